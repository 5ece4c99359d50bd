"""From a body to what is to be drawn, and from pictures to the answer."""

import base64
import json
import re
from dataclasses import replace

import pytest
from fakes import CARD, TEXT_CARD, settings

from dite.server.job import ImageRequest, Partial, Pictures, Progress
from dite.server.problems import Problem
from dite.server.protocol import Answer, parse, progress_event, read_request, shown

REQUEST = ImageRequest(condition=3, n=2, seed=2**32 - 1, steps=20, guidance=2.0, width_px=32, height_px=32, output_format="webp")
DONE = Pictures([b"one", b"two"], queue_s=0.5, run_s=1.25, attempts=2, draw_s=1.0)


def read(document, card=CARD, **changes):
    return read_request(document, card, settings(**changes), new_seed=lambda: 1234)


def refused(document, card=CARD, **changes):
    with pytest.raises(Problem) as caught:
        read(document, card, **changes)
    return caught.value


def test_what_a_request_leaves_open_is_filled_in():
    assert read({"prompt": "cat"}, steps=30, guidance=1.5).request == ImageRequest(3, 1, 1234, 30, 1.5, 32, 32)


def test_every_field_arrives():
    document = {"prompt": "a ship", "model": "tiny", "n": 2, "size": "64x32", "response_format": "b64_json", "output_format": "jpeg", "stream": True}
    document |= {"partial_images": 3, "num_inference_steps": 7, "guidance_scale": 3, "seed": 5, "negative_prompt": "fog", "timeout_s": 2.5}
    asked = read(document | {"progress": True, "user": "me"}, TEXT_CARD)
    assert asked.request == ImageRequest("a ship", 2, 5, 7, 3.0, 64, 32, "fog", "jpeg", 3)
    assert (asked.stream, asked.progress, asked.timeout_s) == (True, True, 2.5)


def test_steps_and_sides_that_the_model_cannot_draw_are_refused_with_the_numbers():
    card = replace(TEXT_CARD, least_steps=2, most_side_px=1024)
    one_step, too_wide = refused({"prompt": "x", "num_inference_steps": 1}, card), refused({"prompt": "x", "size": "1040x16"}, card)
    assert (one_step.status, one_step.param) == (400, "num_inference_steps") and "from 2 to 250, not 1" in one_step.message
    assert (too_wide.status, too_wide.param) == (400, "size") and "at most 1024" in too_wide.message
    assert read({"prompt": "x", "size": "1024x1024"}, card, steps=1).request.steps == 2


def test_a_request_whose_step_would_be_taken_for_a_hanging_one_is_refused_with_the_numbers():
    card = replace(TEXT_CARD, step_s=4.0)
    for asked, param in (({"n": 10, "size": "1024x1024"}, "n"), ({"size": "2048x2048", "n": 1}, "size")):
        problem = refused({"prompt": "x"} | asked, card)
        assert (problem.status, problem.param) == (400, param) and re.search(r"about \d+ s here, and 120 s are the most", problem.message)
    assert read({"prompt": "x", "n": 3, "size": "1024x1024"}, card).request.n == 3
    assert read({"prompt": "x", "n": 10, "size": "2048x2048"}, TEXT_CARD).request.n == 10


def test_null_means_left_out():
    names = ("model", "n", "size", "seed", "guidance_scale", "num_inference_steps", "class_labels", "negative_prompt", "timeout_s", "stream", "user")
    assert read({"prompt": "cat"} | dict.fromkeys(names)) == read({"prompt": "cat"})


def test_seeds_differ_from_request_to_request():
    assert len({read_request({"prompt": "cat"}, CARD, settings()).request.seed for _ in range(20)}) > 15


@pytest.mark.parametrize("labels", [8, "ship", "class:8", [8], ["SHIP"]])
def test_class_labels_name_the_class(labels):
    assert read({"class_labels": labels}).request.condition == 8
    assert read({"class_labels": labels, "prompt": "ship"}).request.condition == 8
    assert read({"class_labels": labels, "prompt": ""}).request.condition == 8


