"""Calibration: real calls of the denoiser, spread over time, the same for the same seed; and second moments of what each linear is given."""

import pytest
import torch

from dite.errors import QuantizationError, UsageError
from dite.ptq.calibrate import Calls, observe, record
from dite.recipe import Calibration

SHORT = Calibration(num_samples=16, num_steps=6, num_calls=8, guidance=2.0)


@pytest.fixture
def calls(tiny_pipeline):
    return record(tiny_pipeline, {"": tiny_pipeline.transformer}, [index % 10 for index in range(16)], SHORT)[""]


def timesteps(calls):
    return [int(call["timestep"].flatten()[0]) for call in (*calls.calibration, *calls.held_out)]


def test_calls_are_spread_over_the_trajectories_steps(calls):
    assert len(calls.held_out) == len(timesteps(calls)) // 4 > 0
    assert len(set(timesteps(calls))) == 6  # every step of the sampler, over the micro-batches


@pytest.mark.parametrize("num_calls", [4, 6, 8])
def test_whatever_the_stride_neighbouring_micro_batches_meet_other_steps(tiny_pipeline, num_calls):
    settings = Calibration(num_samples=32, num_steps=6, num_calls=num_calls, guidance=1.0)
    calls = record(tiny_pipeline, {"": tiny_pipeline.transformer}, [0] * 32, settings)[""]
    assert num_calls - 4 <= len(timesteps(calls)) <= num_calls + 4 and len(set(timesteps(calls))) >= min(num_calls, 6) - 1


def test_calibration_shares_no_noise_with_an_evaluation(calls):
    from dite.ptq.calibrate import SEED_OFFSET
    from dite.sampling import sample_seed

    evaluated = {sample_seed(seed, index) for seed in range(8) for index in range(10_000)}
    assert not evaluated & {sample_seed(SEED_OFFSET + seed, index) for seed in range(8) for index in range(4096)}


def test_a_calibration_that_holds_nothing_out_is_refused(tiny_pipeline):
    settings = Calibration(num_samples=8, num_steps=3, num_calls=8)
    with pytest.raises(UsageError, match="too short"):
        record(tiny_pipeline, {"": tiny_pipeline.transformer}, [0] * 8, settings)


def test_calls_hold_conditional_and_null_labels(calls):
    labels = torch.cat([call["class_labels"] for call in calls.calibration])
    assert (labels == 1000).sum() == (labels != 1000).sum()


def test_the_same_seed_records_the_same_calls(tiny_pipeline, calls):
    again = record(tiny_pipeline, {"": tiny_pipeline.transformer}, [index % 10 for index in range(16)], SHORT)[""]
    assert all(torch.equal(a["hidden_states"], b["hidden_states"]) for a, b in zip(calls.calibration, again.calibration, strict=True))


def test_recording_leaves_no_hook(tiny_pipeline, calls):
    assert not tiny_pipeline.transformer._forward_pre_hooks


def test_moments_are_those_of_the_inputs(tiny_pipeline, calls):
    model, name = tiny_pipeline.transformer, "transformer_blocks.1.ff.net.2"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for call in calls.calibration:
            model(**call)
    handle.remove()
    rows = torch.cat(seen)
    found = observe(model, [name], calls)[name]
    assert found.count == len(rows) and torch.allclose(found.moments, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert found.rows[0].shape[1] == rows.shape[1] and sum(map(len, found.rows)) <= 512


def test_layers_with_one_input_have_equal_moments(tiny_pipeline, calls):
    names = [f"transformer_blocks.0.attn1.to_{part}" for part in "qkv"]
    found = observe(tiny_pipeline.transformer, names, calls)
    assert torch.equal(found[names[0]].moments, found[names[2]].moments) and found[names[0]].count == found[names[1]].count


def test_a_module_called_twice_in_a_forward_is_observed_twice():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x, extra):
            return self.linear(self.linear(x["deep"][0])) + self.other(x["deep"][0]) + extra

    x = torch.randn(5, 4)
    model = Twice()
    found = observe(model, ["linear", "other"], Calls([{"x": {"deep": [x]}, "extra": 1.0}], []))
    assert found["linear"].count == 10 and found["other"].count == 5
    assert torch.allclose(found["other"].moments, x.T @ x, atol=1e-5)


def test_inputs_that_are_not_finite_name_the_layer(tiny_pipeline, calls):
    broken = [call | {"hidden_states": torch.full_like(call["hidden_states"], torch.nan)} for call in calls.calibration]
    with pytest.raises(QuantizationError, match=r"transformer_blocks\.0\.attn1\.to_q"):
        observe(tiny_pipeline.transformer, ["transformer_blocks.0.attn1.to_q"], Calls(broken, []))


def test_a_step_is_held_out_whole_where_a_pipeline_calls_twice_a_step(tiny_pipeline):
    from dite.ptq.calibrate import _Recorder

    recorder = _Recorder(tiny_pipeline.transformer, num_steps=8, stride=1)
    for recorder.steps_done in range(8):
        for condition in (1, 1000):
            recorder.keep(tiny_pipeline.transformer, (), {"hidden_states": torch.zeros(1), "class_labels": torch.tensor([condition])})
    calls = recorder.calls()
    assert [int(call["class_labels"]) for call in calls.held_out] == [1, 1000] * 2 and len(calls.calibration) == 12


@pytest.mark.parametrize(("samples", "steps", "calls"), [(64, 50, 4), (64, 50, 7), (256, 50, 16), (64, 20, 6), (64, 50, 64), (8, 4, 8)])
def test_about_as_many_calls_are_kept_as_were_asked_for(tiny_pipeline, samples, steps, calls):
    from dite.ptq.calibrate import _Recorder

    batches = samples // 8
    recorder = _Recorder(tiny_pipeline.transformer, steps, stride=-(-batches * steps // calls))
    for recorder.steps_done in range(batches * steps):
        recorder.keep(tiny_pipeline.transformer, (), {"hidden_states": torch.zeros(1)})
    assert 0.7 * min(calls, batches * steps) <= len(recorder.kept) <= calls + 2
