"""How long a step takes on several ranks, by mode, codec and link, against one device: `dite bench exchange`, and the figures in docs/results.

A rank stands for a device: a process of one thread. All candidates run in the same ranks, round after round in shuffled order, on one link after the
other, so that a disturbance meets all of them; ratios are medians over rounds of two times of one round. One device is rank 0 alone while the other
ranks sleep, which is the best that one device can do here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dite.errors import DiteError, UnsupportedEnvironment, UsageError
from dite.parallel.cost import CodecSpeed, Prediction, predict
from dite.parallel.group import RENDEZVOUS
from dite.parallel.topology import parse
from dite.parallel.traffic import Layout, step_bytes
from dite.parallel.workload import Link, Workload
from dite_evals import links
from dite_evals.exchange_ranks import ONE_DEVICE, Settings
from dite_evals.report import environment

Progress = Callable[[str, int, int], None]
SYNCHRONOUS = ("kv_gather", "ring", "ulysses")
MODES = (*SYNCHRONOUS, "displaced", "pipefusion")
CODECS = ("none", "int8", "int4", "int2", "int1")
IMAGE_STEPS = 50  # of the image whose seconds and bytes are given: one keyframe and 49 others
ORDER = 2


@dataclass(frozen=True)
class Asked:
    """`model`: a folder, a hub id, builtin:NAME, or {"size", "tokens", "layers"} of a random one. Every mode with every codec; `none` is raw."""

    model: Any
    ranks: int = 2
    modes: Sequence[str] = MODES
    codecs: Sequence[str] = CODECS
    links: Sequence[str] = ("unshaped",)
    steps: int = 6
    rounds: int = 3
    batch_size: int = 1

    def check(self) -> None:
        """Raises UsageError and UnsupportedEnvironment for what can be known beforehand."""
        from dite.parallel.codecs import codec

        for mode in self.modes:
            parse(mode, self.ranks)
        for name in self.codecs:
            codec(name)
        rates = [links.rate_named(name) for name in self.links]
        if self.steps < 2 or self.rounds < 1:
            raise UsageError(f"{self.steps} steps in {self.rounds} rounds", "a keyframe and another step are needed, and a round", "use --steps 6")
        halves = next((mode for mode in self.modes if mode.startswith("cfg")), None)
        if halves and self.batch_size < 2:
            raise UsageError(f"mode {halves} can't share out a batch of 1", "its ranks take different rows of the batch", "use --batch-size 2")
        if any(rate.bits_per_s for rate in rates) and links.refusal():
            raise UnsupportedEnvironment("this machine has no slow links", links.refusal(), "use --links unshaped, or run it as root")

    def candidates(self) -> list[tuple[str, str, int]]:
        """(mode, codec, residual order)."""
        # cfg sends the output only, which travels raw.
        found = [(mode, codec, ORDER if codec != "none" else 0) for mode in self.modes for codec in self.codecs]
        return [one for one in found if one[0] != "cfg" or one[1] == "none"]


def bench_exchange(asked: Asked, *, progress: Progress | None = None) -> dict[str, Any]:
    """The document: environment, rows, and what links and probes measured. Raises UsageError, UnsupportedEnvironment, DiteError."""
    asked.check()
    settings = Settings(asked.model, asked.batch_size, asked.steps, asked.rounds, asked.candidates(), list(asked.links))
    runs, probes, carried = [], defaultdict(list), {}
    total = asked.rounds * len(asked.links) * (1 + len(settings.candidates))
    with ExitStack() as stack:
        shaped = any(links.rate_named(name).bits_per_s for name in asked.links)
        network = stack.enter_context(links.Network(asked.ranks)) if shaped else None
        ranks = stack.enter_context(Ranks(asked.ranks, settings, network))
        for told in ranks.lines():
            if "ask" in told:
                name = told["ask"]["link"]
                if network is not None:
                    network.shape(links.rate_named(name))
                    if name not in carried:
                        carried[name] = network.measured_bytes_per_s()
                ranks.answer()
            elif "probe" in told:
                probes[told["probe"]["link"]].append(told["probe"])
            else:
                runs.append(told["run"])
                if progress:
                    progress(f"trajectories: {' '.join(runs[-1]['candidate'][:2])} at {runs[-1]['link']}", len(runs), total)
    path = "veth" if network is not None else "loopback"
    found = [{"link": name, "path": path, "measured_bytes_per_s": carried.get(name), "probes": probes[name]} for name in asked.links]
    configuration = asdict(asked) | {"dtype": "bfloat16", "threads_per_rank": 1, "guidance": "both branches" if asked.batch_size == 2 else "none"}
    return {"environment": environment(), "configuration": configuration, "links": found, "rows": rows(runs, found, asked)}


def rows(runs: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]], asked: Asked) -> list[dict[str, Any]]:
    """One for each candidate and link."""
    found = []
    for link in measured:
        own: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
        for run in runs:
            if run["link"] == link["link"]:
                own[tuple(run["candidate"])].append(run)
        model = Calibrated.of(link["probes"])
        steady = {candidate: [median(run["seconds"][1:]) for run in some] for candidate, some in own.items()}
        raw = {candidate: times for candidate, times in steady.items() if candidate[1] == "none" and candidate[0] in SYNCHRONOUS}
        best = min(raw, key=lambda candidate: median(raw[candidate]), default=None)
        for candidate, some in own.items():
            row = _row(candidate, some, link, model, asked)
            row["ratio_to_one_device"] = _ratio(steady[ONE_DEVICE, "none", 0], steady[candidate])
            row["ratio_to_best_raw_synchronous"] = _ratio(raw[best], steady[candidate]) if best else None
            found.append(row)
    return found


def _row(candidate: tuple[str, str, int], some: list[dict[str, Any]], link: dict[str, Any], model: Calibrated, asked: Asked) -> dict[str, Any]:
    mode, codec, order = candidate
    ranks = 1 if mode == ONE_DEVICE else asked.ranks
    layout = _layout(mode, codec, ranks, order)
    steady_s = median(second for run in some for second in run["seconds"][1:])
    keyframe_s = median(run["seconds"][0] for run in some)
    waited_s = median(second for run in some for second in run["waited"][1:])
    sent = max(count for run in some for count in run["sent"][1:])
    bandwidth = link["measured_bytes_per_s"] or model.link.bandwidth_bytes_per_s
    wire_s = sent / bandwidth if ranks > 1 else 0.0
    row = {
        "mode": mode,
        "codec": codec,
        "order": order,
        "ranks": ranks,
        "link": link["link"],
        "seconds_per_step": steady_s,
        "keyframe_seconds": keyframe_s,
        "image_seconds": keyframe_s + (IMAGE_STEPS - 1) * steady_s,
        "bytes_per_step": sent,
        "keyframe_bytes": max(run["sent"][0] for run in some),
        "exposed_seconds": waited_s,
        "hidden_seconds": max(0.0, wire_s - waited_s),
        "latent_relative_error": max(run["latent_relative_error"] for run in some),
    }
    if layout is not None:
        now, first = model.predict(layout, False), model.predict(layout, True)
        row |= {
            "bytes_per_step_formula": step_bytes(model.workload, layout),
            "keyframe_bytes_formula": step_bytes(model.workload, layout, first=True),
            "image_bytes": row["keyframe_bytes"] + (IMAGE_STEPS - 1) * sent,
            "predicted_seconds": now.seconds,
            "predicted_keyframe_seconds": first.seconds,
            "prediction_error": now.seconds / steady_s - 1,
            "predicted": asdict(now),
        }
    return row


@dataclass(frozen=True)
class Calibrated:
    """The cost model with what the probe measured on one link."""

    workload: Workload
    link: Link
    speeds: dict[str, CodecSpeed]

    @classmethod
    def of(cls, probes: Sequence[dict[str, Any]]) -> Calibrated:
        """Of several probes the one whose forward was the quickest: the least disturbed."""
        probe = min(probes, key=lambda one: one["workload"]["compute_s"])
        speeds = {name: CodecSpeed(**speed) for name, speed in probe["speeds"].items()}
        return cls(Workload(**probe["workload"]), Link(**probe["measured_link"]), speeds)

    def predict(self, layout: Layout, first: bool) -> Prediction:
        """One step."""
        return predict(self.workload, self.link, layout, first, self.speeds)


def _layout(mode: str, codec: str, ranks: int, order: int) -> Layout | None:
    """None for products that the formulas don't know."""
    if mode == "cfg":
        return Layout(ONE_DEVICE, ranks=ranks, cfg=True)
    cfg = mode.startswith("cfg+")
    mode = mode.removeprefix("cfg+")
    return None if "+" in mode else Layout(mode, codec, ranks, cfg, order=order)


