"""What is measured: shapes, schemes and codecs as a user writes them. Imports no torch, so that a typing mistake is answered at once.

    shape    MxKxN: tokens × in features × out features, as 256x1152x4608
    codec    int8, int4, int2 or int1
    scheme   w4a8, w8a8-g64, w8a8-channel, w4a8-group, w8a8-sym: bits, then the weight's groups (128 unless said), then whether activations have a
             scale a token, or one a (token, group), then whether the weight goes without zero points; a16 leaves activations as they are

Shape letters: M tokens, K in features, N out features.
"""

import re
from dataclasses import dataclass

WIDTHS = ((1152, 1152), (1152, 4608), (4608, 1152))  # K × N of DiT-XL/2's token linears
TOKENS = (256, 1024)
MOST_FEATURES = 2**20
MOST_ELEMENTS = 2**28
CODECS = ("int8", "int4", "int2", "int1")
_SHAPE = re.compile(r"(\d+)[x×](\d+)[x×](\d+)")
_SCHEME = re.compile(r"w(4|6|8)a(4|8|16)(?:-(?:g(\d+)|(channel)))?(?:-(token|group))?(-sym)?")


class UnknownCase(ValueError):
    """A shape, a scheme, a codec, a backend or a device that can't be measured; the message says what can."""


@dataclass(frozen=True)
class Shape:
    """y [M, N] = x [M, K] · Wᵀ."""

    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """
        >>> Shape.parse("256x1152x4608")
        Shape(m=256, k=1152, n=4608)
        """
        match = _SHAPE.fullmatch(text.strip())
        if match is None or not all(1 <= int(size) <= MOST_FEATURES for size in match.groups()):
            raise UnknownCase(f"no shape {text!r}; a shape is MxKxN with sizes from 1 to {MOST_FEATURES}, for example 256x1152x4608")
        return cls(*map(int, match.groups()))


@dataclass(frozen=True)
class Scheme:
    """Bits and granularity of a linear. `activation_bits` None: weight-only; `group_size` None: one scale an output channel."""

    weight_bits: int
    activation_bits: int | None
    group_size: int | None = 128
    activation_per_group: bool = False
    weight_symmetric: bool = False

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """
        >>> Scheme.parse("w4a8-g64-group")
        Scheme(weight_bits=4, activation_bits=8, group_size=64, activation_per_group=True, weight_symmetric=False)
        """
        match = _SCHEME.fullmatch(text.strip())
        if match is None:
            raise UnknownCase(f"no scheme {text!r}; w4a8, w8a8, w6a8 or w4a16, then -g64 or -channel, -token or -group, -sym, as in w4a8-g64-group")
        weight_bits, activation_bits, group, channel, granularity, symmetric = match.groups()
        size = None if channel else int(group or 128)
        if size is not None and (size < 16 or size % 16):
            raise UnknownCase(f"no scheme {text!r}; a group of {size} is no multiple of 16")
        if granularity == "group" and (channel or activation_bits == "16"):
            raise UnknownCase(f"no scheme {text!r}; activations follow the weight's groups, so there must be groups, and codes")
        return cls(int(weight_bits), None if activation_bits == "16" else int(activation_bits), size, granularity == "group", symmetric is not None)

    @property
    def granularity(self) -> str | None:
        """Of the activations: token, group, or None where they are left alone."""
        return None if self.activation_bits is None else "group" if self.activation_per_group else "token"

    def __str__(self) -> str:
        bits = f"w{self.weight_bits}a{self.activation_bits or 16}"
        groups = "-channel" if self.group_size is None else "" if self.group_size == 128 else f"-g{self.group_size}"
        return f"{bits}{groups}{'-group' if self.activation_per_group else ''}{'-sym' if self.weight_symmetric else ''}"


DEFAULT_SHAPES = ",".join(f"{m}x{k}x{n}" for m in TOKENS for k, n in WIDTHS)
DEFAULT_SCHEMES = "w4a8,w8a8,w8a8-sym,w4a8-g64,w8a8-channel,w8a8-channel-sym,w4a8-group,w8a8-group"
DEFAULT_CODECS = ",".join(CODECS)


def names(text: str) -> list[str]:
    """The words of a comma-separated list, each once.

    >>> names("w4a8, w8a8,w4a8,")
    ['w4a8', 'w8a8']
    """
    return list(dict.fromkeys(word for part in text.split(",") if (word := part.strip())))


def codec_names(text: str) -> list[str]:
    """The codecs of a comma-separated list, each once. Raises UnknownCase.

    >>> codec_names("int4,int1")
    ['int4', 'int1']
    """
    found = names(text)
    unknown = next((name for name in found if name not in CODECS), None)
    if unknown is not None:
        raise UnknownCase(f"no codec {unknown!r}; there are {', '.join(CODECS)}")
    if not found:
        raise UnknownCase(f"nothing to measure; give at least one of {', '.join(CODECS)}")
    return found
