"""The typer app, and `main`: the one place that prints answers and errors and chooses the exit code."""

import os
import sys
import warnings
from contextlib import nullcontext, redirect_stdout
from typing import Annotated, Any, TextIO

import typer
from typer.main import get_command

import dite
from dite.cli import bench, convert, doctor, eval, generate, inspect, quantize, recipes, report, serve
from dite.cli.failure import INTERRUPTED, explained, interrupted, print_failure, print_traceback
from dite.cli.output import Answer, print_answer
from dite.errors import DiteError

QUIET = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
# How long an OpenMP thread spins before it sleeps, in iterations. By default two threads on two cores stall each other some fourteen-fold
# as soon as another process wants a core; with this, four-fold less, and no slower on an idle machine. Read when torch is loaded.
SPIN = {"GOMP_SPINCOUNT": "10000"}

app = typer.Typer(
    name="dite",
    help="The diffusion transformer efficiency engine: makes diffusers DiTs small and fast, and proves with numbers what it cost.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect")(inspect.inspect)
app.command("quantize")(quantize.quantize)
app.command("convert")(convert.convert)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.add_typer(eval.app, name="eval")
app.add_typer(bench.app, name="bench")
app.add_typer(recipes.app, name="recipes")
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dite {dite.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)] = False,
) -> None:
    """The diffusion transformer efficiency engine: makes diffusers DiTs small and fast, and proves with numbers what it cost."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    `--json` and `-v` are read from the arguments themselves and not from typer, because they also govern errors found while parsing.
    Under `--json`, what a library prints on stdout goes to stderr.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in arguments
    verbose = "-v" in arguments or "--verbose" in arguments
    stdout = sys.stdout
    if "OMP_WAIT_POLICY" not in os.environ:
        _set_defaults(SPIN)
    if not verbose:
        _hush_libraries()
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = get_command(app).main(arguments, prog_name="dite", standalone_mode=False, obj=arguments)
        return _finish(result, stdout, as_json)
    except BrokenPipeError:
        return _reader_left(stdout)
    except (Exception, KeyboardInterrupt) as error:
        if verbose:
            print_traceback(error)
        return _fail(explained(error), stdout, as_json)


def _finish(result: Any, stdout: TextIO, as_json: bool) -> int:
    if isinstance(result, int) and result == INTERRUPTED:  # typer turns Ctrl-C into this code itself
        return _fail(interrupted(), stdout, as_json)
    if isinstance(result, int):
        return result
    if isinstance(result, Answer):
        print_answer(result, stdout, as_json)
        if result.failure:
            return _fail(result.failure, stdout, as_json=False)  # the answer's document already holds the error
    return 0


def _fail(error: DiteError, stdout: TextIO, as_json: bool) -> int:
    try:
        print_failure(error, stdout, as_json)
    except OSError:  # stdout itself is what failed; stderr may still reach someone
        print_failure(error, stdout, as_json=False)
    return error.exit_code


def _reader_left(stdout: TextIO) -> int:
    """`dite recipes | head -1`: the reader has what it wanted. Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    return 0


def _hush_libraries() -> None:
    """Loading bars and advice of the libraries below drown three-line errors; `-v` brings them back, and so does setting them."""
    _set_defaults(QUIET)
    warnings.simplefilter("ignore", FutureWarning)


def _set_defaults(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)
