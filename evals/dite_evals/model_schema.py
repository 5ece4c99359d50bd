"""The schema of a model's `report.json`, as `schema.py` has that of an evaluation's: checked whenever one is written.

`docs/model-report.schema.json` is the same as JSON Schema: `python -m dite_evals.model_schema` prints it.
A key may be added under the same `schema_version`; one that goes, or means something else, makes a new one. Null is "not measured".
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MODEL_SCHEMA_VERSION = 1
SHA256 = "^[0-9a-f]{64}$"


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Model(_Part):
    """`dtype` as stored; `sha256` by dtype: a digest of every weight, as the figures below carry it. `bytes` of its transformers' weights on disk."""

    source: str
    model_class: str
    parameters: int = Field(ge=0)
    dtype: str
    bytes: int = Field(ge=0)
    sha256: dict[str, str] = Field(min_length=1)


class Layer(_Part):
    """A quantized linear. `error` is relative, of the outputs or of the weights (`error_of`); `sqnr_db` the same in dB."""

    name: str
    kind: str
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    weight_bits: int
    activation_bits: int | None
    group_size: int | None
    transform: str
    error: float | None = None
    sqnr_db: float | None


class Kind(_Part):
    """Layers that are quantized alike."""

    kind: str
    weight_bits: int
    activation_bits: int | None
    group_size: int | None
    layers: int = Field(ge=1)
    weights: int = Field(ge=1)
    bits_per_weight: float | None
    sqnr_db: dict[str, float] | None


class Quantization(_Part):
    """`bytes` of the transformers' weights, `baseline_bytes` the same in bf16; `errors_from`: which file told the layers' errors."""

    recipe: str | None
    bytes: int
    baseline_bytes: int
    errors_from: str | None
    kinds: list[Kind]
    layers: list[Layer]
    skipped: dict[str, str]


class Evaluated(_Part):
    """A report of `dite eval`, which has a schema of its own; `metrics` and `configuration` are as there."""

    file: str
    model_sha256: str = Field(pattern=SHA256)
    dtype: str
    command: str
    metrics: dict[str, Any]
    configuration: dict[str, Any]


class Percentiles(_Part):
    """Microseconds."""

    p20: float
    p50: float
    p80: float


class LinearRow(_Part):
    """One linear of `dite bench linear`; `shape` is tokens, in and out features."""

    op: str
    backend: str
    weight_bits: int
    activation_bits: int | None
    group_size: int | None
    shape: list[int] = Field(min_length=3, max_length=3)
    us: Percentiles
    baseline: str
    ratio_to_baseline: float


class ForwardRow(LinearRow):
    """One variant of `dite bench forward`; `shape` is that of its largest linear."""

    name: str
    weight_bytes: int
    held_bytes: int
    output_relative_error: float


class Linears(_Part):
    """Rows of `dite bench linear`, of shapes that this model has."""

    file: str
    kind: Literal["linear"]
    command: str
    rows: list[LinearRow] = Field(min_length=1)


class Forwards(_Part):
    """Rows of `dite bench forward`, of shapes that this model has."""

    file: str
    kind: Literal["forward"]
    command: str
    rows: list[ForwardRow] = Field(min_length=1)


class ExchangeRow(_Part):
    """One mode with one codec over one link."""

    mode: str
    codec: str
    link: str
    seconds_per_step: float
    keyframe_seconds: float
    bytes_per_step: float
    latent_relative_error: float | None


class Asked(_Part):
    """How `dite bench exchange` was asked to measure."""

    ranks: int
    steps: int
    rounds: int
    batch_size: int
    dtype: str


class Exchanged(_Part):
    """Rows of `dite bench exchange`."""

    file: str
    kind: Literal["exchange"]
    command: str
    model_sha256: str = Field(pattern=SHA256)
    dtype: str
    configuration: Asked
    rows: list[ExchangeRow] = Field(min_length=1)


class Sent(_Part):
    """What a rank sent, headers and keyframes included, and the same uncompressed."""

    ranks: int
    mode: str
    codec: str
    order: int
    bytes_sent: int = Field(ge=0)
    bytes_raw: int = Field(ge=0)


class Generated(_Part):
    """What one `dite generate --nproc` of so many `images` exchanged."""

    file: str
    kind: Literal["generate"]
    command: str
    model_sha256: str = Field(pattern=SHA256)
    dtype: str
    images: int = Field(ge=1)
    steps: int
    guidance: float
    seconds_per_step: float
    exchange: Sent


class NotMeasured(_Part):
    """A section without figures, and the command that would make them."""

    section: str
    command: str


class ModelDocument(_Part):
    """All that is known of one model."""

    schema_version: Literal[1]
    kind: Literal["model"]
    title: str
    model: Model
    quantization: Quantization | None
    fidelity: list[Evaluated]
    fid: list[Evaluated]
    speed: list[Annotated[Linears | Forwards, Field(discriminator="kind")]]
    exchange: list[Annotated[Exchanged | Generated, Field(discriminator="kind")]]
    not_measured: list[NotMeasured]
    environment: dict[str, Any]


def json_schema() -> dict[str, Any]:
    """The same as JSON Schema."""
    return ModelDocument.model_json_schema()


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