@pytest.mark.parametrize("card", [CARD, TEXT_CARD])
def test_every_answer_can_be_asked_for_again_by_what_it_says(card):
    asked = read({"prompt": "cat"}, card)
    said = Answer(asked.request, "tiny", 0).to_json(Pictures([b"x"], 0, 0, 1), 0)["dite"]
    again = {"class_labels": said["class_labels"]} if said["class_labels"] else {"prompt": "cat"}
    again |= {"seed": said["seed"], "num_inference_steps": said["steps"], "guidance_scale": said["guidance"], "size": said["size"]}
    assert read(again, card).request == asked.request


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("n", 0, "n must be from 1 to 10, not 0"),
        ("n", 11, "n must be from 1 to 10, not 11"),
        ("n", 2.0, "n must be a whole number, not 2.0"),
        ("n", True, "n must be a whole number, not true"),
        ("n", "2", 'n must be a whole number, not "2"'),
        ("n", 10**19, f"n must be from 1 to 10, not {10**19}"),
        ("num_inference_steps", 251, "num_inference_steps must be from 1 to 250, not 251"),
        ("num_inference_steps", 0, "num_inference_steps must be from 1 to 250, not 0"),
        ("guidance_scale", -0.5, "guidance_scale must be from 0 to 100, not -0.5"),
        ("guidance_scale", 1e300, "guidance_scale must be from 0 to 100, not 1e+300"),
        ("guidance_scale", "high", 'guidance_scale must be a number, not "high"'),
        ("seed", -1, "seed must be from 0 to 4294967295, not -1"),
        ("seed", 2**32, "seed must be from 0 to 4294967295, not 4294967296"),
        ("partial_images", 4, "partial_images must be from 0 to 3, not 4"),
        ("timeout_s", 0, "timeout_s must be more than 0 and at most 600, not 0"),
        ("timeout_s", 601, "timeout_s must be more than 0 and at most 600, not 601"),
        ("size", "64x64", 'size must be "32x32" or "auto", the only one of this model, not "64x64"'),
        ("response_format", "url", 'response_format must be "b64_json" (pictures are not stored, and have no URL), not "url"'),
        ("output_format", "gif", 'output_format must be "png", "jpeg" or "webp", not "gif"'),
        ("stream", 1, "stream must be true or false, not 1"),
        ("prompt", ["cat"], "prompt must be a string, not a list of 1"),
        ("prompt", {"a": 1}, "prompt must be a string, not an object"),
        ("prompt", "x" * 4001, "prompt must have at most 4000 characters, not 4001"),
        ("prompt", " \n", "prompt or class_labels must name one of this model's classes; both are missing"),
        ("negative_prompt", "fog", "negative_prompt can't be used: this model takes none"),
        ("class_labels", [3, 8], "class_labels must be one class, for all pictures of a request; it has 2"),
        ("class_labels", [], "class_labels must be one class, for all pictures of a request; it has 0"),
        ("class_labels", [[3]], "class_labels must be a class's id or name, or a list of one, not a list of 1"),
        ("class_labels", 3.0, "class_labels must be a class's id or name, or a list of one, not 3.0"),
        ("class_labels", True, "class_labels must be a class's id or name, or a list of one, not true"),
        ("class_labels", "ship", "class_labels means class 8 and prompt class 3; they must agree, or prompt be empty"),
    ],
)
def test_a_wrong_value_is_answered_with_field_limit_and_value(field, value, rule):
    problem = refused({"prompt": "cat", "stream": True} | {field: value})
    assert problem.status == 400 and rule in problem.message
    assert problem.param == field


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("class_labels", 3, "class_labels can't be used: this model draws from prompts and knows no classes"),
        ("prompt", "", "prompt must not be empty"),
        ("size", "64x65", "both sides of size must be multiples of 16, not 64x65"),
        ("size", "4096x2048", "size must have at most 4194304 pixels; 4096x2048 has 8388608"),
        ("size", "0x64", 'size must be WIDTHxHEIGHT as in "512x512", or "auto", not "0x64"'),
        ("size", "６４x６４", "size must be WIDTHxHEIGHT"),
        ("size", "64x64\n", "size must be WIDTHxHEIGHT"),
        ("negative_prompt", "x" * 4001, "negative_prompt must have at most 4000 characters, not 4001"),
    ],
)
def test_models_that_read_text_have_rules_of_their_own(field, value, rule):
    problem = refused({"prompt": "a ship"} | {field: value}, TEXT_CARD)
    assert problem.param == field and problem.status == 400 and rule in problem.message


def test_the_models_own_limit_of_steps_counts_too():
    few = CARD.from_json(CARD.to_json() | {"most_steps": 4})
    assert read({"prompt": "cat"}, few, steps=50).request.steps == 4
    assert "from 1 to 4, not 5" in refused({"prompt": "cat", "num_inference_steps": 5}, few).message


def test_a_model_drawn_without_guidance_takes_none():
    plain = CARD.from_json(CARD.to_json() | {"takes_guidance": False})
    assert read({"prompt": "cat", "guidance_scale": 1}, plain).request.guidance == read({"prompt": "cat"}, plain).request.guidance == 1.0
    assert "leave it out, or give 1, not 4" in refused({"prompt": "cat", "guidance_scale": 4}, plain).message


@pytest.mark.parametrize("field", ["partial_images", "progress"])
def test_what_only_streams_can_show_needs_a_stream(field):
    problem = refused({"prompt": "cat", field: 1 if field == "partial_images" else True})
    assert problem.param == field and 'needs "stream": true' in problem.message


