"""What ranks say to each other at the end of every turn, and how they go on after an error in a call that they share.

    turn of a rank       plan ─ begin, call off ─ step ─ are we all at the same place?  ── yes ── report
                                                                │ no, or a rank has left the group
                                                  meet again ─ tell what failed, and where ─ settle ─ report

A request that can't be drawn (NaN, no memory, a mistake in its pipeline) is answered with its error and costs nobody else a picture: calls that were
not made yet are made at the next turn, and a request whose call was cut short on some rank is begun anew, which gives the same picture, because its
seed is fixed. Where no request is at fault, the exchange is: that error is raised, ranks end, and are started anew.

It goes through the group rather than through the pipes: nobody may report a picture that another rank's error would make it draw again.
"""

from __future__ import annotations

import gc
import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from dite.errors import DiteError, RankLost, RanksDisagree, is_out_of_memory

_TURN = struct.Struct("<4sI16x")  # as long as what ranks say before a call (dite.parallel.handshake): gloo would end the process otherwise
_MAGIC = b"DTT1"


@dataclass
class Verdict:
    """What all ranks hold of a turn, alike: errors by request as they are answered, and the requests that are begun anew."""

    failed: dict[str, dict[str, Any]]
    finished: list[str]
    again: list[str]
    apart: list[str]


def agreed(group: Any, at: dict[str, int]) -> bool:
    """Whether all ranks have made the same calls of the same requests, and none has left. If not, all of them find so, and have to `settle`."""
    if group.ended:
        return False
    mine = _TURN.pack(_MAGIC, zlib.crc32(json.dumps(at, sort_keys=True).encode()))
    try:
        everyone = [bytes(one.numpy()) for one in group.all_gather(group.bytes_of(mine))]
    except DiteError:
        return False
    if any(not one.startswith(_MAGIC) for one in everyone):  # a rank says which call it wants to make: it leaves, and so do the others
        group.leave(RanksDisagree("a rank is in a call that others don't make", "one of its requests has ended on another rank", "ask again"))
    return all(one == mine for one in everyone)


def settle(shared: Any, engine: Any, drawing: list[str], failed: dict[str, dict[str, Any]], finished: list[str]) -> Verdict:
    """Meet again where ranks have left, and agree on what becomes of the requests. `failed` and `finished` are this rank's of this turn, `drawing`
    all that it holds.

    Raises what made ranks lose each other, where no request did.
    """
    lost, engine.lost = engine.lost, None
    fault = lost is not None and not _is_consequence(lost)
    gc.collect()  # an error's frames hold what its call had computed, which may be all the memory there is
    mine = {"drawing": drawing, "failed": failed, "finished": finished, "at": engine.at, "apart": sorted(engine.apart), "fault": fault}
    everyone = shared.rejoin(mine)
    wrong: dict[str, dict[str, Any]] = {}
    for one in reversed(everyone):  # rank 0's words go before those of others
        wrong |= one["failed"]
    for name in drawing:
        if any(name not in one["drawing"] for one in everyone):
            wrong.setdefault(name, told(RankLost("a rank has lost this request", "it failed there and nowhere else", "ask again")))
    done = everyone[0]["finished"]  # by the rank that answers: every packet of those pictures was good
    wrong = {name: error for name, error in wrong.items() if name not in done}
    if not wrong and not any(one["fault"] or one["failed"] for one in everyone):
        raise lost or RankLost("the ranks have lost each other", "none of their requests is at fault", "look at the log for what they said")
    apart = sorted({name for one in everyone for name in one["apart"]})
    places = {name: {one["at"].get(name) for one in everyone} for name in drawing}
    again = [name for name in drawing if name not in wrong and name not in done and (name in shared.broken or len(places[name]) > 1)]
    return Verdict(wrong, done, again, apart)


def _is_consequence(error: Exception) -> bool:
    from dite.server.engine import CONSEQUENCES

    return isinstance(error, CONSEQUENCES)


def told(error: BaseException) -> dict[str, Any]:
    """A request's error as it is answered: in words, its HTTP status, and whether memory was the reason."""
    return {"error": in_words(error), "status": getattr(error, "http_status", 500), "memory": is_out_of_memory(error)}


def in_words(error: BaseException) -> dict[str, str]:
    """As DiteError.to_dict gives it."""
    if isinstance(error, DiteError):
        return error.to_dict()
    return {"type": type(error).__name__, "what": (str(error).strip().splitlines() or [""])[0][:500], "why": "", "try": ""}
