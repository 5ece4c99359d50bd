"""The training recipe: its parts on small tensors, and a whole run of a few seconds on pictures made here."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.timeout(900)  # a whole run takes a minute of a free core
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "cifar10_dit"
NAMES = [f"class{label}" for label in range(10)]


@pytest.fixture
def recipe(monkeypatch):
    """The recipe's modules, importable as its scripts import each other."""
    monkeypatch.syspath_prepend(str(RECIPE))


def settings(**changes):
    from loop import StageSettings

    return StageSettings(
        **({"epochs": 4, "batch_size": 8, "learning_rate": 0.05, "warmup_steps": 2, "decay": 0.5, "weight_decay": 0.0, "ema": 0.9} | changes)
    )


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def fit_line(folder, stage_settings, preview=None):
    """Fit y = 2x - 1 on 64 noisy points; the loss draws noise, as the real ones do."""
    from loop import Run, fit

    torch.manual_seed(0)
    model, x = torch.nn.Linear(1, 1), torch.linspace(-1, 1, 64)[:, None]

    def loss(indices, generator):
        return (model(x[indices]) - 2 * x[indices] + 1 + 0.1 * torch.randn(len(indices), 1, generator=generator)).square().mean()

    fit("line", model, loss, 64, stage_settings, Run(folder=folder, device=torch.device("cpu"), seed=3), preview and (lambda _path: preview(model)))
    return weights(model)


def test_training_is_repeatable(recipe, tmp_path):
    assert torch.equal(fit_line(tmp_path / "a", settings()), fit_line(tmp_path / "b", settings()))


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(recipe, tmp_path):
    flat = settings(decay=0.0)
    whole = fit_line(tmp_path / "a", flat)
    fit_line(tmp_path / "b", flat.model_copy(update={"epochs": 2}))
    assert torch.allclose(fit_line(tmp_path / "b", flat), whole, atol=1e-6)


def test_a_preview_sees_the_averaged_weights_and_disturbs_nothing(recipe, tmp_path, monkeypatch):
    import loop

    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", -1)
    seen = []
    undisturbed = fit_line(tmp_path / "a", settings())
    disturbed = fit_line(tmp_path / "b", settings(), preview=lambda model: seen.append(weights(model)))
    assert torch.equal(undisturbed, disturbed) and len(seen) == 32 and torch.equal(seen[-1], disturbed)


def test_training_learns(recipe, tmp_path):
    assert (fit_line(tmp_path, settings(epochs=40)) - torch.tensor([2.0, -1.0])).abs().max() < 0.1


def test_a_loss_that_is_not_finite_stops_with_advice(recipe, tmp_path):
    with pytest.raises(FloatingPointError, match=r"lower line\.learning_rate"):
        fit_line(tmp_path, settings(learning_rate=1e30, epochs=40, warmup_steps=0))


def test_noise_differs_by_seed_step_and_stream(recipe):
    from loop import _generator

    draws = {torch.rand(1, generator=_generator(*key)).item() for key in ((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2), (2**20, 0, 1))}
    assert len(draws) == 5


def test_standardising_latents_changes_no_reconstruction(recipe):
    import vae

    torch.manual_seed(0)
    model, device = vae.build().eval(), torch.device("cpu")
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    before = vae.decode(model, vae.encode(model, images, device), device)
    vae.standardize_(model, vae.encode(model, images, device))
    latents = vae.encode(model, images, device)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3 and (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert (vae.decode(model, latents, device).int() - before.int()).abs().max() <= 1


def test_a_fresh_model_predicts_zero_and_drops_no_labels_by_itself(recipe):
    import dit

    model = dit.build(num_layers=2).train()
    x = torch.randn(2, 4, 8, 8)
    assert (model(x, torch.tensor([5, 900]), torch.tensor([1, dit.NULL_LABEL])).sample == 0).all()
    assert all(block.norm1.emb.class_embedder.dropout_prob == 0 for block in model.transformer_blocks)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A whole run of the smoke preset on 48 random pictures."""
    folder = tmp_path_factory.mktemp("run")
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": NAMES}}}})}
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        rows = [{"bytes": _png(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)), "path": None} for _ in range(48)]
        table = pa.table({"img": pa.array(rows), "label": pa.array([index % 10 for index in range(48)])}).replace_schema_metadata(metadata)
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    command = [sys.executable, str(RECIPE / "train.py"), "--data", str(folder), "--out", str(folder / "run"), "--preset", "smoke", "--no-compile"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "evals")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_whole_run_leaves_a_folder_that_diffusers_loads(run_folder):
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(run_folder / "cifar10-dit")
    assert pipe.labels["class3"] == 3
    assert pipe([3], num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_a_whole_run_leaves_classifier_statistics_pictures_and_card(run_folder):
    from dite_evals.extractors import load_classifier
    from dite_evals.statistics import read_statistics

    folder = run_folder / "cifar10-dit"
    assert read_statistics(folder / "statistics.safetensors").extractor_id == load_classifier(folder).id
    assert Image.open(folder / "samples.png").size == (512, 640)
    assert "FID" in (folder / "README.md").read_text() and json.loads((folder / "metrics.json").read_text())["fid_n"] == 48


def test_a_run_draws_what_it_has_learned_beside_its_checkpoints(run_folder):
    assert Image.open(run_folder / "dit" / "samples.png").size == (512, 640)
    assert Image.open(run_folder / "vae" / "samples.png").size == (512, 128)


def test_the_card_quotes_the_fid_of_its_own_classifier_only(recipe, run_folder):
    import export

    from dite_evals.extractors import load_classifier

    folder = run_folder / "cifar10-dit"
    settings = {"steps": 20, "guidance": 1.5, "seed": 0, "dtype": "bfloat16"}
    metrics = {"fid": 8.125, "interval": [7.9, 8.4], "n": 5000, "extractor": load_classifier(folder).id}
    report = run_folder / "fid" / "report.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"metrics": metrics, "configuration": settings}))
    assert "**8.12** [7.90, 8.40], N = 5000, 20 steps" in export.write_card(folder).read_text()
    report.write_text(json.dumps({"metrics": metrics | {"extractor": "another"}, "configuration": settings}))
    with pytest.raises(SystemExit, match="another classifier"):
        export.write_card(folder)


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()