def test_an_unknown_field_is_told_the_nearest():
    problem = refused({"prompt": "cat", "guidance": 2})
    assert (problem.status, problem.code, problem.param) == (
        400,
        "unknown_parameter",
        "guidance",
    ) and "did you mean guidance_scale?" in problem.message
    assert len(refused({"prompt": "cat", "z" * 50_000: 2}).message) < 500


def test_fields_of_openais_that_mean_nothing_here_are_passed_over():
    ignored = {"user": "me", "quality": "hd", "style": [], "background": "auto", "moderation": "low", "output_compression": 5, "safety_identifier": 1}
    assert read({"prompt": "cat"} | ignored) == read({"prompt": "cat"})


def test_another_models_name_is_not_found():
    problem = refused({"prompt": "cat", "model": "dall-e-3"})
    assert (problem.status, problem.code) == (404, "model_not_found") and re.search('"dall-e-3".*"tiny"', problem.message)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "line 1, column 1"),
        (b"{", "column 2"),
        (b"[1]", "it must be an object, not a list of 1"),
        (b"null", "it must be an object, not null"),
        (b'{"n": 1, "n": 2}', '"n" is given twice'),
        (b'{"x": {"n": 1, "n": 2}}', '"n" is given twice'),
        (b'{"n": NaN}', "NaN is no number in JSON"),
        (b'{"n": -Infinity}', "-Infinity is no number in JSON"),
        (b'{"n": 1e999}', "a number is too large for a double"),
        (b'{"n": ' + b"9" * 21 + b"}", "a number has 21 digits, and 20 are the most"),
        (b'{"n": ' + b"9" * 60_000 + b"}", "a number has 60000 digits"),
        (b'{"prompt": "\xff"}', "byte 12 is not UTF-8"),
        (b'\xef\xbb\xbf{"n": 1}', "BOM"),
        ('{"n": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
        (b'{"n": 1} {}', "Extra data"),
        (b"[" * 60_000, "it is nested too deeply"),
        (b'{"n":' * 10_000 + b"1" + b"}" * 10_000, "it is nested too deeply"),
        (b'{"prompt": "\\ud800"}', "half a surrogate pair"),
        (b'{"x": [["\\udfff"]]}', "half a surrogate pair"),
        (b'{"\\ud800": 1}', "half a surrogate pair"),
        (b'{"n": 01}', "column"),
        (b'{"prompt": "a\nb"}', "Invalid control character"),
    ],
)
def test_json_that_could_be_read_in_two_ways_or_not_at_all_is_refused(body, why):
    with pytest.raises(Problem, match=re.escape(why)) as caught:
        parse(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_good_json_is_read():
    document = {"prompt": "a cât \u2028 \U0001f431", "n": 2, "x": [1.5, None, True, {"y": {}}], "big": 2**63}
    assert parse(json.dumps(document, ensure_ascii=False).encode()) == document == parse(json.dumps(document).encode())


def test_a_value_is_shown_short_and_in_ascii():
    assert shown("x" * 1000) == '"' + "x" * 60 + '..."' and shown("\ud800é") == '"\\ud800\\u00e9"'
    assert [shown(value) for value in ([[]] * 9, {}, None, 1.5)] == ["a list of 9", "an object", "null", "1.5"]


def test_an_answer_holds_the_pictures_and_how_to_make_them_again():
    document = Answer(REQUEST, "tiny", 1700000000).to_json(DONE, total_s=2.0)
    assert [base64.b64decode(one["b64_json"]) for one in document["data"]] == DONE.images
    assert {name: document[name] for name in ("created", "output_format", "size")} == {
        "created": 1700000000,
        "output_format": "webp",
        "size": "32x32",
    }
    facts = document["dite"]
    assert facts["timings"] == {"queue_s": 0.5, "run_s": 1.25, "draw_s": 1.0, "total_s": 2.0} and (facts["attempts"], facts["model"]) == (2, "tiny")
    assert (facts["seed"], facts["seeds"], facts["class_labels"], facts["steps"], facts["guidance"]) == (2**32 - 1, [2**32 - 1, 0], [3], 20, 2.0)


def test_a_stream_says_which_picture_it_shows():
    answer = Answer(REQUEST, "tiny", 1700000000)
    partial = answer.partial(Partial(1, b"half"), 0)
    assert (partial["type"], partial["partial_image_index"], partial["dite"]) == ("image_generation.partial_image", 0, {"picture": 1})
    completed = list(answer.completed(DONE, 2.0))
    assert [event["dite"]["picture"] for event in completed] == [0, 1] and completed[1]["b64_json"] == base64.b64encode(b"two").decode()
    assert progress_event(Progress(2, 5)) == {"type": "dite.progress", "step": 2, "steps": 5}
