"""The byte formulas and the reference codec can't drift apart. (The one test here that loads torch.)"""

import math

import pytest

from dite.parallel.rates import GROUP, payload_bytes


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "int1"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 64), (5, 65), (4, 1152)])
def test_payload_bytes_are_those_of_the_reference_codec(kind, shape):
    from dite_kernels import codec

    codes, scale = codec.payload_shapes(shape, kind)
    assert payload_bytes(kind, *shape) == math.prod(codes) + 2 * math.prod(scale) and codec.GROUP == GROUP
