"""What goes wrong on purpose: what arrives at one rank is altered, a rank is killed, stopped, given NaN, or started differently."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import torch
from samples import build, denoise, pipeline, rows

import dite
from dite.errors import DiteError
from dite.models.families import example_inputs
from dite.parallel.group import Pending
from dite.parallel.handle import parallelize

DIT = "DiTTransformer2DModel"
KINDS = ("drop", "duplicate", "reorder", "flip", "stale", "epoch")
STEPS = 3
_wait = Pending.wait


def rank():
    return int(os.environ["RANK"])


def world():
    return int(os.environ["WORLD_SIZE"])


class Wire:
    """Stands between what arrives and who waits for it. Without `kind` it only records; with one it alters one exchange of those recorded."""

    def __init__(self, kind=None, record=(), other=(), seed=0):
        self.kind, self.record, self.other = kind, record, other
        self.random = random.Random(seed)
        self.seen, self.altered_s, self.listening = [], None, False
        self.at = self.random.choice(self.places()) if kind else -1

    def __enter__(self):
        def wait(pending):
            sent = pending._sent  # a gather's own packet is among those received
            received = _wait(pending)
            self.arrived([one for one in received if one is not sent])
            return received

        Pending.wait = wait
        return self

    def __exit__(self, *_):
        Pending.wait = _wait

    def during(self, action):
        """action() of a handle; what is exchanged before and after it isn't listened to."""

        def run(par):
            self.listening = True
            result = action(par)
            self.listening = False
            return result

        return run

    def arrived(self, tensors):
        if tensors and self.listening:
            self.seen.append([one.clone() for one in tensors])
            if len(self.seen) == self.at + 1:
                self.alter(tensors)
                self.altered_s = time.monotonic()

    def places(self):
        """Exchanges of the record at which there is something to put in place."""
        every = range(1, len(self.record) - 1)
        return every if self.kind != "stale" else [at for at in every if any(self.stale(at, one) is not None for one in self.record[at])]

    def alter(self, tensors):
        """One of these arrives otherwise."""
        fitting = [one for one in tensors if self.kind != "stale" or self.stale(self.at, one) is not None]
        which = self.random.randrange(len(fitting))
        tensor = fitting[which]
        if self.kind == "flip":
            tensor[self.random.randrange(len(tensor))] ^= 1 << self.random.randrange(8)
            return
        source = {
            "drop": lambda: torch.zeros_like(tensor),
            "duplicate": lambda: self.record[self.at - 1][which % len(self.record[self.at - 1])],
            "reorder": lambda: self.record[self.at + 1][which % len(self.record[self.at + 1])],
            "epoch": lambda: self.other[self.at][which],
            "stale": lambda: self.stale(self.at, tensor),
        }[self.kind]()
        tensor.zero_()
        size = min(len(source), len(tensor))
        tensor[:size] = source[:size]

    def stale(self, at, tensor):
        """What came a step before from the same rank for the same layer; None in the first step."""
        earlier = [one for before in self.record[:at] for one in before if about(one) == about(tensor)]
        return earlier[-1] if earlier else None


def about(packet):
    """Layer, role and rank of a packet, or that it is an agreement; of its first stream where there are several."""
    start = bytes(packet[:20].numpy())
    return start[16:20] if start.startswith(b"DTX1") else start[:4]


def outcome(action):
    """What an action came to: its result, or the error and when."""
    try:
        return {"result": action(), "error": None, "s": time.monotonic()}
    except DiteError as failed:
        return {"result": None, "error": type(failed).__name__, "text": str(failed)[:300], "s": time.monotonic()}


def shared(model, mode, codec, action, order=2, timeout_s=20.0):
    """action(handle) on a model shared out, and what came of it."""

    def run():
        with parallelize(model, world(), mode, codec, order=order, timeout_s=timeout_s, probe=False) as par:
            return action(par)

    return outcome(run)


