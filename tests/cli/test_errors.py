"""What a person sees when something goes wrong, and what a script can rely on."""

import pytest

from dite import errors
from dite.cli import app, doctor, failure


def _raise(error):
    def command(*arguments, **keywords):
        raise error

    return command


@pytest.fixture
def failing(monkeypatch, run):
    """Run a command whose inside raises `error`."""

    def call(error, *arguments):
        monkeypatch.setattr(app, "get_command", lambda _: type("Command", (), {"main": staticmethod(_raise(error))}))
        return run("recipes", *arguments)

    return call


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.DiteError("what"), 1),
        (errors.QuantizationError("what"), 1),
        (errors.UsageError("what"), 2),
        (errors.OutputExists("what"), 2),
        (errors.UnsupportedModel("why"), 3),
        (errors.UnsupportedEnvironment("what"), 3),
        (errors.QualityGateFailed("what"), 4),
        (errors.ResumeConflict("what"), 5),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("division by zero"), 1),
    ],
)
def test_each_kind_of_error_has_its_exit_code(failing, error, code):
    assert failing(error).code == code
    assert failing(error, "--json").document["exit_code"] == code


def test_an_error_is_three_lines_on_stderr_and_nothing_on_stdout(failing):
    outcome = failing(errors.UsageError("no class shp", "the classes are cat, ship", "did you mean ship?"))
    assert outcome.out == ""
    assert outcome.err.splitlines() == ["error: no class shp", "  why: the classes are cat, ship", "  try: did you mean ship?"]


def test_json_errors_say_the_type_and_the_three_parts(failing):
    document = failing(errors.UnsupportedModel("no transformer", "give a DiT"), "--json").document
    assert document["error"] == {"type": "UnsupportedModel", "what": "this model is not supported here", "why": "no transformer", "try": "give a DiT"}


def test_a_traceback_is_shown_only_with_v(failing):
    assert "Traceback" not in failing(ZeroDivisionError("division by zero")).err
    assert "Traceback" in failing(ZeroDivisionError("division by zero"), "-v").err


def test_an_unexpected_error_still_says_what_why_and_try(failing):
    lines = failing(ZeroDivisionError("division by zero")).err.splitlines()
    assert lines[0] == "error: ZeroDivisionError: division by zero"
    assert [line[:6] for line in lines[1:]] == ["  why:", "  try:"]


def test_a_full_disk_is_named_as_such(failing):
    outcome = failing(OSError(28, "No space left on device", "out/model.safetensors"))
    assert "No space left on device: out/model.safetensors" in outcome.err


def test_an_unknown_option_names_the_nearest(run):
    outcome = run("quantize", "model", "--recip", "w4a8")
    assert outcome.code == 2
    assert "--recip" in outcome.err and "did you mean --recipe?" in outcome.err


def test_an_unknown_command_names_the_nearest(run):
    outcome = run("quantise", "model")
    assert outcome.code == 2
    assert "did you mean 'quantize'?" in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "--recip"),
        ("quantise",),
        ("quantize",),
        ("generate", "m", "-o", "x", "-n", "many"),
        ("generate", "m", "-o", "x", "--dtype", "int3"),
    ],
)
def test_usage_errors_are_one_json_document_too(run, arguments):
    outcome = run(*arguments, "--json")
    assert outcome.code == 2 and outcome.document["exit_code"] == 2
    assert outcome.document["error"]["type"] == "UsageError"
    assert all(outcome.document["error"][key] for key in ("what", "why", "try"))


def test_ctrl_c_inside_a_command_exits_130_and_says_so(run, monkeypatch):
    monkeypatch.setattr(doctor, "_version", _raise(KeyboardInterrupt()))
    outcome = run("doctor", "--json")
    assert outcome.code == 130
    assert outcome.document["error"]["type"] == "Interrupted" and "error: interrupted" in outcome.err


def test_explaining_an_error_of_ours_returns_it_unchanged():
    error = errors.RecipeError("what", "why", "try")
    assert failure.explained(error) is error
