"""Q-DiT's and DiT's ImageNet protocols on a small random pipeline with made-up Inception weights: every step a person takes but the waiting."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dite
from dite.errors import DiteError
from dite_evals import npz
from dite_evals.collect import Wanted, collect
from dite_evals.extractors import load_extractor
from dite_evals.inception import InceptionV3
from dite_evals.protocols import balanced, load_protocol
from dite_evals.statistics import read_statistics, write_statistics

_spec = importlib.util.spec_from_file_location("inception_weights", Path(__file__).with_name("inception_weights.py"))
made_up = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made_up)

PAPERS = {  # N, steps, guidance, seed, dtype
    "imagenet256-qdit10k": (10_000, 50, 1.5, 0, "float16"),
    "imagenet256-adm50k": (50_000, 250, 1.5, 0, "float32"),
}
FEW = 10  # the fewest an FID takes; each further one costs an eigenproblem of 2048


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """Inception looks at 50 images at a time, padded: a minute on a busy core."""
    before = InceptionV3.batch_size
    InceptionV3.batch_size = FEW
    yield
    InceptionV3.batch_size = before


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What the person brings: weights, and ADM's file (`arr_0` images, and the moments of more) imported for them."""
    folder = tmp_path_factory.mktemp("imagenet")
    weights, adm, statistics = folder / "inception.safetensors", folder / "VIRTUAL_small.npz", folder / "imagenet256.safetensors"
    with torch.no_grad():
        save_file(made_up.fill_(InceptionV3().state_dict()), weights)
    extractor = load_extractor("inception", weights, "legacy")
    images = torch.randint(0, 256, (FEW, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    npz.write_npz(folder / "images.npz", {"arr_0": images.numpy()})
    computed = collect(folder / "images.npz", extractor, Wanted(), _silent)
    arrays = {"mu": computed.moments.mu, "sigma": computed.moments.sigma, "mu_s": computed.spatial.mu, "sigma_s": computed.spatial.sigma}
    npz.write_npz(adm, {"arr_0": images.numpy()} | {key: value.numpy() for key, value in arrays.items()})
    write_statistics(statistics, collect(adm, extractor, Wanted(n=1_281_167), _silent))
    return {"weights": str(weights), "statistics": str(statistics)}


def _silent(_what, _done, _total):
    pass


@pytest.mark.parametrize("name", PAPERS)
def test_a_protocol_is_the_papers(name):
    settings, changed = load_protocol(name, "fid")
    assert (settings.n, settings.steps, settings.guidance, settings.seed, settings.dtype) == PAPERS[name]
    assert (settings.extractor, settings.resize, settings.weights, settings.statistics, changed) == ("inception", "legacy", None, None, {})


@pytest.mark.parametrize("name", PAPERS)
def test_every_class_is_drawn_equally_often(name):
    drawn = torch.tensor(balanced(range(1000), load_protocol(name)[0].n)).bincount()
    assert len(drawn) == 1000 and drawn.min() == drawn.max() == PAPERS[name][0] // 1000


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("missing", ["weights", "statistics"])
def test_what_the_person_must_bring_is_asked_for(name, missing, given, tiny_pipeline):
    brought = {key: value for key, value in given.items() if key != missing}
    with pytest.raises(DiteError, match=missing):
        dite.evaluate(tiny_pipeline, name, n=FEW, steps=2, dtype="float32", force=True, **brought)


def test_imported_statistics_say_what_they_are_of(given):
    facts = read_statistics(given["statistics"]).facts()
    assert (facts["n"], facts["num_features"], facts["num_spatial"], facts["data"]) == (1_281_167, 2048, 2023, "VIRTUAL_small.npz")


# The two differ in numbers only, and each takes two dozen eigenproblems of 2048.
@pytest.mark.parametrize("name", ["imagenet256-qdit10k", pytest.param("imagenet256-adm50k", marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_a_protocol_runs_through_on_a_small_model(name, given, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("dite_evals.fid.SIZES", 2)  # of the 15 eigenproblems of a whole curve 3 are enough here
    dtype = PAPERS[name][-1]
    pipe = tiny_pipeline.to(getattr(torch, dtype))
    changes = {"n": FEW, "steps": 2, "micro_batch": 4, **given}
    metrics = dite.evaluate(pipe, name, output=tmp_path / "report", force=True, **changes)
    assert metrics["fid"] > 0 and metrics["interval"][0] <= metrics["fid"] <= metrics["interval"][1] and metrics["n"] == FEW
    assert metrics["extractor"].startswith("inception-v3-tf/legacy299") and metrics["protocol"] == name
    assert metrics["overrides"].keys() == changes.keys()
    assert (tmp_path / "report" / "report.html").is_file()
