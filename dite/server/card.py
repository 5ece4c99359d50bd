"""What the HTTP process knows of the model, told by rank 0 when it is ready."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelCard:
    """`classes`: name → id of class-conditional models (several names may mean one id), empty for text models. `sizes_px`: the one size (width,
    height) of models that have only one; others take multiples of `multiple_px`."""

    pipeline: str
    reads_text: bool
    classes: dict[str, int] = field(default_factory=dict)
    class_ids: list[int] = field(default_factory=list)
    default_size_px: tuple[int, int] = (0, 0)
    fixed_size: bool = True
    multiple_px: int = 1
    most_steps: int = 1000
    takes_guidance: bool = True
    takes_negative_prompt: bool = False
    parameters: int = 0
    backend: str = ""
    exchange: dict[str, Any] | None = None  # ranks, mode, codec; None on one device

    def to_json(self) -> dict[str, Any]:
        """For a frame, and for `/v1/models`."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ModelCard:
        """The inverse of `to_json`."""
        return cls(**document | {"default_size_px": tuple(document["default_size_px"])})
