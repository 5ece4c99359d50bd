"""Every error that dite raises on purpose.

    DiteError                   1   500   anything below; catch this one
    ├── UsageError              2   400   an argument, a flag or a file name is wrong
    │   ├── RecipeError         2   400   a recipe can't be read, or a key or a value in it is wrong
    │   ├── OutputExists        2   409   the output is already there
    │   └── OutputInUse         2   409   another run is writing the output
    ├── UnsupportedModel        3   400   the model can't do what was asked of it
    ├── UnsupportedEnvironment  3   501   this machine or this installation can't
    ├── QuantizationError       1   500   a layer's numbers can't be quantized
    ├── CheckpointError         1   500   a folder is damaged, incomplete or hostile
    ├── NonFiniteOutput         1   500   a model or a rank produced NaN or infinity
    ├── ExchangeCorrupted       1   500   what a rank sent can't be used
    ├── RanksDisagree           1   500   the ranks of a job were started with different settings or inputs
    ├── RankLost                1   503   another rank ended or doesn't answer
    ├── QualityGateFailed       4   422   a --fail-if condition holds
    └── ResumeConflict          5   409   an interrupted run was started with other settings

The numbers are the command line's exit code and the server's HTTP status. An error says three things: what went wrong, why (the rule, with
the numbers), and what to try.
"""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint with the nearest known name, or an empty one when none is as alike as `cutoff` (0 to 1).

    >>> did_you_mean("w4a9", ["w4a8", "w8a8"])
    'did you mean w4a8?'
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else ""


class DiteError(Exception):
    """`what` happened, `why` (the rule with the numbers), and a `hint`: what to try."""

    exit_code = 1
    http_status = 500

    def __init__(self, what: str, why: str = "", hint: str = ""):
        super().__init__("\n".join(part for part in (what, why, hint) if part))
        self.what = what
        self.why = why
        self.hint = hint

    def to_dict(self) -> dict[str, str]:
        """The `error` object of `--json`."""
        return {"type": type(self).__name__, "what": self.what, "why": self.why, "try": self.hint}


class UsageError(DiteError):
    """An argument, a flag or a file name is wrong."""

    exit_code = 2
    http_status = 400


class RecipeError(UsageError):
    """A recipe can't be read, or a key or a value in it is wrong."""


class OutputExists(UsageError):
    """The output is already there."""

    http_status = 409


class OutputInUse(UsageError):
    """Another run is writing the output."""

    http_status = 409


class UnsupportedModel(DiteError):
    """The model can't do what was asked of it: `UnsupportedModel(reason, hint)`."""

    exit_code = 3
    http_status = 400

    def __init__(self, reason: str, hint: str = "", what: str = "this model is not supported here"):
        super().__init__(what, reason, hint)
        self.reason = reason


class UnsupportedEnvironment(DiteError):
    """This machine or this installation can't."""

    exit_code = 3
    http_status = 501


class QuantizationError(DiteError):
    """A layer's numbers can't be quantized."""


class CheckpointError(DiteError):
    """A folder is damaged, incomplete or hostile."""


class NonFiniteOutput(DiteError):
    """A model or a rank produced NaN or infinity; an image of it would be black, and look like an answer."""


class ExchangeCorrupted(DiteError):
    """What a rank sent is damaged, out of turn, or does not fit the state of its receiver."""


class RanksDisagree(DiteError):
    """The ranks of a job were started with different settings, versions or inputs."""


class RankLost(DiteError):
    """Another rank ended or doesn't answer."""

    http_status = 503


class QualityGateFailed(DiteError):
    """A `--fail-if` condition holds."""

    exit_code = 4
    http_status = 422


class ResumeConflict(DiteError):
    """An interrupted run was started with other settings."""

    exit_code = 5
    http_status = 409


NO_PRIMITIVE = "could not create a primitive"  # all that oneDNN says when it gets no memory; what it can't compute is a "primitive descriptor"
# CUDA, torch on Windows, torch on Linux, the system, C++, cuBLAS
MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: in Python, in torch or the libraries below it, or on a card."""
    said = str(error).casefold().strip()
    return isinstance(error, MemoryError) or said == NO_PRIMITIVE or any(words in said for words in MEMORY_WORDS)


def first_line(error: BaseException) -> str:
    """The first line of what an error says that says anything; its type's name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
