"""Runs `triton_kernels/` in Triton's interpreter where no card does it for real."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).with_name("triton_kernels")


def test_kernels_agree_with_their_references_in_the_interpreter():
    """In a process of its own: the interpreter takes the compiler's place when triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed; pip install 'dite[triton]'")
    if torch.cuda.is_available():
        pytest.skip("the card runs these tests for real, in this process")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=FOLDER.parents[2], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0 and re.search(r"\d\d+ passed", done.stdout), (done.stdout + done.stderr)[-6000:]
