"""Throughput and latency of the server: written to docs/results/serve-speed.json.

    python evals/serve_speed.py --out docs/results/serve-speed.json [--model builtin:cifar10-dit] [--seconds 20] [--rounds 5]

Everything that is compared is measured by turns in one run. The measurements: how much batches gain in the model itself and how much of that the
server keeps; latency at multiples of its capacity; continuous against dynamic batches where requests have unlike steps; what HTTP adds; the start.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "evals")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from dite_evals.serve_load import closed, opened  # noqa: E402
from dite_evals.serving import Answer, Server, call, draw, served  # noqa: E402
from dite_kernels.bench.environment import environment  # noqa: E402

STEPS, GUIDANCE, BATCH = 20, 2.0, 8
THREADS = 1  # for the model: the other core is the server's and the clients'
SETTINGS = ("--steps", str(STEPS), "--guidance", str(GUIDANCE), "--max-batch", str(BATCH))
WANTED = ["throughput", "overhead", "latency", "neighbours", "batching"]
MIXED_STEPS = (10, 20, 50, 100)

DIRECT = """
import sys, time
from dite.models.load import load_pipeline
from dite.sampling import SampleSettings, sample
pipe = load_pipeline(sys.argv[1])
for line in sys.stdin:
    rows, pictures = map(int, line.split())
    began = time.perf_counter()
    for _ in sample(pipe, [3] * pictures, range(pictures), SampleSettings({steps}, {guidance}, rows)): pass
    print((time.perf_counter() - began) / pictures, flush=True)
"""


class Direct:
    """The model without a server, in a process of its own: seconds a picture in batches of `rows`."""

    def __init__(self, model: str):
        code = DIRECT.format(steps=STEPS, guidance=GUIDANCE)
        variables = {"GOMP_SPINCOUNT": "10000"} | os.environ | {"OMP_NUM_THREADS": str(THREADS)}  # as the command line sets it
        self.process = subprocess.Popen([sys.executable, "-c", code, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)

    def seconds(self, rows: int, pictures: int) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{rows} {pictures}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)


def fields(number: int) -> dict[str, Any]:
    return {"class_labels": number % 10, "prompt": "", "seed": number, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}


def throughput(server: Server, model: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Pictures a second: the model alone one by one and in batches, the server with more clients than it has places."""
    direct, rows = Direct(model), []
    try:
        direct.seconds(1, 2), direct.seconds(BATCH, BATCH)
        for _ in range(rounds):
            one, batch = 1 / direct.seconds(1, 8), 1 / direct.seconds(BATCH, 4 * BATCH)
            load = asyncio.run(closed(server.address, 2 * BATCH, seconds, fields))
            rows.append({"one_by_one": one, "batches": batch, "server": load.steady, "requests": len(load.answers)})
    finally:
        direct.close()
    gain = statistics.median(row["batches"] / row["one_by_one"] for row in rows)
    kept = statistics.median(row["server"] / row["batches"] for row in rows)
    return {
        "what": f"pictures a second, batches of {BATCH}",
        "rounds": rows,
        "batching_gain": gain,
        "server_of_batches": kept,
        "goal": "at least 0.8",
    }


def latency(server: Server, seconds: float) -> list[dict[str, Any]]:
    """Open loop at multiples of the capacity that is measured just before."""
    rows = []
    for multiple in (0.5, 1, 2, 4):
        load = asyncio.run(closed(server.address, 2 * BATCH, seconds, fields))
        capacity = load.steady
        loaded = asyncio.run(opened(server.address, multiple * capacity, seconds, fields, seed=int(multiple * 2)))
        rows.append({"load": multiple, "capacity": capacity, **loaded.row()})
        print(rows[-1], flush=True)
    return rows


