"""Errors as people meet them: what went wrong, why, what to try; and an exit code that scripts can rely on.

0 ok   1 failure   2 usage   3 unsupported   4 quality gate failed   5 resume conflict   130 interrupted
"""

import sys
import traceback
from typing import TextIO

import typer

from dite.cli.output import print_json
from dite.errors import DiteError, UsageError, did_you_mean

INTERRUPTED = 130


class Interrupted(DiteError):
    """Ctrl-C. Not part of the library's tree: only the command line turns an interruption into an exit code."""

    exit_code = INTERRUPTED


def interrupted() -> Interrupted:
    return Interrupted(
        "interrupted",
        "Ctrl-C, or the signal it sends",
        "outputs are renamed into place when complete, so none is half written; run it again, quantize with --resume",
    )


def explained(error: BaseException) -> DiteError:
    """Any exception as an error with three lines."""
    if isinstance(error, DiteError):
        return error
    if isinstance(error, KeyboardInterrupt | typer.Abort):  # Abort is what older typers make of Ctrl-C
        return interrupted()
    if is_usage(error):
        return _usage(error)
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return DiteError(
            f"{error.strerror}{where}", "the operating system refused to read or write", "check the path, its permissions and the space on that disk"
        )
    text = " ".join(str(error).split()) or "no message"
    return DiteError(
        f"{type(error).__name__}: {text}",
        "dite did not expect this: a bug of ours, or a library that behaves in a way we have not met",
        "run the same command with -v, and report the traceback",
    )


def is_usage(error: BaseException) -> bool:
    """Typer's own errors. By shape, since typer carries click inside from 0.26 on and imports it before."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def print_failure(error: DiteError, stdout: TextIO, as_json: bool) -> None:
    """Three lines on stderr; with `--json`, also the document on stdout."""
    if as_json:
        print_json({"error": error.to_dict(), "exit_code": error.exit_code}, stdout)
        stdout.flush()
    lines = [f"error: {error.what}", f"  why: {error.why}" if error.why else "", f"  try: {error.hint}" if error.hint else ""]
    print("\n".join(line for line in lines if line), file=sys.stderr)


def print_traceback(error: BaseException) -> None:
    traceback.print_exception(error, file=sys.stderr)


def _usage(error: BaseException) -> UsageError:
    """Typer's error in our three lines, with its own suggestions kept."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "dite"
    usage = " ".join(context.get_usage().split()).removeprefix("Usage: ") if context else f"{path} --help"
    option = getattr(error, "option_name", None)
    possibilities = (option and getattr(error, "possibilities", None)) or []  # click since 8.3 has them for commands too
    message = f"no such option {option}" if possibilities else error.format_message().rstrip(".")
    what, _, guess = message.replace("Value error, ", "").partition(". Did you mean")
    guess = did_you_mean(option, possibilities, cutoff=0) if possibilities else guess and f"did you mean{guess}"
    help_hint = f"`{path} --help` lists what it takes"
    return UsageError(what[:1].lower() + what[1:], f"usage: {usage}", f"{guess} {help_hint}" if guess else help_hint)
