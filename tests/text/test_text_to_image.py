"""Text-to-image pipelines from prompt to picture, offline: quantized, saved, loaded and drawn with, by the CLI and in Python."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dite
from dite.checkpoint import transformers_quantizer
from dite.cli import main as cli
from dite.errors import CheckpointError, UnsupportedEnvironment, UsageError
from dite.quant.apply import quantized_layers
from dite.sampling import SampleSettings, sample
from tests.text.pipelines import PIPELINES

ENCODERS = ["text_encoders.num_bits=8"]
OLD = int(transformers.__version__.split(".")[0]) < 5
needs_transformers_5 = pytest.mark.skipif(OLD, reason="transformers before 5 loads quantized models in another way")


# FLUX draws 512×512 whatever its size: seconds a picture.
@pytest.fixture(params=["pixart", "sd3", pytest.param("flux", marks=pytest.mark.slow)])
def make(request):
    return PIPELINES[request.param]


def latents(pipe):
    settings = SampleSettings(num_steps=2, micro_batch=2)
    return torch.stack([one.latent for one in sample(pipe, ["a red cat", "a blue dog"], [0, 1], settings)])


def encoders(pipe):
    return {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}


def test_a_prompt_decides_the_picture(make):
    pipe = make()
    cat, dog = sample(pipe, ["a red cat", "a blue dog"], [0, 0], SampleSettings(num_steps=2, micro_batch=2))
    assert not torch.equal(cat.latent, dog.latent)


@pytest.mark.parametrize("name", PIPELINES)
def test_it_is_quantized_saved_and_loaded_and_its_text_encoders_are_left_alone(name, tmp_path):
    pipe = PIPELINES[name]()
    before = latents(pipe)
    report = dite.quantize(pipe, "w4a8")
    assert report.text_encoders == {} and not any(quantized_layers(part) for part in encoders(pipe).values())
    drawn = latents(pipe)
    assert 0 < (drawn - before).norm() / before.norm() < 0.2
    dite.save(pipe, tmp_path / "model")
    assert torch.equal(latents(dite.load(tmp_path / "model")), drawn)
    assert torch.equal(latents(type(pipe).from_pretrained(tmp_path / "model")), drawn)


def test_the_command_line_quantizes_and_draws(make, tmp_path, capsys):
    dite.save(make(), tmp_path / "base")
    small, pictures = str(tmp_path / "small"), tmp_path / "pictures"
    assert cli(["quantize", str(tmp_path / "base"), "--recipe", "w4a8", "-o", small, "--json", "--no-progress"]) == 0
    assert json.loads(capsys.readouterr().out)["text_encoders"] == {}
    drawing = ["--prompt", "a red cat", "--prompt", "a blue dog", "--steps", "2", "--compare", str(tmp_path / "base")]
    assert cli(["generate", small, *drawing, "-o", str(pictures), "--json", "--no-progress"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [name.rpartition("/")[2] for name in document["images"]] == ["0000-a-red-cat-seed0.png", "0001-a-blue-dog-seed1.png"]
    assert {path.name for path in pictures.iterdir()} >= {"compare.png", "grid.png", "metadata.json"}


@needs_transformers_5
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_text_encoders_are_rounded_by_choice_and_come_back_bit_for_bit(make, dtype, tmp_path):
    dite.save(make(), tmp_path / "base")
    pipe = dite.load(tmp_path / "base", dtype=dtype)
    report = dite.quantize(pipe, "w4a8", overrides=ENCODERS)
    assert report.text_encoders.keys() == encoders(pipe).keys()
    for name, encoder in encoders(pipe).items():
        assert len(quantized_layers(encoder)) == report.text_encoders[name]["layers"] > 0
        assert all(layer.scheme.activation is None for layer in quantized_layers(encoder).values())
    dite.save(pipe, tmp_path / "model")
    again = dite.load(tmp_path / "model", dtype=dtype)
    for name, encoder in encoders(pipe).items():
        before, after = encoder.state_dict(), encoders(again)[name].state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
        of_layer = {key: layer.weight.dtype for key, layer in quantized_layers(encoder).items()}
        assert of_layer == {key: layer.weight.dtype for key, layer in quantized_layers(encoders(again)[name]).items()}
    assert torch.equal(latents(pipe), latents(again))


@needs_transformers_5
def test_the_command_line_rounds_text_encoders_when_asked(make, tmp_path, capsys):
    dite.save(make(), tmp_path / "base")
    arguments = ["quantize", str(tmp_path / "base"), "--recipe", "w4a8", "--text-encoders", "8", "--json", "--no-progress"]
    assert cli([*arguments, "-o", str(tmp_path / "absent"), "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)["text_encoders"]
    assert cli([*arguments, "-o", str(tmp_path / "small")]) == 0
    done = json.loads(capsys.readouterr().out)["text_encoders"]
    assert {name: one["layers"] for name, one in planned.items()} == {name: one["layers"] for name, one in done.items()}
    assert "num_bits: 8" in (tmp_path / "small/recipe.yaml").read_text().partition("text_encoders:")[2]
    assert (tmp_path / "small/text_encoder/model.safetensors").stat().st_size < (tmp_path / "base/text_encoder/model.safetensors").stat().st_size


@needs_transformers_5
def test_inspecting_a_pipeline_tells_of_its_text_encoders():
    pipe = PIPELINES["pixart"]()
    before = dite.inspect(pipe)
    plain = sum(parameter.numel() for parameter in pipe.text_encoder.parameters())
    assert before.text_encoders == {"text_encoder": {"class": "T5EncoderModel", "parameters": plain, "bytes": 4 * plain, "layers": {}}}
    dite.quantize(pipe, "w4a8", overrides=ENCODERS, effort="fast")
    after = dite.inspect(pipe)
    found = after.to_dict()["text_encoders"]["text_encoder"]
    assert found["parameters"] == plain and found["bytes"] < 4 * plain and found["layers"] == {"W8 g128": 14}
    assert "text_encoder: T5EncoderModel" in str(after) and "14 × W8 g128" in str(after)
    assert dite.inspect(pipe.transformer).text_encoders == {}


@needs_transformers_5
def test_dequantizing_a_text_encoder_gives_back_plain_linears():
    pipe = PIPELINES["pixart"]()
    dite.quantize(pipe, "w4a8", overrides=ENCODERS)
    before = latents(pipe)
    pipe.text_encoder.dequantize()
    assert not quantized_layers(pipe.text_encoder) and not hasattr(pipe.text_encoder.config, "quantization_config")
    assert (latents(pipe) - before).norm() / before.norm() < 1e-3


def test_a_model_without_text_encoders_is_told_so(tiny_pipeline):
    before = {name: tensor.clone() for name, tensor in tiny_pipeline.transformer.state_dict().items()}
    with pytest.raises(UsageError, match="no text encoder"):
        dite.quantize(tiny_pipeline, "w4a8", overrides=ENCODERS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_pipeline.transformer.state_dict().items())


def test_an_old_transformers_is_refused_before_anything_changes(monkeypatch):
    monkeypatch.setattr(transformers_quantizer, "OLDEST", 99)
    pipe = PIPELINES["pixart"]()
    with pytest.raises(UnsupportedEnvironment, match="transformers 99"):
        dite.quantize(pipe, "w4a8", overrides=ENCODERS)
    assert not quantized_layers(pipe.transformer)


@needs_transformers_5
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state, key: state.pop(key), "is missing"),
        (lambda state, key: state.update({key: state[key][:-1].clone()}), "has the wrong shape"),
        (lambda state, key: state.update({key: state[key].short()}), "codes are torch.uint8"),
        (lambda state, key: state.update({key.replace("qdata", "smooth"): torch.ones(20)}), "should not be there"),
        (lambda state, key: state.update({key.replace("qdata", "scale"): state[key.replace("qdata", "scale")] * torch.nan}), "NaN"),
    ],
    ids=["missing", "shape", "dtype", "extra", "nan"],
)
@pytest.mark.parametrize("load", [dite.load, None], ids=["dite", "diffusers"])
def test_a_spoilt_text_encoder_is_refused_by_name(spoil, says, load, tmp_path):
    pipe = PIPELINES["pixart"]()
    dite.quantize(pipe, "w4a8", overrides=ENCODERS)
    pipe.save_pretrained(tmp_path / "model")
    file = tmp_path / "model/text_encoder/model.safetensors"
    state = load_file(file)
    key = next(name for name in state if name.endswith(".qdata"))
    spoil(state, key)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        (load or type(pipe).from_pretrained)(tmp_path / "model")
    assert says in str(error.value) and key.removesuffix(".qdata") in str(error.value)
