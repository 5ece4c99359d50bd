"""DINOv2 and CLIP from local folders; tiny random ones that these tests make, and the published figure where somebody has the real DINOv2
(DITE_DINOV2_FOLDER)."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import dite
from dite.errors import CheckpointError, UnsupportedEnvironment, UsageError
from dite_evals.extractors import load_extractor
from dite_evals.resize import clean
from dite_evals.statistics import compute_statistics, write_statistics

transformers = pytest.importorskip("transformers")

REAL = os.environ.get("DITE_DINOV2_FOLDER")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
IMAGES = torch.randint(0, 256, (3, 3, 40, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def save_dinov2(folder, **config):
    torch.manual_seed(1)
    transformers.Dinov2Model(transformers.Dinov2Config(**SMALL | config)).save_pretrained(folder)
    return folder


def save_clip(folder):
    torch.manual_seed(2)
    text = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 99, "eos_token_id": 2}
    vision = SMALL | {"intermediate_size": 37}
    config = transformers.CLIPConfig(text_config=text | {"bos_token_id": 1, "pad_token_id": 0}, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return save_dinov2(tmp_path_factory.mktemp("towers") / "dinov2")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("towers") / "clip")


@pytest.fixture
def copy(dinov2, tmp_path):
    """A DINOv2 folder to damage."""
    import shutil

    return shutil.copytree(dinov2, tmp_path / "copy")


def test_dinov2_gives_its_class_token_of_the_whole_image(dinov2):
    extractor = load_extractor("dinov2", dinov2)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        expected = transformers.Dinov2Model.from_pretrained(dinov2)(pixel_values=(clean(IMAGES, 28) / 255 - mean) / deviation)
    assert torch.allclose(extractor.extract(IMAGES), expected.last_hidden_state[:, 0], atol=1e-5)
    assert extractor.num_features == 32 and extractor.id.startswith("dinov2/clean28:mean0.485,0.456,0.406:std0.229,0.224,0.225/sha256:")


def test_clip_gives_its_projected_embedding(clip):
    extractor = load_extractor("clip", clip)
    model = transformers.CLIPModel.from_pretrained(clip)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=(clean(IMAGES, 28) / 255 - mean) / deviation).pooler_output
        expected = model.visual_projection(pooled)
    assert extractor.num_features == 16
    assert torch.allclose(extractor.extract(IMAGES), expected, atol=1e-5)


def test_registers_are_dinov2_too(tmp_path):
    torch.manual_seed(3)
    config = transformers.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=2)
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    assert load_extractor("dinov2", tmp_path).id.startswith("dinov2_with_registers/")


def test_the_text_half_of_clip_changes_no_identity(clip, tmp_path):
    alone = transformers.CLIPVisionModelWithProjection.from_pretrained(
        clip, config=transformers.CLIPVisionConfig.from_pretrained(clip, projection_dim=16)
    )
    alone.save_pretrained(tmp_path)
    extractor = load_extractor("clip", tmp_path)
    assert extractor.weights_sha256 == load_extractor("clip", clip).weights_sha256
    assert torch.allclose(extractor.extract(IMAGES), load_extractor("clip", clip).extract(IMAGES))


def test_the_id_follows_weights_heads_preprocessing_and_resize(dinov2, tmp_path):
    def with_preprocessor(**values):
        folder = save_dinov2(tmp_path / str(len(list(tmp_path.iterdir()))))
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
        return folder

    ids = [load_extractor("dinov2", dinov2).id, load_extractor("dinov2", dinov2, "legacy").id, load_extractor("dinov2", dinov2, "none").id]
    ids.append(load_extractor("dinov2", save_dinov2(tmp_path / "heads", num_attention_heads=4)).id)
    ids.append(load_extractor("dinov2", with_preprocessor(crop_size={"height": 56, "width": 56})).id)
    ids.append(load_extractor("dinov2", with_preprocessor(image_mean=[0.5, 0.5, 0.5])).id)
    assert len(set(ids)) == len(ids)
    assert load_extractor("dinov2", save_dinov2(tmp_path / "again")).id == ids[0]


def test_a_folder_of_shards_is_the_same_extractor(dinov2, tmp_path):
    transformers.Dinov2Model.from_pretrained(dinov2).save_pretrained(tmp_path, max_shard_size="40kB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert load_extractor("dinov2", tmp_path).id == load_extractor("dinov2", dinov2).id


def test_features_do_not_depend_on_how_many_images_are_given(dinov2):
    extractor = load_extractor("dinov2", dinov2)
    assert torch.equal(extractor.extract(IMAGES)[:1], extractor.extract(IMAGES[:1]))


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_without_a_folder_the_error_says_what_to_give(kind, tmp_path):
    with pytest.raises(UsageError, match="downloads nothing"):
        load_extractor(kind)
    with pytest.raises(UsageError, match="no folder"):
        load_extractor(kind, tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_extractor(kind, tmp_path)


def test_another_kind_of_model_is_refused(dinov2, clip):
    with pytest.raises(UsageError, match=r"model_type in its config\.json is 'dinov2'"):
        load_extractor("clip", dinov2)
    with pytest.raises(UsageError, match="holds no dinov2"):
        load_extractor("dinov2", clip)


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"model_type": []}', '{"model_type": "dinov2", "hidden_size": "wide"}'])
def test_a_config_with_anything_wrong_is_refused(copy, config):
    (copy / "config.json").write_text(config)
    with pytest.raises((CheckpointError, UsageError)):
        load_extractor("dinov2", copy)


def test_a_clip_without_its_vision_half_is_refused(clip, tmp_path):
    import shutil

    copy = shutil.copytree(clip, tmp_path / "copy")
    edit(copy / "config.json", vision_config="none")
    with pytest.raises(CheckpointError, match="can't load"):
        load_extractor("clip", copy)


def test_a_missing_weight_is_no_noise(copy):
    state = load_file(copy / "model.safetensors")
    state.pop("layernorm.bias")
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, layernorm\.bias"):
        load_extractor("dinov2", copy)


def test_weights_of_other_shapes_or_not_finite_are_refused(copy):
    state = load_file(copy / "model.safetensors")
    save_file(state | {"layernorm.bias": torch.full((32,), float("inf"))}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layernorm\.bias is not finite"):
        load_extractor("dinov2", copy)
    edit(copy / "config.json", hidden_size=64)
    with pytest.raises(CheckpointError, match="can't load"):
        load_extractor("dinov2", copy)


def test_a_folder_with_pickles_alone_is_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_extractor("dinov2", copy)


@pytest.mark.parametrize(
    "preprocessor",
    [{"crop_size": 30}, {"crop_size": "28"}, {"crop_size": 0}, {"image_mean": 0.5}, {"image_std": [1, 1, 0]}, {"image_mean": ["a", "b", "c"]}],
)
def test_a_preprocessor_that_can_not_be_followed_is_refused(copy, preprocessor):
    (copy / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    with pytest.raises(CheckpointError, match=r"can't be used"):
        load_extractor("dinov2", copy)


def test_an_index_that_points_elsewhere_is_refused(copy):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="files beside it"):
        load_extractor("dinov2", copy)


def test_code_in_a_folder_never_runs(copy, tmp_path):
    edit(copy / "config.json", auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert load_extractor("dinov2", copy).num_features == 32 and not (tmp_path / "ran").exists()


def test_without_transformers_the_error_says_what_to_install(dinov2, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedEnvironment, match="pip install transformers"):
        load_extractor("dinov2", dinov2)


@pytest.mark.parametrize(
    ("weights", "how", "reason"), [("w", None, "holds its own"), (None, "clean", "resizes nothing"), (None, "blur", "known: clean")]
)
def test_a_classifier_takes_neither_weights_nor_a_resize(reference_folder, weights, how, reason):
    with pytest.raises(UsageError, match=reason):
        load_extractor(str(reference_folder), weights, how)


def test_a_protocol_takes_one_with_its_weights_and_resize(pipe, smoke, dinov2, tmp_path):
    extractor = load_extractor("dinov2", dinov2, "legacy")
    write_statistics(tmp_path / "s.safetensors", compute_statistics(extractor, IMAGES, "noise"))
    protocol = smoke | {"extractor": "dinov2", "weights": str(dinov2), "resize": "legacy", "statistics": str(tmp_path / "s.safetensors")}
    metrics = dite.evaluate(pipe, protocol, output=tmp_path / "report")
    assert metrics["extractor"] == extractor.id and "legacy" in (tmp_path / "report" / "protocol.yaml").read_text()
    with pytest.raises(UsageError, match="belong to another extractor"):
        dite.evaluate(pipe, protocol | {"resize": None})


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="DITE_DINOV2_FOLDER names no folder of facebook/dinov2-base")
def test_the_real_dinov2_gives_the_published_checksum():
    """torch-fidelity's own test of dinov2-vit-b-14, which resizes by TF1's rule: −34.62496 for noise of this seed."""
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2023))
    extractor = load_extractor("dinov2", REAL, "legacy")
    assert extractor.id.startswith("dinov2/legacy224:")
    assert extractor.extract(image).sum().item() == pytest.approx(-34.6249580383, abs=1e-3)
