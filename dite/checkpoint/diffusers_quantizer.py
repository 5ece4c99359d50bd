"""dite as a diffusers quantizer: plain `from_pretrained` loads our folders, and `DiteConfig` quantizes while loading.

    DiTPipeline.from_pretrained("dit-w4a8")                                                        after `import dite`
    DiTTransformer2DModel.from_pretrained(path, quantization_config=dite.DiteConfig("w4a8"))
    PipelineQuantizationConfig(quant_mapping={"transformer": dite.DiteConfig("w4a8")})

Two traps of the loader are handled here: it casts every float tensor to `torch_dtype` (so scales are taken from the state dict instead), and on
reload the file's configuration beats the caller's (so what runs the model, the backend, is chosen afterwards by `set_backend`).
"""

import logging
from enum import Enum
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from pydantic import ValidationError
from torch import nn

from dite.checkpoint.format import FORMAT_VERSION
from dite.checkpoint.register import register_quantizers
from dite.errors import CheckpointError, UsageError
from dite.models.planning import make_plan
from dite.quant.apply import check_weights, dequantize_linears_, insert_empty_layers_, quantize_linears_, quantized_layers
from dite.quant.linear import QuantLinear
from dite.quant.lora import UNLOAD, prepare_for_adapters_, refuse_adapters
from dite.quant.plan import QuantPlan, StoredPlan
from dite.recipe import QuantRecipe, load_recipe

log = logging.getLogger("dite")
OPTIONAL_TENSORS = ("zero_point", "bias", "smooth", "lowrank_down", "lowrank_up")
CAST_TENSORS = ("bias", "lowrank_down", "lowrank_up")  # in the model's dtype; the others stay as they are stored
KEYS = ("quant_method", "format_version", "recipe", "layers", "skipped", "calibration")


class DiteMethod(str, Enum):  # noqa: UP042 - diffusers compares with plain strings
    """diffusers reads `.value`."""

    DITE = "dite"


