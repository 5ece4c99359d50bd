"""Small models, and a sampler for them that needs no pipeline."""

import importlib.util
from pathlib import Path

import torch


def _fixtures():
    spec = importlib.util.spec_from_file_location("shared_fixtures", Path(__file__).parents[1] / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fixtures = _fixtures()
FAMILIES, build = fixtures.FAMILIES, fixtures._build
pipeline = fixtures._tiny_pipeline


def denoise(model, inputs, steps, seed=0):
    """A few steps of a sampler: each input is the one before, changed a little by the model's answer."""
    dtype = next(model.parameters()).dtype
    inputs = {name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value for name, value in inputs.items()}
    x = inputs["hidden_states"] + torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
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
