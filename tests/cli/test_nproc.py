"""`dite generate --nproc`: ranks that the command starts itself, real processes throughout."""

import json
import os
import subprocess
import sys

import pytest

DRAW = ("--class", "ship", "-n", "2", "--steps", "3", "--guidance", "2")


def dite(*arguments, **environment):
    """The command line as a user runs it; never longer than two minutes."""
    command = [sys.executable, "-m", "dite", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False)


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.png"))}


@pytest.fixture(scope="module")
def shared(model_folder_once, tmp_path_factory):
    """What `--nproc 2 --codec none` drew, and its answer."""
    folder = tmp_path_factory.mktemp("shared") / "pictures"
    done = dite("generate", model_folder_once, *DRAW, "--nproc", 2, "--codec", "none", "-o", folder, "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_two_ranks_draw_what_one_device_draws(shared, model_folder_once, run, tmp_path):
    alone = run("generate", model_folder_once, *DRAW, "-o", tmp_path / "alone", "--json")
    assert alone.document["exchange"] is None
    assert pictures(shared[0]).keys() == pictures(tmp_path / "alone").keys() and len(pictures(shared[0])) == 2


def test_the_answer_counts_what_was_exchanged(shared):
    exchange = shared[1]["exchange"]
    assert exchange["ranks"] == 2 and exchange["mode"] == "kv_gather" and exchange["calls"] == 3
    assert exchange["bytes_sent"] > exchange["bytes_raw"] > 0


def test_the_answer_says_which_model_it_is_of(shared, model_folder_once, run, tmp_path):
    (tmp_path / "generate.json").write_text(json.dumps(shared[1]))
    page = run("report", model_folder_once, "--exchange", tmp_path / "generate.json", "-o", tmp_path / "page", "--json")
    assert page.code == 0, page.err
    assert page.document["exchange"][0]["model_sha256"] == page.document["model"]["sha256"]["float32"] == shared[1]["model_sha256"]


def test_a_codec_sends_fewer_bytes(shared, model_folder_once, tmp_path):
    done = dite("generate", model_folder_once, *DRAW, "--nproc", 2, "--codec", "int2", "-o", tmp_path / "small", "--json")
    assert json.loads(done.stdout)["exchange"]["bytes_sent"] < 0.8 * shared[1]["exchange"]["bytes_sent"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--nproc", 2, "--mode", "rings"), "did you mean ring"),
        (("--nproc", 3, "--mode", "cfg+ring"), "cfg degree 2 must divide"),
        (("--mode", "cfg"), "cfg degree 2 must divide"),
        (("--nproc", 2, "--codec", "missing.json"), "missing.json"),
        (("--nproc", 2, "--codec", "int3"), "no codec named 'int3'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(flags, message, model_folder_once, run, tmp_path):
    outcome = run("generate", model_folder_once, *DRAW, *flags, "-o", tmp_path / "out")
    assert outcome.code == 2 and message in outcome.err, outcome.err
    assert not (tmp_path / "out").exists()


def test_what_the_ranks_refuse_is_said_once(model_folder_once, tmp_path):
    done = dite("generate", model_folder_once, *DRAW, "--nproc", 3, "--mode", "pipefusion", "-o", tmp_path / "out", "--json")
    assert done.returncode == 3 and "2 blocks" in json.loads(done.stdout)["error"]["why"]


def test_a_rank_that_dies_ends_the_command_with_an_error(model_folder_once, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os, signal, sys\nif os.environ.get('RANK') == '1': os.kill(os.getpid(), signal.SIGKILL)\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = dite("generate", model_folder_once, *DRAW, "--nproc", 2, "-o", tmp_path / "out", PYTHONPATH=path)
    assert done.returncode == 1 and "rank 1 ended with signal SIGKILL" in done.stderr, done.stderr


def test_inspect_says_which_modes_a_model_has(model_folder_once, run):
    supports = run("inspect", model_folder_once, "--json").document["supports"]
    assert all(supports[mode]["ok"] for mode in ("parallelize", "kv_gather", "ring", "ulysses", "displaced", "pipefusion", "cfg"))


def test_what_gloo_says_on_stdout_while_ranks_meet_goes_to_stderr():
    code = """
import ctypes
from dite.parallel.launch import keeping_stdout
print("before")
with keeping_stdout():
    ctypes.CDLL(None).puts(b"[Gloo] hello")
print("after")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "before\nafter\n" and done.stderr == "[Gloo] hello\n"
