"""One JSON line for each happening, and nothing in it that a client asked to see."""

import json
import logging
import re
import sys

import pytest
from fakes import CARD, settings

from dite.server.logs import adopt, failure, log
from dite.server.protocol import read_request


@pytest.fixture
def lines(capsys):
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def raised(error):
    try:
        raise error
    except type(error) as caught:
        return caught


def test_a_line_has_the_time_the_event_and_its_facts(lines):
    log("job_done", job="job-1", seconds=0.5)
    (line,) = lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {"event": "job_done", "job": "job-1", "seconds": 0.5}


def test_text_with_line_breaks_stays_one_line(lines):
    log("odd", message='a\nb\r\u2028"\ud800')
    assert lines()[0]["message"] == 'a\nb\r\u2028"\ud800'


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "condition"])
def test_prompts_are_refused(name, lines):
    with pytest.raises(AssertionError, match=f"'{name}'.* must not be logged"):
        log("job_done", **{name: "a secret"})
    assert lines() == []


def test_an_object_appears_as_its_type(lines):
    log("job_done", request=read_request({"prompt": "cat", "seed": 1}, CARD, settings()), path=[object()])
    assert (lines()[0]["request"], "cat") == ("<Asked>", "cat")


def test_a_failure_says_where_and_not_what(lines):
    log("mistake", **failure(raised(ValueError("a secret prompt"))))
    (line,) = lines()
    assert line["error"] == "ValueError" and re.fullmatch(r"test_logs\.py:\d+ raised", line["where"][-1]) and "secret" not in str(line)


def test_other_libraries_errors_become_lines_without_their_details(lines):
    adopt("some.library")
    logging.getLogger("some.library").warning("as many as a client likes")
    logging.getLogger("some.library").error("It failed\nwith %s", "a secret", exc_info=raised(KeyError("a secret")))
    (line,) = lines()
    assert (line["event"], line["library"], line["level"], line["message"]) == ("library", "some.library", "error", "It failed")
    assert line["error"] == "KeyError" and "secret" not in str(line)


def test_a_log_that_cannot_be_written_stops_nothing(monkeypatch):
    class Full:
        written = 0

        def write(self, text):
            Full.written += 1
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    log("job_done")
    assert Full.written == 1
