"""`dite.parallelize`: a pipeline's model shared out over ranks, until the handle is closed.

    with dite.parallelize(pipe, degree=2, mode="kv_gather", codec="int4") as par:
        images = pipe(class_labels=[207], generator=torch.Generator().manual_seed(0)).images
        print(par.stats())

Every rank runs the same script with the same seeds (torchrun, or the command line's --nproc) and gets the same pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from threading import get_ident
from typing import Any

import torch
from torch import nn

from dite.errors import DiteError, UnsupportedModel, UsageError
from dite.models.access import the_denoiser
from dite.parallel.adaptive import START, Adaptive
from dite.parallel.auto import decide
from dite.parallel.budget import Profile
from dite.parallel.calls import checksum, cut, layout
from dite.parallel.checks import compare_with_one_device, refuse
from dite.parallel.clock import Clock
from dite.parallel.codecs import codec as codec_named
from dite.parallel.families import Family, attentions_of, family_of
from dite.parallel.group import TIMEOUT_S, RankGroup
from dite.parallel.handshake import agree_on_call, description, shake_hands
from dite.parallel.hooks import Hooks
from dite.parallel.launch import environment_ranks
from dite.parallel.modes import Displaced, KVGather, Local, Mode, Ring, Ulysses
from dite.parallel.runners import CodecOf, OwnRows, PipeFusion, Remembered, Runner, join_rows
from dite.parallel.schedule import Schedule
from dite.parallel.simulation import Alone, Simulation
from dite.parallel.stream import ADAPTIVE, Moment, Predictor, ResidualStream
from dite.parallel.topology import Topology, bounds, parse
from dite.parallel.watching import watch

AUTO = "auto"
SIMPLE_MODES = {"kv_gather": KVGather, "ring": Ring, "displaced": Displaced}


@dataclass(frozen=True)
class Settings:
    """What all ranks must agree about. `codec` is a name, or a schedule's digest; `reason` why mode "auto" chose it."""

    mode: str = "kv_gather"
    codec: str = "int4"
    predictor: Predictor = field(default_factory=Predictor)
    patches: int | None = None
    reason: str = ""

    def check(self, simulate: bool) -> None:
        """Raises UsageError for settings that contradict each other."""
        if AUTO in (self.mode, self.codec) and simulate:
            raise UsageError("auto can't be simulated", "it measures ranks and the link between them", "name a mode and a codec")
        if AUTO in (self.mode, self.codec) and self.predictor.order != 2:
            raise UsageError(f"auto can't use residual order {self.predictor.order}", "its error figures are those of order 2", "leave order out")
        if self.patches is not None and (self.patches < 1 or not self.mode.endswith("pipefusion")):
            raise UsageError(f"{self.patches} patches can't be used", "pipefusion alone has them, 1 or more", "leave patches out")


