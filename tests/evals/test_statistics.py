"""Reference statistics on disk: exact when read back, refused when anything about them is wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dite.errors import CheckpointError, UsageError
from dite_evals.backend import torchmetrics
from dite_evals.extractors import load_classifier, save_classifier
from dite_evals.frechet import Moments, moments
from dite_evals.statistics import FORMAT, Statistics, compute_statistics, inject_, read_statistics, write_statistics

GOOD = {"format": FORMAT, "n": "9", "extractor": "toy", "data": "noise", "data_sha256": "0" * 64}


def write(path, mu=None, sigma=None, **metadata):
    mu = torch.zeros(3, dtype=torch.float64) if mu is None else mu
    sigma = torch.eye(3, dtype=torch.float64) if sigma is None else sigma
    save_file({"mu": mu, "sigma": sigma}, path, {**GOOD, **metadata})
    return path


def test_what_is_written_is_read_back_to_the_bit(extractor, tmp_path):
    images = torch.randint(0, 256, (11, 3, 32, 32), dtype=torch.uint8)
    before = compute_statistics(extractor, images, "noise")
    write_statistics(tmp_path / "deep" / "s.safetensors", before)
    after = read_statistics(tmp_path / "deep" / "s.safetensors")
    assert torch.equal(after.moments.mu, before.moments.mu) and torch.equal(after.moments.sigma, before.moments.sigma)
    assert (after.moments.n, after.extractor_id, after.data_name, after.data_sha256) == (11, extractor.id, "noise", before.data_sha256)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["s.safetensors"]


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 60), features=st.integers(1, 9), seed=st.integers(0, 999), offset=st.floats(-50, 50))
def test_injected_moments_are_what_torchmetrics_would_have_summed(n, features, seed, offset):
    x = (torch.randn(n, features, generator=torch.Generator().manual_seed(seed)) + offset).double()
    metric = torchmetrics("image.fid").FrechetInceptionDistance(feature=_Width(features))
    inject_(metric, moments(x))
    assert torch.allclose(metric.real_features_sum, x.sum(0), rtol=1e-12, atol=1e-9)
    assert torch.allclose(metric.real_features_cov_sum, x.T @ x, rtol=1e-12, atol=1e-9)
    assert int(metric.real_features_num_samples) == n


class _Width(torch.nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features


def test_statistics_of_another_extractor_are_never_compared(extractor):
    statistics = Statistics(Moments(torch.zeros(2), torch.eye(2), 5), "other/raw/sha256:00", "noise", "0")
    with pytest.raises(UsageError, match="other/raw"):
        statistics.require(extractor)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"format": "npz"}, "format"),
        ({"n": "1"}, "at least 2"),
        ({"n": "-5"}, "at least 2"),
        ({"n": "nine"}, "at least 2"),
        ({"extractor": ""}, "extractor is missing"),
        ({"mu": torch.zeros(3)}, "float64"),
        ({"mu": torch.zeros(4, dtype=torch.float64)}, r"mu is \[4\]"),
        ({"mu": torch.full((3,), float("nan"), dtype=torch.float64)}, "not finite"),
        ({"sigma": torch.tensor([[1.0, 2, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)}, "not symmetric"),
        ({"sigma": torch.diag(torch.tensor([1.0, 1, -1], dtype=torch.float64))}, "eigenvalue"),
    ],
)
def test_a_file_with_anything_wrong_is_refused(tmp_path, damage, reason):
    with pytest.raises(CheckpointError, match=reason):
        read_statistics(write(tmp_path / "s.safetensors", **damage))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, content):
    (tmp_path / "s.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_statistics(tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError):
        read_statistics(tmp_path / "absent.safetensors")


def test_features_do_not_depend_on_how_many_images_are_given(extractor):
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(extractor.extract(images)[:3], extractor.extract(images[:3]))
    assert extractor.extract(images[:0]).shape == (0, 192)


@pytest.mark.parametrize("shape", [(2, 3, 31, 32), (2, 1, 32, 32), (3, 32, 32)])
def test_an_extractor_refuses_images_it_was_not_made_for(extractor, shape):
    with pytest.raises(UsageError):
        extractor(torch.zeros(shape, dtype=torch.uint8))


def test_other_weights_are_another_extractor(extractor, tmp_path):
    from dite_evals.classifier import SmallClassifier

    save_classifier(SmallClassifier(), tmp_path, "toy", 32, dtype=torch.float16, accuracy=0.9)
    assert load_classifier(tmp_path).id != extractor.id
    assert next(load_classifier(tmp_path).parameters()).dtype == torch.float32


CONFIGS = [
    "",
    "[]",
    '{"num_classes": 10}',
    '{"_class_name": "SmallClassifier"}',
    '{"_class_name": "SmallClassifier", "num_classes": true}',
    '{"_class_name": "SmallClassifier", "num_classes": 10, "image_size": "32"}',
    '{"_class_name": "SmallClassifier", "num_classes": 9999999999}',
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_classifier_folder_with_a_wrong_config_is_refused(tmp_path, config):
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier" / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_classifier(tmp_path)


def test_weights_that_do_not_fit_the_classifier_are_named(tmp_path):
    from dite_evals.classifier import SmallClassifier

    save_classifier(SmallClassifier(7), tmp_path, "toy", 32)
    config = tmp_path / "classifier" / "config.json"
    config.write_text(config.read_text().replace('"num_classes": 7', '"num_classes": 10'))
    with pytest.raises(CheckpointError, match=r"head\.bias"):
        load_classifier(tmp_path)
