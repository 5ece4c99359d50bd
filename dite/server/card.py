"""What the HTTP process knows of the model, told by rank 0 when it is ready."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dite.server.job import ImageRequest


@dataclass(frozen=True)
class ModelCard:
    """`classes`: name → id of class-conditional models (several names may mean one id), empty for text models. Of some models `default_size_px`
    (width, height) is the only size; others take multiples of `multiple_px`, sides of at most `most_side_px`."""

    pipeline: str
    reads_text: bool
    classes: dict[str, int] = field(default_factory=dict)
    class_ids: list[int] = field(default_factory=list)
    default_size_px: tuple[int, int] = (0, 0)
    fixed_size: bool = True
    multiple_px: int = 1
    most_side_px: int | None = None
    least_steps: int = 1
    most_steps: int = 1000
    takes_guidance: bool = True
    takes_negative_prompt: bool = False
    parameters: int = 0
    backend: str = ""
    exchange: dict[str, Any] | None = None  # ranks, mode, codec; None on one device
    step_s: float | None = None  # of one picture of the default size with guidance, as the warm-up took it
    joins: bool = True  # whether requests share forwards

    def seconds(self, request: ImageRequest) -> float:
        """At most about how long a step of a request takes by itself, with guidance; 0 where nobody knows.

        n pictures take n times as long as one, or less. Matrix products grow with the pixels, attention with their square: the power 1.5 is between
        them, and at 16 times the pixels of a DiT-XL a little too much.
        """
        if self.step_s is None:
            return 0.0
        pixels = request.width_px * request.height_px / (self.default_size_px[0] * self.default_size_px[1])
        return self.step_s * request.n * pixels ** (1.5 if pixels > 1 else 1.0)

    def to_json(self) -> dict[str, Any]:
        """For a frame, and for `/v1/models`."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ModelCard:
        """The inverse of `to_json`."""
        return cls(**document | {"default_size_px": tuple(document["default_size_px"])})
