"""A packet: 48 bytes that say what follows, and a checksum over both. What doesn't belong here and now is refused, never decoded.

magic 4 | codec 1 | order 1 | flags 1 | dtype 1 | epoch 4 | step 2 | branch 2 | layer 2 | role 1 | rank 1
rows 4 | columns 4 | inputs 4 | length 4 | digest 8 | crc 4
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace

import torch

from dite.errors import ExchangeCorrupted, RanksDisagree
from dite.parallel.rates import HEADER_BYTES

MAGIC = b"DTX1"
_LAYOUT = struct.Struct("<4sBBBBIHHHBBIIIIQI")
assert _LAYOUT.size == HEADER_BYTES
_CRC_AT = HEADER_BYTES - 4
KEYFRAME, NONFINITE, DIGEST = 1, 2, 4


@dataclass(frozen=True)
class Header:
    """What a packet is about. `inputs`: a checksum of what the model was called with; `digest`: of the sender's reference before this packet, when
    flag DIGEST is set."""

    codec: int
    order: int
    flags: int
    dtype: int
    epoch: int
    step: int
    branch: int
    layer: int
    role: int
    rank: int
    rows: int
    columns: int
    inputs: int
    length: int = 0
    digest: int = 0

    def fields(self) -> dict[str, int]:
        """By name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def seal(packet: torch.Tensor, header: Header) -> None:
    """Write the header before a body of `header.length` bytes that is already in `packet` (uint8, CPU), and the checksum."""
    view = memoryview(packet.numpy())
    fields = header.fields()
    digest = fields.pop("digest")
    _LAYOUT.pack_into(view, 0, MAGIC, *fields.values(), digest, 0)
    crc = zlib.crc32(view[HEADER_BYTES : HEADER_BYTES + header.length], zlib.crc32(view[:_CRC_AT]))
    struct.pack_into("<I", view, _CRC_AT, crc)


def open_packet(packet: torch.Tensor, expected: Header) -> tuple[Header, torch.Tensor]:
    """The header and the body of a packet that should be as `expected`, flags, length and digest aside. Raises ExchangeCorrupted, RanksDisagree."""
    view = memoryview(packet.numpy())
    if len(view) < HEADER_BYTES:
        raise _corrupted(expected, f"{len(view)} bytes arrived, fewer than a header's {HEADER_BYTES}")
    magic, *values, crc = _LAYOUT.unpack_from(view, 0)
    if magic != MAGIC:
        raise _corrupted(expected, f"it begins with {magic!r}, not {MAGIC!r}")
    header = Header(*values)
    if not 0 <= header.length <= len(view) - HEADER_BYTES:
        raise _corrupted(expected, f"it says {header.length} bytes where {len(view) - HEADER_BYTES} arrived")
    if zlib.crc32(view[HEADER_BYTES : HEADER_BYTES + header.length], zlib.crc32(view[:_CRC_AT])) != crc:
        raise _corrupted(expected, "its checksum is wrong")
    wanted = replace(expected, flags=header.flags, length=header.length, digest=header.digest)
    if header == replace(wanted, inputs=header.inputs) != wanted:
        raise RanksDisagree(
            f"rank {expected.rank} called the model with other inputs than this one",
            f"their checksums at step {expected.step} are {header.inputs:08x} and {expected.inputs:08x}",
            "give all ranks the same seed, as generator=torch.Generator().manual_seed(0), and the same conditions",
        )
    if header != wanted:
        pairs = zip(header.fields().items(), wanted.fields().values(), strict=True)
        raise _corrupted(expected, "; ".join(f"{name} is {got}, not {want}" for (name, got), want in pairs if got != want))
    if (header.flags ^ expected.flags) & KEYFRAME:
        raise _corrupted(expected, "one side holds it for a keyframe, the other doesn't")
    return header, packet[HEADER_BYTES : HEADER_BYTES + header.length]


def _corrupted(expected: Header, why: str) -> ExchangeCorrupted:
    where = f"rank {expected.rank}'s packet of layer {expected.layer}, step {expected.step}"
    return ExchangeCorrupted(f"{where} can't be used", why, "the exchange was stopped before a wrong picture could come of it; start the ranks again")
