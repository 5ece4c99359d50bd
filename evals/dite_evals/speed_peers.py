"""Which of the peers' settings `dite bench forward` measures: those made for speed, one or two a library; see peer_calls.py for the calls."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from dite_evals.peer_calls import PEERS, Peer


@dataclass(frozen=True)
class Setting:
    """A peer's setting by the name and the group that peer_calls.py knows it by, and how a row says what it computes.

    `device` is where it is made for (None: anywhere); with `compiles` the library's documentation says to compile the model.
    """

    name: str
    group_size: int | None
    weight_bits: int
    activation_bits: int | None
    device: str | None = None
    compiles: bool = False

    @property
    def peer(self) -> Peer:
        return next(peer for peer in PEERS if (peer.name, peer.group_size) == (self.name, self.group_size))

    @property
    def version(self) -> str | None:
        """Of the library; None where it is not installed."""
        try:
            return version(self.peer.library)
        except PackageNotFoundError:
            return None


SETTINGS = {
    "torchao": (
        Setting("torchao int8 activations, int8 weights", None, 8, 8, compiles=True),
        Setting("torchao int8 activations, int4 weights, CPU kernel", 128, 4, 8, device="cpu", compiles=True),
        Setting("torchao int8 activations, int4 weights, intx", 128, 4, 8, compiles=True),
    ),
    "quanto": (Setting("optimum-quanto qint8 weights", None, 8, None),),
    "sdnq": (Setting("sdnq int8, quantized matmul", None, 8, 8),),
}
