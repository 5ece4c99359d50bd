"""Figures as Prometheus reads them."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dite.server.metrics import Metrics

COUNTS = ("queue_wait_seconds_count", "request_seconds_count", "step_seconds_count", "batch_size_count")
TOTALS = ("requests_total", "images_total", "exchange_bytes_total", "rank_restarts_total")
NAMES = {f"dite_{name}" for name in (*COUNTS, *TOTALS, "queue_depth", "rank_memory_bytes", "rank_pid")}


def figures(metrics):
    """Each sample by name and labels' values."""
    page, kind = metrics.render()
    assert kind.startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(page.decode()) for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


@pytest.fixture
def metrics():
    return Metrics()


def test_every_name_that_is_promised_is_there(metrics):
    metrics.request_done(200, 0.1)
    metrics.rank(0, 17, 1000)
    assert {name for name, *_ in figures(metrics)} >= NAMES


def test_requests_are_counted_by_code_and_only_drawings_are_timed(metrics):
    metrics.request_done(200, 2.0)
    metrics.request_done(200)
    metrics.request_done(429, 0.5)
    found = figures(metrics)
    assert (found["dite_requests_total", "200"], found["dite_requests_total", "429"]) == (2, 1)
    assert (found["dite_request_seconds_count",], found["dite_request_seconds_sum",]) == (2, 2.5)


def test_steps_pictures_and_waits_add_up(metrics):
    metrics.step(0.5, 4)
    metrics.step(0.25, 2)
    metrics.images(3)
    metrics.waited(1.5)
    metrics.queue(7)
    found = figures(metrics)
    assert (found["dite_step_seconds_sum",], found["dite_batch_size_sum",], found["dite_images_total",]) == (0.75, 6, 3)
    assert (found["dite_queue_wait_seconds_sum",], found["dite_queue_depth",]) == (1.5, 7)


def test_bytes_never_count_down_when_ranks_start_again(metrics):
    seen = []
    for rank, raw, sent in [(0, 100, 10), (1, 100, 10), (0, 150, 15), (0, 150, 15)]:
        metrics.exchange(rank, raw, sent)
        seen.append(figures(metrics)["dite_exchange_bytes_total", "raw"])
    metrics.restart()
    metrics.exchange(0, 400, 40)  # more than before the restart, and all of it new
    metrics.exchange(1, 7, 1)
    metrics.exchange(1, 3, 1)  # started again, and nobody said so
    found = figures(metrics)
    assert seen == [100, 200, 250, 250] and found["dite_exchange_bytes_total", "raw"] == 250 + 400 + 7 + 3
    assert (found["dite_exchange_bytes_total", "sent"], found["dite_rank_restarts_total",]) == (25 + 40 + 1, 1)


def test_a_rank_that_is_gone_has_no_process(metrics):
    metrics.rank(0, 17, 1000)
    metrics.rank(1, 18, 2000)
    metrics.rank(0, None, None)
    metrics.rank(0, None, None)
    found = figures(metrics)
    assert ("dite_rank_pid", "0") not in found and ("dite_rank_memory_bytes", "0") not in found
    assert (found["dite_rank_pid", "1"], found["dite_rank_memory_bytes", "1"]) == (18, 2000)


def test_two_servers_in_a_process_count_apart(metrics):
    metrics.images(3)
    assert figures(Metrics())["dite_images_total",] == 0