def inject(mode, codec, count, seed=0):
    """`count` faults, one a run, each on one of the ranks; what this rank came to."""
    model = build(DIT)
    inputs = rows(example_inputs(model), 2 if "cfg" in mode else 1)

    def first_request(par):
        return denoise(model, inputs, STEPS)

    def second_request(par):
        denoise(model, inputs, 1)
        par.reset()
        other.seen.clear()
        return denoise(model, inputs, STEPS)

    with Wire() as clean:
        first = shared(model, mode, codec, clean.during(first_request))
    with Wire() as other:
        shared(model, mode, codec, other.during(second_request))
    plan, documents = random.Random(seed), []
    for number in range(count):
        kind, victim = KINDS[number % len(KINDS)], plan.randrange(world())
        mine = rank() == victim
        with Wire(kind if mine else None, clean.seen, other.seen, seed=1000 * seed + number) as wire:
            got = shared(model, mode, codec, wire.during(first_request))
        document = {"kind": kind, "victim": victim, "at": wire.at, "error": got["error"], "text": got.get("text"), "s": got["s"]}
        document["altered_s"] = wire.altered_s
        document["same"] = got["result"] is not None and torch.equal(got["result"], first["result"])
        documents.append(document)
    return {"documents": documents, "clean": first["error"], "exchanges": len(clean.seen)}


def hooked(model, block, step, action):
    """action() in the middle of a step."""
    calls = []

    def hook(module, args, kwargs):
        calls.append(1)
        if len(calls) == step:
            action()

    return model.transformer_blocks[block].register_forward_pre_hook(hook, with_kwargs=True)


def live_on():
    """The rank has left, but its process is still there: the others must not learn of it from its end."""
    time.sleep(30.0)


def dies(how, mode, codec="int4", timeout_s=2.0, victim=1):
    """One rank is killed, stopped, or fails in the middle of a step; what the others came to, in seconds after it."""
    model = build(DIT)
    inputs = rows(example_inputs(model), 2)
    folder = Path(os.environ["ANSWERS"])
    if rank() == victim:
        # time.monotonic is the same clock in all processes.
        def now():
            (folder / "when").write_text(str(time.monotonic()))
            if how == "fails":
                raise KeyError("no such thing")
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])

        own = range(len(model.transformer_blocks))
        hooked(model, own[victim % len(own)], 3, now)
    with contextlib.suppress(KeyError):
        got = shared(model, mode, codec, lambda par: denoise(model, inputs, 6) and None, timeout_s=timeout_s)
        return {"error": got["error"], "after_s": got["s"] - float((folder / "when").read_text()), "text": got.get("text")}
    return live_on()


def leaves_between_steps(mode, victim=0):
    """An exception that leaves the `with` block on one rank, while no exchange is under way there."""
    model = build(DIT)
    inputs = example_inputs(model)

    def action(par):
        denoise(model, inputs, 2)
        if rank() == victim:
            (Path(os.environ["ANSWERS"]) / "when").write_text(str(time.monotonic()))
            raise KeyError("no such thing")
        return denoise(model, inputs, 2)

    with contextlib.suppress(KeyError):
        got = shared(model, mode, "int4", action, timeout_s=20.0)
        return {"error": got["error"], "after_s": got["s"] - float((Path(os.environ["ANSWERS"]) / "when").read_text())}
    return live_on()


def poisoned(where, mode, codec, victim=1):
    """NaN on one rank: in the input, or in weights after the ranks have compared them."""
    model = build(DIT)
    inputs = rows(example_inputs(model), 2)
    weights = {"first": "transformer_blocks.0.attn1.to_k.weight", "last": "transformer_blocks.1.ff.net.2.weight", "out": "proj_out_2.weight"}

    def action(par):
        mine = dict(inputs)
        denoise(model, mine, 1)
        if rank() == victim and where == "input":
            mine["hidden_states"] = inputs["hidden_states"].clone()
            mine["hidden_states"][0, 0, -1, -1] = torch.nan
        elif rank() == victim:
            model.get_parameter(weights[where]).data[-1, -1] = torch.nan
        result = denoise(model, mine, 3)
        return bool(result.isfinite().all())

    return shared(model, mode, codec, action)


def disagree(what):
    """Rank 1 is started with something else."""
    model, settings = build(DIT), {"mode": "kv_gather", "codec": "int4", "order": 2, "timeout_s": 20.0}
    inputs, seed = example_inputs(model), 0
    if rank() == 1:
        if what == "weights":
            model.transformer_blocks[1].attn1.to_q.weight.data[0, 0] += 1e-3
        elif what == "bits":
            dite.quantize(model, "w4a8", effort="fast")
        elif what == "latents":
            seed = 1
        elif what == "shapes":
            inputs = rows(inputs, 2)
        else:
            settings |= {"codec": {"codec": "int2"}, "order": {"order": 1}, "mode": {"mode": "ring"}}.get(what, {})

    def run():
        with parallelize(model, world(), **settings) as par:
            denoise(model, inputs, 2, seed)
            for _ in range(2 if what == "requests" and rank() == 1 else 1):
                par.reset()
            return bool(denoise(model, inputs, 2, seed).isfinite().all())

    return outcome(run)


