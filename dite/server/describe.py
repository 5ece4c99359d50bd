"""A rank's model, as the HTTP process needs to know it; its pictures, as clients get them."""

from __future__ import annotations

import io
import math
import time
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

import dite
from dite.errors import UnsupportedModel
from dite.models.inspect import stats
from dite.pictures import to_png
from dite.sampling import call_parameters, class_ids, takes_classes
from dite.server.card import ModelCard
from dite.server.engine import Engine, Failed
from dite.server.job import ImageRequest
from dite.server.logs import failure, log
from dite.server.settings import ServerSettings

ROUNDING = 2e-2  # largest difference of joined calls, relative, that is rounding and no mistake (bfloat16 has 8 bits)


def card(pipe: Any, shared: Any = None) -> ModelCard:
    """What `pipe` draws, in which sizes, and how it is shared out."""
    known = call_parameters(pipe)
    classes = takes_classes(pipe)
    side = _default_side_px(pipe)
    exchange = None
    if shared is not None:
        stats = shared.stats()
        exchange = {key: stats[key] for key in ("ranks", "mode", "codec", "order", "reason") if key in stats}
    return ModelCard(
        pipeline=type(pipe).__name__,
        reads_text=not classes,
        classes=dict(getattr(pipe, "labels", {})) if classes else {},
        class_ids=class_ids(pipe) if classes else [],
        default_size_px=(side, side),
        fixed_size="height" not in known,
        multiple_px=getattr(pipe, "vae_scale_factor", 8) * 2,
        most_side_px=_most_side_px(pipe),
        most_steps=getattr(getattr(pipe.scheduler, "config", None), "num_train_timesteps", 1000),
        takes_guidance="guidance_scale" in known,
        takes_negative_prompt="negative_prompt" in known,
        parameters=sum(one.numel() for one in pipe.transformer.parameters()),
        backend=_runs_on(pipe),
        exchange=exchange,
    )


def warm_up(engine: Engine, described: ModelCard, settings: ServerSettings) -> ModelCard:
    """Draw a picture, so that kernels are compiled and connections open; and learn what only drawing tells: how long a step takes, whether calls can
    be joined, and whether one step is enough for a picture (PixArt's pipeline takes it for a distilled model's, and fails with others).

    Raises what drawing raises: a server that can't draw is not ready.
    """
    width, height = described.default_size_px
    first = ImageRequest(
        condition="a ship" if described.reads_text else described.class_ids[0], n=1, seed=0, steps=2, guidance=2.0, width_px=width, height_px=height
    )
    error, step_s = _drawn(engine, first)
    if error is not None:
        raise error
    of_one_step, _ = _drawn(engine, replace(first, steps=1))
    if of_one_step is not None:
        if engine.interrupted:
            raise of_one_step  # in the middle of an exchange; a pipeline that can't draw in one step says so outside of them
        log("one_step_is_not_enough", **failure(of_one_step))
    if engine.joins and settings.batching != "none" and settings.max_batch > 1 and engine.shared is None:
        difference = engine.joined_equals_alone(replace(first, steps=2), replace(first, steps=3, seed=1))
        engine.joins = difference <= ROUNDING
        if not engine.joins:
            log("requests_not_joined", why="calls made together differ from calls made alone", by=min(difference, 1e9), allowed=ROUNDING)
    return replace(described, step_s=step_s, least_steps=1 if of_one_step is None else 2, joins=engine.joins)


def _drawn(engine: Engine, request: ImageRequest) -> tuple[BaseException | None, float]:
    """Draw a request: its error, if it has one, and how long its last step took, decoding and all (as `step_timeout_s` counts it)."""
    happened, seconds = engine.start("warm-up", request), 0.0
    while engine.names:
        began = time.perf_counter()
        happened += engine.step()
        seconds = time.perf_counter() - began
        if engine.interrupted:
            engine.cancel("warm-up")
    return next((event.error for event in happened if isinstance(event, Failed)), engine.lost), seconds


def encoded(images: torch.Tensor, request: ImageRequest, settings: ServerSettings) -> list[bytes]:
    """Image files of uint8 [n, 3, H, W]; PNGs carry what is needed to draw them again."""
    files = []
    for image, seed in zip(images, request.seeds, strict=True):
        facts = {"class" if isinstance(request.condition, int) else "prompt": request.condition, "seed": seed, "steps": request.steps}
        facts |= {"guidance": request.guidance, "model": settings.served_name, "version": dite.__version__}
        if request.negative_prompt is not None:
            facts["negative_prompt"] = request.negative_prompt
        files.append(_file(image, request.output_format, facts))
    return files


def preview(pipe: Any, latents: torch.Tensor, output_format: str) -> list[bytes]:
    """Pictures of latents that aren't finished; none for latents that only their pipeline knows how to unfold."""
    if latents.dim() != 4 or getattr(pipe, "vae", None) is None:
        return []
    config = pipe.vae.config
    with torch.no_grad():
        scaled = latents.to(pipe.vae.dtype) / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        images = (pipe.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).nan_to_num(0.5).clamp(0, 1)
    return [_file((image * 255).round().to(torch.uint8).cpu(), output_format, None) for image in images]


def _file(image: torch.Tensor, output_format: str, facts: dict[str, Any] | None) -> bytes:
    if output_format == "png":
        return to_png(image, facts)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format=output_format.upper(), quality=95)
    return buffer.getvalue()


def _runs_on(pipe: Any) -> str:
    """Widths and backend of quantized layers, else the precision: for people, on the page."""
    found = stats(pipe)
    widths, backends = ", ".join(found["layers"]), ", ".join(found["backends"])
    return f"{widths} on {backends}" if widths else str(pipe.transformer.dtype).removeprefix("torch.")


def _most_side_px(pipe: Any) -> int | None:
    """Where positions are cut out of a table, as SD3's are, the largest side that it has them for."""
    embedding = getattr(pipe.transformer, "pos_embed", None)
    table = getattr(embedding, "pos_embed", None)
    if not getattr(embedding, "pos_embed_max_size", None) or not isinstance(table, torch.Tensor):
        return None
    return math.isqrt(table.numel() // table.shape[-1]) * getattr(embedding, "patch_size", 1) * _pixels_per_latent(pipe)


def _default_side_px(pipe: Any) -> int:
    side = getattr(pipe, "default_sample_size", None) or getattr(pipe.transformer.config, "sample_size", None)
    if not isinstance(side, int):
        raise UnsupportedModel(f"{type(pipe).__name__} does not say what size it draws", "serve a pipeline whose transformer has a sample_size")
    return side * _pixels_per_latent(pipe)


def _pixels_per_latent(pipe: Any) -> int:
    if hasattr(pipe, "vae_scale_factor"):
        return pipe.vae_scale_factor
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)
