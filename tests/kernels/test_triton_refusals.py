"""When the triton backend refuses, and what it says. What it computes is tested in `triton_kernels/`."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from dite_kernels.quant_tensor import LinearSpec
from dite_kernels.triton_kernels import backend
from dite_kernels.triton_kernels.backend import Triton

BACKEND = Triton("triton", "under test")
CPU, CARD = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """A function that pretends a card of some compute capability, with triton installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend, "version", lambda name: "3.6.0")
    monkeypatch.setattr(torch.version, "hip", None)

    def pretend(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    return pretend


def spec(**changes):
    return LinearSpec(**{"in_features": 64, "out_features": 8, "weight_bits": 4, "group_size": 16, "activation_bits": 8} | changes)


def test_weight_only_layers_are_refused_with_the_reason():
    assert "weight-only" in BACKEND.refusal(spec(activation_bits=None), CARD)


def test_groups_that_could_overflow_are_refused_with_the_limit():
    assert "33025" in BACKEND.refusal(spec(in_features=40000, group_size=None), CARD)


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in BACKEND.refusal(spec(), CPU)


def test_a_cpu_is_refused_unless_kernels_are_interpreted(card, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "NVIDIA card" in BACKEND.refusal(spec(), CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert BACKEND.refusal(spec(), CPU) is None


@pytest.mark.parametrize(("capability", "fits"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), True)])
def test_cards_before_ampere_are_refused(card, capability, fits):
    card(*capability)
    reason = BACKEND.refusal(spec(), CARD)
    assert reason is None if fits else f"{capability[0]}.{capability[1]}" in reason


@pytest.mark.parametrize(("version", "fits"), [("3.5.1", False), ("3.6.0", True), ("3.6.0+git1234", True), ("3.10.0", True), ("4.0.0rc1", True)])
def test_a_triton_that_flushes_small_numbers_to_zero_is_refused(card, monkeypatch, version, fits):
    card(9, 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "version", lambda name: version)
    reason = BACKEND.refusal(spec(), CARD)
    assert reason is None if fits else "3.6 or newer" in reason and version in reason


def test_importing_the_backend_imports_no_triton():
    code = "import sys, dite_kernels.triton_kernels.backend\nassert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
