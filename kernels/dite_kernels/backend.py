"""What a backend is: one way to compute y = x·Wᵀ + b from a packed weight."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from dite_kernels.hadamard import rotate
from dite_kernels.quant_tensor import LinearSpec, QuantTensor


@dataclass(frozen=True)
class InputTransform:
    """What is done to inputs before they are quantized: times `smooth` [K]; then, with a `block`, times `sign` [K] of ±1 and rotated in blocks of so
    many columns. Each may be None. Tensors are fp32."""

    smooth: torch.Tensor | None = None
    sign: torch.Tensor | None = None
    block: int | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] transformed, in its own dtype."""
        x = x if self.smooth is None else x * self.smooth.to(x.device, x.dtype)
        return x if self.block is None else rotate(x, self.block, self.sign)


@dataclass(frozen=True)
class Backend(ABC):
    """`holds_codes`: `prepare`'s result holds all that the weight did, so that its own codes can be dropped; `restore` gives them back.
    `transforms`: `linear` takes an InputTransform, and does it on the way.
    `gelus`: `linear` can put its results through the tanh-approximated GELU."""

    name: str
    summary: str
    holds_codes = False
    transforms = False
    gelus = False

    def unavailable(self) -> str | None:
        """Why this backend can't run on this machine at all, or None."""
        return None

    def describe(self) -> str:
        """What it is, on this machine."""
        return self.summary

    def refusal(self, spec: LinearSpec, device: torch.device) -> str | None:
        """Why this backend can't run `spec` on `device`, or None."""
        return None

    def prepare(self, weight: QuantTensor, spec: LinearSpec, dtype: torch.dtype) -> Any:
        """Whatever `linear` wants kept between calls."""
        return weight

    def restore(self, prepared: Any, spec: LinearSpec) -> QuantTensor:
        """The weight that was prepared, bit for bit; only where `holds_codes`."""
        return prepared

    @abstractmethod
    def linear(
        self,
        x_MK: torch.Tensor,
        prepared: Any,
        bias: torch.Tensor | None,
        spec: LinearSpec,
        transform: InputTransform | None = None,
        gelu: bool = False,
    ) -> torch.Tensor:
        """y [M, N] in x's dtype. `transform` only where `transforms`, `gelu` only where `gelus`."""
