"""`dite serve`: an image server for one model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dite.cli import options
from dite.cli.output import Answer, note, print_json
from dite.cli.sharing import Sharing
from dite.errors import UsageError

LEAST_KEY_CHARS = 16

Port = Annotated[int, typer.Option("--port", help="Port to listen on; 0 takes any that is free.", min=0, max=65535)]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; any but this machine's own needs --api-key-file.")]
KeyFile = Annotated[Path | None, typer.Option("--api-key-file", metavar="FILE", help="File with the key that clients must send.", show_default=False)]
MaxQueue = Annotated[
    int, typer.Option("--max-queue", help="Pictures (of the default size and steps) that may wait; more are refused with 429.", min=0)
]
MaxBatch = Annotated[int, typer.Option("--max-batch", help="Pictures drawn at once.", min=1)]
Batching = Annotated[
    str,
    typer.Option("--batching", help="continuous: requests join at the next step. dynamic: requests of one kind begin together. none: one at a time."),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        "--micro-batch",
        help="Rows of every forward, padded: pictures then have the same bits whatever else is being drawn.",
        min=1,
        show_default=False,
    ),
]
Name = Annotated[str | None, typer.Option("--name", help="What clients call the model; MODEL itself, or its folder's name.", show_default=False)]
Engine = Annotated[str, typer.Option("--engine", help="local, or ray: replicas on a Ray cluster behind one address (needs dite\\[ray]).")]
Replicas = Annotated[int, typer.Option("--replicas", help="With --engine ray: how many, each with its own ranks.", min=1)]
SetServer = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, as limits.steps=100 or max_restarts=10; --dry-run lists them. Repeatable."),
]


def serve(
    model: options.Model,
    port: Port = 8000,
    host: Host = "127.0.0.1",
    api_key_file: KeyFile = None,
    name: Name = None,
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps where a request doesn't say.", min=1)] = 50,
    guidance: Annotated[float, typer.Option("--guidance", help="Guidance where a request doesn't say.", min=0.0)] = 4.0,
    nproc: options.Nproc = None,
    mode: options.Mode = "kv_gather",
    codec: options.Codec = "int4",
    order: options.Order = 2,
    batching: Batching = "continuous",
    max_batch: MaxBatch = 8,
    micro_batch: MicroBatch = None,
    max_queue: MaxQueue = 64,
    engine: Engine = "local",
    replicas: Replicas = 1,
    set: SetServer = None,
    device: options.Device = "cpu",
    dtype: options.Precision = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> Answer | int:
    """Serve pictures over HTTP: OpenAI's images API, metrics, and a page to try it at /."""
    from dite.recipe import override_key, validate
    from dite.server.settings import ServerSettings

    if engine not in ("local", "ray"):
        raise UsageError(f"no engine named {engine!r}", "engines are local and ray", "leave --engine out")
    if replicas > 1 and engine == "local":
        raise UsageError(
            f"--replicas {replicas} needs --engine ray", "a local server is one replica", "put several servers behind a balancer, or use Ray"
        )
    sharing = Sharing.of(nproc, mode, codec, order)
    if sharing.rank or (sharing.degree > 1 and not sharing.to_start):
        raise UsageError("dite serve was started by torchrun", "it starts its own ranks", f"use dite serve {model} --nproc {sharing.degree}")
    values: dict[str, Any] = {"model": model, "port": port, "host": host, "name": name or "", "steps": steps, "guidance": guidance}
    values |= {"nproc": sharing.degree, "mode": mode, "codec": codec, "order": order, "batching": batching, "max_batch": max_batch}
    values |= {"micro_batch": micro_batch, "max_queue": max_queue, "device": device, "dtype": dtype and dtype.value}
    for override in set or []:
        refuse_a_flags_key(override)
        values = override_key(values, override)
    settings = validate(ServerSettings, values | {"api_key": read_key(api_key_file)}, "server")
    if dry_run:
        document = {"dry_run": True, "engine": engine, "replicas": replicas, "settings": settings.model_dump(mode="json")}
        return Answer(document, "\n".join(f"{key}: {value}" for key, value in document["settings"].items()))
    check_model(model)
    if engine == "ray":
        from dite.server.ray import serve_on_ray

        serve_on_ray(settings, replicas, started=lambda url: announce(settings, url, json))
    else:
        from dite.server.listen import run

        run(settings, started=lambda url: announce(settings, url, json))
    return 0


FLAG_OF = {"model": "MODEL", "api_key": "--api-key-file", "dtype": "--dtype"} | {
    name: "--" + name.replace("_", "-")
    for name in (
        "port",
        "host",
        "name",
        "device",
        "steps",
        "guidance",
        "nproc",
        "mode",
        "codec",
        "order",
        "batching",
        "max_batch",
        "micro_batch",
        "max_queue",
    )
}


def refuse_a_flags_key(override: str) -> None:
    """Raise UsageError for a `--set` of what a flag sets: two places for one setting, and a key in the list of processes."""
    key = override.partition("=")[0].partition(".")[0].strip()
    if key in FLAG_OF:
        why = "a key on the command line can be read by everyone on this machine" if key == "api_key" else "it has a flag of its own"
        raise UsageError(f"--set can't set {key}", why, f"use {FLAG_OF[key]}")


def announce(settings: Any, url: str, as_json: bool) -> None:
    """Say where the server is, once it can draw."""
    if as_json:
        print_json({"url": url, "model": settings.served_name}, sys.__stdout__)
        sys.__stdout__.flush()
    note(f"{settings.served_name} is served at {url} (a page to try it: {url}/, OpenAI clients: base_url={url}/v1). Ctrl-C ends it.")


def check_model(model: str) -> None:
    """Refuse a model that isn't there before any process is started; without torch."""
    if not model.startswith("builtin:") and not Path(model).exists() and model.count("/") != 1:
        raise UsageError(
            f"no model at {model}", "it is neither a folder, nor a hub id of the form owner/name, nor builtin:NAME", "try builtin:cifar10-dit"
        )


def read_key(path: Path | None) -> str | None:
    """The first line of a file. Raises UsageError for one that is too short to be a secret."""
    if path is None:
        return None
    if not path.is_file():
        raise UsageError(
            f"no key file at {path}", "--api-key-file names a file whose first line is the key", "write one, for example with openssl rand -hex 32"
        )
    key = (path.read_text(encoding="utf-8").splitlines() or [""])[0].strip()
    if len(key) < LEAST_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        rule = f"a key has at least {LEAST_KEY_CHARS} printable ASCII characters and no spaces; this one has {len(key)} characters"
        raise UsageError(f"the key in {path} can't be used", rule, "make one with openssl rand -hex 32")
    return key
