"""Compile csrc/ once, for this processor, and load it through a plain C interface: no torch headers, so that any version of torch will do.

The library lies in the user's cache, named by a hash of the sources, the compiler and its flags. Processes that start at once each compile to a file
of their own and rename it; whoever is last wins, and all files are the same. `DITE_CPU_ISA` names one of LEVELS instead of the best one here.

OpenMP's runtime is the one that torch has loaded: a second one's threads would fight it for the cores.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # noqa: F401 - its OpenMP runtime must be there before our library is

from dite_kernels import processor

SOURCES = Path(__file__).parent / "csrc"
# Sources, and what each needs beside COMMON: in the codecs of residuals every product and sum is rounded, so that ranks agree to the bit.
UNITS = {"dite_cpu.c": [], "residual.c": ["-ffp-contract=off"]}
COMPILERS = ("gcc", "cc", "clang")
DEADLINE_S = 300
COMMON = ["-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"]
# Best first: what /proc/cpuinfo must list, and what the compiler is told.
LEVELS = {
    "amx": (("amx_int8", "amx_tile", "avx512_vnni", "avx512_bf16", "avx512bw", "f16c"), [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8"]),
    "avx512_vnni": (("avx512_vnni", "avx512bw", "f16c"), AVX512),
    "avx2": (("avx2", "fma", "f16c"), ["-mavx2", "-mfma", "-mf16c"]),
    "portable": ((), []),
}


class Unavailable(RuntimeError):
    """The kernels can't be compiled or run here; the message says why."""


def library() -> ctypes.CDLL:
    """The loaded library, at the best level that works here. Raises Unavailable; tried once only, since a compiler that fails takes its time."""
    found = attempt()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


@functools.cache
def attempt() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    reasons = []
    try:
        compiler()
        for level in levels():
            try:
                return _load(level)
            except Unavailable as error:
                reasons.append(f"{level}: {error}")
    except Unavailable as error:
        return str(error)
    return "; ".join(reasons)


def levels() -> list[str]:
    """Levels that the processor has, best first; with DITE_CPU_ISA that one only. Raises Unavailable when it has not."""
    flags = processor_flags()
    here = [name for name, (needed, _) in LEVELS.items() if flags.issuperset(needed)]
    forced = os.environ.get("DITE_CPU_ISA")
    if forced is None:
        return here
    if forced not in LEVELS:
        raise Unavailable(f"DITE_CPU_ISA={forced} is none of {', '.join(LEVELS)}")
    if forced not in here:
        raise Unavailable(f"DITE_CPU_ISA={forced} needs {', '.join(sorted(set(LEVELS[forced][0]) - flags))}, which this processor lacks")
    return [forced]


def processor_flags() -> set[str]:
    """Instruction sets that LEVELS may ask for; none on other processors than x86-64."""
    return processor.flags() if platform.machine() in ("x86_64", "AMD64") else set()


def compiler() -> list[str]:
    """The C compiler: CC, which may have options, or the first of COMPILERS. Raises Unavailable when there is none."""
    wanted = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else [[name] for name in COMPILERS]
    found = next(([path, *options] for name, *options in wanted if (path := shutil.which(name))), None)
    if found is None:
        raise Unavailable(f"no C compiler ({', '.join(name for name, *_ in wanted)}) was found; install gcc, or set CC")
    return found


def cache_folder() -> Path:
    """Where compiled libraries are kept: DITE_CACHE, else the user's cache folder."""
    if os.environ.get("DITE_CACHE"):
        return Path(os.environ["DITE_CACHE"]) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dite" / "kernels"


def _load(level: str) -> ctypes.CDLL:
    path = _compiled(level)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"what {compiler()[0]} made can't be loaded: {error}") from error
    if loaded.dite_prepare():
        raise Unavailable("the system doesn't let processes use AMX tiles")
    loaded.level = level
    return loaded


def _compiled(level: str) -> Path:
    """The library's file, compiled unless it is there."""
    command = [*compiler(), *COMMON, *LEVELS[level][1]]
    digest = hashlib.sha256("\0".join([*command, str(UNITS), _version(tuple(compiler()))]).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    name = f"dite_cpu_{level}_{digest.hexdigest()[:16]}.so"
    try:
        folder = cache_folder()
        if (folder / name).is_file():
            return folder / name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        building = tempfile.TemporaryDirectory(dir=folder, prefix="building_")
    except (OSError, RuntimeError):  # no home, or one that can't be written to: compile for this process alone
        folder = Path(tempfile.mkdtemp(prefix="dite_kernels_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        building = tempfile.TemporaryDirectory(dir=folder)
    with building:
        _compile(command, Path(building.name) / name)
        os.replace(Path(building.name) / name, folder / name)
    return folder / name


def _compile(command: list[str], output: Path) -> None:
    """Objects with OpenMP, library without its runtime if this process has one; without OpenMP where the compiler doesn't know it."""
    objects = {source: str(output.parent / source) + ".o" for source in UNITS}
    failure = ""
    for threads in (["-fopenmp"], []):
        steps = [[*command, *UNITS[source], *threads, "-c", str(SOURCES / source), "-o", made] for source, made in objects.items()]
        runtime = threads if not _has_runtime() else []
        steps.append([*compiler(), "-shared", *runtime, "-o", str(output), *objects.values(), "-lm"])
        failure = next(filter(None, map(_run, steps)), "")
        if not failure:
            return
    raise Unavailable(f"{command[0]} failed: {failure}")


def _has_runtime() -> bool:
    """Whether OpenMP's runtime, as gcc calls it, is among this process's global symbols: torch brings it."""
    return hasattr(ctypes.CDLL(None), "GOMP_parallel")


def _run(command: list[str]) -> str:
    """What went wrong, or an empty string."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} doesn't run: {error}") from error
