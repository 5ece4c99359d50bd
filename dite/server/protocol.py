"""The Images API: from a request's body to what is to be drawn, and from pictures to the answer. Nothing here waits, reads or sends."""

from __future__ import annotations

import base64
import json
import math
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import dite
from dite.errors import did_you_mean
from dite.server.card import ModelCard
from dite.server.job import ImageRequest, Partial, Pictures, Progress
from dite.server.labels import class_id
from dite.server.problems import Problem, invalid
from dite.server.settings import ServerSettings

SEEDS = 2**32  # torch's CPU generator tells no more apart
MOST_GUIDANCE = 100  # beyond, models overflow
MOST_PARTIAL_IMAGES = 3
MOST_DIGITS = 20
SHOWN_CHARS = 60

IGNORED = ("user", "safety_identifier", "quality", "style", "background", "moderation", "output_compression")


class Fields(BaseModel):
    """The body of a request, by type. `description` completes the sentence "FIELD must be ...". null means the same as leaving a field out."""

    model_config = ConfigDict(strict=True, extra="ignore")

    prompt: str | None = Field(None, description="a string")
    model: str | None = Field(None, description="a string")
    n: int = Field(1, description="a whole number")
    size: str = Field("auto", description='a string as in "256x256", or "auto"')
    response_format: Literal["b64_json"] = Field("b64_json", description='"b64_json" (pictures are not stored, and have no URL)')
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description='"png", "jpeg" or "webp"')
    stream: bool = Field(False, description="true or false")
    partial_images: int = Field(0, description="a whole number")

    class_labels: int | str | list[int | str] | None = Field(None, description="a class's id or name, or a list of one")
    num_inference_steps: int | None = Field(None, description="a whole number")
    guidance_scale: float | None = Field(None, description="a number")
    seed: int | None = Field(None, description="a whole number")
    negative_prompt: str | None = Field(None, description="a string")
    timeout_s: float | None = Field(None, description="a number of seconds")
    progress: bool = Field(False, description="true or false")


@dataclass(frozen=True)
class Asked:
    """The pictures, and how the answer is to be delivered."""

    request: ImageRequest
    stream: bool = False
    progress: bool = False
    timeout_s: float | None = None


@dataclass(frozen=True)
class Answer:
    """Words that every answer to a request has in common."""

    request: ImageRequest
    model: str
    created: int  # Unix time

    def to_json(self, pictures: Pictures, total_s: float) -> dict[str, Any]:
        """The whole answer of a request without `stream`."""
        data = [{"b64_json": _base64(image)} for image in pictures.images]
        facts = {"output_format": self.request.output_format, "size": _size(self.request)}
        return {"created": self.created, "data": data} | facts | {"dite": self._remade_from(pictures, total_s)}

    def partial(self, event: Partial, round_: int) -> dict[str, Any]:
        """The stream's event for a picture before it is finished, the `round_`-th of that picture; OpenAI's words can't say of which."""
        return self._event("image_generation.partial_image", event.image) | {"partial_image_index": round_, "dite": {"picture": event.index}}

    def completed(self, pictures: Pictures, total_s: float) -> Iterator[dict[str, Any]]:
        """The stream's event for each finished picture."""
        tokens = {"image_tokens": 0, "text_tokens": 0}
        usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": tokens}  # OpenAI's clients expect them
        facts = self._remade_from(pictures, total_s)
        for index, image in enumerate(pictures.images):
            yield self._event("image_generation.completed", image) | {"usage": usage, "dite": facts | {"picture": index}}

    def _event(self, kind: str, image: bytes) -> dict[str, Any]:
        looks = {"size": _size(self.request), "output_format": self.request.output_format, "quality": "auto", "background": "auto"}
        return {"type": kind, "b64_json": _base64(image), "created_at": self.created} | looks

    def _remade_from(self, pictures: Pictures, total_s: float) -> dict[str, Any]:
        """What is needed to make the pictures again, and how long they took."""
        request = self.request
        timings = {"queue_s": pictures.queue_s, "run_s": pictures.run_s, "draw_s": pictures.draw_s, "total_s": total_s}
        return {
            "model": self.model,
            "seed": request.seed,
            "seeds": request.seeds,
            "class_labels": [request.condition] if isinstance(request.condition, int) else None,
            "steps": request.steps,
            "guidance": request.guidance,
            "size": _size(request),
            "version": dite.__version__,
            "attempts": pictures.attempts,
            "timings": {name: round(seconds, 4) for name, seconds in timings.items()},
        }


