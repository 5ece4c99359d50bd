"""A quantized weight as the kernels see it: three packed tensors and the numbers that explain them."""

from dataclasses import dataclass

import torch

from dite_kernels import affine, packing


@dataclass(frozen=True)
class LinearSpec:
    """The shape and the arithmetic of a quantized linear. `activation_bits` None: weight-only."""

    in_features: int
    out_features: int
    weight_bits: int
    group_size: int | None
    weight_symmetric: bool = False
    activation_bits: int | None = None
    activation_per_group: bool = False
    activation_symmetric: bool = False

    @property
    def groups(self) -> int:
        return affine.group_count(self.in_features, self.group_size)

    @property
    def activation_group_size(self) -> int | None:
        return self.group_size if self.activation_per_group else None


@dataclass(frozen=True)
class QuantTensor:
    """qdata uint8 [N, packed K]; scale [N, G] fp16 or fp32; zero_point uint8 [N, packed G], or None when symmetric."""

    qdata: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def codes(self, spec: LinearSpec) -> torch.Tensor:
        """uint8 [N, K]."""
        return packing.unpack(self.qdata, spec.weight_bits, spec.in_features)

    def zeros(self, spec: LinearSpec) -> torch.Tensor:
        """uint8 [N, G]."""
        if self.zero_point is None:
            return torch.full(self.scale.shape, 2 ** (spec.weight_bits - 1), dtype=torch.uint8, device=self.scale.device)
        return packing.unpack(self.zero_point, spec.weight_bits, spec.groups)

    def validate(self, spec: LinearSpec) -> None:
        """Raise ValueError unless sizes agree exactly, scales are finite and > 0, and zero points are inside their range."""
        shapes = {
            "qdata": (self.qdata, (spec.out_features, packing.packed_columns(spec.in_features, spec.weight_bits))),
            "scale": (self.scale, (spec.out_features, spec.groups)),
        }
        if not spec.weight_symmetric:
            shapes["zero_point"] = (self.zero_point, (spec.out_features, packing.packed_columns(spec.groups, spec.weight_bits)))
        for name, (tensor, shape) in shapes.items():
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape:
                raise ValueError(f"{name} is {found}; {spec.weight_bits} bits in groups of {spec.group_size} need {shape}")
            if name != "scale" and tensor.dtype != torch.uint8:
                raise ValueError(f"{name} is {tensor.dtype}; codes are torch.uint8")
        if self.scale.dtype not in (torch.float16, torch.float32):
            raise ValueError(f"scale is {self.scale.dtype}; use torch.float16 or torch.float32")
        for name, packed, columns in (("qdata", self.qdata, spec.in_features), ("zero_point", self.zero_point, spec.groups)):
            if packed is not None and packing.has_padding_set(packed, spec.weight_bits, columns):
                raise ValueError(f"{name} has codes behind the last of its {columns} columns; rows are padded with 0")
        if not (torch.isfinite(self.scale) & (self.scale > 0)).all():
            raise ValueError("scale holds values that are not finite and > 0")

    def dequantize(self, spec: LinearSpec, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [N, K] that the codes stand for."""
        return affine.dequantize(self.codes(spec), self.scale, self.zeros(spec), spec.group_size, dtype)


def quantize_weight(weight_NK: torch.Tensor, spec: LinearSpec) -> QuantTensor:
    """Round `weight_NK` to nearest, with fp16 scales where they fit, and pack it."""
    codes, scale, zero = affine.quantize(weight_NK, spec.weight_bits, spec.group_size, spec.weight_symmetric, half_scales=True)
    return QuantTensor(packing.pack(codes, spec.weight_bits), scale, None if spec.weight_symmetric else packing.pack(zero, spec.weight_bits))
