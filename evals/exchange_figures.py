"""The figures of parallel inference in docs/results: steps over real slow links, and what the cost model foretells of links that aren't here.

    python evals/exchange_figures.py [--out FOLDER] [--rounds N]        half an hour; needs root for network namespaces, and a quiet machine

`exchange-speed.json`: documents of `dite bench exchange` for a model of the size of DiT-512 (some of its blocks) and for the built-in one.
`exchange-speed.png`: milliseconds a step against bandwidth, all modes. `exchange-predictions.json`: predictions, and how far the model behind them
was off where it could be checked.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from dite.parallel.cost import ASSUMED_GPU_SPEEDS, image_seconds, predict
from dite.parallel.traffic import Layout, bytes_per_image
from dite.parallel.workload import LINKS, WORKLOADS
from dite_evals.exchange_plot import draw
from dite_evals.exchange_speed import CODECS, IMAGE_STEPS, MODES, SYNCHRONOUS, Asked, bench_exchange
from dite_kernels.bench.document import write

SHAPED = ("100mbit", "300mbit", "1gbit", "unshaped")
ERROR_BOUND = 0.05
NOTES = (
    "Random weights amplify rounding: raw ring differs from one device by the order of bf16 sums only, and its error says by how much. What codecs "
    "cost in quality is measured on trained weights (exchange-quality.json).",
    "The network is emulated on the same two cores as both ranks: what travels takes processor time from what is computed, which hides less than a "
    "network card would.",
)
PREDICTED_LINKS = ("10gbe", "pcie4", "nvlink")
PREDICTED_RANKS = (4, 8)


def benches(rounds: int) -> dict[str, Asked]:
    """By the title of its panel."""
    large = {"size": "dit-xl-2", "tokens": 1024, "layers": 6}
    return {
        "DiT-XL/2 for 512 px, 6 of 28 blocks, random weights, batch 1": Asked(large, links=SHAPED, steps=8, rounds=rounds),
        "built-in CIFAR-10 DiT, 16 tokens, both guidance branches": Asked(
            "builtin:cifar10-dit", modes=(*MODES, "cfg"), links=SHAPED, steps=12, rounds=rounds, batch_size=2
        ),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each link: what is fastest, and by how much."""
    found = []
    for link in dict.fromkeys(row["link"] for row in rows):
        own = [row for row in rows if row["link"] == link]
        several = [row for row in own if row["ranks"] > 1]
        good = [row for row in several if row["codec"] != "none" and row["latent_relative_error"] < ERROR_BOUND]
        sync = [row for row in good if row["mode"] in SYNCHRONOUS]
        pipes = {row["codec"]: row["seconds_per_step"] for row in own if row["mode"] == "pipefusion"}
        found.append(
            {
                "link": link,
                "fastest": _named(min(own, key=_seconds)),
                "fastest_raw": _named(min((row for row in several if row["codec"] == "none"), key=_seconds)),
                "fastest_compressed_within_error_bound": _named(min(good, key=_seconds)) if good else None,
                "fastest_compressed_synchronous_within_error_bound": _named(min(sync, key=_seconds)) if sync else None,
                "pipefusion_raw_over_best_compressed": pipes["none"] / min(time for codec, time in pipes.items() if codec != "none"),
            }
        )
    return found


def prediction_quality(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far predictions were off, of all rows on several ranks and by mode."""
    off = [(row["mode"], abs(row["prediction_error"])) for row in rows if row["ranks"] > 1 and "prediction_error" in row]
    by_mode = {mode: median(error for name, error in off if name == mode) for mode in dict.fromkeys(mode for mode, _ in off)}
    within = sum(error <= 0.2 for _, error in off)
    errors = [error for _, error in off]
    return {"rows": len(off), "within_20_percent": within, "median": median(errors), "worst": max(errors), "median_by_mode": by_mode}


def predictions() -> list[dict[str, Any]]:
    """Every mode and codec on GPUs that aren't here."""
    found = []
    for name, workload in WORKLOADS.items():
        alone = image_seconds(workload, LINKS["pcie4"], Layout("one_device"), IMAGE_STEPS)
        for link in PREDICTED_LINKS:
            for ranks in PREDICTED_RANKS:
                for mode, codec in ((mode, codec) for mode in MODES for codec in CODECS):
                    layout = Layout(mode, codec, ranks)
                    step = predict(workload, LINKS[link], layout, False, ASSUMED_GPU_SPEEDS)
                    seconds = image_seconds(workload, LINKS[link], layout, IMAGE_STEPS, ASSUMED_GPU_SPEEDS)
                    row = {"prediction": True, "workload": name, "link": link, "ranks": ranks, "mode": mode, "codec": codec}
                    row |= {"seconds_per_step": step.seconds, "exposed_seconds": step.exposed_s, "hidden_seconds": step.hidden_s}
                    row |= {"bytes_per_image": bytes_per_image(workload, layout, IMAGE_STEPS), "image_seconds": seconds}
                    found.append(row | {"ratio_to_one_device": alone / seconds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    save(asked.out, {title: bench_exchange(one) for title, one in benches(asked.rounds).items()})


def save(out: Path, documents: dict[str, dict[str, Any]]) -> None:
    """Write the three files."""
    models = []
    for title, one in documents.items():
        models.append({"title": title, "summary": summary(one["rows"]), "cost_model": prediction_quality(one["rows"]), **one})
    command = {"command": "python evals/exchange_figures.py"}
    write(command | {"error_bound": ERROR_BOUND, "notes": NOTES, "models": models}, out / "exchange-speed.json")
    draw(documents, out / "exchange-speed.png")
    assumed = {
        "note": "predictions of the cost model, not measurements: workloads, links and codec speeds are as given here",
        "image_steps": IMAGE_STEPS,
        "workloads": {name: asdict(one) for name, one in WORKLOADS.items()},
        "links": {name: asdict(LINKS[name]) for name in PREDICTED_LINKS},
        "codec_speeds": {name: asdict(one) for name, one in ASSUMED_GPU_SPEEDS.items()},
        "checked_against_shaped_runs": {one["title"]: one["cost_model"] for one in models},
    }
    write(command | assumed | {"rows": predictions()}, out / "exchange-predictions.json")


def _seconds(row: dict[str, Any]) -> float:
    return row["seconds_per_step"]


def _named(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("mode", "codec", "seconds_per_step", "ratio_to_one_device", "ratio_to_best_raw_synchronous", "latent_relative_error")
    return {key: row[key] for key in keys}


if __name__ == "__main__":
    main()
