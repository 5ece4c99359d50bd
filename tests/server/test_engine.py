"""Requests drawn together give what each gives alone."""

import json

import pytest
import torch
from fakes import settings
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from living import save_model
from pipelines import PIPELINES, dit, request

import dite
from dite.errors import NonFiniteOutput
from dite.sampling import SampleSettings, sample
from dite.server.describe import card, warm_up
from dite.server.engine import Engine, Failed, Finished, Stepped
from dite.server.problems import Problem
from dite.server.protocol import read_request
from dite.server.rank import Rank


def drawn(engine, requests, every=1):
    """Start the requests `every` steps apart, and step until all have ended; name → its last event, and all events."""
    events, waiting, turn = [], dict(requests), 0
    while waiting or engine.names:
        if waiting and turn % every == 0:
            name = next(iter(waiting))
            events += engine.start(name, waiting.pop(name))
        events += engine.step()
        turn += 1
        assert turn < 200
    return {event.name: event for event in events if not isinstance(event, Stepped)}, events


def conditions(family):
    return [1, 2, 3] if family == "dit" else ["a ship", "a cat", "two dogs"]


def mixed(family):
    """Three requests with other steps, guidance, seeds and counts."""
    a, b, c = conditions(family)
    return {"a": request(a, steps=3, seed=7), "b": request(b, steps=5, guidance=1.0, n=2), "c": request(c, steps=2, guidance=4.0, seed=9)}


@pytest.mark.parametrize("family", PIPELINES)
def test_requests_of_other_steps_guidance_and_start_share_forwards_and_equal_themselves_alone(family):
    pipe, requests = PIPELINES[family](), mixed(family)
    rows, engine = [], Engine(pipe)
    inner = engine._forward
    engine._forward = lambda **arguments: rows.append(len(arguments["hidden_states"])) or inner(**arguments)
    together, _ = drawn(engine, requests)
    engine.close()
    calls = len(rows)
    for name, one in requests.items():
        alone, _ = drawn(engine := Engine(pipe), {name: one})
        engine.close()
        assert (together[name].images.int() - alone[name].images.int()).abs().max() <= 1  # a step of 255: float32 rounds otherwise in other batches
    assert calls < 3 + 5 + 2 and max(rows) > 2


@pytest.mark.parametrize("family", PIPELINES)
def test_a_fixed_micro_batch_makes_pictures_the_same_bit_for_bit(family):
    pipe, requests = PIPELINES[family](), mixed(family)
    together, _ = drawn(engine := Engine(pipe, micro_batch=3), requests)
    engine.close()
    for name, one in requests.items():
        alone, _ = drawn(engine := Engine(pipe, micro_batch=3), {name: one})
        engine.close()
        assert torch.equal(together[name].images, alone[name].images)


def test_the_pictures_are_those_of_sampling():
    pipe = dit()
    ours, _ = drawn(engine := Engine(pipe, micro_batch=4), {"a": request(3, n=2, seed=5, steps=6)})
    engine.close()
    theirs = [one.image for one in sample(pipe, [3, 3], [5, 6], SampleSettings(6, 2.0, 2))]
    assert torch.equal(ours["a"].images, torch.stack(theirs))


def test_the_pictures_of_a_quantized_model_are_those_of_sampling():
    pipe = dit()
    dite.quantize(pipe, "w8a8", effort="fast")
    assert "8" in card(pipe).backend
    ours, _ = drawn(engine := Engine(pipe, micro_batch=4), {"a": request(3, n=2, seed=5, steps=6), "b": request(1, steps=4)})
    engine.close()
    theirs = [one.image for one in sample(pipe, [3, 3], [5, 6], SampleSettings(6, 2.0, 2))]
    assert torch.equal(ours["a"].images, torch.stack(theirs))


@pytest.mark.parametrize("family, least, side_px", [("dit", 1, None), ("pixart", 2, None), ("sd3", 1, 128), ("flux", 1, None)])
def test_the_card_says_which_steps_and_sides_a_model_can_draw(family, least, side_px):
    engine = Engine(PIPELINES[family]())
    found = warm_up(engine, card(engine.pipe), settings())
    engine.close()
    assert (found.least_steps, found.most_side_px, found.joins) == (least, side_px, True) and 0 < found.step_s < 10


@pytest.fixture(scope="module", params=["pixart", "sd3"])
def fuzzed(request):
    engine = Engine(PIPELINES[request.param]())
    yield engine, warm_up(engine, card(engine.pipe), settings())
    engine.close()


@examples(max_examples=40, deadline=None)
@given(
    steps=st.integers(-1, 4),
    sides=st.tuples(st.integers(-1, 20), st.integers(-1, 20)),
    n=st.integers(0, 3),
    guidance=st.sampled_from([-1, 0, 0.5, 1, 1.5, 100, 101]),
    off=st.sampled_from([0, 0, 0, 1]),
)
def test_whatever_is_not_refused_is_drawn(fuzzed, steps, sides, n, guidance, off):
    engine, known = fuzzed
    size = "x".join(str(side * known.multiple_px + off) for side in sides)
    document = {"prompt": "a ship", "num_inference_steps": steps, "size": size, "n": n, "guidance_scale": guidance, "seed": 1}
    try:
        asked = read_request(document, known, settings(limits={"images": 2, "steps": 3}))
    except Problem as problem:
        assert problem.status == 400
        return
    ends, _ = drawn(engine, {"a": asked.request})
    assert isinstance(ends["a"], Finished) or isinstance(ends["a"].error, NonFiniteOutput), ends["a"].error


