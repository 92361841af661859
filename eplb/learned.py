"""What a group of ranks has come to, for the group that takes its place: where experts are, and for which load."""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..core.errors import PlacementError
from .placement import Placement, Topology, plan

_Number = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class Learned(msgspec.Struct, frozen=True):
    """Told by the rank that plans, each time that experts have moved. The same bytes give the same placement on all."""

    num_layers: _Number
    num_logical: _Number
    num_physical: _Number
    num_ranks: _Number
    slots: bytes
    """[layers, physical] int32, little-endian: the expert in each slot, as committed."""
    load: bytes
    """[layers, logical] float32, little-endian: of the window."""

    @classmethod
    def of(cls, placement: Placement, topology: Topology, load: NDArray[np.float64]) -> Learned:
        """What is known now.

        Args:
            placement: where experts are.
            topology: of the slots.
            load: [layers, logical] tokens.
        """
        return cls(
            placement.num_layers,
            placement.num_logical,
            placement.num_physical,
            topology.num_ranks,
            placement.physical_to_logical.astype("<i4").tobytes(),
            load.astype("<f4").tobytes(),
        )

    def pack(self) -> bytes:
        """As bytes."""
        return _encoder.encode(self)

    @staticmethod
    def unpack(data: bytes) -> Learned:
        """Of `pack`'s bytes.

        Raises:
            PlacementError: they are something else.
        """
        try:
            return _decoder.decode(data)
        except msgspec.DecodeError as error:
            raise PlacementError(f"what a group has learned of its experts cannot be understood: {error}") from None

    def placement(self, num_layers: int, num_logical: int, topology: Topology) -> Placement:
        """Where the next group begins: where the last one was, or, on other ranks or slots, where its load says.

        Args:
            num_layers: of the model that will serve.
            num_logical: experts of a layer.
            topology: of the ranks that will serve.

        Raises:
            PlacementError: it was learned of another model, or is no placement.
        """
        if (self.num_layers, self.num_logical) != (num_layers, num_logical):
            raise PlacementError(
                f"what was learned is of {self.num_layers} layers with {self.num_logical} experts each, expected "
                f"{num_layers} with {num_logical}"
            )
        if (self.num_physical, self.num_ranks) == (topology.num_physical, topology.num_ranks):
            slots = np.frombuffer(self._checked(self.slots, self.num_physical), np.dtype("<i4"))
            return Placement.from_physical(slots.reshape(num_layers, -1), num_logical)
        load = np.frombuffer(self._checked(self.load, num_logical), np.dtype("<f4"))
        return plan(load.reshape(num_layers, -1).astype(np.float64), topology)

    def _checked(self, data: bytes, columns: int) -> bytes:
        if len(data) != self.num_layers * columns * 4:
            raise PlacementError(
                f"what was learned has {len(data)} bytes for [{self.num_layers}, {columns}] numbers of 4 bytes"
            )
        return data


# Made once: when several threads make the first of a type, msgspec crashes.
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Learned)
