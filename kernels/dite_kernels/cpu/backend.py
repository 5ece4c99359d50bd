"""The `cpu` backend: integers in C, with everything around them (smoothing, rotation, quantization, scales, bias, rounding) in the same call."""

import ctypes

import torch
import torch.nn.functional as F

from dite_kernels import dense
from dite_kernels.backend import Backend
from dite_kernels.cpu import build
from dite_kernels.cpu.packed import BFLOAT16, FLOAT32, CCall, Packed, address, pack, unpack
from dite_kernels.reference import MAX_GROUP

TYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
FEW_TOKENS = 64  # up to here a weight-only layer is computed from its codes, faster than from an unpacked weight that is not kept


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
        check_not_traced()
        if spec.activation_bits is None:
            y = self._weight_only(x_MK if transform is None else transform(x_MK), prepared, bias, spec)
            return F.gelu(y, approximate="tanh") if gelu else y
        x = plain(x_MK, x_MK.dtype if x_MK.dtype in TYPES else torch.float32)
        y = torch.empty(len(x), spec.out_features, dtype=x.dtype, device="cpu")
        bias = None if bias is None else plain(bias, torch.float32)
        smooth, sign, block = (None, None, None) if transform is None else (transform.smooth, transform.sign, transform.block)
        vectors = (address(part, torch.float32) for part in (bias, smooth, sign if block else None))
        call = CCall(len(x), address(x, x.dtype), address(y, x.dtype), *vectors, block or 0)
        call.x_type = call.y_type = TYPES[x.dtype]
        call.levels, call.per_group, call.symmetric = 2**spec.activation_bits - 1, spec.activation_per_group, spec.activation_symmetric
        call.gelu, call.threads = gelu, torch.get_num_threads()
        if len(x) and build.library().dite_linear(ctypes.byref(prepared.weight), ctypes.byref(call)):
            raise MemoryError(f"no memory for the codes of {len(x)} tokens of {spec.in_features} columns")
        return y.to(x_MK.dtype)

    def _weight_only(self, x_MK: torch.Tensor, prepared: Packed, bias: torch.Tensor | None, spec) -> torch.Tensor:
        if len(x_MK) > FEW_TOKENS:
            return dense.linear(x_MK, self.restore(prepared, spec).dequantize(spec, x_MK.dtype), bias, spec)
        x, bias = plain(x_MK, torch.float32), None if bias is None else plain(bias, torch.float32)
        y = torch.empty(len(x), spec.out_features, dtype=torch.float32, device="cpu")
        at = [address(tensor, torch.float32) for tensor in (x, y, bias)]
        build.library().dite_weight_only(ctypes.byref(prepared.weight), *at, ctypes.c_int64(len(x)), torch.get_num_threads())
        return y.to(x_MK.dtype)


def plain(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Its numbers in one piece, and no graph."""
    return tensor.detach().to(dtype).resolve_neg().contiguous()


def check_not_traced() -> None:
    """Raise RuntimeError under torch.jit.trace, which would record an empty tensor: it does not see calls into C."""
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace can't record the CPU kernels; set_backend(model, 'expanded') before tracing")
