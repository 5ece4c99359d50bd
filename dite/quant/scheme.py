"""What a quantized linear is: bits, groups, symmetry. Pure data, no torch."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _multiple_of_16(value: int | None) -> int | None:
    if value is not None and (value < 16 or value % 16 or value > MAX_GROUP_SIZE):
        nearest = min(max(16, round(value / 16) * 16), MAX_GROUP_SIZE)
        rule = f"group_size {value} must be a multiple of 16 from 16 to {MAX_GROUP_SIZE}, or null for one group a row"
        raise ValueError(f"{rule}; try {nearest}")
    return value


MAX_BLOCK = 1024
MAX_RANK = 1024
MAX_GROUP_SIZE = 32768  # the sum of a group must fit int32
GroupSize = Annotated[int | None, AfterValidator(_multiple_of_16)]


class WeightScheme(Strict):
    """Codes of `num_bits` in groups of `group_size` along the input features (None: one group a row)."""

    num_bits: Literal[4, 6, 8] = 8
    group_size: GroupSize = 128
    symmetric: bool = False

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
    """A change of basis that leaves the layer's function as it is and makes its numbers easier to round.

    `smooth` scales channels by a stored vector, moving range from activations to weights (SmoothQuant, arXiv 2211.10438); `hadamard` rotates blocks
    of `block` channels (a power of two), after random signs drawn from `sign_seed` if there is one; `smooth+hadamard` does one after the other.
    """

    kind: Literal["none", "hadamard", "smooth", "smooth+hadamard"] = "none"
    block: int | None = None
    sign_seed: int | None = Field(default=None, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _block_belongs_to_hadamard(self) -> Self:
        if self.rotates != (self.block is not None):
            raise ValueError(f"transform {self.kind} {'needs a block' if self.rotates else 'takes no block'}")
        if self.block is not None and (not 2 <= self.block <= MAX_BLOCK or self.block & (self.block - 1)):
            raise ValueError(f"a Hadamard block is a power of two from 2 to {MAX_BLOCK}, not {self.block}")
        if self.sign_seed is not None and not self.rotates:
            raise ValueError(f"transform {self.kind} takes no sign_seed")
        return self

    @property
    def rotates(self) -> bool:
        return self.kind.endswith("hadamard")

    @property
    def smooths(self) -> bool:
        return self.kind.startswith("smooth")


class LayerScheme(Strict):
    """Everything a quantized layer's forward depends on; one entry of `layers` in a saved `quantization_config`.

    `rank`: columns of a low-rank part in the model's dtype beside the codes (SVDQuant, arXiv 2411.05007), which sees activations unrounded; 0: none.
    """

    weight: WeightScheme
    activation: ActivationScheme | None = None
    transform: TransformScheme = Field(default_factory=TransformScheme)
    rank: int = Field(default=0, ge=0, le=MAX_RANK)