def cancelled(mode, codec):
    """A request that ends in an exception between steps on all ranks, then another: compared with a fresh handle's."""
    pipe = pipeline()
    calls = {"class_labels": [1, 2], "num_inference_steps": 4, "output_type": "np"}

    def draw():
        return torch.from_numpy(pipe(**calls, generator=torch.Generator().manual_seed(3)).images)

    with parallelize(pipe, world(), mode, codec, probe=False):
        fresh = draw()
    with parallelize(pipe, world(), mode, codec, probe=False):
        step, taken = pipe.scheduler.step, []

        def failing(*arguments, **named):
            taken.append(1)
            if len(taken) == 3:
                raise KeyboardInterrupt
            return step(*arguments, **named)

        pipe.scheduler.step = failing
        with contextlib.suppress(KeyboardInterrupt):
            draw()
        pipe.scheduler.step = step
        again = draw()
    return {"steps": len(taken), "equal": torch.equal(again, fresh)}


def interleaved(mode, codec, requests, steps=3):
    """Requests whose steps take turns, against the same ones alone."""
    model = build(DIT)
    inputs = example_inputs(model)

    def steps_of(seed):
        x = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(seed))
        for step in range(steps):
            x = x - 0.05 * model(**inputs | {"hidden_states": x, "timestep": torch.full_like(inputs["timestep"], 900 - 10 * step)})[0][:, :4]
            yield x

    order = [number for number in range(requests) for _ in range(steps)]
    random.Random(0).shuffle(order)
    with torch.no_grad(), parallelize(model, world(), mode, codec, probe=False) as par:
        running, last = {}, {}
        for number in order:
            with par.request(str(number)):
                last[number] = next(running.setdefault(number, steps_of(number)))
        kept = len(par.streams())
        for number in range(requests):
            par.finish(str(number))
        left = len(par.streams())
        equal = 0
        for number in range(requests):
            par.reset()
            *_, alone = steps_of(number)
            equal += torch.equal(alone, last[number])
    return {"equal": equal, "kept": kept, "left": left}


def reshaped(mode, codec):
    """The shape of the latents changes between steps: the calls after it, against a fresh request of that shape."""
    model = build(DIT)
    small, large = rows(example_inputs(model), 1), rows(example_inputs(model), 3)
    with parallelize(model, world(), mode, codec, probe=False) as par:
        denoise(model, small, 2)
        changed = denoise(model, large, 2)
        back = denoise(model, small, 2)
        par.reset()
        return {"equal": torch.equal(changed, denoise(model, large, 2)), "back": back.isfinite().all().item()}


def again(mode):
    """A group that ended by an error, and the next one of the same processes."""
    model = build(DIT)
    inputs = example_inputs(model)
    with Wire() as clean:
        first = shared(model, mode, "int4", clean.during(lambda par: denoise(model, inputs, STEPS)))
    with Wire("flip" if rank() == 0 else None, clean.seen) as wire:
        broken = shared(model, mode, "int4", wire.during(lambda par: denoise(model, inputs, STEPS)))
    second = shared(model, mode, "int4", lambda par: denoise(model, inputs, STEPS))
    return {"broken": broken["error"], "equal": torch.equal(first["result"], second["result"])}


def used_after_an_error():
    """What a handle says that is used again after its group ended."""
    model = build(DIT)
    inputs = example_inputs(model)

    with Wire() as clean:
        shared(model, "kv_gather", "int4", clean.during(lambda par: denoise(model, inputs, STEPS)))

    def action(par):
        with Wire("drop" if rank() == 0 else None, clean.seen) as wire:
            first = outcome(lambda: wire.during(lambda par: denoise(model, inputs, STEPS))(par))
        return [first["error"], outcome(lambda: denoise(model, inputs, STEPS))["error"]]

    return shared(model, "kv_gather", "int4", action)["result"]


SCENARIOS = {
    one.__name__: one
    for one in (inject, dies, leaves_between_steps, poisoned, disagree, cancelled, interleaved, reshaped, again, used_after_an_error)
}
