"""What the replicas of `--engine ray` share, without Ray; and what is said where Ray can't be used."""

import asyncio
import sys

import pytest

from dite.errors import UnsupportedEnvironment, UsageError
from dite.server.board import GONE_S, SILENT_S, Board, Roll, Stage, merged
from dite.server.cluster import Share, connected, gist
from dite.server.metrics import Metrics
from dite.server.ray import serve_on_ray
from dite.server.settings import ServerSettings


def page(images):
    metrics = Metrics()
    metrics.images(images)
    metrics.step(0.2, 4)
    metrics.request_done(200, 0.5)
    return metrics.render()[0].decode()


def test_pages_of_replicas_merge_into_one_that_keeps_them_apart():
    lines = merged({"a": page(3), "b": page(5)}).decode().splitlines()
    assert 'dite_images_total{ray_replica="a"} 3.0' in lines and 'dite_images_total{ray_replica="b"} 5.0' in lines
    assert 'dite_requests_total{code="200",ray_replica="b"} 1.0' in lines
    assert 'dite_step_seconds_bucket{le="0.25",ray_replica="a"} 1.0' in lines
    assert len({line for line in lines if line.startswith("# TYPE dite_images")}) == len(
        [line for line in lines if line.startswith("# TYPE dite_images")]
    )
    assert "# TYPE dite_images_total counter" in lines and "# TYPE dite_step_seconds histogram" in lines


def test_a_replica_that_has_fallen_silent_is_forgotten():
    async def story():
        now = 0.0
        board = Board(clock=lambda: now)
        await board.report("a", "ready", "one")
        now = SILENT_S
        assert await board.report("b", "ready", "two") == {"a": "one", "b": "two"}
        now = 2 * SILENT_S - 1
        assert (await board.look())["states"] == {"b": "ready"} and await board.report("b", "ready", "two") == {"b": "two"}

    asyncio.run(story())


def test_a_board_without_words_is_not_taken_for_replicas_that_have_drained():
    roll = Roll()
    assert not roll.is_over(0.0)
    roll.hear({"a": "ready", "b": "draining"}, 0.0)
    roll.hear({}, 6.0)
    roll.hear({"a": "drained"}, 7.0)
    assert not roll.is_over(7.0) and not roll.is_over(GONE_S)
    assert roll.is_over(GONE_S + 1)  # b is gone
    roll.hear({"b": "drained"}, 8.0)
    assert roll.is_over(8.0)


def test_replicas_that_wait_for_a_stage_hear_of_it_whenever_they_ask():
    async def story():
        board = Board()
        waiting = [asyncio.create_task(board.stage_after(stage)) for stage in (Stage.SERVING, Stage.SERVING, Stage.DRAINING)]
        await asyncio.sleep(0)
        await board.go_on_to(Stage.DRAINING)
        assert await asyncio.wait_for(asyncio.gather(*waiting[:2]), 5) == [Stage.DRAINING] * 2 and not waiting[2].done()
        assert await asyncio.wait_for(board.stage_after(Stage.SERVING), 5) == Stage.DRAINING
        await board.go_on_to(Stage.ABORTING)
        await board.go_on_to(Stage.DRAINING)  # never back
        assert await asyncio.wait_for(waiting[2], 5) == Stage.ABORTING

    asyncio.run(story())


def test_a_replica_takes_threads_for_each_rank_and_a_card_for_each_on_cuda(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    for name in ("OMP_NUM_THREADS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert Share.of(ServerSettings(model="m", nproc=2), 3) == Share(3, threads=2, cpus=4, gpus=0)
    assert Share.of(ServerSettings(model="m", nproc=2, device="cuda"), 1) == Share(1, threads=1, cpus=2, gpus=2)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert Share.of(ServerSettings(model="m", nproc=2), 3).cpus == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert Share.of(ServerSettings(model="m", nproc=2), 3).cpus == 10


@pytest.fixture
def clean_environment(monkeypatch):
    """What serve_on_ray sets for Ray is forgotten again."""
    monkeypatch.setattr("os.environ", {})


def test_without_ray_the_extra_is_named(monkeypatch, clean_environment):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedEnvironment, match=r"ray is not installed[\s\S]*dite\[ray,serve\]"):
        serve_on_ray(ServerSettings(model="m"), 1, print)


def test_a_cluster_that_cannot_be_joined_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UnsupportedEnvironment, match=r"no Ray cluster answers at 127\.0\.0\.1:1"), connected(Share(1, 1, 1, 0)):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(UsageError, match="not as a client"), connected(Share(1, 1, 1, 0)):
        pass


def test_of_an_error_that_quotes_a_traceback_the_last_line_is_said():
    assert gist(RuntimeError('ray::f() (pid=1)\n  File "a.py", line 1, in f\n    g()\nValueError: no')) == "ValueError: no"
    assert gist(RuntimeError("one\ntwo")) == "one" and gist(RuntimeError()) == "RuntimeError"
