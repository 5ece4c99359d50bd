"""Configurations and indexes that ask for more than there is, or for something else."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.checkpoint.hostile.spoil import CONFIG, INDEX, LAYER, SCHEDULER, WEIGHTS, case, config_of, edit, replace_text, split


def config_case(name: str, file: str, word: str, change: Callable, where: str = CONFIG, seal: str = "resealed") -> None:
    case(name, file, word, seal)(lambda folder: edit(folder / where, change))


SEEDED = {"kind": "hadamard", "block": 16, "sign_seed": 2**100}


def _no_linear(config):
    layers = config["quantization_config"]["layers"]
    layers["pos_embed"] = layers[LAYER]


def _layer(scheme: Callable) -> Callable:
    return lambda config: scheme(config["quantization_config"]["layers"][LAYER])


config_case("another group size", LAYER, "wrong shape", _layer(lambda s: s["weight"].update(group_size=16)))
config_case("a group size of 17", "group_size", "multiple of 16", _layer(lambda s: s["weight"].update(group_size=17)))
config_case("a group size of 2^63", "group_size", "multiple of 16", _layer(lambda s: s["weight"].update(group_size=2**63)))
config_case("5 bits", "num_bits", "quantization_config", _layer(lambda s: s["weight"].update(num_bits=5)))
config_case("8 bits for codes of 4", f"{LAYER}.qdata", "wrong shape", _layer(lambda s: s["weight"].update(num_bits=8)))
config_case("a rank of 2^31", "rank", "quantization_config", _layer(lambda s: s.update(rank=2**31)))
config_case(
    "a seed of 2^100",
    "sign_seed",
    "quantization_config",
    _layer(lambda s: s.update(transform=SEEDED)),
)
config_case(
    "a layer that is no linear",
    "pos_embed",
    "no linear",
    _no_linear,
)
config_case("a layer forgotten", LAYER, "is missing", lambda c: c["quantization_config"]["layers"].pop(LAYER))
config_case("a model from a newer dite", "format_version", "newer dite", lambda c: c["quantization_config"].update(format_version=99))
config_case("another library's quantizer", CONFIG, "quant_method", lambda c: c["quantization_config"].update(quant_method="bitsandbytes"))
config_case("2^24 layers", CONFIG, "modules", lambda c: c.update(num_layers=2**24))
config_case("2^31 layers", CONFIG, "num_layers", lambda c: c.update(num_layers=2**31))
config_case("2^20 heads", CONFIG, "tables would take", lambda c: c.update(num_attention_heads=2**20))
config_case("positions of a picture of a million pixels a side", CONFIG, "tables would take", lambda c: c.update(sample_size=2**20))
config_case("2^24 classes", CONFIG, "wrong shape", lambda c: c.update(num_embeds_ada_norm=2**24))
config_case("an autoencoder of 2^20 layers a block", "vae/config.json", "modules", lambda c: c.update(layers_per_block=2**20), "vae/config.json")
config_case("an autoencoder of 2^20 channels", "vae/config.json", "wrong shape", lambda c: c.update(latent_channels=2**20), "vae/config.json")
config_case("2^24 timesteps", SCHEDULER, "num_train_timesteps", lambda c: c.update(num_train_timesteps=2**24), SCHEDULER)
config_case("a key that the model doesn't take", CONFIG, "no_such_key", lambda c: c.update(no_such_key=1))
config_case("a key left out", CONFIG, "norm_eps", lambda c: c.pop("norm_eps"))
config_case("another class", CONFIG, "_class_name", lambda c: c.update(_class_name="UNet2DModel"))
config_case("no such class", INDEX, "no such class", lambda c: c.update(transformer=["diffusers", "NoSuchModel"]), INDEX)
config_case("a part from another library", INDEX, "subprocess", lambda c: c.update(transformer=["subprocess", "Popen"]), INDEX)
config_case(
    "a part that is a path",
    "../outside",
    "named like variables",
    lambda c: c.update({"../outside": ["diffusers", "VQModel"]}),
    INDEX,
    "unsealed",
)
config_case("a pipeline that brings its own code", INDEX, "_class_name", lambda c: c.update(_class_name=["pipeline", "Mine"]), INDEX)
config_case("no such pipeline", INDEX, "_class_name", lambda c: c.update(_class_name="NoSuchPipeline"), INDEX)
config_case("a part left out", INDEX, "vae", lambda c: c.pop("vae"), INDEX)
config_case("labels that are no labels", INDEX, "id2label", lambda c: c.update(id2label={"x": 1}), INDEX)


@case("a configuration with 1e999", CONFIG, "no finite number", "resealed")
def _(folder):
    replace_text(config_of(folder), '"norm_eps": 1e-05', '"norm_eps": 1e999')


@case("a configuration with NaN", CONFIG, "no JSON", "resealed")
def _(folder):
    replace_text(config_of(folder), '"norm_eps": 1e-05', '"norm_eps": NaN')


@case("a key twice in a configuration", CONFIG, "appears twice", "resealed")
def _(folder):
    replace_text(config_of(folder), '"norm_eps"', '"norm_eps": 1, "norm_eps"')


@case("a configuration nested 100 deep", CONFIG, "nested deeper", "resealed")
def _(folder):
    edit(config_of(folder), lambda c: c["quantization_config"].update(calibration=json.loads('{"a":' * 100 + "1" + "}" * 100)))


@case("a configuration of 17 million bytes", CONFIG, "too large", "resealed")
def _(folder):
    config_of(folder).write_bytes(config_of(folder).read_bytes() + b" " * 17_000_000)


@case("a configuration that is a list", CONFIG, "not a mapping", "resealed")
def _(folder):
    config_of(folder).write_text("[]")


def _index(folder: Path, place: str) -> None:
    header, _ = split(folder / WEIGHTS)
    path = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys((name for name in header if name != "__metadata__"), place)})
    )


@case("an index that points out of the folder", "index.json", "of its own folder only", "resealed")
def _(folder):
    _index(folder, "../../outside/secret.safetensors")


@case("an index that points out of the folder, without a manifest", "index.json", "of its own folder only", "unsealed")
def _(folder):
    _index(folder, "../../outside/secret.safetensors")


@case("an index that names a file which isn't there", "transformer/other.safetensors", "missing", "resealed")
def _(folder):
    _index(folder, "other.safetensors")


@case("an index that leaves a tensor out", "index.json", "weight_map", "resealed")
def _(folder):
    _index(folder, "diffusion_pytorch_model.safetensors")
    edit(folder / "transformer/diffusion_pytorch_model.safetensors.index.json", lambda i: i["weight_map"].pop(f"{LAYER}.scale"))
