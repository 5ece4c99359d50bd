"""From what a user holds (our wrapper, a diffusers pipeline, a bare model) to the denoisers inside."""

from typing import Any

from torch import nn

from dite.errors import UnsupportedModel

COMPONENTS = ("transformer", "transformer_2")


def unwrap(model: Any) -> Any:
    """The diffusers pipeline inside a `dite.Pipeline` (whatever holds one in `.pipe`); anything else as it is."""
    return model if isinstance(model, nn.Module) else getattr(model, "pipe", model)


def denoisers(model: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by component name, or {"": model} for a bare model; of compiled ones, the model inside.

    Raises UnsupportedModel when there is none.
    """
    model = unwrap(model)
    if isinstance(model, nn.Module):
        return {"": _uncompiled(model)}
    if not hasattr(model, "components"):
        raise UnsupportedModel(
            f"a {type(model).__name__} is neither a diffusers pipeline nor a torch module", "pass a DiffusionPipeline or its transformer"
        )
    found = {name: _uncompiled(getattr(model, name)) for name in COMPONENTS if isinstance(getattr(model, name, None), nn.Module)}
    if not found:
        parts = ", ".join(name for name, part in model.components.items() if isinstance(part, nn.Module)) or "no modules"
        raise UnsupportedModel(
            f"{type(model).__name__} has no transformer; it holds {parts}", "dite works on diffusion transformers; UNet pipelines are not supported"
        )
    return found


def text_encoders(model: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline by component name; none for a bare model."""
    parts = getattr(unwrap(model), "components", {})
    return {name: part for name, part in parts.items() if name.startswith("text_encoder") and isinstance(part, nn.Module)}


def the_denoiser(model: Any) -> nn.Module:
    """The first (usually the only) denoiser."""
    return next(iter(denoisers(model).values()))


def _uncompiled(module: nn.Module) -> nn.Module:
    """What `torch.compile` has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)
