"""From images or other people's files to reference statistics: one pass, exact, and never for the wrong extractor."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dite.errors import CheckpointError, NonFiniteOutput, UsageError
from dite_evals.collect import EXTRACTOR_ID, Wanted, collect, plan
from dite_evals.extractors import Extractor, load_extractor
from dite_evals.frechet import frechet_distance, moments
from dite_evals.statistics import RunningMoments, compute_statistics, read_statistics, write_statistics
from dite_evals.statistics_npz import read_npz, write_npz

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


class Toy(nn.Module):
    """Colours as features, with spatial ones beside them; a white image breaks it."""

    num_features, num_spatial, batch_size = 3, 4, 4

    def outputs(self, images):
        x = images.float() / 255
        features = x.mean((2, 3))
        features = torch.where(features.min(1, keepdim=True).values == 1, torch.full_like(features, float("nan")), features)
        return {"features": features, "spatial": x[:, 0, ::4, ::4].flatten(1), "logits": features * 2}


@pytest.fixture
def toy():
    return Extractor(Toy(), "toy", "0" * 64, "raw")


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 255, (11, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def images(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.fixture
def npz(pixels, tmp_path):
    np.savez(tmp_path / "images.npz", pixels)
    return tmp_path / "images.npz"


def silent(*_):
    pass


def arrays(**changes):
    return {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(4), "sigma_s": np.eye(4)} | changes


def same(a, b) -> bool:
    return torch.equal(a.mu, b.mu) and torch.equal(a.sigma, b.sigma) and a.n == b.n


def test_statistics_of_a_source_are_those_of_its_images(toy, npz, images):
    done = []
    found = collect(npz, toy, Wanted(), lambda *tick: done.append(tick))
    assert same(found.moments, compute_statistics(toy, images, "images").moments) and found.data_name == "images"
    assert found.data_sha256 == compute_statistics(toy, images, "x").data_sha256 and found.extractor_id == toy.id
    everything = toy.extract_all(images)
    for ours, kind in ((found.moments, "features"), (found.spatial, "spatial")):
        exact = moments(everything[kind])
        assert torch.allclose(ours.mu, exact.mu, atol=1e-12) and torch.allclose(ours.sigma, exact.sigma, atol=1e-12)
    assert done == [("features", 4, 11), ("features", 8, 11), ("features", 11, 11)]


@pytest.mark.parametrize("offset", [0, 1e4])
def test_running_moments_are_exact_however_they_are_cut(offset):
    x = torch.randn(101, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset
    running = RunningMoments()
    for part in x.split(7):
        running.add(part)
    assert torch.allclose(running.moments().sigma, torch.cov(x.T), rtol=1e-9) and torch.allclose(running.moments().mu, x.mean(0), rtol=1e-12)
    assert RunningMoments().moments() is None


@pytest.mark.parametrize("keep", [0, 1, 3, 11])
def test_features_are_kept_evenly_and_written(toy, images, keep, tmp_path):
    found = compute_statistics(toy, images, "images", keep=keep)
    assert keep == 0 or torch.equal(found.features, toy.extract(images)[[index * 11 // keep for index in range(keep)]])
    write_statistics(tmp_path / "s.safetensors", found)
    after = read_statistics(tmp_path / "s.safetensors")
    assert (after.features is None) == (keep == 0) and (keep == 0 or torch.equal(after.features, found.features))
    assert same(after.moments, found.moments) and same(after.spatial, found.spatial) and after.facts() == found.facts()
    assert (tmp_path / "s.safetensors").stat().st_mode & 0o444 == 0o444


def test_features_do_not_depend_on_how_images_lie_in_memory(toy, images):
    assert not images.is_contiguous() and torch.equal(toy.extract(images), toy.extract(images.contiguous()))


def test_more_features_than_images_or_one_image_are_refused(toy, images):
    with pytest.raises(UsageError, match="12 features can't be kept\nthere are 11 images"):
        compute_statistics(toy, images, "images", keep=12)
    with pytest.raises(UsageError, match="1 given, at least 2"):
        compute_statistics(toy, images[:1], "images")


@pytest.mark.parametrize("damage", [{"features": torch.ones(2, 4)}, {"features": torch.ones(12, 3)}, {"features": torch.full((2, 3), float("nan"))}])
def test_a_file_whose_features_do_not_fit_is_refused(toy, images, tmp_path, damage):
    from dataclasses import replace

    write_statistics(tmp_path / "s.safetensors", replace(compute_statistics(toy, images, "images"), **damage))
    with pytest.raises(CheckpointError, match="feature"):
        read_statistics(tmp_path / "s.safetensors")


def test_nan_features_name_the_image(toy, pixels, tmp_path):
    pixels[6] = 255
    np.savez(tmp_path / "a.npz", pixels)
    with pytest.raises(NonFiniteOutput, match="image 6 gave NaN"):
        collect(tmp_path / "a.npz", toy, Wanted(), silent)


def test_images_of_another_size_are_refused(npz, reference_folder):
    with pytest.raises(UsageError, match="they have 8×8 pixels, it takes 32×32"):
        collect(npz, load_extractor(str(reference_folder)), Wanted(), silent)
    assert collect(npz, load_extractor(str(reference_folder)), Wanted(image_size=32), silent).data_name == "images, middle 32×32"


def test_adm_s_npz_goes_out_and_comes_back_to_the_bit(toy, images, tmp_path):
    before = compute_statistics(toy, images, "images")
    write_npz(tmp_path / "deep" / "adm.npz", before)
    after = collect(tmp_path / "deep" / "adm.npz", toy, Wanted(n=11), silent)
    assert same(after.moments, before.moments) and same(after.spatial, before.spatial)
    assert (after.extractor_id, after.data_name) == (toy.id, "adm.npz")
    assert frechet_distance(after.moments, before.moments) < 1e-9


def test_what_adm_and_clean_fid_write_is_read(toy, tmp_path):
    """ADM: moments of both kinds and images, as numpy.savez writes them; clean-fid: two arrays, compressed."""
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.zeros(2), **arrays())
    np.savez_compressed(tmp_path / "clean.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert collect(tmp_path / "adm.npz", toy, Wanted(n=9), silent).spatial.n == 9
    assert collect(tmp_path / "clean.npz", toy, Wanted(n=9), silent).spatial is None


def test_features_come_from_the_images_beside_imported_moments(toy, pixels, images, tmp_path):
    np.savez(tmp_path / "adm.npz", arr_0=pixels, **arrays())
    found = collect(tmp_path / "adm.npz", toy, Wanted(n=50000, keep=11), silent)
    assert torch.equal(found.features, toy.extract(images)) and found.moments.n == 50000 and found.moments.mu.abs().max() == 0


def test_single_precision_is_accepted_and_made_symmetric(toy, tmp_path):
    sigma = np.eye(3, dtype=np.float32)
    sigma[0, 1], sigma[1, 0] = 0.25, 0.25 + 1e-7
    np.savez(tmp_path / "a.npz", mu=np.zeros(3, np.float32), sigma=np.asfortranarray(sigma))
    found = read_npz(tmp_path / "a.npz", toy.id, 5).moments
    assert torch.equal(found.sigma, found.sigma.T) and found.sigma.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mu": np.zeros(4)}, r"mu is \[4\] and sigma \[3, 3\]"),
        ({"sigma": np.full((3, 3), np.nan)}, "not finite"),
        ({"mu": np.full(3, np.inf)}, "not finite"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "sigma is not symmetric"),
        ({"sigma": -np.eye(3)}, "eigenvalue"),
        ({"mu_s": np.zeros(4, np.int64)}, "mu_s is int64"),
        ({"mu": np.array(["a"])}, "expected float64"),
    ],
)
def test_an_npz_with_anything_wrong_is_refused(toy, tmp_path, changes, reason):
    np.savez(tmp_path / "a.npz", **arrays(**changes))
    with pytest.raises(CheckpointError, match=reason):
        read_npz(tmp_path / "a.npz", toy.id, 9)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (Wanted(), "doesn't say of how many"),
        (Wanted(n=1), "at least 2"),
        (Wanted(n=9, image_size=8), "leave those flags out"),
        (Wanted(n=9, split="train"), "leave those flags out"),
    ],
)
def test_an_import_without_what_it_needs_says_so(toy, tmp_path, wanted, reason):
    np.savez(tmp_path / "a.npz", **arrays())
    with pytest.raises(UsageError, match=reason):
        collect(tmp_path / "a.npz", toy, wanted, silent)


def test_statistics_of_another_extractor_are_not_imported(toy, tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UsageError, match="5 features, toy gives 3"):
        collect(tmp_path / "a.npz", toy, Wanted(n=9), silent)
    np.savez(tmp_path / "b.npz", **arrays(mu_s=np.zeros(2), sigma_s=np.eye(2)))
    with pytest.raises(UsageError, match="2 spatial features, toy gives 4"):
        collect(tmp_path / "b.npz", toy, Wanted(n=9), silent)


def test_an_id_alone_is_enough_to_import_and_not_to_look_at_images(toy, npz, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    assert EXTRACTOR_ID.fullmatch(toy.id)
    assert collect(tmp_path / "a.npz", toy.id, Wanted(n=9), silent).extractor_id == toy.id
    for source, wanted in ((npz, Wanted()), (tmp_path / "a.npz", Wanted(n=9, keep=2))):
        with pytest.raises(UsageError, match="extractor's id"):
            collect(source, toy.id, wanted, silent)
    with pytest.raises(UsageError, match="no extractor was named"):
        collect(npz, None, Wanted(), silent)


def test_finished_statistics_are_read_for_their_own_extractor_only(toy, images, tmp_path, reference_folder):
    path = tmp_path / "s.safetensors"
    write_statistics(path, compute_statistics(toy, images, "images"))
    assert same(collect(path, None, Wanted(), silent).moments, collect(path, toy, Wanted(), silent).moments)
    with pytest.raises(UsageError, match="belong to another extractor"):
        collect(path, load_extractor(str(reference_folder)), Wanted(), silent)
    with pytest.raises(UsageError, match="is finished"):
        collect(path, toy, Wanted(n=5), silent)


def test_a_plan_says_what_would_be_done(toy, npz, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    assert plan(npz, toy, Wanted(n=5)) == {"dry_run": True, "does": "compute", "n": 5, "extractor": toy.id, "data": "images"}
    assert plan(tmp_path / "a.npz", toy, Wanted(n=9, keep=3))["does"] == "import"


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"no CIFAR-10 at {os.path.relpath(CIFAR10, Path(__file__).parents[2])} beside the project")
def test_real_test_images_are_as_near_to_the_shipped_statistics_as_the_model_card_says():
    """Of 1,000 of the 10,000: nearer than any model's samples, and further than all of them (0.1) by the bias of so few."""
    from dite.models.builtin import builtin_folder

    folder = builtin_folder("cifar10-dit")
    shipped = read_statistics(folder / "statistics.safetensors")
    found = collect(CIFAR10, load_extractor(str(folder)), Wanted(split="test", n=1000), silent)
    assert found.extractor_id == shipped.extractor_id and found.data_name == "cifar10 test"
    assert 0 < frechet_distance(found.moments, shipped.moments) < 3


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason="no CIFAR-10 beside the project")
def test_the_shipped_statistics_can_be_computed_again():
    from dite.models.builtin import builtin_folder

    folder = builtin_folder("cifar10-dit")
    shipped = read_statistics(folder / "statistics.safetensors")
    again = collect(CIFAR10, load_extractor(str(folder)), Wanted(split="train"), silent)
    assert (again.data_name, again.data_sha256, again.moments.n) == (shipped.data_name, shipped.data_sha256, 50_000)
    assert torch.allclose(again.moments.sigma, shipped.moments.sigma, atol=1e-5) and torch.allclose(again.moments.mu, shipped.moments.mu, atol=1e-5)
