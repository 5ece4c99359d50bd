"""Text encoders on disk: every architecture's own names, and folders that say what is not so."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dite
from dite.errors import CheckpointError
from dite.quant.apply import quantized_layers
from tests.checkpoint.hostile.cases import reseal
from tests.text.pipelines import PIPELINES

pytestmark = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers before 5 loads quantized models in another way")
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
Q = "encoder.block.0.layer.0.SelfAttention.q"


def qwen():
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"}}
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(text_config=TEXT | rope, vision_config=vision))


def mistral():
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28, "patch_size": 14}
    config = transformers.Mistral3Config(text_config=TEXT | {"model_type": "mistral"}, vision_config=vision | {"model_type": "pixtral"})
    return transformers.Mistral3ForConditionalGeneration(config)


def gemma():
    return transformers.Gemma2Model(transformers.Gemma2Config(**TEXT, head_dim=16))


@pytest.mark.parametrize("build", [qwen, mistral, gemma])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encoders_whose_files_name_tensors_otherwise_come_back(build, dtype, tmp_path):
    torch.manual_seed(0)
    pipe = PIPELINES["pixart"]()
    pipe.text_encoder = build().eval()
    dite.save(pipe, tmp_path / "base")
    pipe = dite.load(tmp_path / "base", dtype=dtype)
    dite.quantize(pipe, "w4a8", overrides=["text_encoders.num_bits=4"])
    dite.save(pipe, tmp_path / "small")
    before, after = pipe.text_encoder.state_dict(), dite.load(tmp_path / "small", dtype=dtype).text_encoder.state_dict()
    assert quantized_layers(pipe.text_encoder) and before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A plain and a quantized folder."""
    place = tmp_path_factory.mktemp("encoders")
    pipe = PIPELINES["pixart"]()
    dite.save(pipe, place / "plain")
    dite.quantize(pipe, "w4a8", overrides=["text_encoders.num_bits=8"])
    dite.save(pipe, place / "quantized")
    return place


def config(**changes):
    """Keys of the encoder's configuration changed, or, for None, taken out."""

    def spoil(folder):
        path = folder / "text_encoder/config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return spoil


def quantization(change):
    def spoil(folder):
        path = folder / "text_encoder/config.json"
        values = json.loads(path.read_text())
        change(values["quantization_config"])
        path.write_text(json.dumps(values))

    return spoil


def tensors(change):
    def spoil(folder):
        path = folder / "text_encoder/model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path, {"format": "pt"})

    return spoil


def activated(stored):
    stored["layers"][Q]["activation"] = {"num_bits": 8, "granularity": "token", "symmetric": False}


LIES = {
    "plain: a tensor renamed": ("plain", tensors(lambda state: state.update(other=state.pop(f"{Q}.weight"))), f"{Q}.weight is missing"),
    "plain: an embedding renamed": ("plain", tensors(lambda state: state.update(other=state.pop("shared.weight"))), "is missing"),
    "plain: a tensor too many": ("plain", tensors(lambda state: state.update(other=torch.ones(3))), "other should not be there"),
    "plain: a tensor cut": ("plain", tensors(lambda state: state.update({f"{Q}.weight": state[f"{Q}.weight"][:9].clone()})), "has the wrong shape"),
    "plain: NaN": ("plain", tensors(lambda state: state["shared.weight"].fill_(torch.nan)), "shared.weight is damaged"),
    "a plain tensor renamed": ("quantized", tensors(lambda state: state.update(other=state.pop("shared.weight"))), "is missing"),
    "codes renamed": ("quantized", tensors(lambda state: state.update(other=state.pop(f"{Q}.qdata"))), f"{Q}.qdata is missing"),
    "a tensor too many": ("quantized", tensors(lambda state: state.update(other=torch.ones(3))), "other should not be there"),
    "no quantization_config": ("quantized", config(quantization_config=None), "is missing"),
    "quantization_config is a list": ("quantized", config(quantization_config=[1]), "quant_method is None"),
    "another quant_method": ("quantized", quantization(lambda stored: stored.update(quant_method="dite2")), "quant_method is 'dite2'"),
    "another known quant_method": ("quantized", quantization(lambda stored: stored.update(quant_method="quanto")), "quant_method is 'quanto'"),
    "a layer less": ("quantized", quantization(lambda stored: stored["layers"].pop(Q)), f"{Q}.weight is missing"),
    "a layer that is none": ("quantized", quantization(lambda stored: stored["layers"].update(other=stored["layers"][Q])), "other is no linear"),
    "rounded activations": ("quantized", quantization(activated), "more than rounded"),
    "other bits": ("quantized", quantization(lambda stored: stored["layers"][Q]["weight"].update(num_bits=4)), "has the wrong shape"),
    "fewer layers": ("quantized", config(num_layers=1), "is no linear of T5EncoderModel"),
    "no layers": ("plain", config(num_layers=0), "num_layers is 0"),
    "fewer layers, plain": ("plain", config(num_layers=1), "should not be there"),
    "many layers": ("plain", config(num_layers=2**24), "more than"),
    "a wide model": ("plain", config(d_model=2**20), "has the wrong shape"),
    "many words": ("plain", config(vocab_size=2**24), "has the wrong shape"),
    "more than that": ("plain", config(vocab_size=2**31), "vocab_size is 2147483648"),
    "a distance of none": ("plain", config(relative_attention_max_distance=0), "relative_attention_max_distance is 0"),
    "a number in words": ("plain", config(layer_norm_epsilon="small"), "layer_norm_epsilon is a text"),
    "kernels from a hub": ("plain", config(_attn_implementation="someone/kernels"), "code from a hub is not run"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_folder_that_is_sealed_and_lies_is_refused(lie, saved, tmp_path):
    kind, spoil, says = LIES[lie]
    folder = shutil.copytree(saved / kind, tmp_path / "model")
    spoil(folder)
    reseal(folder)
    with pytest.raises(CheckpointError) as error:
        dite.load(folder)
    assert says in str(error.value)


def test_what_was_not_spoilt_loads(saved, tmp_path):
    folder = shutil.copytree(saved / "quantized", tmp_path / "model")
    reseal(folder)
    dite.load(folder)
