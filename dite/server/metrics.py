"""What Prometheus reads at `/metrics`. Each server has its own registry, so that two in one process count apart."""

from __future__ import annotations

from contextlib import suppress

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
PICTURES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One method for each happening."""

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("dite_requests", "Requests answered, by status code; 499 where the client left first", ["code"], registry=registry)
        self._request_seconds = Histogram(
            "dite_request_seconds", "From a request for pictures to the end of its answer", buckets=SECONDS, registry=registry
        )
        self._queue_depth = Gauge("dite_queue_depth", "Jobs that wait", registry=registry)
        self._queue_wait = Histogram("dite_queue_wait_seconds", "From a job's arrival until ranks get it", buckets=SECONDS, registry=registry)
        self._step_seconds = Histogram("dite_step_seconds", "One step of all pictures drawn together", buckets=STEP_SECONDS, registry=registry)
        self._batch_size = Histogram("dite_batch_size", "Pictures drawn together in a step", buckets=PICTURES, registry=registry)
        self._images = Counter("dite_images", "Pictures finished", registry=registry)
        self._exchanged = Counter("dite_exchange_bytes", "Bytes exchanged by ranks: raw, and as sent", ["kind"], registry=registry)
        self._restarts = Counter("dite_rank_restarts", "Times that the ranks were started again", registry=registry)
        self._memory = Gauge("dite_rank_memory_bytes", "Memory of a rank", ["rank"], registry=registry)
        self._pid = Gauge("dite_rank_pid", "Process id of a rank", ["rank"], registry=registry)
        self._totals: dict[tuple[int, str], int] = {}  # what each rank last said it has exchanged since its start
        for kind in ("raw", "sent"):
            self._exchanged.labels(kind)  # 0 until something is exchanged, rather than absent

    def request_done(self, code: int, seconds: float | None = None) -> None:
        """A request was answered with `code`. `seconds` for requests for pictures only: polls of the status would hide their times."""
        self._requests.labels(str(code)).inc()
        if seconds is not None:
            self._request_seconds.observe(seconds)

    def queue(self, depth: int) -> None:
        """So many jobs wait now."""
        self._queue_depth.set(depth)

    def waited(self, seconds: float) -> None:
        """A job left the queue for the ranks."""
        self._queue_wait.observe(seconds)

    def step(self, seconds: float, pictures: int) -> None:
        """The ranks made a step of so many pictures."""
        self._step_seconds.observe(seconds)
        self._batch_size.observe(pictures)

    def images(self, n: int) -> None:
        """So many pictures were finished."""
        self._images.inc(n)

    def restart(self) -> None:
        """All ranks were started again; their totals begin at 0. What an old rank says after this would be counted twice."""
        self._restarts.inc()
        self._totals.clear()

    def exchange(self, rank: int, raw_total: int, sent_total: int) -> None:
        """What `rank` has exchanged since its start. Totals that fall are those of a rank that was started again."""
        for kind, total in (("raw", raw_total), ("sent", sent_total)):
            last = self._totals.get((rank, kind), 0)
            self._exchanged.labels(kind).inc(total - last if total >= last else total)
            self._totals[rank, kind] = total

    def rank(self, rank: int, pid: int | None, memory_bytes: int | None) -> None:
        """Facts of a rank; None for what isn't known, or no longer true."""
        for gauge, value in ((self._pid, pid), (self._memory, memory_bytes)):
            if value is not None:
                gauge.labels(str(rank)).set(value)
                continue
            with suppress(KeyError):
                gauge.remove(str(rank))

    def render(self) -> tuple[bytes, str]:
        """The page, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
