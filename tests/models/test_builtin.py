"""The model that ships inside the package."""

import json

import pytest
import torch

import dite
from dite.errors import UsageError
from dite.models.builtin import builtin_folder, builtin_names
from dite.models.load import load_pipeline
from dite.sampling import SampleSettings, sample
from dite_evals.extractors import load_classifier

FOLDER = builtin_folder("cifar10-dit")
CLASSES = list(range(10))


def draw(pipe, classes, steps=12, guidance=2.0):
    return list(sample(pipe, classes, list(range(len(classes))), SampleSettings(num_steps=steps, guidance=guidance)))


def test_it_fits_the_package():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) <= 40_000_000 and max(sizes) <= 15_000_000


def test_plain_diffusers_loads_it_as_it_is():
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(FOLDER)
    assert pipe.get_label_ids(["ship"]) == [8] and pipe.transformer.config.num_embeds_ada_norm == 1000


def test_it_holds_no_path_of_the_machine_that_made_it():
    assert not any("_name_or_path" in json.loads(path.read_text()) for path in FOLDER.rglob("*.json"))


def test_its_pictures_are_recognised_as_their_classes():
    classes = CLASSES * 3
    images = torch.stack([one.image for one in draw(load_pipeline("builtin:cifar10-dit", dtype="float32"), classes)])
    network = load_classifier(FOLDER).network
    assert (network.logits(images).argmax(1) == torch.tensor(classes)).float().mean() > 0.6


@pytest.mark.parametrize(("recipe", "limit"), [("w8a8", 0.05), ("w4a8", 0.5)])
def test_quantizing_it_costs_little(recipe, limit):
    original, small = (load_pipeline("builtin:cifar10-dit", dtype="float32") for _ in range(2))
    dite.quantize(small, recipe, effort="fast")
    ours, theirs = (torch.stack([one.latent for one in draw(pipe, CLASSES)]) for pipe in (small, original))
    assert (ours - theirs).norm() / theirs.norm() < limit


def test_four_bits_make_it_a_third():
    seen = dite.inspect(load_pipeline("builtin:cifar10-dit"))
    assert seen.sizes["w4a8"] < 0.45 * seen.sizes["bf16"]  # the label tables, a sixth of this small model, stay as they are


def test_an_unknown_builtin_names_the_known_ones():
    assert "cifar10-dit" in builtin_names()
    with pytest.raises(UsageError, match="known: cifar10-dit"):
        builtin_folder("cifar100-dit")
