"""Quantizing what can't be quantized, or where there is no room: it stops, says at which layer and timestep, and what was done is kept."""

import hashlib
import subprocess
import sys

import pytest
import torch

import dite
from dite.errors import QuantizationError
from dite.ptq.journal import holds_work

FEW = ["calibration.num_samples=8", "calibration.num_steps=4", "calibration.num_calls=8"]
LAYER = "transformer_blocks.1.ff.net.0.proj"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [f"{LAYER}.weight", f"{LAYER}.bias", "proj_out_2.weight", "pos_embed.proj.bias"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(tiny_pipeline, name, value):
    with torch.no_grad():
        tiny_pipeline.transformer.get_parameter(name).view(-1)[3] = value
    with pytest.raises(QuantizationError, match=name.removesuffix(".weight")):
        dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    assert type(tiny_pipeline.transformer.get_submodule(LAYER)) is torch.nn.Linear


def test_an_infinity_met_in_calibration_is_told_with_layer_and_timestep(tiny_pipeline):
    with torch.no_grad():
        tiny_pipeline.transformer.get_submodule(LAYER).weight.fill_(3e38)  # finite, and no product with it is
    with pytest.raises(QuantizationError, match=rf"layer {LAYER} gave NaN or inf\nat timestep 7\d\d of calibration"):
        dite.quantize(tiny_pipeline, "w4a8", overrides=FEW)


def test_memory_that_runs_out_is_a_clear_error_and_the_journal_goes_on(tiny_pipeline, twin, make_tiny_pipeline, tmp_path, monkeypatch):
    from dite.ptq import rounding

    whole, calls = rounding.round_layer, []

    def scarce(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return whole(*arguments)

    monkeypatch.setattr(rounding, "round_layer", scarce)
    with pytest.raises(QuantizationError, match=r"(?s)memory ran out.*99 bytes.*--resume"):
        dite.quantize(tiny_pipeline, "w4a8", overrides=FEW, journal=tmp_path / "journal")
    assert holds_work(tmp_path / "journal")
    resumed = make_tiny_pipeline()
    dite.quantize(resumed, "w4a8", overrides=FEW, journal=tmp_path / "journal")
    dite.quantize(twin, "w4a8", overrides=FEW)
    ours, theirs = resumed.transformer.state_dict(), twin.transformer.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory through /proc")
def test_a_limit_on_memory_ends_in_the_same_error(tiny_pipeline):
    from tests.checkpoint.hostile.watch import memory_limit

    tiny_pipeline.transformer.transformer_blocks[0].attn1.to_q.register_forward_pre_hook(lambda *_: torch.ones(2**30))
    with memory_limit(2**30), pytest.raises(QuantizationError, match="memory ran out"):
        dite.quantize(tiny_pipeline, "w4a8", overrides=FEW)


SCRIPT = """
import sys, hashlib, torch
torch.set_num_threads(int(sys.argv[1]))
import dite
from dite.models.load import load_pipeline
pipe = load_pipeline(sys.argv[2])
dite.quantize(pipe, "w4a8", overrides=sys.argv[3:])
digest = hashlib.sha256()
for name, tensor in sorted(pipe.transformer.state_dict().items()):
    digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("overrides", [["effort=fast"], FEW], ids=["rounded", "calibrated"])
def test_the_same_recipe_and_seed_give_the_same_bytes_at_one_and_two_threads(tiny_pipeline, tmp_path, overrides):
    tiny_pipeline.save_pretrained(tmp_path / "m")
    digests = set()
    for threads in ("1", "2"):
        command = [sys.executable, "-c", SCRIPT, threads, str(tmp_path / "m"), *overrides]
        done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1 and len(next(iter(digests))) == hashlib.sha256().digest_size * 2
