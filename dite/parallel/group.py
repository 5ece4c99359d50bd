"""RankGroup: the processes that make a picture together, and every way in which they exchange bytes.

Processes are started by `dite ... --nproc N` (they meet through a file, and listen on loopback only) or by torchrun (they meet at its address, across
machines too). Each exchange has a deadline; the first one that fails ends the group: the ranks that are left raise RankLost and never wait again.

A rank that leaves closes its connections at once, so that those who wait for it learn of it in no time, and they leave in turn. gloo has no other way
to tell them, and keeps connections open while anything refers to a group or to an exchange of it: so all of these are held here, and let go together.
Its collectives run in threads that nobody can call off; here it carries messages from rank to rank only.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist

from dite.errors import ExchangeCorrupted, RankLost, UsageError, first_line
from dite.parallel.launch import RENDEZVOUS, environment_ranks, keeping_stdout

TIMEOUT_S = 60.0


@dataclass
class Traffic:
    """What this rank sent, in bytes: `sent` on the wire, headers and keyframes included, and `raw`, the same exchanges uncompressed in the model's
    dtype without headers. `seconds` is how long it waited for others."""

    sent: int = 0
    raw: int = 0
    exchanges: int = 0
    seconds: float = 0.0

    def add(self, sent: int, raw: int) -> None:
        self.sent += sent
        self.raw += raw
        self.exchanges += 1


class RankGroup:
    """The ranks of a job, or some of them. `members` are their numbers in the whole job; `index` is this rank's place among them.

    Tensors are sent as they are, contiguous and in host memory: packets of models on a card are copied there, which no card has been tried with.
    """

    def __init__(self, members: Sequence[int], rank: int, process_group: Any, timeout_s: float, whole: RankGroup | None = None):
        self.members = list(members)
        self.rank = rank
        self.index = self.members.index(rank)
        self.timeout_s = timeout_s
        self.traffic = Traffic() if whole is None else whole.traffic
        self._group = process_group
        self._whole = whole or self
        self._lost: RankLost | None = None
        self._parts: list[RankGroup] = [] if whole is None else whole._parts
        self._parts.append(self)
        self._splits: list[tuple[Sequence[Sequence[int]], RankGroup]] = []  # as they were asked for, and this rank's part of each
        self._under_way: WeakSet[Pending] = WeakSet() if whole is None else whole._under_way

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.members)

    @classmethod
    def join(cls, degree: int, timeout_s: float = TIMEOUT_S) -> RankGroup:
        """Meet the other ranks. Raises UsageError where this process was not started as one of `degree`, RankLost where they don't come."""
        place = environment_ranks()
        if place is None or place[1] != degree:
            raise UsageError(
                f"{degree} ranks were asked for",
                "this process was started alone" if place is None else f"it was started as rank {place[0]} of {place[1]}",
                f"start it as `torchrun --nproc-per-node {degree} script.py`, or use the command line's --nproc {degree}",
            )
        rank, world = place
        deadline = timedelta(seconds=timeout_s)
        try:
            with keeping_stdout():
                if not dist.is_initialized():
                    if RENDEZVOUS in os.environ:
                        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                        store = dist.FileStore(os.environ[RENDEZVOUS], world)
                        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=deadline)
                    else:
                        dist.init_process_group("gloo", timeout=deadline)
                group = cls(range(world), rank, dist.new_group(list(range(world)), timeout=deadline, backend="gloo"), timeout_s)
        except (RuntimeError, ValueError) as error:
            raise RankLost("the ranks could not meet", _first_line(error), f"start all {degree} within {timeout_s:.0f} s") from error
        group.barrier()
        return group

    def split(self, groups: Sequence[Sequence[int]]) -> RankGroup:
        """The one of `groups` (numbers of ranks, each once) that this rank belongs to. All ranks must call it alike."""
        mine = next((members for members in groups if self.rank in members), None)
        assert mine is not None, f"rank {self.rank} is in none of {groups}"
        part = RankGroup(mine, self.rank, None, self.timeout_s, self._whole)
        part._connect(groups)
        self._whole._splits.append((groups, part))
        return part

    def _connect(self, groups: Sequence[Sequence[int]]) -> None:
        """Open the connections of the one of `groups` that this is. All ranks must call it alike."""
        for members in groups:
            with self.waiting("meeting of some ranks"), keeping_stdout():
                process_group = dist.new_group(list(members), timeout=timedelta(seconds=self.timeout_s), backend="gloo") if len(members) > 1 else None
            if self.rank in members:
                self._group = process_group

    def forget_parts(self) -> None:
        """What was split off so far is not used any more: `meet_again` leaves it closed. All ranks must call it alike."""
        self._splits.clear()

    def meet_again(self) -> None:
        """Open the connections that every rank has closed by `leave`, this group's and those of what was split off it. All ranks must call it alike;
        one that has not left yet does so first. What was under way is lost. Raises RankLost where they don't all come."""
        whole = self._whole
        whole.leave(RankLost("this group is closed", "its ranks meet again", "wait until they have"))
        whole._under_way.clear()
        whole._lost = None
        whole._connect([whole.members])
        for groups, part in whole._splits:
            part._connect(groups)
        whole.barrier()

    def all_gather(self, packet: torch.Tensor) -> list[torch.Tensor]:
        """Every member's packet, in their order; all of one length."""
        return self.start_all_gather(packet).wait()

    def start_all_gather(self, packet: torch.Tensor) -> Pending:
        """The same without waiting."""
        received = [packet if member == self.index else torch.empty_like(packet) for member in range(self.size)]
        pending = Pending(self, received, packet)
        others = [(member, tensor) for member, tensor in enumerate(received) if member != self.index]
        return self._start(pending, [(member, packet) for member, _ in others], others)

    def start_shift(self, packet: torch.Tensor) -> Pending:
        """Send to the next member and receive from the previous one, without waiting."""
        return self.exchange([((self.index + 1) % self.size, packet)], [((self.index - 1) % self.size, torch.empty_like(packet))])

    def exchange(self, outgoing: Sequence[tuple[int, torch.Tensor]], incoming: Sequence[tuple[int, torch.Tensor]]) -> Pending:
        """Point-to-point messages (member, tensor) that may cross, started together; `incoming` tensors are filled."""
        return self._start(Pending(self, [tensor for _, tensor in incoming], [tensor for _, tensor in outgoing]), outgoing, incoming)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrite `tensor` with that of member `source`."""
        if self.index == source:
            self.exchange([(member, tensor) for member in range(self.size) if member != source], []).wait()
        else:
            self.exchange([], [(source, tensor)]).wait()

    def barrier(self) -> None:
        """Wait until all members are here; the first one also opens the connections."""
        self.all_gather(torch.zeros(1, dtype=torch.uint8))

    def bytes_of(self, text: bytes) -> torch.Tensor:
        """As a tensor to send."""
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def gather_json(self, document: Any) -> list[Any]:
        """Every member's document. Nothing is unpickled. Raises ExchangeCorrupted."""
        text = json.dumps(document, sort_keys=True).encode()
        sizes = [_opened(bytes(one.numpy())) for one in self.all_gather(self.bytes_of(_sealed(len(text).to_bytes(8, "little"))))]
        lengths = [int.from_bytes(size, "little") for size in sizes]
        padded = self.bytes_of(_sealed(text).ljust(max(lengths) + 4, b"\0"))
        return [json.loads(_opened(bytes(one[: length + 4].numpy()))) for one, length in zip(self.all_gather(padded), lengths, strict=True)]

    def close(self) -> None:
        """Leave: connections are closed, and ranks that still wait for this one learn of it. The processes can meet again."""
        self.leave(RankLost("this group is closed", "it was left before", "parallelize again"))

    def leave(self, reason: BaseException) -> None:
        """The same, because of an error; whoever uses the group again is told of it."""
        whole = self._whole
        if whole._lost is None:
            why = f"{type(reason).__name__}: {_first_line(reason)}"
            whole._lost = reason if isinstance(reason, RankLost) else RankLost("this rank has left its group", why, "parallelize again")
        for pending in list(whole._under_way):
            pending.abandon()
        for part in whole._parts:
            process_group, part._group = part._group, None
            if process_group is not None:
                dist.destroy_process_group(process_group)

    @property
    def ended(self) -> bool:
        """Whether this rank has left."""
        return self._whole._lost is not None

    def check(self) -> None:
        """Raises RankLost when the group has ended."""
        if self._whole._lost is not None:
            raise self._whole._lost

    def waiting(self, what: str) -> _Waiting:
        """Count the time of an exchange; what fails in it ends the group."""
        return _Waiting(self, what)

    def _start(self, pending: Pending, outgoing: Sequence[tuple[int, torch.Tensor]], incoming: Sequence[tuple[int, torch.Tensor]]) -> Pending:
        with self.waiting("point-to-point exchange"):
            for member, tensor in incoming:
                pending.add(dist.irecv(tensor, group=self._group, group_src=member))
            for member, tensor in outgoing:
                pending.add(dist.isend(tensor, group=self._group, group_dst=member))
        return pending


