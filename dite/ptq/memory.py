"""Running out of memory, said as an error that tells what to do: what was written down before (the journal) is still good."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dite.errors import DiteError, QuantizationError, is_out_of_memory


def peak_memory_bytes() -> int:
    """The largest resident set this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def explained_memory(journaled: bool) -> Iterator[None]:
    """Raise QuantizationError where memory runs out, in Python, in torch on the CPU, or on a card."""
    try:
        yield
    except DiteError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        asked = next((line.strip() for line in str(error).splitlines() if is_out_of_memory(RuntimeError(line))), "")
        why = f"this process had {peak_memory_bytes()} bytes{f'; {asked[-200:]}' if asked else ''}"
        again = "run it again with --resume where there is more memory: what is done is kept" if journaled else "use a machine with more memory"
        raise QuantizationError("memory ran out while quantizing", why, f"{again}, or load the model in bfloat16") from error