class Parallel:
    """A model that is shared out. Undone by `close`, or at the end of a `with`."""

    def __init__(self, pipe: Any, topology: Topology, settings: Settings, codec_of: CodecOf, group: RankGroup | Alone):
        self.model = the_denoiser(pipe)
        if settings.codec == "none":  # there is nothing to foretell, nor to remember
            settings = replace(settings, predictor=Predictor(0))
        self.topology, self.settings, self.group = topology, settings, group
        self._adaptive = Adaptive(group, self._layers()) if settings.codec == AUTO and isinstance(group, RankGroup) else None
        self._codec_of = self._adaptive.codec_of if self._adaptive else codec_of
        self._schedule = getattr(codec_of, "__self__", None)  # of a Schedule's method
        self._thread: int | None = None
        self._clock = Clock()
        self._hooks = Hooks()
        self._remembered: dict[tuple[int, int], Remembered] = {}
        self._runner: Runner | None = None
        self._steps = 0
        self.broken: set[str] = set()  # names of requests in whose calls ranks have left the group
        self._cfg = self._tokens = None
        if topology.world == 1:
            return
        if isinstance(group, RankGroup):
            self._cfg = group.split(topology.cfg_groups()) if topology.cfg > 1 else None
            self._tokens = group.split(topology.token_groups()) if topology.tokens > 1 else None
        try:
            if topology.tokens > 1:
                self._runner = self._make_runner(family_of(self.model))
                self._runner.install(self._hooks)
            self._hooks.replace(self.model, "forward", self._around)
            self._hooks.mark(self.model, "dite_exchange", {"ranks": topology.world, **asdict(replace(settings, reason=""))})
            watch(pipe, self.model, self._clock, self._hooks, self.begin)
        except BaseException:
            self._hooks.undo()
            raise

    def __enter__(self) -> Parallel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if error is not None:
            self.group.leave(error)  # the other ranks shall not wait for this one
        self.close()

    @property
    def rank(self) -> int:
        """This process's number; rank 0 is the one that should write files."""
        return self.group.rank

    def close(self) -> None:
        """Leave the pipeline as it was found, and the other ranks."""
        self._hooks.undo()
        with suppress(DiteError):  # what is still under way belongs to no picture
            for remembered in self._remembered.values():
                remembered.drain()
        self._remembered = {}
        self.group.close()

    def stats(self) -> dict[str, Any]:
        """What this rank exchanged so far, in bytes and seconds; `bytes_raw` is the same uncompressed, in the model's dtype."""
        traffic = asdict(self.group.traffic)
        return {
            "ranks": self.topology.world,
            "rank": self.rank,
            "mode": self.settings.mode if self.topology.world > 1 else "one device",
            "codec": self.settings.codec,
            "order": self.settings.predictor.order,
            "calls": self._steps,
            "bytes_sent": traffic["sent"],
            "bytes_raw": traffic["raw"],
            "exchanges": traffic["exchanges"],
            "seconds_waited": traffic["seconds"],
            **({"reason": self.settings.reason} if self.settings.reason else {}),
        }

    def schedule(self) -> Schedule:
        """With codec "auto": what the last request was drawn with; given as `codec`, it draws the same again."""
        if self._adaptive is None:
            raise UsageError("there is no schedule to replay", f"codec {self.settings.codec} does not depend on the link", "use codec='auto'")
        return self._adaptive.schedule()

    def profile(self) -> Profile:
        """With `simulate`: how much of keys and values changed so far, by step and layer, for `dite.parallel.budget.allocate`."""
        return self._simulated().changes.profile(self.topology.tokens)

    def changes(self) -> dict[str, list[list[float]]]:
        """With `simulate`: `change` ‖Δ‖/‖x‖ of keys and values, and `correlation` of successive changes, [step][layer] from the second step on."""
        return self._simulated().changes.table()

    def _simulated(self) -> Simulation:
        if not isinstance(self._runner, Simulation):
            raise UsageError("changes were not recorded", "a simulation does that", "use simulate=True")
        return self._runner

    def reset(self) -> None:
        """Begin a request anew, as pipelines do by `scheduler.set_timesteps`: the next exchange is a keyframe."""
        self._clock.restart()
        self._forget()

    def begin(self, steps: int) -> None:
        """A request of so many steps begins, as `scheduler.set_timesteps` says. Raises UsageError where a schedule is for another count."""
        if self._schedule is not None:
            self._schedule.check(steps, self._layers())
        self.reset()

    @contextmanager
    def request(self, name: str) -> Iterator[None]:
        """Calls inside belong to the request of that name, whose state is apart from all others' and kept until `finish(name)`."""
        before = self._clock.switch(name)
        try:
            yield
        finally:
            self._clock.switch(before)

    @contextmanager
    def part(self, number: int) -> Iterator[None]:
        """The call inside is part `number` of one that is made in several, in order; each part has references of its own."""
        before, self._clock.part = self._clock.part, number
        try:
            yield
        finally:
            self._clock.part = before

    def finish(self, name: str) -> None:
        """Forget a request, done or cancelled."""
        self._clock.finish(name)
        self.broken.discard(name)
        self._forget()

    def rejoin(self, document: Any) -> list[Any]:
        """After an error: where it was in a call, and has taken every rank out of the group, meet again; then exchange a JSON document. Returns
        everyone's.

        All ranks must call it. Requests in `broken` have to be begun anew: a rank was in the middle of a call of theirs. The others go on. Raises
        RankLost.
        """
        if self.group.ended:
            if self.topology.mode == "displaced":  # packets of all requests were on their way
                self.broken |= self._clock.names()
            gone = {self._clock.epoch(name) for name in self.broken}
            self._remembered = {key: one for key, one in self._remembered.items() if key[0] not in gone}
            self.group.meet_again()
        everyone = self.group.gather_json({"latest": self._clock.latest, "broken": sorted(self.broken), "said": document})
        self._clock.latest = max(one["latest"] for one in everyone)  # a rank may not have come as far as others
        self.broken = {name for one in everyone for name in one["broken"]}
        return [one["said"] for one in everyone]

    def streams(self) -> list[ResidualStream]:
        """All that is remembered, in an order that is the same on all ranks of a group."""
        return [stream for key in sorted(self._remembered) for stream in self._remembered[key].streams()]

    def _layers(self) -> int:
        return len(attentions_of(self.model, family_of(self.model)))

    def _make_runner(self, family: Family) -> Runner:
        arguments = (self.model, family, self._tokens or self.group, self.settings.predictor, self._codec_of)
        if isinstance(self.group, Alone):
            return Simulation(*arguments, topology=self.topology, patches=self.settings.patches)
        if self.topology.mode == "pipefusion":
            return PipeFusion(*arguments, patches=self.settings.patches)
        return OwnRows(*arguments, make=self._mode_maker())

    def _mode_maker(self) -> Callable[[int, list[tuple[int, int]]], Mode]:
        predictor, topology, token_group = self.settings.predictor, self.topology, self._tokens
        if topology.mode in SIMPLE_MODES:
            return lambda layer, parts: SIMPLE_MODES[topology.mode](layer, token_group, parts, predictor)
        across = self.group.split(topology.ulysses_groups())
        around = self.group.split(topology.ring_groups()) if topology.ring > 1 else None

        def make(layer: int, parts: list[tuple[int, int]]) -> Mode:
            turn = token_group.index // topology.ulysses
            mine = parts[turn * topology.ulysses : (turn + 1) * topology.ulysses]
            chunks = [(chunk[0][0], chunk[-1][1]) for chunk in (parts[at : at + topology.ulysses] for at in range(0, len(parts), topology.ulysses))]
            inner = Local(layer, across, mine, predictor) if around is None else Ring(layer, around, chunks, predictor)
            return Ulysses(layer, across, mine, predictor, inner)

        return make

    def _around(self, forward: Callable) -> Callable:
        """The model's forward, as everyone calls it."""
        signature = inspect.signature(type(self.model).forward)

        def shared(*args: Any, **kwargs: Any) -> Any:
            self.group.check()
            if self._thread not in (None, get_ident()):
                rule = "ranks exchange in one order, which two threads would mix up"
                raise UsageError("a model that is shared out was called from another thread", rule, "call it from one thread")
            self._thread = get_ident()
            if getattr(self.model, "is_cache_enabled", False):
                raise UnsupportedModel("a cache that skips blocks would decide differently on each rank", "call disable_cache() on the model")
            bound = signature.bind(self.model, *args, **kwargs)
            exchanged = self.group.traffic.exchanges
            try:
                with torch.no_grad():
                    return self._call(forward, bound)
            except (UsageError, UnsupportedModel) as refused:
                if self.group.traffic.exchanges != exchanged:
                    self.group.leave(refused)
                raise  # before any exchange all ranks refuse alike
            except BaseException as error:
                self.broken.add(self._clock.name)
                self.group.leave(error)  # half of a call is done: what this rank would send next is not what others wait for
                raise

        return shared

    def _call(self, forward: Callable, bound: inspect.BoundArguments) -> Any:
        timestep = bound.arguments.get("timestep")
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor(float(timestep or 0))
        moment = self._clock.tick(float(timestep.flatten()[0]), checksum(bound.arguments))
        if isinstance(self.group, RankGroup):
            agree_on_call(self.group, moment, layout(bound.arguments))
        self._forget()
        remembered = self._remembered.setdefault((moment.epoch, moment.branch), Remembered())
        self._steps += 1
        rows = self._rows(bound.arguments) if self._cfg is not None else None
        remembered.fit(tuple(bound.arguments["hidden_states"].shape))

        def call() -> Any:
            return forward(*bound.args[1:], **bound.kwargs)

        if self._adaptive:
            self._adaptive.begin(moment)
        result = call() if self._runner is None else self._runner.call(call, moment, remembered)
        if rows is not None:
            result = self._join_batch(result, rows, moment)
        if self._adaptive:
            self._adaptive.after(moment, remembered.streams())
        return result

    def _rows(self, arguments: dict[str, Any]) -> list[tuple[int, int]]:
        """Cut this rank's rows of the batch out of the arguments; returns everyone's."""
        count = len(arguments["hidden_states"])
        if count < self._cfg.size:
            rule = f"it has {count}, and mode {self.settings.mode} shares them out over {self._cfg.size} ranks"
            raise UsageError("the batch has too few rows", rule, "use a guidance scale above 1, more images at once, or a mode without cfg")
        rows = bounds(count, self._cfg.size)
        first, last = rows[self._cfg.index]
        for name, value in arguments.items():
            arguments[name] = cut(value, count, first, last)
        return rows

    def _join_batch(self, result: Any, rows: list[tuple[int, int]], moment: Moment) -> Any:
        x = result[0]
        whole = join_rows(self._cfg, x.reshape(1, len(x), -1), rows, moment).reshape(rows[-1][1], *x.shape[1:])
        return (whole, *result[1:]) if isinstance(result, tuple) else type(result)(sample=whole)

    def _forget(self) -> None:
        """Drop what belongs to requests that are over."""
        live = self._clock.epochs()
        for key in [key for key in self._remembered if key[0] not in live]:
            with suppress(DiteError):  # what is still under way belongs to no picture
                self._remembered.pop(key).drain()


