"""What a quantized linear is: bits, groups, symmetry. Pure data, no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Strict(BaseModel):
    """Immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightScheme(Strict):
    """Codes of `num_bits` in groups of `group_size` along the input features (None: one group a row)."""

    num_bits: Literal[4, 6, 8] = 8
    group_size: int | None = 128
    symmetric: bool = False

    @field_validator("group_size")
    @classmethod
    def _multiple_of_16(cls, value: int | None) -> int | None:
        if value is not None and (value < 16 or value % 16):
            raise ValueError(
                f"group_size {value} must be a positive multiple of 16, or null for one group a row; try {max(16, round(value / 16) * 16)}"
            )
        return value

    def groups(self, in_features: int) -> int:
        """How many groups a row of `in_features` has; the last one may be shorter.

        >>> WeightScheme(group_size=256).groups(1152)
        5
        """
        return 1 if self.group_size is None else -(-in_features // self.group_size)


class ActivationScheme(Strict):
    """Codes computed anew at every call: one scale a token, or one a (token, group) with the weight's groups."""

    num_bits: Literal[4, 8] = 8
    granularity: Literal["token", "group"] = "token"
    symmetric: bool = False


class TransformScheme(Strict):
    """A change of basis that leaves the layer's function as it is and makes its numbers easier to round."""

    kind: Literal["none"] = "none"
    block: int | None = None
    sign_seed: int | None = None


class LayerScheme(Strict):
    """Everything a quantized layer's forward depends on; one entry of `layers` in a saved `quantization_config`."""

    weight: WeightScheme
    activation: ActivationScheme | None = None
    transform: TransformScheme = Field(default_factory=TransformScheme)
    rank: int = Field(default=0, ge=0)