def progress_event(progress: Progress) -> dict[str, Any]:
    """The stream's event for a step, where `progress` was asked for."""
    return {"type": "dite.progress", "step": progress.step, "steps": progress.steps}


def parse(body: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, one object, no key twice, no NaN or infinity, no half characters, no number or nesting without end. Raises Problem 400."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for key, value in pairs:
            if key in given:
                raise _broken(f"{shown(key)} is given twice")
            given[key] = value
        return given

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise _broken(f"a number has {len(digits)} digits, and {MOST_DIGITS} are the most")
        return int(digits)

    def finite(digits: str) -> float:
        if not math.isfinite(float(digits)):
            raise _broken("a number is too large for a double")
        return float(digits)

    def named(name: str) -> float:
        raise _broken(f"{name} is no number in JSON")

    try:
        document = json.loads(body.decode("utf-8"), object_pairs_hook=once, parse_int=whole, parse_float=finite, parse_constant=named)
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _broken("it has half a surrogate pair, which is no character") from None
    except UnicodeDecodeError as error:
        raise _broken(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _broken(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _broken("it is nested too deeply") from None
    if not isinstance(document, dict):
        raise _broken(f"it must be an object, not {shown(document)}")
    return document


def read_request(
    document: dict[str, Any], card: ModelCard, settings: ServerSettings, new_seed: Callable[[], int] = lambda: secrets.randbelow(SEEDS)
) -> Asked:
    """Check every field against the model and the server's limits, and fill in what is left open.

    Raises Problem: 404 for another model's name, 400 otherwise, naming the field, the rule and the value.
    """
    fields = _fields(document)
    if fields.model not in (None, settings.served_name):
        message = f"model {shown(fields.model)} is not served here; this server has {shown(settings.served_name)}"
        raise Problem(404, "model_not_found", message, param="model")
    limits = settings.limits
    most_steps = min(limits.steps, card.most_steps)
    allowed_steps = min(card.least_steps, most_steps), most_steps
    steps = fields.num_inference_steps
    width_px, height_px = _sides_px(fields.size, card, limits.pixels_px)
    for name in ("partial_images", "progress"):
        if getattr(fields, name) and not fields.stream:
            raise invalid(name, f'{name} needs "stream": true')
    if fields.timeout_s is not None and not 0 < fields.timeout_s <= limits.request_timeout_s:
        raise invalid("timeout_s", f"timeout_s must be more than 0 and at most {limits.request_timeout_s:g}, not {fields.timeout_s:g}")
    request = ImageRequest(
        condition=_condition(fields, card, limits.prompt_chars),
        n=_within("n", fields.n, 1, limits.images),
        seed=new_seed() if fields.seed is None else _within("seed", fields.seed, 0, SEEDS - 1),
        steps=max(card.least_steps, min(settings.steps, most_steps)) if steps is None else _within("num_inference_steps", steps, *allowed_steps),
        guidance=_guidance(fields, card, settings.guidance),
        width_px=width_px,
        height_px=height_px,
        negative_prompt=_negative_prompt(fields, card, limits.prompt_chars),
        output_format=fields.output_format,
        partial_images=_within("partial_images", fields.partial_images, 0, MOST_PARTIAL_IMAGES),
    )
    _soon_enough(request, card, settings.step_timeout_s)
    return Asked(request, fields.stream, fields.progress, fields.timeout_s)


def shown(value: Any) -> str:
    """A value as an error message quotes it: short, ASCII, and never opened up, however deep it goes."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str) and len(value) > SHOWN_CHARS:
        return json.dumps(value[:SHOWN_CHARS] + "...")
    return json.dumps(value)


def _fields(document: dict[str, Any]) -> Fields:
    known = [*Fields.model_fields, *IGNORED]
    unknown = next((key for key in document if key not in known), None)
    if unknown is not None:
        hint = did_you_mean(unknown[:SHOWN_CHARS], known) or f"there are {', '.join(known)}"
        raise Problem(400, "unknown_parameter", f"unknown field {shown(unknown)}; {hint}", param=unknown[:SHOWN_CHARS])
    try:
        return Fields.model_validate({key: value for key, value in document.items() if value is not None})
    except ValidationError as error:
        name = str(error.errors(include_url=False, include_input=False, include_context=False)[0]["loc"][0])
        rule = Fields.model_fields[name].description
        raise Problem(400, "invalid_type", f"{name} must be {rule}, not {shown(document[name])}", param=name) from None


def _condition(fields: Fields, card: ModelCard, most_chars: int) -> int | str:
    prompt, labels = _text("prompt", fields.prompt, most_chars), fields.class_labels
    if card.reads_text:
        if labels is not None:
            raise invalid("class_labels", "class_labels can't be used: this model draws from prompts and knows no classes")
        if not prompt:
            raise invalid("prompt", 'prompt must not be empty: this model draws from prompts, for example "a ship at sea"')
        return prompt
    if isinstance(labels, list):
        if len(labels) != 1:
            raise invalid("class_labels", f"class_labels must be one class, for all pictures of a request; it has {len(labels)}")
        labels = labels[0]
    if labels is None and not prompt:
        raise invalid("prompt", "prompt or class_labels must name one of this model's classes; both are missing")
    named = None if labels is None else class_id(labels, card, "class_labels")
    asked = class_id(prompt, card, "prompt") if prompt else named
    if named not in (None, asked):
        raise invalid("class_labels", f"class_labels means class {named} and prompt class {asked}; they must agree, or prompt be empty")
    return asked


def _text(name: str, text: str | None, most_chars: int) -> str:
    if text is not None and len(text) > most_chars:
        raise invalid(name, f"{name} must have at most {most_chars} characters, not {len(text)}")
    return text if text and text.strip() else ""


def _negative_prompt(fields: Fields, card: ModelCard, most_chars: int) -> str | None:
    text = _text("negative_prompt", fields.negative_prompt, most_chars)
    if text and not card.takes_negative_prompt:
        raise invalid("negative_prompt", "negative_prompt can't be used: this model takes none")
    return text or None


def _guidance(fields: Fields, card: ModelCard, default: float) -> float:
    guidance = fields.guidance_scale
    if not card.takes_guidance:
        if guidance not in (None, 1.0):
            raise invalid(
                "guidance_scale", f"guidance_scale can't be used: this model is drawn without guidance; leave it out, or give 1, not {guidance:g}"
            )
        return 1.0
    return default if guidance is None else _within("guidance_scale", guidance, 0, MOST_GUIDANCE)


def _sides_px(size: str, card: ModelCard, most_px: int) -> tuple[int, int]:
    default = "{}x{}".format(*card.default_size_px)
    if size in ("auto", default):
        return card.default_size_px
    if card.fixed_size:
        raise invalid("size", f'size must be "{default}" or "auto", the only one of this model, not {shown(size)}')
    sides = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if sides is None:
        raise invalid("size", f'size must be WIDTHxHEIGHT as in "{default}", or "auto", not {shown(size)}')
    width, height = int(sides[1]), int(sides[2])
    if width % card.multiple_px or height % card.multiple_px:
        raise invalid("size", f"both sides of size must be multiples of {card.multiple_px}, not {size}")
    if card.most_side_px is not None and max(width, height) > card.most_side_px:
        raise invalid("size", f"both sides of size must be at most {card.most_side_px}, which is what this model has positions for, not {size}")
    if width * height > most_px:
        raise invalid("size", f"size must have at most {most_px} pixels; {size} has {width * height}")
    return width, height


def _soon_enough(request: ImageRequest, card: ModelCard, most_s: float) -> None:
    """Refuse what would be taken for a rank that hangs, and would end as one."""
    seconds = card.seconds(request)
    if seconds > most_s:
        what = f"a step of {request.n} pictures of {_size(request)} would take about {seconds:.0f} s here, and {most_s:g} s are the most"
        alone = card.seconds(replace(request, n=1))
        raise invalid("n" if alone <= most_s else "size", f"{what}; ask for fewer or smaller ones (step_timeout_s is the server's setting)")


def _within(name: str, value: Any, low: int, high: int) -> Any:
    if not low <= value <= high:
        raise invalid(name, f"{name} must be from {low} to {high}, not {value}")
    return value


def _broken(why: str) -> Problem:
    return Problem(400, "invalid_json", f"the body is not usable JSON: {why}")


def _size(request: ImageRequest) -> str:
    return f"{request.width_px}x{request.height_px}"


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")
