"""Kernels against their references: on a card where there is one, else on CPU tensors in Triton's interpreter.

Which of both is settled when triton is imported, for the whole process. So without a card these files are collected only under TRITON_INTERPRET=1,
in a process of their own, which `tests/kernels/test_triton_interpreted.py` starts.
"""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def rounds_bf16() -> bool:
    """Whether a kernel rounds fp32 to bf16; the interpreter cuts the bits off instead."""
    return not INTERPRETED


@pytest.fixture
def same():
    """Whether every tensor of one tuple equals its fellow in another, whatever the device; a NaN equals a NaN."""

    def check(found, expected) -> bool:
        pairs = zip(found, expected, strict=True)
        return all(torch.allclose(a.cpu().double(), b.cpu().double(), rtol=0, atol=0, equal_nan=True) for a, b in pairs)

    return check
