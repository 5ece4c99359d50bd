"""What a time depends on besides the code."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from dite_kernels import processor
from dite_kernels.bench.cases import UnknownCase

FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16", "sve")
VARIABLES = ("ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "DITE_BACKEND", "DITE_CPU_ISA", "TRITON_INTERPRET")


def environment() -> dict[str, Any]:
    """Versions, processor, threads, card, the variables that choose instructions, and how busy the machine was on the whole."""
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cpu": processor.describe(FLAGS),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **{name: os.environ.get(name) for name in VARIABLES},
    }


def chosen_device(name: str) -> torch.device:
    """cpu, cuda or cuda:N, if it is there. Raises UnknownCase."""
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise UnknownCase(f"no device {name!r}; there are cpu, cuda and cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnknownCase(f"no device {name!r}; torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