class _Waiting:
    """A context. Not a generator's: an error's frames refer to the exchange that failed, and would keep its connections open; a generator's context
    would keep the frames."""

    def __init__(self, group: RankGroup, what: str):
        self.group, self.what = group, what

    def __enter__(self) -> None:
        self.group.check()
        self.started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        del traceback
        group = self.group
        group.traffic.seconds += time.perf_counter() - self.started
        if not isinstance(error, RuntimeError | ValueError):
            return
        why = f"rank {group.rank} of {group._whole.size}, deadline {group.timeout_s:.0f} s: {_first_line(error)}"
        error.with_traceback(None)
        group.leave(RankLost(f"another rank was lost in the {self.what}", why, "look at what the other ranks printed, and start all of them again"))
        raise group._whole._lost from error


class Pending:
    """Exchanges under way. `wait` returns the received tensors; what is sent is kept alive until then."""

    def __init__(self, group: RankGroup, received: list[torch.Tensor], sent: Any):
        self._group, self._received, self._sent = group, received, sent
        self._works: list[Any] = []
        group._under_way.add(self)

    def add(self, work: Any) -> None:
        """One more message."""
        self._works.append(work)

    def wait(self) -> list[torch.Tensor]:
        """Raises RankLost."""
        with self._group.waiting("exchange"):
            while self._works:
                self._works[0].wait()
                self._works.pop(0)
        self._sent = None
        return self._received

    def abandon(self) -> None:
        """Nobody will wait for it."""
        self._works.clear()


def _sealed(text: bytes) -> bytes:
    return zlib.crc32(text).to_bytes(4, "little") + text


def _opened(text: bytes) -> bytes:
    if text != _sealed(text[4:]):
        raise ExchangeCorrupted("what a rank says of itself can't be used", "its checksum is wrong", "start the ranks again")
    return text[4:]


def _first_line(error: BaseException) -> str:
    return first_line(error).split(". This is typically")[0][:300]  # gloo goes on with advice