class DiteConfig(QuantizationConfigMixin):
    """How a model is, or is to be, quantized; what `quantization_config` in its config.json holds.

    Give `recipe` (name, file, dict or QuantRecipe) to quantize while loading. A quantized model carries `layers`, the scheme of each layer, which
    decide alone; its `recipe` tells what it was made with.
    """

    def __init__(
        self,
        recipe: Any = None,
        *,
        layers: dict[str, Any] | None = None,
        skipped: dict[str, str] | None = None,
        calibration: dict | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = "dite",
    ):
        self.quant_method = DiteMethod.DITE
        if format_version > FORMAT_VERSION:
            why = f"format_version {format_version}; this dite reads up to {FORMAT_VERSION}"
            raise CheckpointError("the model is from a newer dite", why, "upgrade dite")
        self.format_version = format_version
        self.quantized = layers is not None
        try:
            self.recipe = _recipe(recipe, stored=self.quantized)
            self.plan = StoredPlan.model_validate({"layers": layers or {}, "skipped": skipped or {}}, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CheckpointError("quantization_config can't be read", f"{where}: {first['msg']}", "is config.json damaged?") from error
        if layers and (wrong := _incomplete(self.plan.model_dump(mode="json")["layers"], layers)):
            raise CheckpointError("quantization_config can't be read", f"layers.{wrong} is not spelled out", "is config.json damaged?")
        if not isinstance(calibration, dict | None) or not isinstance((calibration or {}).get("plan"), dict | None):
            raise CheckpointError("quantization_config can't be read", "calibration, or plan in it, is no mapping", "is config.json damaged?")
        self.calibration = calibration

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What diffusers calls with a config.json's `quantization_config`."""
        unknown, version = sorted(set(config_dict) - set(KEYS)), config_dict.get("format_version", 0)
        why = f"unknown key {unknown[0]}" if unknown else None
        if config_dict.get("quant_method") != "dite":
            why = why or f"quant_method is {config_dict.get('quant_method')!r}, not dite"
        if type(version) is not int or ("layers" in config_dict and version < 1):
            why = why or f"format_version is {version!r}; it is a whole number from 1"
        if config_dict.get("layers") and (missing := next((key for key in KEYS if key not in config_dict), None)):
            why = why or f"it lacks {missing}"
        if "layers" in config_dict and not all(isinstance(config_dict.get(key), dict) for key in ("layers", "skipped")):
            why = why or "layers, or skipped, is no mapping"
        if "recipe" not in config_dict and not config_dict.get("layers"):
            why = why or "it lists no layers, and no recipe to make them by"
        if why:
            raise CheckpointError("quantization_config can't be read", why, "is config.json damaged?")
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def of(cls, plan: QuantPlan, recipe: QuantRecipe, calibration: dict | None = None) -> "DiteConfig":
        """The configuration of a model that was just quantized."""
        stored = StoredPlan.of(plan).model_dump(mode="json")
        return cls(recipe, layers=stored["layers"], skipped=stored["skipped"], calibration=calibration)

    def to_dict(self) -> dict[str, Any]:
        values = {"quant_method": self.quant_method.value, "format_version": self.format_version}
        values["recipe"] = self.recipe and self.recipe.model_dump(mode="json", exclude_unset=True)
        return values | self.plan.model_dump(mode="json") | {"calibration": self.calibration} if self.quantized else values

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class DiteQuantizer(DiffusersQuantizer):
    """Builds empty quantized layers before the weights arrive, or quantizes the model after they did."""

    use_keep_in_fp32_modules = True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what the loader would fail at half-way."""
        refuse_disk(device_map, "model")

    def check_if_quantized_param(self, model, param_value, param_name, state_dict, **kwargs) -> bool:
        module, _, tensor = param_name.rpartition(".")
        return tensor not in CAST_TENSORS and isinstance(_submodule(model, module), QuantLinear)

    def create_quantized_param(self, model, param_value, param_name, target_device, state_dict, unexpected_keys=None, **kwargs) -> None:
        module, _, tensor = param_name.rpartition(".")
        layer = model.get_submodule(module)
        extra = next((name for name in OPTIONAL_TENSORS if f"{module}.{name}" in state_dict and getattr(layer, name) is None), None)
        if extra is not None:  # diffusers would only warn, and the codes would mean something else
            raise CheckpointError(
                f"{module}.{extra} should not be there",
                "the layer's scheme in config.json has no such tensor",
                "weights and config.json are from different models",
            )
        setattr(layer, tensor, state_dict[param_name].to(target_device, copy=True))

    def check_quantized_param_shape(self, param_name, current_param, loaded_param) -> bool:
        raise CheckpointError(
            f"{param_name} has the wrong shape",
            f"it is {tuple(loaded_param.shape)}; its scheme in config.json needs {tuple(current_param.shape)}",
            "weights and config.json are from different models",
        )

    def _process_model_before_weight_loading(self, model, **kwargs) -> None:
        if not self.pre_quantized:
            return
        insert_planned_(model, self.quantization_config)
        model.register_to_config(quantization_config=self.quantization_config)

    def _process_model_after_weight_loading(self, model, **kwargs) -> None:
        if not self.pre_quantized:
            recipe = self.quantization_config.recipe
            if recipe.calibrated:
                why = "the whole pipeline must run to calibrate"
                if not recipe.lenient:
                    raise UsageError(f"recipe {recipe.name} can't be carried out while loading", why, "load the pipeline, then call dite.quantize")
                log.warning("dite: recipe %s rounds to nearest while loading (%s); dite.quantize on the loaded pipeline is better", recipe.name, why)
                recipe = recipe.uncalibrated()
            plan = make_plan(model, recipe, allow_marked=True)
            check_weights(model, plan)
            quantize_linears_(model, plan)
            self.quantization_config = DiteConfig.of(plan, recipe)
            model.register_to_config(quantization_config=self.quantization_config)
        check_tensors(model)
        prepare_for_adapters_(model)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        """What `model.dequantize()` of diffusers asks for: plain linears, and nothing that speaks of quantization. Raises UsageError for adapters."""
        refuse_adapters(model, "dequantized", UNLOAD)
        dequantize_linears_(model)
        model._internal_dict = FrozenDict({key: value for key, value in model.config.items() if key != "quantization_config"})
        for added in ("quantization_method", "fuse_lora"):
            model.__dict__.pop(added, None)
        return model

    def get_state_dict_and_metadata(self, state_dict, safe_serialization: bool = False):
        adapted = next((name for name in state_dict if ".base_layer." in name), None)
        if adapted is not None:  # no loader knows such names
            raise UsageError("a quantized model with adapters attached can't be saved", f"it would hold {adapted}", UNLOAD)
        return state_dict, {}

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters are; codes are not


def insert_planned_(model: nn.Module, config: DiteConfig) -> None:
    """Put empty quantized layers where a stored configuration lists them. Raises CheckpointError when it lists something else than linears."""
    if not config.plan.layers:
        raise CheckpointError("quantization_config can't be read", "it lists no layers", "is config.json damaged?")
    for name in config.plan.layers:
        if not isinstance(_submodule(model, name), nn.Linear):
            what, why = f"{name} is no linear of {type(model).__name__}", "quantization_config lists it"
            raise CheckpointError(what, why, "was the folder made for another diffusers version?")
    insert_empty_layers_(model, config.plan.layers)


def mark_quantized_(model: nn.Module, plan: QuantPlan, recipe: QuantRecipe, calibration: dict | None = None) -> None:
    """Make a model that was quantized in memory look to diffusers like one it loaded: `save_pretrained` then works."""
    if not hasattr(model, "register_to_config"):
        return
    config = DiteConfig.of(plan, recipe, calibration)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = DiteQuantizer(config, pre_quantized=True)
    model.register_to_config(quantization_config=config)
    prepare_for_adapters_(model)


def search_plan_of(model: nn.Module) -> dict[str, Any] | None:
    """What the search that chose a model's layers found; None for models quantized without one."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return (config.calibration or {}).get("plan") if isinstance(config, DiteConfig) else None


def recipe_of(model: nn.Module) -> QuantRecipe | None:
    """What a model was quantized with, in this process or before it was saved; None for others."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config.recipe if isinstance(config, DiteConfig) else None


def refuse_disk(device_map: Any, kind: str) -> None:
    """Raise UsageError for a device map that puts layers onto the disk: loaders offload parameters only, and codes are buffers."""
    if device_map == "disk" or (isinstance(device_map, dict) and "disk" in device_map.values()):
        why = "codes are buffers, and only parameters are offloaded while a model is loaded"
        raise UsageError(f"a quantized {kind} can't be loaded onto the disk", why, "load it, then accelerate.disk_offload(model, folder)")


def check_tensors(model: nn.Module) -> None:
    """Raise CheckpointError unless the model is complete and sound: nothing left on meta, every number finite, every quantized layer valid."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(f"{name} is missing", "the weights lack this tensor", "copy or download the folder again")
    check_finite(model)
    for name, layer in quantized_layers(model).items():
        try:
            layer.tensor.validate(layer.spec)
            layer.validate_parts()
        except ValueError as error:
            raise CheckpointError(f"layer {name} is damaged", str(error), "copy or download the folder again") from error


def check_finite(model: nn.Module) -> None:
    """Raise CheckpointError that names the tensor where one of a model's state holds NaN or inf."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all():
            raise CheckpointError(f"{name} is damaged", "it holds NaN or inf", "copy or download the folder again")


def _incomplete(whole: Any, given: Any, path: str = "") -> str | None:
    """Where a stored scheme leaves something to a default: another version's could be another."""
    if isinstance(whole, dict) and isinstance(given, dict):
        return next((found for key in whole if (found := _incomplete(whole[key], given.get(key, ...), f"{path}.{key}".lstrip(".")))), None)
    return None if whole == given and type(whole) is type(given) else path


def _recipe(given: Any, stored: bool) -> QuantRecipe | None:
    if stored:
        return None if given is None else QuantRecipe.model_validate(given)
    return load_recipe("w4a8" if given is None else given)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


register_quantizers()