def batching(model: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Requests of 10 to 100 steps: how long they wait, and until their picture. At half of what *dynamic* batches can draw, where neither server's
    queue grows, and at 0.7 of what continuous ones can, which may be more than dynamic ones keep up with."""
    chance = random.Random(0)
    steps = [chance.choice(MIXED_STEPS) for _ in range(10_000)]

    def mixed(number: int) -> dict[str, Any]:
        return fields(number) | {"num_inference_steps": steps[number]}

    loads = {}
    with (
        served(model, *SETTINGS, "--max-queue", "1000", threads=THREADS) as continuous,
        served(model, *SETTINGS, "--max-queue", "1000", "--batching", "dynamic", threads=THREADS) as dynamic,
    ):
        servers = {"continuous": continuous, "dynamic": dynamic}
        capacity = {name: asyncio.run(closed(one.address, 2 * BATCH, 2 * seconds, mixed)).steady for name, one in servers.items()}
        for load, rate in {"half_of_dynamic": 0.5 * capacity["dynamic"], "most_of_continuous": 0.7 * capacity["continuous"]}.items():
            rows = []
            for turn in range(rounds):
                pair = {name: asyncio.run(opened(one.address, rate, seconds, mixed, seed=turn)).row() for name, one in servers.items()}
                rows.append(pair)
                print(load, {name: (row["queue_s"], row["latency_s"]) for name, row in pair.items()}, flush=True)
            loads[load] = {"requests_per_second": rate, "of_capacity": {name: rate / most for name, most in capacity.items()}} | _compared(rows)
    return {
        "what": f"steps {MIXED_STEPS} at random",
        "capacity": capacity,
        **loads,
        "goal": "median wait at most 0.5 of that of dynamic batches, at half of their capacity",
    }


def _compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    waits = {name: statistics.median(row[name]["queue_s"]["p50"] for row in rows) for name in ("continuous", "dynamic")}
    return {
        "median_wait_s": waits,
        "median_wait_ratio": _ratio(rows, "queue_s", "p50"),
        "median_latency_ratio": _ratio(rows, "latency_s", "p50"),
        "p99_latency_ratio": _ratio(rows, "latency_s", "p99"),
        "rounds": rows,
    }


def _ratio(rows: list[dict[str, Any]], what: str, which: str) -> float:
    return statistics.median(row["continuous"][what][which] / max(row["dynamic"][what][which], 1e-4) for row in rows)


def overhead(server: Server, count: int = 40) -> dict[str, Any]:
    """What a client waits beyond the drawing itself, one request at a time."""

    async def measure() -> tuple[list[float], list[float]]:
        extra, probes = [], []
        for number in range(count):
            reply = await draw(server.address, **fields(number))
            extra.append((reply.seconds - reply.json["dite"]["timings"]["draw_s"]) * 1e3)
            probes.append((await call(server.address, "GET", "/health")).seconds * 1e3)
        return extra, probes

    extra, probes = asyncio.run(measure())
    quantiles = statistics.quantiles(extra, n=20)
    return {
        "what": "milliseconds between a client's request and its reply beyond the drawing",
        "p50": statistics.median(extra),
        "p95": quantiles[18],
        "health_p50": statistics.median(probes),  # what this machine takes for a request that does nothing
        "goal": "under 5",
    }


def neighbours(model: str, count: int = 48) -> dict[str, Any]:
    """Do other requests change a picture? Each drawn among seven others, and alone: levels (of 255) by which they differ at most."""
    wanted = [
        fields(number) | {"num_inference_steps": MIXED_STEPS[number % 3], "guidance_scale": (1.0, 2.0, 4.0)[number % 3]} for number in range(count)
    ]

    async def compare(server: Server) -> list[int]:
        among: list[bytes] = []
        for start in range(0, count, BATCH):
            replies = await asyncio.gather(*(draw(server.address, **one) for one in wanted[start : start + BATCH]))
            among += [_picture(reply) for reply in replies]
        alone = [_picture(await draw(server.address, **one)) for one in wanted]
        return [_largest_difference(*pair) for pair in zip(among, alone, strict=True)]

    found = {"what": f"{count} pictures of unlike steps and guidance, among seven others and alone: largest difference of a pixel, in levels of 255"}
    for name, flags in {"continuous": (), f"micro_batch {BATCH}": ("--micro-batch", str(BATCH))}.items():
        with served(model, *SETTINGS, *flags, threads=THREADS) as server:
            levels = asyncio.run(compare(server))
        found[name] = {"most": max(levels), "identical": levels.count(0), "pictures": count}
    return found


def _picture(reply: Answer) -> bytes:
    return base64.b64decode(reply.json["data"][0]["b64_json"])


def _largest_difference(a: bytes, b: bytes) -> int:
    pixels = [np.asarray(Image.open(io.BytesIO(one))).astype(int) for one in (a, b)]
    return int(np.abs(pixels[0] - pixels[1]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/serve-speed.json")
    parser.add_argument("--model", default="builtin:cifar10-dit")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=WANTED)
    options = parser.parse_args()
    command = f"python evals/serve_speed.py --out docs/results/{options.out.name} --model {options.model}"
    command += f" --seconds {options.seconds:g} --rounds {options.rounds}"
    document = json.loads(options.out.read_text()) if options.out.exists() and options.only else {}
    document |= {"command": command, "environment": environment(), "model": options.model, "steps": STEPS, "guidance": GUIDANCE, "threads": THREADS}
    wanted = options.only or WANTED

    def keep(name: str, result: Any) -> None:
        document[name] = result
        options.out.write_text(json.dumps(document, indent=1) + "\n")

    with served(options.model, *SETTINGS, threads=THREADS) as server:
        keep("ready_s", round(server.ready_s, 2))
        if "throughput" in wanted:
            keep("throughput", throughput(server, options.model, options.seconds, options.rounds))
            print({name: value for name, value in document["throughput"].items() if name != "rounds"}, flush=True)
        if "overhead" in wanted:
            keep("overhead", overhead(server))
            print(document["overhead"], flush=True)
        if "latency" in wanted:
            keep("latency", latency(server, options.seconds))
    if "neighbours" in wanted:
        keep("neighbours", neighbours(options.model))
        print(document["neighbours"], flush=True)
    if "batching" in wanted:
        keep("batching", batching(options.model, options.seconds, options.rounds))
        for load in ("half_of_dynamic", "most_of_continuous"):
            print(load, {name: value for name, value in document["batching"][load].items() if name != "rounds"}, flush=True)


if __name__ == "__main__":
    main()
