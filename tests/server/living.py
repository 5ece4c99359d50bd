"""A service with real ranks, for as long as a `with` lasts; and a model for it."""

import asyncio
import os
import time
from contextlib import asynccontextmanager

from pipelines import dit

from dite.server.service import Service
from dite.server.settings import ServerSettings

NOT_A_NUMBER = 7  # drawing this class gives NaN
UNKNOWN = 5000  # and this one an IndexError inside the model, which has no such class


def save_model(folder):
    """The small DiT, one of whose classes is broken."""
    import torch

    pipe = dit()
    with torch.no_grad():
        for block in pipe.transformer.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight[NOT_A_NUMBER] = float("nan")
    pipe.save_pretrained(folder)
    return str(folder)


@asynccontextmanager
async def living(model, **settings):
    """Ready when it is entered; all ranks are gone when it is left, which raises what ended the service, if anything did."""
    service = Service(ServerSettings(model=model, **settings))
    running = asyncio.create_task(service.run())
    try:
        await until(lambda: service.is_ready or running.done(), 60)
        if running.done():
            running.result()
        yield service
    finally:
        ranks = pids(service)
        running.cancel()
        await asyncio.wait({running}, timeout=20)
        assert not [pid for pid in ranks if exists(pid)]
    if not running.cancelled():
        running.result()


async def until(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        await asyncio.sleep(0.01)


def pids(service):
    return [rank["pid"] for rank in service.status()["ranks"]]


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
