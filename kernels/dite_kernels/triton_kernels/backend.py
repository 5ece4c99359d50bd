"""The backend of NVIDIA cards: activations quantized by one kernel, multiplied as integers by a second (`dite_kernels.triton_kernels`)."""

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version

import torch

from dite_kernels import affine, dense, reference
from dite_kernels.backend import Backend
from dite_kernels.triton_kernels import interpreted

LEAST_CAPABILITY = (8, 0)
LEAST_TRITON = (3, 6)
# With fewer tokens, unpacking the weight and one float product may be quicker. A guess: it awaits measurement on a card.
BREAK_EVEN_TOKENS = 64


def missing_package() -> str | None:
    """What is wrong with the triton installed here; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'dite[triton]'"
    try:
        found = version("triton")
    except PackageNotFoundError:  # nightly builds are called otherwise
        return None
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < LEAST_TRITON and not interpreted():
        why = "before 3.6 it divides with numbers below 1.2e-38 taken as 0, which are other codes than the reference's"
        return f"it needs triton 3.6 or newer, and {found} is installed: {why}; torch 2.10 brings 3.6"
    return None


def missing(device: torch.device) -> str | None:
    """What kernels of this package lack to run on `device`; None if nothing."""
    if (problem := missing_package()) is not None:
        return problem
    if device.type == "cpu":
        return None if interpreted() else "it needs an NVIDIA card (TRITON_INTERPRET=1 runs it on a CPU, for tests)"
    if device.type != "cuda" or torch.version.hip:
        return f"it needs an NVIDIA card, and this device is {device.type}{' (ROCm)' if torch.version.hip else ''}"
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        return f"it needs compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} (Ampere) or newer; this card has {found[0]}.{found[1]}"
    return None


class Triton(Backend):
    """Integer products in groups on NVIDIA's matrix units, of 4-bit weights too."""

    def unavailable(self):
        return missing_package() or (None if interpreted() or torch.cuda.is_available() else "torch finds no NVIDIA card")

    def refusal(self, spec, device):
        if spec.activation_bits is None:
            return "float activations have no integer product, and this layer is weight-only"
        width = affine.group_width(spec.in_features, spec.group_size)
        if width > reference.MAX_GROUP:
            return f"a group of {width} columns can overflow int32; the most is {reference.MAX_GROUP}"
        return missing(device)

    def prepare(self, weight, spec, dtype):
        from dite_kernels.triton_kernels.weight import prepare

        return prepare(weight, spec)

    def linear(self, x_MK, prepared, bias, spec, transform=None, gelu=False):
        from dite_kernels.triton_kernels import product
        from dite_kernels.triton_kernels.quantize import CodeFormat, quantize

        if x_MK.shape[0] < BREAK_EVEN_TOKENS:
            return dense.linear(x_MK, prepared.dequantize(spec, x_MK.dtype), bias, spec)
        x = quantize(x_MK, CodeFormat.for_product(spec))
        return product.linear(x, prepared, bias, spec, x_MK.dtype)
