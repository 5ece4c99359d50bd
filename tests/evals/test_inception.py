"""TensorFlow's Inception-v3: layer by layer counts, the features of another implementation with the same made-up weights, and published figures
where somebody has the real ones (DITE_INCEPTION_WEIGHTS)."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dite.errors import CheckpointError, NonFiniteOutput, UsageError
from dite_evals.backend import torchmetrics
from dite_evals.extractors import load_extractor
from dite_evals.inception import InceptionV3
from dite_evals.weights import read_weights

_spec = importlib.util.spec_from_file_location("inception_weights", Path(__file__).with_name("inception_weights.py"))
made_up = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made_up)

REAL = os.environ.get("DITE_INCEPTION_WEIGHTS")

# Szegedy et al. 2015 (arXiv 1512.00567), table 1 and figures 5 to 7, written down again: inputs, outputs and kernel area of each convolution.
STEM = [(3, 32, 9), (32, 32, 9), (32, 64, 9), (64, 80, 1), (80, 192, 9)]


def block_35(inputs, pool):
    return [(inputs, 64, 1), (inputs, 48, 1), (48, 64, 25), (inputs, 64, 1), (64, 96, 9), (96, 96, 9), (inputs, pool, 1)]


def block_17(width):
    single = [(768, width, 1), (width, width, 7), (width, 192, 7)]
    double = [(768, width, 1), (width, width, 7), (width, width, 7), (width, width, 7), (width, 192, 7)]
    return [(768, 192, 1), *single, *double, (768, 192, 1)]


def block_8(inputs):
    single = [(inputs, 384, 1), (384, 384, 3), (384, 384, 3)]
    double = [(inputs, 448, 1), (448, 384, 9), (384, 384, 3), (384, 384, 3)]
    return [(inputs, 320, 1), *single, *double, (inputs, 192, 1)]


TO_17 = [(288, 384, 9), (288, 64, 1), (64, 96, 9), (96, 96, 9)]
TO_8 = [(768, 192, 1), (192, 320, 9), (768, 192, 1), (192, 192, 7), (192, 192, 7), (192, 192, 9)]
SEVENTEENS = [*block_17(128), *block_17(160), *block_17(160), *block_17(192)]
CONVOLUTIONS = [*STEM, *block_35(192, 32), *block_35(256, 64), *block_35(288, 64), *TO_17, *SEVENTEENS, *TO_8, *block_8(1280), *block_8(2048)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The made-up weights as a file."""
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    with torch.no_grad():
        save_file(made_up.fill_(InceptionV3().state_dict()), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    extractor = load_extractor("inception", weights)
    extractor.network.batch_size = 2  # fifty take a minute on a busy core
    return extractor


@pytest.fixture(scope="module")
def outputs(inception):
    return inception.extract_all(made_up.images())


def test_every_layer_s_parameters_add_up():
    convolutions = sum(inputs * outputs * area for inputs, outputs, area in CONVOLUTIONS)
    channels = sum(outputs for _, outputs, _ in CONVOLUTIONS)
    classifier = 2048 * 1008 + 1008
    assert (len(CONVOLUTIONS), channels, convolutions) == (94, 17_216, 21_751_136)
    network = InceptionV3()
    assert sum(value.numel() for value in network.parameters()) == convolutions + 2 * channels + classifier == 23_850_960
    stored = [value.numel() for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")]
    assert sum(stored) == convolutions + 4 * channels + classifier == 23_885_392  # the running means and variances too
    assert len(stored) == 5 * 94 + 2


def test_the_keys_are_those_of_the_usual_conversion():
    keys = InceptionV3().state_dict().keys()
    ends = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    some = ("Conv2d_1a_3x3", "Mixed_5b.branch5x5_2", "Mixed_6a.branch3x3dbl_3", "Mixed_6e.branch7x7dbl_5", "Mixed_7a.branch7x7x3_4")
    some += ("Mixed_7c.branch3x3dbl_3b", "Mixed_7b.branch_pool")
    assert {f"{name}.{end}" for name in some for end in ends} | {"fc.weight", "fc.bias"} <= keys


def test_an_image_gives_three_vectors(outputs, inception):
    assert {kind: list(values.shape) for kind, values in outputs.items()} == {"features": [2, 2048], "spatial": [2, 2023], "logits": [2, 1008]}
    assert (inception.num_features, inception.num_spatial) == (2048, 2023)


@pytest.mark.parametrize("kind", ["features", "logits", "spatial"])
def test_they_are_those_of_another_implementation_with_the_same_weights(outputs, kind):
    some, mean, deviation = made_up.GOLDEN[kind]
    found = outputs[kind]
    assert found[1, :: found.shape[1] // 5][:6].tolist() == pytest.approx(some, rel=1e-3, abs=1e-2)
    assert (found.double().mean().item(), found.double().std().item()) == pytest.approx((mean, deviation), rel=1e-4)


def test_the_average_pools_leave_the_padding_out(inception):
    ones = torch.ones(1, 192, 5, 5)
    block = inception.network.Mixed_5b
    with torch.no_grad():
        assert torch.allclose(block._pool(ones), block.branch_pool(ones))  # with it, corners would be 4/9


def test_the_id_follows_the_values_and_the_resize_and_not_the_file(weights, inception, tmp_path):
    state = load_file(weights)
    counted = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7), **state}
    save_file({key: value.double() if value.is_floating_point() else value for key, value in counted.items()}, tmp_path / "other.safetensors")
    assert load_extractor("inception", tmp_path / "other.safetensors").id == inception.id
    assert inception.id.startswith("inception-v3-tf/legacy299:")
    assert load_extractor("inception", weights, "clean").id not in (inception.id, load_extractor("inception", weights, "none").id)
    save_file(state | {"fc.bias": state["fc.bias"] + 1e-6}, tmp_path / "more.safetensors")
    assert load_extractor("inception", tmp_path / "more.safetensors").id != inception.id


def test_without_resizing_other_sizes_are_refused(weights):
    with pytest.raises(UsageError, match="60×40 pixels, it takes 299×299"):
        load_extractor("inception", weights, "none").extract(made_up.images())


def test_missing_weights_say_where_they_come_from_and_how_to_convert_them(tmp_path):
    for given in (None, tmp_path / "absent.safetensors"):
        with pytest.raises(UsageError, match=r"dite convert") as error:
            load_extractor("inception", given)
        assert "6726825d" in error.value.hint


@pytest.mark.parametrize(("name", "content"), [("inception.pth", b"anything"), ("inception.safetensors", b"PK\x03\x04zip"), ("a.bin", b"\x80\x02q")])
def test_a_pickle_is_never_opened(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="is a pickle"):
        load_extractor("inception", tmp_path / name)


@pytest.mark.parametrize("header_bytes", [0x0280, 0x010380, 0x0480])
def test_safetensors_whose_header_is_as_long_as_a_pickle_begins_are_read(tmp_path, header_bytes):
    path = tmp_path / "a.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(header_bytes)
    path.write_bytes(header_bytes.to_bytes(8, "little") + header + bytes(4))
    assert read_weights(path, "").keys() == {"a"}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"Mixed_6d.branch1x1.conv.weight": None}, r"Mixed_6d\.branch1x1\.conv\.weight is absent, expected \(192, 768, 1, 1\); 1 of 472"),
        ({"AuxLogits.fc.weight": torch.ones(2)}, r"AuxLogits\.fc\.weight is \(2,\), expected nothing"),
        ({"fc.bias": torch.ones(1000)}, r"fc\.bias is \(1000,\)"),
        ({"fc.bias": torch.full((1008,), float("nan"))}, r"a weight of fc\.bias is not finite"),
        ({"fc.bias": torch.ones(1008, dtype=torch.int64)}, r"no floating-point number"),
    ],
)
def test_weights_are_compared_key_by_key(weights, tmp_path, damage, reason):
    state = {key: value for key, value in (load_file(weights) | damage).items() if value is not None}
    save_file(state, tmp_path / "damaged.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        load_extractor("inception", tmp_path / "damaged.safetensors")


def test_torchvision_s_weights_are_recognised(weights, tmp_path):
    save_file(load_file(weights) | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, tmp_path / "torchvision.safetensors")
    with pytest.raises(CheckpointError, match="torchvision's") as error:
        load_extractor("inception", tmp_path / "torchvision.safetensors")
    assert "1008" in error.value.why


def test_a_golden_vector_beside_the_weights_is_checked(weights, outputs, tmp_path):
    (tmp_path / "w.safetensors").symlink_to(weights)
    golden = tmp_path / "w.golden.safetensors"
    save_file({"images": made_up.images(), "features": outputs["features"]}, golden)
    assert load_extractor("inception", tmp_path / "w.safetensors", "clean").num_features == 2048
    save_file({"images": made_up.images(), "features": outputs["features"] * 1.01}, golden)
    with pytest.raises(CheckpointError, match=r"other features than it should\noff by 0\.0099"):
        load_extractor("inception", tmp_path / "w.safetensors")
    save_file({"images": made_up.images().float(), "features": outputs["features"]}, golden)
    with pytest.raises(CheckpointError, match="no golden vector"):
        load_extractor("inception", tmp_path / "w.safetensors")


def test_features_that_are_not_finite_name_the_image(inception, monkeypatch):
    def broken(images):
        features = torch.ones(len(images), 2048)
        features[images.flatten(1).sum(1) == 0] = float("nan")  # a black image
        return {"features": features}

    monkeypatch.setattr(inception.network, "outputs", broken)
    images = torch.ones(5, 3, 8, 8, dtype=torch.uint8)
    images[3] = 0
    with pytest.raises(NonFiniteOutput, match="image 3 gave NaN"):
        inception.extract(images)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="DITE_INCEPTION_WEIGHTS names no file of the real weights")
def test_the_real_weights_give_the_published_inception_score():
    """torchmetrics' documentation of InceptionScore (1.0): noise of this seed scores 1.0544 ± 0.0117."""
    extractor = load_extractor("inception", REAL, "none")
    torch.manual_seed(123)
    images = torch.randint(0, 255, (100, 3, 299, 299), dtype=torch.uint8)
    logits = extractor.extract_all(images)["logits"]
    metric = torchmetrics("image.inception").InceptionScore(feature=torch.nn.Identity())
    metric.update(logits)
    mean, deviation = metric.compute()
    assert (mean.item(), deviation.item()) == pytest.approx((1.0544, 0.0117), abs=2e-4)