def test_a_model_whose_joined_calls_differ_says_so_and_draws_one_after_another(capsys):
    engine = Engine(dit())
    inner = engine._forward
    engine._forward = lambda **arguments: inner(**arguments | {"timestep": torch.full_like(arguments["timestep"], arguments["timestep"][0])})
    found = warm_up(engine, card(engine.pipe), settings())
    engine.close()
    assert not engine.joins and not found.joins and '"requests_not_joined"' in capsys.readouterr().err


@pytest.fixture
def _grad_mode():
    """Put back what a rank switches off."""
    before = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(before)


@pytest.mark.usefixtures("_grad_mode")
def test_no_request_decodes_with_gradients_whatever_was_begun_before_it(tmp_path):
    torch.set_grad_enabled(True)
    rank = Rank(None, settings(model=save_model(tmp_path / "tiny"), batching="none"), 0)  # else the warm-up's own leak would hide it
    rank.load()
    decode, seen = rank.engine.pipe.vae.decode, []
    rank.engine.pipe.vae.decode = lambda *given, **named: seen.append(torch.is_grad_enabled()) or decode(*given, **named)
    for steps in (2, 4, 6):  # the first one to end switches them on again for the others
        rank.engine.start(str(steps), request(1, steps=steps))
    while rank.engine.names:
        rank.engine.step()
    rank.engine.close()
    assert seen == [False] * 3


def test_what_failed_is_logged_by_its_place_and_not_by_its_words(capsys):
    engine = Engine(dit())
    rank = Rank(None, settings(), 0)
    rank.engine = engine

    def broken(**arguments):
        raise ValueError("a secret prompt")

    engine._forward = broken
    ends, _ = drawn(engine, {"bad": request(2)})
    engine.close()
    assert rank._told(ends["bad"])["error"]["what"] == "a secret prompt"
    (line,) = [json.loads(one) for one in capsys.readouterr().err.splitlines() if "draw_failed" in one]
    assert (line["job"], line["error"], "secret" in str(line)) == ("bad", "ValueError", False) and "test_engine.py" in line["where"][-1]


def test_a_cancelled_request_leaves_the_others_as_they_were():
    pipe = dit()
    engine = Engine(pipe, micro_batch=2)
    events = engine.start("gone", request(1, steps=50)) + engine.start("kept", request(2))
    events += engine.step()
    engine.cancel("gone")
    assert engine.names == ["kept"]
    while engine.names:
        events += engine.step()
    engine.close()
    alone, _ = drawn(engine := Engine(pipe, micro_batch=2), {"kept": request(2)})
    engine.close()
    assert torch.equal(events[-1].images, alone["kept"].images) and [event.name for event in events if isinstance(event, Finished)] == ["kept"]


def test_a_request_whose_output_is_not_finite_fails_alone():
    pipe = dit()
    engine = Engine(pipe)
    inner = engine._forward

    def poisoned(**arguments):
        result = inner(**arguments)
        output = result[0].clone()
        output[arguments["class_labels"] == 7] = float("nan")
        return type(result)(sample=output)

    engine._forward = poisoned
    ends, _ = drawn(engine, {"bad": request(7), "good": request(2)})
    engine.close()
    assert isinstance(ends["bad"], Failed) and isinstance(ends["bad"].error, NonFiniteOutput) and isinstance(ends["good"], Finished)


def test_a_request_that_does_not_fit_into_memory_fails_alone():
    engine = Engine(dit())
    inner = engine._forward

    def small(**arguments):
        if len(arguments["hidden_states"]) > 4:
            raise MemoryError("not enough memory")
        return inner(**arguments)

    engine._forward = small
    ends, _ = drawn(engine, {"large": request(1, n=3), "small": request(2)}, every=1)
    engine.close()
    assert isinstance(ends["large"].error, MemoryError) and isinstance(ends["small"], Finished)


def test_progress_counts_every_step_and_shows_latents_where_asked():
    _, events = drawn(engine := Engine(dit()), {"a": request(1, steps=3), "b": request(2, steps=2, partial_images=1)})
    engine.close()
    steps = [(event.name, event.step, event.preview is not None) for event in events if isinstance(event, Stepped)]
    assert sorted(steps) == [("a", 1, False), ("a", 2, False), ("a", 3, False), ("b", 1, True), ("b", 2, True)]


def test_closing_leaves_the_pipeline_as_it_was():
    pipe = dit()
    before = dict(vars(pipe.transformer)), dict(vars(pipe.scheduler))
    engine = Engine(pipe)
    engine.start("a", request(1))
    engine.close()
    assert (dict(vars(pipe.transformer)), dict(vars(pipe.scheduler))) == before and engine.names == []


def test_calls_made_together_are_compared_with_calls_made_alone():
    engine = Engine(dit())
    assert engine.joined_equals_alone(request(1), request(2, steps=7)) < 1e-5 and engine.names == []
    inner = engine._forward
    engine._forward = lambda **arguments: inner(**arguments | {"timestep": torch.full_like(arguments["timestep"], arguments["timestep"][0])})
    assert engine.joined_equals_alone(request(1), request(2, steps=7)) > 1e-2
    engine.close()
