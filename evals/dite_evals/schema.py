"""The schema of `report.json`: what a reader of a report may rely on, checked whenever one is written or read.

`docs/report.schema.json` is the same as JSON Schema, for readers in other languages. A key may be added under the same `schema_version`; one that
goes, or means something else, makes a new one. Numbers that are no numbers (an infinite PSNR) are null.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

SCHEMA_VERSION = 2

Interval = Annotated[list[float | None], Field(min_length=2, max_length=2)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Psnr(_Part):
    """dB; `p05` is what 95% of the samples exceed, `interval` of the mean, 95%."""

    mean: float | None
    p05: float | None
    interval: Interval


class FidelityMetrics(_Part):
    """Paired with the baseline, over `n` samples."""

    n: int = Field(ge=1)
    psnr: Psnr
    ssim: float | None
    latent_relative_error: float | None
    per_step_error: list[float | None]
    protocol: str
    overrides: dict[str, Any]
    seconds: float = Field(ge=0)


class FidMetrics(_Part):
    """Against reference statistics, over `n` samples. Intervals are of 95%; a metric that was left out is null, and `left_out` says why."""

    n: int = Field(ge=2)
    fid: float
    interval: Interval
    extractor: str
    num_features: int = Field(default=0, ge=0)
    fid_corrected: float | None = None
    fid_corrected_interval: Interval | None = None
    fid_infinity: float | None = None
    fid_infinity_interval: Interval | None = None
    sfid: float | None = None
    sfid_interval: Interval | None = None
    kid: float | None = None
    kid_interval: Interval | None = None
    precision: float | None = None
    precision_interval: Interval | None = None
    recall: float | None = None
    recall_interval: Interval | None = None
    cmmd: float | None = None
    cmmd_interval: Interval | None = None
    inception_score: float | None = None
    inception_score_interval: Interval | None = None
    left_out: dict[str, str] = Field(default_factory=dict)
    features_sha256: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    protocol: str
    overrides: dict[str, Any]
    seconds: float = Field(ge=0)


class Replicates(_Part):
    """A metric of parts of the samples, for a paired comparison: each part holds a `fraction` of them."""

    values: list[float] = Field(min_length=2)
    fraction: float = Field(gt=0, lt=1)
    parts: str


class CurvePoint(_Part):
    """Mean FID of disjoint blocks of n samples."""

    n: int = Field(ge=1)
    fid: float


class _Document(_Part):
    schema_version: Literal[2]
    title: str
    configuration: dict[str, Any]
    environment: dict[str, Any]
    command: str


class FidelityReport(_Document):
    """`samples`: one object a sample, with its `psnr` and `latent_relative_error`."""

    kind: Literal["fidelity"]
    metrics: FidelityMetrics
    samples: list[dict[str, Any]] = Field(default_factory=list)


class FidReport(_Document):
    """`curve`: FID against N; `replicates` by metric."""

    kind: Literal["fid"]
    metrics: FidMetrics
    curve: list[CurvePoint] = Field(default_factory=list)
    replicates: dict[str, Replicates] = Field(default_factory=dict)


Document = Annotated[FidelityReport | FidReport, Field(discriminator="kind")]
ADAPTER: TypeAdapter[Any] = TypeAdapter(Document)


def json_schema() -> dict[str, Any]:
    """The same as JSON Schema."""
    return ADAPTER.json_schema()


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
