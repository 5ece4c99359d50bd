"""Which of the waiting requests may join those under way.

continuous   whoever fits, at the next step: requests begin and end at different times
dynamic      those that wait together and are of one kind (size, steps, guidance or none), when the last batch is done
none         one at a time
"""

from __future__ import annotations

from collections.abc import Sequence

from dite.server.job import ImageRequest, Job


def fits(policy: str, most: int, job: Job, running: Sequence[Job], fresh: bool) -> bool:
    """Whether `job` may begin beside `running`; `most` pictures are drawn at once, but for a request that is larger by itself. `fresh`: no step of
    what is running has been done yet. A job that is drawn again is drawn alone."""
    if not running:
        return True
    if policy == "none" or job.attempts or any(one.attempts > 1 for one in running):
        return False
    if sum(one.request.n for one in running) + job.request.n > most:
        return False
    return policy == "continuous" or (fresh and kind(job.request) == kind(running[0].request))


def kind(request: ImageRequest) -> tuple[int, int, int, bool]:
    """What requests of one batch have in common."""
    return request.width_px, request.height_px, request.steps, request.guidance > 1
