"""This machine's processor, as Linux tells it. Imports no torch."""

import functools
import os
import platform
from pathlib import Path


@functools.cache
def entries() -> dict[str, str]:
    """/proc/cpuinfo of the first core; empty on other systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    found: dict[str, str] = {}
    for key, colon, value in (line.partition(":") for line in lines):
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def flags() -> set[str]:
    """Instruction sets, by Linux's names."""
    return set((entries().get("flags") or entries().get("Features") or "").split())


def describe(shown: tuple[str, ...]) -> dict[str, object]:
    """Model name, cores that this process may use, and which of the instruction sets `shown` there are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = flags()
    return {"name": entries().get("model name") or platform.processor(), "cores": cores, "flags": [flag for flag in shown if flag in found]}
