"""`dite doctor`: what this machine and this installation can do, and the reason for each thing they can't."""

import platform
import sys
from importlib import import_module, metadata, util

from rich.console import Group
from rich.markup import escape
from rich.table import Table

import dite
from dite.cli import options
from dite.cli.output import Answer
from dite.errors import UnsupportedEnvironment

REQUIRED = ("torch", "diffusers", "accelerate", "safetensors", "pydantic", "PyYAML", "typer", "rich", "pillow", "numpy")
OPTIONAL = ("triton", "transformers", "torchmetrics", "peft", "fastapi", "uvicorn", "prometheus_client", "ray")
CPU_FLAGS = ("avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve")


def doctor(json: options.Json = False, no_progress: options.NoProgress = False, verbose: options.Verbose = False) -> Answer:
    """Show versions, processor, devices, and which kernel backends are available."""
    versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    missing = [name for name in REQUIRED if versions[name] is None]
    document = {
        "dite": dite.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cpu": _cpu(),
        "devices": [] if missing else _devices(),
        "backends": [] if missing else _backends(),
    }
    failure = (
        UnsupportedEnvironment(f"missing packages: {', '.join(missing)}", "dite can't run without them", "install dite again with pip")
        if missing
        else None
    )
    return Answer(document, _table(document), failure)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, object]:
    if util.find_spec("dite_kernels") is None:
        return {"name": platform.processor(), "cores": None, "flags": []}
    return import_module("dite_kernels.processor").describe(CPU_FLAGS)


def _devices() -> list[dict[str, object]]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [
        {"name": f"cuda:{index}", "model": card.name, "memory_bytes": card.total_memory, "capability": f"{card.major}.{card.minor}"}
        for index, card in enumerate(cards)
    ]


def _backends() -> list[dict[str, object]]:
    if util.find_spec("dite_kernels") is None:
        return [{"name": "dite_kernels", "ok": False, "reason": "the package dite_kernels is not importable; install dite again"}]
    return import_module("dite_kernels.backends").describe()


def _table(document: dict) -> Group:
    """Four small blocks, in the order in which one looks for a cause."""
    facts = _columns()
    facts.add_row("dite", document["dite"])
    facts.add_row("python", f"{document['python']}  ({sys.executable})")
    facts.add_row("platform", document["platform"])
    cpu = document["cpu"]
    facts.add_row("cpu", f"{cpu['name']}, {cpu['cores']} cores: {' '.join(cpu['flags']) or 'no known flags'}")
    for card in document["devices"]:
        facts.add_row(card["name"], f"{card['model']}, {card['memory_bytes'] / 1e9:.0f} GB, compute capability {card['capability']}")
    if not document["devices"]:
        facts.add_row("gpu", "none that torch can use")
    packages = _columns()
    for name, version in document["versions"].items():
        packages.add_row(name, version or ("[red]missing[/red]" if name in REQUIRED else "[dim]not installed (optional)[/dim]"))
    backends = _columns()
    for backend in document["backends"]:
        backends.add_row(
            f"[{'green' if backend['ok'] else 'dim'}]{backend['name']}[/]", ("yes" if backend["ok"] else "no") + escape(f": {backend['reason']}")
        )
    return Group(facts, "", "[bold]packages[/bold]", packages, "", "[bold]kernel backends[/bold]", backends)


def _columns() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table
