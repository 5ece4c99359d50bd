"""What the ranks of a test do. Started by ranks.py; reads a line for each scenario and forks its ranks."""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

import dite
from dite.models.families import example_inputs
from dite.parallel.handle import parallelize
from dite.parallel.schedule import Rule, Schedule

sys.path.insert(0, str(Path(__file__).parent))
import fault_scenarios as faults
from samples import FAMILIES, build, denoise, error, pipeline, rows


def held(par):
    """(name of a stream and of the group in which it is shared, the stream), for all that this rank remembers."""
    for moment, remembered in sorted(par._remembered.items()):
        for layer, mode in sorted(remembered.layers.items()):
            inner = mode.inner.streams() if hasattr(mode, "inner") else []
            for stream in mode.streams():
                owner = mode.inner if any(stream is one for one in inner) else mode
                members = getattr(owner, "group", par._runner.group).members
                name = stream.name
                yield f"{moment[1]} {layer} {type(owner).__name__} {members} {name.layer}.{name.role}.{name.rank}", stream


def agree(par, document):
    """Whether every stream that several ranks hold is the same bits on all of them, and how many streams there are."""
    mine = {name: stream.digest() for name, stream in held(par)} if par._runner else {}
    digests = {}
    for other in par.group.gather_json(mine):
        for name, digest in other.items():
            digests.setdefault(name, []).append(digest)
    document["streams"] = len(digests)
    # Without a codec there is no state: senders don't even keep what they sent.
    document["same"] = par.settings.codec == "none" or all(len(set(one)) == 1 for one in digests.values())


def states(mode, codec, order, seeds, steps):
    """Requests of `steps` steps, one a seed: of how many streams of how many steps all holders had the same hash."""
    model = build("DiTTransformer2DModel")
    inputs = rows(example_inputs(model), 2 if mode.startswith("cfg") else 1)
    found = {"equal": 0, "different": 0, "alone": 0}
    with torch.no_grad(), parallelize(model, int(os.environ["WORLD_SIZE"]), mode, codec, order=order, probe=False, timeout_s=60) as par:
        for seed in range(seeds):
            par.reset()
            x, mine = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(seed)), {}
            for step in range(steps):
                x = x - 0.05 * model(**inputs | {"hidden_states": x, "timestep": torch.full_like(inputs["timestep"], 980 - 19 * step)})[0][:, :4]
                mine |= {f"{step} {name}": stream.digest() for name, stream in held(par)}
            digests = {}
            for other in par.group.gather_json(mine):
                for name, digest in other.items():
                    digests.setdefault(name, []).append(digest)
            for one in digests.values():
                found["alone" if len(one) == 1 else "equal" if len(set(one)) == 1 else "different"] += 1
    return found


def modes(cases):
    """For each case {family, mode, codec, order, ...}: distance from one device and from the simulation, and whether states agree."""
    return [one_case(**case) for case in cases]


def schedule(codecs):
    """ "none,int4": one codec a step, the last for all that follow."""
    first, last = codecs.split(",")[:-1], codecs.split(",")[-1]
    return Schedule.from_rules(last, [Rule(str(step), "*", name) for step, name in enumerate(first)])


def one_case(family, mode, codec="none", order=2, steps=4, dtype="float32", quantized=False, probe=False, samples=1, damping="adaptive"):
    model = build(family).to(getattr(torch, dtype))
    if quantized:
        dite.quantize(model, "w4a8", effort="fast")
    inputs = rows(example_inputs(model), 3 if mode.startswith("cfg") else samples)
    document = {"case": [family, mode, codec, order]}
    settings = {"mode": mode, "codec": schedule(codec) if "," in codec else codec, "order": order, "damping": damping}
    world = int(os.environ["WORLD_SIZE"])
    one = denoise(model, inputs, steps)
    try:
        with parallelize(model, world, **settings, timeout_s=30, probe=probe) as par:
            got = denoise(model, inputs, steps)
            agree(par, document)
            document |= par.stats()
    except dite.DiteError as refused:
        document |= {"refused": refused.why or refused.what, "type": type(refused).__name__}
        return document | {"undone": torch.equal(denoise(model, inputs, steps), one)}
    with parallelize(model, world, **settings, simulate=True):
        simulated = denoise(model, inputs, steps)
    with parallelize(model, world, **settings | {"codec": "none"}, simulate=True):
        exact = denoise(model, inputs, steps)
    document |= {"error": error(got, one), "simulated": error(got, simulated), "own": error(simulated, exact)}
    return document | {"undone": torch.equal(denoise(model, inputs, steps), one)}


def too_few_tokens():
    """One token, and then enough of them, on the same handle."""
    model = build("WanTransformer3DModel")
    enough = dict(example_inputs(model))
    one = enough | {"hidden_states": enough["hidden_states"][..., :2, :2]}
    with parallelize(model, int(os.environ["WORLD_SIZE"]), "kv_gather", "none", probe=False):
        told = faults.outcome(lambda: denoise(model, one, 1))["error"]
        return [told, bool(denoise(model, enough, 2).isfinite().all())]


def evaluates(folder):
    """Fidelity of a pipeline that is shared out, against itself on one device; every rank asks for the report."""
    pipe = pipeline()
    with parallelize(pipe, int(os.environ["WORLD_SIZE"]), "kv_gather", "none", probe=False):
        settings = {"n": 2, "steps": 2, "guidance": 2.0, "micro_batch": 2}
        found = dite.evaluate(pipe, "fidelity-128", baseline=pipeline(), output=folder, **settings)
    return {"psnr": found["psnr"]["mean"], "wrote": "report" in found}


SCENARIOS = {"evaluates": evaluates, "modes": modes, "states": states, "too_few_tokens": too_few_tokens, **faults.SCENARIOS}


def be_rank(rank, world, scenario, settings, folder):
    """The life of a forked rank."""
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "DITE_RENDEZVOUS": str(folder / "ranks"), "ANSWERS": str(folder)}
    result = SCENARIOS[scenario](**settings)
    (folder / f"{rank}.part").write_text(json.dumps(result))
    os.replace(folder / f"{rank}.part", folder / f"{rank}.json")


def main():
    torch.set_num_threads(1)
    for family in FAMILIES:
        build(family)  # diffusers imports its models when they are first used
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for line in sys.stdin:
        world, scenario, settings, folder = json.loads(line)
        pids = []
        for rank in range(world):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    be_rank(rank, world, scenario, settings, Path(folder))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            pids.append(pid)
        print(json.dumps(pids), flush=True)


if __name__ == "__main__":
    main()
