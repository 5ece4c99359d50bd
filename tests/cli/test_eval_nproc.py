"""`dite eval fid` by several ranks, killed and gone on with: real processes, and the same number to the last bit."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from dite_evals.classifier import SmallClassifier
from dite_evals.extractors import load_classifier, save_classifier
from dite_evals.statistics import compute_statistics, write_statistics

N = 250  # three units: of 100 samples, 100 and 50, as micro-batches of 4 and extractor batches of 50 make them


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    save_classifier(SmallClassifier(), folder, "toy", 32)
    (folder / "config.json").write_text("{}")
    images = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_statistics(folder / "statistics.safetensors", compute_statistics(load_classifier(folder), images, "noise", keep=50))
    values = {"name": "mine", "kind": "fid", "n": N, "steps": 1, "guidance": 1.0, "micro_batch": 4, "threads": 1}
    (folder / "mine.yaml").write_text(yaml.safe_dump(values | {"extractor": str(folder), "statistics": str(folder)}))
    return folder / "mine.yaml"


@pytest.fixture(scope="module")
def measure(model_folder_once, protocol):
    """`measure(*flags, start=...)`: the answer of `dite eval fid`, run to its end."""

    def call(*flags, start=(sys.executable, "-m", "dite")):
        command = [*start, "eval", "fid", str(model_folder_once), "--protocol", str(protocol), "--json", *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment(), check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def environment():
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone(measure):
    return measure("--batch-size", 64)


def figures(document):
    return {key: value for key, value in document.items() if key not in ("seconds", "report", "overrides")}


def test_ranks_give_what_one_process_gives_to_the_last_bit(measure, alone, tmp_path):
    shared = measure("--nproc", 3, "--batch-size", 7, "-o", tmp_path / "r")
    assert figures(shared) == figures(alone) and len(alone["features_sha256"]) == 64
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["configuration"]["ranks"] == 3 and report["metrics"]["fid"] == alone["fid"]


def test_ranks_without_an_output_meet_in_a_folder_that_goes_with_them(measure, alone):
    assert figures(measure("--nproc", 2)) == figures(alone)


def test_accelerate_launch_starts_ranks_too(measure, alone, tmp_path):
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    launch += ("--dynamo_backend", "no", "--main_process_port", "0", "-m", "dite")
    assert figures(measure("-o", tmp_path / "r", "--features-only", start=launch)) == figures(alone)


def test_a_run_that_is_killed_goes_on_with_other_ranks_and_gives_the_same(measure, alone, model_folder_once, protocol, tmp_path):
    command = [sys.executable, "-m", "dite", "eval", "fid", str(model_folder_once), "--protocol", str(protocol), "--nproc", "2", "-o"]
    with subprocess.Popen([*command, str(tmp_path / "r")], env=environment(), stderr=subprocess.DEVNULL, start_new_session=True) as run:
        samples, deadline = tmp_path / "r.samples", time.monotonic() + 60
        while len(list(samples.glob("shard-*"))) < 8 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGKILL)
    kept = len(list(samples.glob("shard-*")))
    assert kept >= 8 and not (tmp_path / "r").exists()
    assert figures(measure("-o", tmp_path / "r")) == figures(alone)
    assert len(list(samples.glob("shard-*"))) == -(-N // 4) and not list(samples.glob("**/*.partial"))


def test_ranks_that_are_asked_for_other_settings_all_refuse(measure, model_folder_once, protocol, tmp_path):
    measure("-o", tmp_path / "r")
    command = [sys.executable, "-m", "dite", "eval", "fid", str(model_folder_once), "--protocol", str(protocol), "--nproc", "2", "--seed", "1"]
    done = subprocess.run([*command, "-o", tmp_path / "r"], capture_output=True, text=True, timeout=100, env=environment(), check=False)
    assert done.returncode == 5 and "seed was 0, now 1" in done.stderr and done.stderr.count("belongs to a run with other settings") == 1
