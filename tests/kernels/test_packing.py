import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dite_kernels.packing import pack, packed_columns, unpack


@given(st.sampled_from([4, 6, 8]), st.integers(0, 4), st.integers(1, 70), st.integers(0, 99))
def test_unpacking_undoes_packing(bits, rows, columns, seed):
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_columns(columns, bits)) and torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (4, [1, 2, 15], [0x21, 0x0F]),
        (6, [0b000001, 0b000010, 0b000100, 0b111111], [0b10000001, 0b01000000, 0b11111100]),
        (6, [63], [63, 0, 0]),
        (8, [0, 255, 7], [0, 255, 7]),
    ],
)
def test_bytes_on_disk_never_change(bits, codes, packed):
    assert pack(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [packed]
