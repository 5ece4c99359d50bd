"""What the ranks of a test do. Started by ranks.py; reads a line for each scenario and forks its ranks."""

import importlib.util
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


def _fixtures():
    spec = importlib.util.spec_from_file_location("shared_fixtures", Path(__file__).parents[1] / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fixtures = _fixtures()
FAMILIES, build = fixtures.FAMILIES, fixtures._build


def denoise(model, inputs, steps, seed=0):
    """A few steps of a sampler: each input is the one before, changed a little by the model's answer."""
    x = inputs["hidden_states"] + torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for step in range(steps):
            timestep = torch.full_like(inputs["timestep"], 900 - step)
            out = model(**inputs | {"hidden_states": x, "timestep": timestep})[0]
            x = x - 0.05 * out[:, : x.shape[1]] if out.shape != x.shape else x - 0.05 * out
    return x


def rows(inputs, count):
    """The inputs of several samples."""
    batch = len(inputs["hidden_states"])

    def repeat(value):
        if isinstance(value, dict):
            return {name: repeat(one) for name, one in value.items()}
        return torch.cat([value] * count) if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch else value

    return repeat(dict(inputs))


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


def agree(par, document):
    """Whether every stream that several ranks hold is the same bits on all of them, and how many streams there are."""
    mine = {f"{one.name.layer}.{one.name.role}.{one.name.rank}": one.digest() for one in par.streams()}
    held = {}
    for other in par.group.gather_json(mine):
        for name, digest in other.items():
            held.setdefault(name, set()).add(digest)
    document["streams"] = len(held)
    # Without a codec there is no state: senders don't even keep what they sent.
    document["same"] = par.settings.codec == "none" or all(len(digests) == 1 for digests in held.values())


def modes(cases, steps):
    """For each case [family, mode, codec, order]: distance from one device and from the simulation, and whether states agree."""
    world, found = int(os.environ["WORLD_SIZE"]), []
    for family, mode, codec, order in cases:
        model = build(family)
        inputs = dict(example_inputs(model))
        if mode.startswith("cfg"):
            inputs = rows(inputs, 3)
        document = {"case": [family, mode, codec, order]}
        one = denoise(model, inputs, steps)
        try:
            with parallelize(model, world, mode, codec, order=order, timeout_s=30) as par:
                got = denoise(model, inputs, steps)
                agree(par, document)
                document |= par.stats()
            with parallelize(model, world, mode, codec, order=order, simulate=True):
                simulated = denoise(model, inputs, steps)
            document |= {"error": error(got, one), "simulated": error(got, simulated), "undone": torch.equal(denoise(model, inputs, steps), one)}
        except dite.DiteError as refused:
            document |= {"refused": refused.why or refused.what}
        found.append(document)
    return found


SCENARIOS = {"modes": modes}


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
