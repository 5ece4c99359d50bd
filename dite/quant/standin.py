"""What a quantized linear shows as its `weight`: the shape, the dtype and the device of a weight, without any numbers.

Code that asks a linear what its weight looks like gets an answer (PEFT places adapters beside it, diffusers compares shapes); code that would read
or change numbers (fusing an adapter into the weight) gets an error, instead of changing a copy that nobody uses.
"""

import torch

from dite.errors import UnsupportedModel

DETACH = torch.ops.aten.detach.default  # what `.data` is


class WeightStandIn(torch.Tensor):
    """[N, K] of `dtype` on `device`; takes no memory. Every operation on it raises UnsupportedModel."""

    _is_hf_initialized = True  # transformers fills weights that don't say so with random numbers, those of linears that their block initializes too

    @staticmethod
    def __new__(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> "WeightStandIn":
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.data.__set__:
            refuse("assignment to .data")
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return args[0] if func is DETACH else refuse(str(func))

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"WeightStandIn({tuple(self.shape)}, {self.dtype}, {self.device})"


def refuse(operation: str) -> None:
    """Raise UnsupportedModel for an operation on a quantized weight."""
    raise UnsupportedModel(
        f"{operation} wants its numbers, and it holds integer codes",
        "do this to the full-precision model and quantize the result; or leave it out: a plain LoRA adapter works unfused, beside the layer. "
        "`layer.dequantize()` gives the values",
        what="a quantized linear has no weight to compute with",
    )
