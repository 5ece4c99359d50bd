"""The `cpu` backend: integers in C, with everything around them (smoothing, rotation, quantization, scales, bias, rounding) in the same call."""

import ctypes

import torch
import torch.nn.functional as F

from dite_kernels import dense
from dite_kernels.backend import Backend
from dite_kernels.cpu import build
from dite_kernels.cpu.packed import BFLOAT16, FLOAT32, CCall, Packed, pack, unpack
from dite_kernels.reference import MAX_GROUP

TYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
FEW_TOKENS = 32  # up to here a weight-only layer is computed from its codes; beyond, unpacking it for one matrix product is faster


class Cpu(Backend):
    """AMX, AVX512-VNNI, AVX2 or plain C, as build.levels says."""

    holds_codes = True
    transforms = True
    gelus = True

    def unavailable(self):
        try:
            build.library()
        except build.Unavailable as error:
            return str(error)
        return None

    def describe(self):
        return f"{self.summary}; compiled here for {build.library().level}"

    def refusal(self, spec, device):
        if device.type != "cpu":
            return f"it runs on CPUs, the layer is on {device.type}"
        if min(spec.group_size or spec.in_features, spec.in_features) > MAX_GROUP:
            return f"groups of more than {MAX_GROUP} columns could overflow its int32 sums"
        return self.unavailable()

    def prepare(self, weight, spec, dtype):
        return pack(build.library(), weight, spec)

    def restore(self, prepared, spec):
        return unpack(build.library(), prepared, spec)

    @torch.compiler.disable
    def linear(self, x_MK, prepared, bias, spec, transform=None, gelu=False):
        if spec.activation_bits is None:
            y = self._weight_only(x_MK if transform is None else transform(x_MK), prepared, bias, spec)
            return F.gelu(y, approximate="tanh") if gelu else y
        x = (x_MK.detach() if x_MK.dtype in TYPES else x_MK.detach().float()).contiguous()
        y = torch.empty(len(x), spec.out_features, dtype=x.dtype)
        bias = None if bias is None else bias.detach().float()
        smooth, sign, block = (None, None, None) if transform is None else (transform.smooth, transform.sign, transform.block)
        call = CCall(
            len(x),
            x.data_ptr(),
            y.data_ptr(),
            *(None if part is None else part.data_ptr() for part in (bias, smooth, sign if block else None)),
            block or 0,
        )
        call.x_type = call.y_type = TYPES[x.dtype]
        call.levels, call.per_group, call.symmetric = 2**spec.activation_bits - 1, spec.activation_per_group, spec.activation_symmetric
        call.gelu, call.threads = gelu, torch.get_num_threads()
        if len(x) and build.library().dite_linear(ctypes.byref(prepared.weight), ctypes.byref(call)):
            raise MemoryError(f"no memory for the codes of {len(x)} tokens of {spec.in_features} columns")
        return y.to(x_MK.dtype)

    def _weight_only(self, x_MK: torch.Tensor, prepared: Packed, bias: torch.Tensor | None, spec) -> torch.Tensor:
        if len(x_MK) > FEW_TOKENS:
            return dense.linear(x_MK, self.restore(prepared, spec).dequantize(spec, x_MK.dtype), bias, spec)
        x, bias = x_MK.detach().float().contiguous(), None if bias is None else bias.detach().float()
        y = torch.empty(len(x), spec.out_features)
        at = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y, bias)]
        build.library().dite_weight_only(ctypes.byref(prepared.weight), *at, ctypes.c_int64(len(x)), torch.get_num_threads())
        return y.to(x_MK.dtype)