def parallelize(
    model: Any,
    degree: int | None = None,
    mode: str = "kv_gather",
    codec: Any = "int4",
    *,
    order: int = 2,
    damping: float | str = ADAPTIVE,
    patches: int | None = None,
    timeout_s: float = TIMEOUT_S,
    probe: bool = True,
    simulate: bool = False,
) -> Parallel:
    """Share a pipeline's transformer (or a bare one) out over `degree` ranks; by default over all that were started.

    `mode`: kv_gather, ring, ulysses, displaced, pipefusion, cfg, or a product (`cfg+ring`, `ulysses+ring`); see dite.parallel.topology. "auto"
    measures model and link and takes what the cost model finds fastest (mode and codec; or one device): `stats()["reason"]` says why.
    `codec`: none, int8, int4, int2, int1, lowrank-R, topk-K, a `Schedule` of them, or "auto", which follows the link. `order` 0 sends values, 1
    changes, 2 changes against a prediction damped by `damping` (0 to 1, or "adaptive"). `patches` of pipefusion: twice the ranks unless given. Every
    exchange has the deadline `timeout_s`.

    With `simulate` this process computes what `degree` ranks would, one after another: to learn what a mode and a codec cost in quality. Its bytes
    are those of all packets, each counted once, and without the raw output of each step.

    With `probe`, one call of the model without a codec is compared with one device's before anything else, and a model that differs is refused.

    Raises UsageError, UnsupportedModel, RanksDisagree, RankLost; what was put on the model is taken off again then.
    """
    pipe = getattr(model, "pipe", model)
    transformer = the_denoiser(pipe)
    place = environment_ranks()
    if degree is None:
        degree = place[1] if place and not simulate else 1
    codec_of, codec_name = _codecs(codec)
    settings = Settings(mode, codec_name, Predictor(order, damping), patches)
    settings.check(simulate)
    if hasattr(transformer, "dite_exchange"):
        raise UsageError("this model is shared out already", f"by {transformer.dite_exchange['mode']}", "close its handle first")
    topology = parse("kv_gather" if mode == AUTO else mode, degree)
    if degree == 1:
        return Parallel(pipe, topology, settings, codec_of, Alone())
    refuse(pipe, topology, codec_of)
    if simulate:
        return Parallel(pipe, topology, settings, codec_of, Alone())
    group = RankGroup.join(degree, timeout_s)
    try:
        shake_hands(group, description(transformer) | {"settings": asdict(settings), "topology": asdict(topology)})
        if mode == AUTO:
            decision = decide(transformer, group)
            codec_of, codec_name = _codecs(decision.codec)
            settings = replace(settings, mode=decision.mode, codec=codec_name, reason=decision.reason)
            topology = parse(decision.mode, decision.degree)
        if topology.world == 1:
            group.close()
            return Parallel(pipe, topology, settings, codec_of, Alone(group.rank))
        if probe:
            compare_with_one_device(transformer, topology, lambda: _plainly(transformer, topology, settings, group))
        handle = Parallel(pipe, topology, settings, codec_of, group)
    except BaseException:
        group.close()
        raise
    group.traffic.sent = group.traffic.raw = group.traffic.exchanges = 0
    group.traffic.seconds = 0.0
    return handle


@contextmanager
def _plainly(model: nn.Module, topology: Topology, settings: Settings, group: RankGroup) -> Iterator[None]:
    """Shared out without a codec; the group stays open."""
    handle = Parallel(model, topology, replace(settings, codec="none"), lambda step, layer: "none", group)
    try:
        yield
    finally:
        handle._hooks.undo()
        group.forget_parts()


def _codecs(codec: Any) -> tuple[CodecOf, str]:
    if codec == AUTO:
        return (lambda step, layer: START), AUTO
    if isinstance(codec, str):
        codec_named(codec)
        return (lambda step, layer: codec), codec
    if not isinstance(codec, Schedule):
        raise UsageError(f"a codec can't be a {type(codec).__name__}", "it is a name, or a Schedule", "use int4")
    return codec.codec, f"schedule {codec.digest}"
