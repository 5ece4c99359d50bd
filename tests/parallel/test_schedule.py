"""Schedules: one meaning has one text, whatever isn't a schedule is refused with the numbers, and files are whole."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dite.errors import UsageError
from dite.parallel.schedule import Rule, Schedule

CODECS = ["none", "int8", "int4", "int2", "int1", "lowrank-8", "topk-32"]
tables = st.integers(1, 6).flatmap(lambda width: st.lists(st.lists(st.sampled_from(CODECS), min_size=width, max_size=width), min_size=1, max_size=6))
spans = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda pair: f"{min(pair)}-{max(pair)}")
ranges = st.one_of(st.just("*"), st.integers(0, 20).map(str), spans, st.integers(0, 20).map(lambda n: f"{n}-"), st.tuples(spans, spans).map(",".join))
rules = st.lists(st.builds(Rule, ranges, ranges, st.sampled_from(CODECS)), max_size=5)


def refusal(document) -> str:
    with pytest.raises(UsageError) as caught:
        Schedule.from_json(document if isinstance(document, str) else json.dumps(document))
    return str(caught.value)


@settings(max_examples=100, deadline=None)
@given(tables, st.booleans())
def test_a_table_is_what_it_was_after_json(rows, repeat_last):
    schedule = Schedule.from_table(rows, repeat_last)
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule and again.to_json() == schedule.to_json() and again.digest == schedule.digest
    assert [[again.codec(step, layer) for layer in range(len(rows[0]))] for step in range(len(rows))] == rows


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(CODECS), rules)
def test_rules_are_what_they_were_after_json(default, some):
    schedule = Schedule.from_rules(default, some)
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule and again.digest == schedule.digest


def test_the_last_rule_that_matches_wins():
    schedule = Schedule.from_rules("int4", [Rule("0-9", "*", "int8"), Rule("5", "2,4-", "int2"), Rule("40-", "0-1", "int1")])
    cells = [(0, 0), (9, 99), (5, 2), (5, 3), (5, 400), (10, 2), (39, 0), (40, 1), (41, 2)]
    assert [schedule.codec(*cell) for cell in cells] == ["int8", "int8", "int2", "int8", "int2", "int4", "int4", "int1", "int4"]


def test_constant_is_one_codec_everywhere():
    schedule = Schedule.constant("int4")
    assert schedule.codec(0, 0) == schedule.codec(999, 999) == "int4" and schedule.to_json() == '{"default":"int4"}'


def test_a_table_ends_unless_it_says_that_its_last_row_goes_on():
    rows = [["int4", "int8"], ["int2", "int2"]]
    with pytest.raises(UsageError, match=r"step 7\nthe schedule is for 2 steps, 0 to 1\n.*repeat_last"):
        Schedule.from_table(rows).codec(7, 0)
    assert Schedule.from_table(rows, repeat_last=True).codec(7, 0) == "int2"
    with pytest.raises(UsageError, match="layer 2\nthe schedule is for 2 layers"):
        Schedule.from_table(rows, repeat_last=True).codec(0, 2)


def test_a_run_is_checked_before_it_starts():
    schedule = Schedule.from_table([["int4", "int8"]] * 3)
    schedule.check(3, 2)
    for steps, layers in ((4, 2), (3, 3), (3, 1), (0, 2)):
        with pytest.raises(UsageError):
            schedule.check(steps, layers)
    Schedule.constant("int4").check(1000, 1000)


@pytest.mark.parametrize("step, layer", [(-1, 0), (0, -1)])
def test_nothing_lies_before_the_first_step_or_layer(step, layer):
    with pytest.raises(UsageError, match="count from 0"):
        Schedule.constant("int4").codec(step, layer)


def test_the_same_table_has_the_same_digest_however_its_codecs_are_numbered():
    texts = ['{"codecs":["int4","int8"],"table":[[0,1]]}', ' {"table": [[2, 0]], "codecs": ["int8", "int1", "int4"], "repeat_last": false}']
    first, second = map(Schedule.from_json, texts)
    assert first == second and first.digest == second.digest and first.digest != Schedule.constant("int4").digest


@pytest.mark.parametrize(
    "document, said",
    [
        ("[]", "not a list"),
        ("{", "not valid JSON"),
        ('{"default": "int4", "default": "int8"}', "duplicate key 'default'"),
        ('{"default": NaN}', "NaN"),
        ("[" * 100_000, "not valid JSON"),
        ({}, "lacks default"),
        ({"defualt": "int4"}, "did you mean default"),
        ({"default": "int5"}, "did you mean int4|no codec named"),
        ({"default": None}, "no codec"),
        ({"default": "int4", "rules": {}}, "must be a list"),
        ({"default": "int4", "rules": ["int8"]}, "rule 0"),
        ({"default": "int4", "rules": [{"steps": "0", "layers": "*", "codec": "int8", "step": "1"}]}, "did you mean steps"),
        ({"default": "int4", "rules": [{"steps": "0", "codec": "int8"}]}, "lacks layers"),
        ({"default": "int4", "rules": [{"steps": 3, "layers": "*", "codec": "int8"}]}, "not an integer"),
        ({"default": "int4", "rules": [{"steps": "9-0", "layers": "*", "codec": "int8"}]}, "ends before it begins"),
        ({"default": "int4", "rules": [{"steps": "1, 2", "layers": "*", "codec": "int8"}]}, "no range"),
        ({"default": "int4", "rules": [{"steps": "007", "layers": "*", "codec": "int8"}]}, "no range"),
        ({"default": "int4", "rules": [{"steps": "", "layers": "*", "codec": "int8"}]}, "no range"),
        ({"default": "int4", "repeat_last": True}, "lacks codecs, table|unknown key 'default'"),
        ({"codecs": ["int4"], "table": []}, "0 entries"),
        ({"codecs": ["int4"], "table": [[]]}, "0 entries"),
        ({"codecs": ["int4"], "table": [[0], [0, 0]]}, r"table\[1\] has 2 layers"),
        ({"codecs": ["int4"], "table": [[1]]}, "it must be 0 to 0"),
        ({"codecs": ["int4"], "table": [[-1]]}, "it must be 0 to 0"),
        ({"codecs": ["int4"], "table": [[True]]}, "not true or false"),
        ({"codecs": ["int4"], "table": [[0.0]]}, "not a number"),
        ({"codecs": ["int4", "int4"], "table": [[0]]}, "twice"),
        ({"codecs": ["int4"], "table": [[0]], "repeat_last": 1}, "true or false"),
        ({"codecs": ["int4"], "table": [[0] * 10_001]}, "1 to 10000"),
        ({"codecs": ["int4"], "table": [[0] * 401] * 10_000}, "4000000 in all"),
    ],
)
def test_what_is_no_schedule_is_refused_with_the_reason(document, said):
    import re

    assert re.search(said, refusal(document))


def test_a_file_holds_the_schedule_whole(tmp_path):
    path, schedule = tmp_path / "schedule.json", Schedule.from_table([["int4", "none"]], repeat_last=True)
    path.write_text("something old")
    schedule.write(path)
    assert Schedule.read(path) == schedule and [file.name for file in tmp_path.iterdir()] == ["schedule.json"]


def test_files_that_cannot_be_read_or_written_are_usage_errors(tmp_path):
    (tmp_path / "latin").write_bytes(b'{"default": "\xff"}')
    for path in (tmp_path / "absent.json", tmp_path, tmp_path / "latin"):
        with pytest.raises(UsageError, match="can't read a schedule"):
            Schedule.read(path)
    with pytest.raises(UsageError, match="can't write"):
        Schedule.constant("int4").write(tmp_path / "absent" / "schedule.json")
    with pytest.raises(UsageError, match="can't write"):
        Schedule.constant("int4").write(tmp_path)