def _ratio(baseline: list[float], own: list[float]) -> float:
    return median(one / other for one, other in zip(baseline, own, strict=True))


class Ranks:
    """The processes; a context manager. They write their logs beside the file through which they meet."""

    def __init__(self, count: int, settings: Settings, network: links.Network | None = None):
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        path = self.folder / "settings.json"
        path.write_text(json.dumps(asdict(settings)))
        shared = os.environ | {"WORLD_SIZE": str(count), RENDEZVOUS: str(self.folder / "ranks"), "OMP_NUM_THREADS": "1"}
        shared |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "GLOO_SOCKET_IFNAME": links.INTERFACE if network else "lo"}
        self.processes = []
        for rank in range(count):
            words = [sys.executable, "-P", "-m", "dite_evals.exchange_ranks", str(path)]
            words = network.command(rank, words) if network else words
            log = self._stack.enter_context((self.folder / f"{rank}.log").open("w"))
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE} if rank == 0 else {"stdin": subprocess.DEVNULL, "stdout": log}
            self.processes.append(subprocess.Popen(words, env=shared | {"RANK": str(rank)}, stderr=log, text=True, **streams))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self._stack.close()

    def lines(self) -> Iterator[dict[str, Any]]:
        """What rank 0 tells. Every wait of a rank has a deadline, and so this ends. Raises DiteError when a rank failed."""
        for line in self.processes[0].stdout:
            yield json.loads(line)
        for rank, process in enumerate(self.processes):
            if process.wait(60):
                last = ((self.folder / f"{rank}.log").read_text().strip().splitlines() or ["it printed nothing"])[-1]
                raise DiteError(f"rank {rank} of the bench ended with {process.returncode}", last, "run it again with --verbose, or fewer modes")

    def answer(self) -> None:
        """The link that was asked for is there."""
        self.processes[0].stdin.write("\n")
        self.processes[0].stdin.flush()
