"""What will be done to each linear of a model: the product of a recipe and a discovery."""

import hashlib
from dataclasses import dataclass, field

from dite.quant.scheme import LayerScheme, Strict
from dite_kernels.affine import group_count
from dite_kernels.packing import packed_columns


def weight_bytes(in_features: int, out_features: int, scheme: LayerScheme) -> int:
    """Bytes on disk of a linear's weight: qdata, fp16 scales, packed zero points, and (16 bits each) smooth scales and low-rank factors."""
    weight = scheme.weight
    groups = group_count(in_features, weight.group_size)
    zeros = 0 if weight.symmetric else packed_columns(groups, weight.num_bits)
    codes = out_features * (packed_columns(in_features, weight.num_bits) + 2 * groups + zeros)
    return codes + 2 * in_features * scheme.transform.smooths + 2 * scheme.rank * (in_features + out_features)


@dataclass(frozen=True)
class LayerPlan:
    """One linear and how it is quantized; once that is done, also how its codes were chosen and what that cost.

    `error` is relative: of the outputs on held-out inputs if the layer was calibrated (`output_error`), else of the weight. `stored_bytes` is what
    the finished layer takes, where that is known.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    scheme: LayerScheme
    rounding: str = "nearest"
    error: float | None = None
    stored_bytes: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes on disk of qdata, fp16 scales, packed zero points, and (16 bits each) smooth scales and low-rank factors."""
        return self.stored_bytes or weight_bytes(self.in_features, self.out_features, self.scheme)


@dataclass(frozen=True)
class QuantPlan:
    """Layers in the model's order, and the linears left alone with the reason.

    `other_bytes`: the rest of the model, in bf16; `basis`: how token and conditioning linears were told apart; `unmatched`: patterns of the recipe
    that no linear of this model has a name for.
    """

    layers: list[LayerPlan]
    skipped: dict[str, str] = field(default_factory=dict)
    other_bytes: int = 0
    basis: str = "observed"
    unmatched: list[str] = field(default_factory=list)

    @property
    def estimated_bytes(self) -> int:
        """The transformer's weights on disk after quantization, everything else in bf16."""
        return self.other_bytes + sum(layer.weight_bytes for layer in self.layers)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical plan: equal plans, equal digests."""
        return hashlib.sha256(StoredPlan.of(self).model_dump_json().encode()).hexdigest()


class StoredPlan(Strict):
    """The part of a plan that a saved model's `quantization_config` holds."""

    layers: dict[str, LayerScheme]
    skipped: dict[str, str] = {}

    @classmethod
    def of(cls, plan: QuantPlan) -> "StoredPlan":
        return cls(layers={layer.name: layer.scheme for layer in plan.layers}, skipped=plan.skipped)
