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


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return dite.save(PIPELINES["sd3"](), tmp_path_factory.mktemp("clips") / "sd3")


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"eos_token_id": 2, "bos_token_id": 0}, True),  # as old configurations have it
        ({"eos_token_id": 63, "bos_token_id": 62}, True),
        ({"eos_token_id": 64}, False),
        ({"eos_token_id": 0}, False),
        ({"eos_token_id": -1}, False),
        ({"eos_token_id": None}, False),  # the class's own is beyond these 64 words
    ],
)
def test_a_clip_that_could_not_find_the_end_of_a_text_is_refused(changes, fits, clips, tmp_path):
    folder = shutil.copytree(clips, tmp_path / "model")
    config(**changes)(folder)
    reseal(folder)
    if fits:
        return dite.load(folder)
    with pytest.raises(CheckpointError, match=r"text_encoder/config.json: eos_token_id is"):
        dite.load(folder)


@pytest.mark.parametrize("key", ["layer_norm_eps", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_null_for_a_number_is_refused(key, clips, tmp_path):
    folder = shutil.copytree(clips, tmp_path / "model")
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: None}))
    reseal(folder)
    with pytest.raises(CheckpointError, match=f"{key} is null"):
        dite.load(folder)


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    pipe = PIPELINES["sd3"]()
    pipe.text_encoder_2.config.eos_token_id = 49407
    with pytest.raises(CheckpointError, match=r"text_encoder_2.config: eos_token_id is 49407(?s:.*)set pipe.text_encoder_2.config.eos_token_id"):
        dite.save(pipe, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_a_quantized_encoder_without_a_dtype_is_refused(saved, tmp_path):
    """transformers would take the type of the first scale for it."""
    folder = shutil.copytree(saved / "quantized", tmp_path / "model")
    config(dtype=None)(folder)
    reseal(folder)
    with pytest.raises(CheckpointError, match="dtype is missing"):
        dite.load(folder)
