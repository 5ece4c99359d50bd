"""The answer on stdout, everything else on stderr."""

import io
import json
import subprocess
import sys

from dite.cli import app
from dite.cli.output import Answer, print_answer, progress
from dite.errors import QualityGateFailed


def _command(monkeypatch, work):
    monkeypatch.setattr(app, "get_command", lambda _: type("Command", (), {"main": staticmethod(lambda *a, **k: work())}))


def test_what_a_library_prints_does_not_spoil_the_document(monkeypatch, run):
    def chatty():
        print("a library says hello")
        return Answer({"answer": 42})

    _command(monkeypatch, chatty)
    outcome = run("recipes", "--json")
    assert outcome.document == {"answer": 42}
    assert "hello" in outcome.err


def test_numbers_that_json_cannot_hold_become_null():
    stdout = io.StringIO()
    print_answer(Answer({"psnr": {"mean": float("inf")}, "row": [float("nan"), 1.5, True]}), stdout, as_json=True)
    assert json.loads(stdout.getvalue()) == {"psnr": {"mean": None}, "row": [None, 1.5, True]}


def test_a_failed_gate_prints_its_answer_and_the_error_in_one_document(monkeypatch, run):
    _command(monkeypatch, lambda: Answer({"psnr": 20.0}, failure=QualityGateFailed("psnr 20 < 30", "the gate", "more bits")))
    outcome = run("eval", "--json")
    assert outcome.code == 4
    assert outcome.document["psnr"] == 20.0 and outcome.document["error"]["type"] == "QualityGateFailed"


def test_no_progress_is_drawn_off_a_terminal(capsys):
    with progress() as tick:
        tick("quantizing", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_only_rank_0_draws_progress(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("RANK", "1")
    with progress() as tick:
        tick("quantizing", 1, 2)
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_early_is_no_error():
    command = "import sys; from dite.cli import main; sys.exit(main(['recipes', 'show', 'w4a8']))"
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
