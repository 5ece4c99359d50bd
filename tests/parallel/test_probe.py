"""The probe: what it measures, and that all ranks get the same."""

import json
import os
import subprocess
import sys

SCRIPT = """
import json, sys, torch
from dataclasses import asdict
from dite.models.families import example_inputs
from dite.parallel.choice import choose
from dite.parallel.group import RankGroup
from dite.parallel.probe import measure
from diffusers import DiTTransformer2DModel
torch.set_num_threads(1)
torch.manual_seed(0)
model = DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3, sample_size=8).eval()
before = torch.is_grad_enabled(), [name for name in vars(model) if name == "forward"]
with torch.no_grad():
    plain = model(**example_inputs(model))[0]
group = RankGroup.join(2, timeout_s=60)
workload, link, speeds = measure(model, example_inputs(model), group)
with torch.no_grad():
    undone = torch.equal(model(**example_inputs(model))[0], plain)
layout = str(choose(workload, link, 2, 0.1, {"int4": 0.01}).layout)
print(json.dumps([asdict(workload), asdict(link), {name: asdict(one) for name, one in speeds.items()}, undone, layout]))
"""


def ranks(tmp_path):
    shared = os.environ | {"WORLD_SIZE": "2", "DITE_RENDEZVOUS": str(tmp_path / "ranks"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SCRIPT]
    started = [subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True) for rank in range(2)]
    return [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in started]


def test_all_ranks_measure_and_get_the_same_and_the_model_is_as_before(tmp_path):
    one, other = ranks(tmp_path)
    assert one == other
    workload, link, speeds, undone, layout = one
    assert undone and layout
    shape = {name: workload[name] for name in ("layers", "tokens", "width", "heads", "output_channels", "output_tokens", "batch", "value_bytes")}
    assert shape == {"layers": 3, "tokens": 16, "width": 64, "heads": 4, "output_channels": 32, "output_tokens": 16, "batch": 1, "value_bytes": 4}
    assert 0 <= workload["fixed_s"] <= workload["compute_s"] and 0 < workload["attention_share"] < 1
    assert link["bandwidth_bytes_per_s"] > 1e6 and 0 < link["latency_s"] < 0.1
    assert set(speeds) == {"none", "int8", "int4", "int2", "int1"} and all(value >= 0 for one in speeds.values() for value in one.values())
