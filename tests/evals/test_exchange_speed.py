"""The exchange bench: real ranks on loopback, bytes by formula and by counter, and slow links that leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dite.errors import DiteError, UnsupportedEnvironment, UsageError
from dite_evals import exchange_speed, links
from dite_evals.exchange_speed import Asked, bench_exchange

TINY = {"size": "dit-xl-2", "tokens": 16, "layers": 3, "changes": {"num_attention_heads": 4, "attention_head_dim": 16}}
ROW = {"mode", "codec", "order", "ranks", "link", "seconds_per_step", "bytes_per_step", "latent_relative_error"}
needs_slow_links = pytest.mark.skipif(bool(links.refusal()), reason=f"no slow links here: {links.refusal()}")


@pytest.fixture(scope="module")
def document():
    """Every mode, raw and compressed, on two ranks."""
    return bench_exchange(Asked(TINY, modes=(*exchange_speed.MODES, "cfg"), codecs=("none", "int4"), steps=3, rounds=1, batch_size=2))


def test_rows_have_the_fixed_keys_and_one_device_is_the_baseline(document):
    assert all(row.keys() >= ROW and row["seconds_per_step"] > 0 for row in document["rows"])
    names = {(row["mode"], row["codec"]) for row in document["rows"]}
    assert len(names) == len(document["rows"]) == 1 + 2 * len(exchange_speed.MODES) + 1 and ("cfg", "none") in names
    (one,) = [row for row in document["rows"] if row["mode"] == "one_device"]
    assert (one["ranks"], one["bytes_per_step"], one["latent_relative_error"], one["ratio_to_one_device"]) == (1, 0, 0.0, 1.0)


def test_what_was_sent_is_what_the_formulas_say(document):
    wrong = {
        (row["mode"], row["codec"]): row
        for row in document["rows"]
        if (row["bytes_per_step"], row["keyframe_bytes"]) != (row["bytes_per_step_formula"], row["keyframe_bytes_formula"])
    }
    assert wrong == {}


def test_uneven_shares_are_counted_as_they_are_sent():
    rows = bench_exchange(Asked(TINY, ranks=3, modes=["kv_gather", "ring"], codecs=["int2"], steps=2, rounds=1))["rows"]
    assert all(row["bytes_per_step"] == row["bytes_per_step_formula"] for row in rows)


def test_raw_synchronous_modes_draw_what_one_device_draws(document):
    errors = {row["mode"]: row["latent_relative_error"] for row in document["rows"] if row["codec"] == "none"}
    assert max(errors[mode] for mode in (*exchange_speed.SYNCHRONOUS, "cfg")) < 0.1  # bf16, which random weights amplify
    assert all(row["latent_relative_error"] < 1 for row in document["rows"])


def test_ratios_are_medians_over_rounds_and_not_of_medians():
    def run(mode, turn, seconds):
        times = {"seconds": [9.0, seconds], "waited": [0.0, 0.1], "sent": [8, 4], "latent_relative_error": 0.0}
        return {"candidate": [mode, "none", 0], "link": "unshaped", "round": turn} | times

    runs = [run("one_device", turn, (1.0, 10.0, 3.0)[turn]) for turn in range(3)] + [run("ring", turn, (0.5, 5.0, 3.0)[turn]) for turn in range(3)]
    workload = {"name": "", "layers": 1, "tokens": 4, "width": 4, "heads": 1, "output_channels": 1, "compute_s": 1.0}
    probe = {"workload": workload, "measured_link": {"name": "", "bandwidth_bytes_per_s": 1e6, "latency_s": 0.0}, "speeds": {}}
    measured = [{"link": "unshaped", "measured_bytes_per_s": None, "probes": [probe]}]
    one, ring = exchange_speed.rows(runs, measured, Asked("x", steps=2))
    assert one["ratio_to_one_device"] == 1.0 and ring["ratio_to_one_device"] == 2.0 and ring["keyframe_seconds"] == 9.0


def test_a_model_that_no_rank_can_load_ends_the_bench_with_its_reason(tmp_path):
    with pytest.raises(DiteError, match="rank 0 of the bench ended with 1"):
        bench_exchange(Asked(str(tmp_path / "absent"), modes=["ring"], codecs=["none"]))


def test_what_cannot_be_measured_is_refused_before_ranks_start(monkeypatch):
    monkeypatch.setattr(links, "refusal", lambda: "network namespaces need root")
    with pytest.raises(UnsupportedEnvironment, match="need root"):
        Asked(TINY, links=["unshaped", "100mbit"]).check()
    for wrong in ({"links": ["10mbit"]}, {"modes": ["rings"]}, {"codecs": ["int3"]}, {"steps": 1}):
        with pytest.raises(UsageError):
            Asked(TINY, **wrong).check()


@needs_slow_links
def test_a_slow_link_carries_what_it_should_and_is_gone_afterwards():
    with links.Network(3) as network:
        network.shape(links.RATES["100mbit"])
        slow = network.measured_bytes_per_s(0.4)
        network.shape(links.RATES["unshaped"])
        assert 9e6 < slow < 12.6e6 < network.measured_bytes_per_s(0.2)
        mine = [network.namespace(rank) for rank in range(3)]
        assert set(mine) <= set(os.listdir("/run/netns"))
    assert not set(mine) & set(os.listdir("/run/netns"))


@needs_slow_links
def test_ranks_meet_over_slow_links():
    found = bench_exchange(Asked(TINY, modes=["kv_gather"], codecs=["none"], links=["100mbit"], steps=2, rounds=1))
    (link,) = found["links"]
    assert link["path"] == "veth" and 9e6 < link["measured_bytes_per_s"] < 12.6e6
    assert [row["link"] for row in found["rows"]] == ["100mbit"] * 2


@needs_slow_links
def test_what_a_killed_run_leaves_behind_is_removed_with_its_processes():
    script = (
        "import subprocess, sys, time\nfrom dite_evals import links\nnetwork = links.Network(2).__enter__()\n"
        "inside = subprocess.Popen(network.command(0, ['sh', '-c', 'echo inside; exec sleep 300']), stdout=subprocess.PIPE)\n"
        "inside.stdout.readline()\nprint(network.namespace(0), inside.pid, flush=True)\ntime.sleep(300)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as run:
        namespace, inside = run.stdout.readline().split()
        os.kill(run.pid, signal.SIGKILL)
    assert Path("/run/netns", namespace).exists()
    assert namespace in links.remove_stale()
    assert not Path("/run/netns", namespace).exists() and _ended(int(inside))


def _ended(pid: int, deadline_s: float = 20.0) -> bool:
    """A killed process takes a moment to go where others want the cores."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False
