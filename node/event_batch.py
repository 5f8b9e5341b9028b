"""A batch of events under construction, for decoders that run in Python: fixed memory, filled by packing, flushed by the caller."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from tickmesh.node.event import EVENT, EventArray, Kind

_EVENT = struct.Struct("<QqqIBBHqqQq")
_REFERENCE = struct.Struct("<QqqIBBHq24s")
_SIZE = EVENT.itemsize
_LEVEL = int(Kind.LEVEL)
assert _EVENT.size == _REFERENCE.size == _SIZE


class BatchFull(Exception):
    """An event did not fit: the caller must flush when there is less room than one message can need.

    Attributes:
        capacity: events that the batch holds.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(f"the batch of {capacity} events is full: take() its events while room < the decoder's events_max")
        self.capacity = capacity


class EventBatch:
    """Events in order, in one EVENT array.

    Attributes:
        events: EVENT[capacity]; the first `count` are filled.
        count: how many are filled. A decoder that refuses a message sets it back to what it was.
    """

    def __init__(self, capacity: int = 1 << 17) -> None:
        memory = np.zeros(capacity * _SIZE, np.uint8)
        self.events: EventArray = memory.view(EVENT)
        self.count = 0
        self._bytes = memory.data

    @property
    def capacity(self) -> int:
        """Events that fit."""
        return len(self.events)

    @property
    def room(self) -> int:
        """Events that still fit."""
        return len(self.events) - self.count

    def append(
        self, kind: int, instrument: int, ts_event: int, ts_recv: int, side: int, price: int, qty: int,
        id: int = 0, aux: int = 0, flags: int = 0, seq: int = 0,
    ) -> None:  # fmt: skip
        """Add an event; the arguments are the fields of EVENT and must be in their ranges.

        Raises:
            BatchFull: there is no room.
        """
        if self.count == len(self.events):
            raise BatchFull(len(self.events))
        _EVENT.pack_into(self._bytes, self.count * _SIZE, seq, ts_event, ts_recv, instrument, kind, side, flags, price, qty, id, aux)
        self.count += 1

    def append_levels(
        self, instrument: int, ts_event: int, ts_recv: int, levels: Sequence[tuple[int, int, int, int]], flags: int, more: int, seq: int
    ) -> None:
        """Add LEVEL events, of ``(side, price, qty, orders)`` each; all but the last have the flag `more` too.

        Raises:
            BatchFull: there is no room for all of them.
        """
        if len(levels) > self.room:
            raise BatchFull(len(self.events))
        pack_into, memory, offset, left = _EVENT.pack_into, self._bytes, self.count * _SIZE, len(levels)
        marked = flags | more
        for side, price, qty, orders in levels:
            left -= 1
            pack_into(memory, offset, seq, ts_event, ts_recv, instrument, _LEVEL, side, marked if left else flags, price, qty, 0, orders)
            offset += _SIZE
        self.count += len(levels)

    def append_reference(self, instrument: int, ts_recv: int, symbol: bytes, tick_size: int, qty_exponent: int) -> None:
        """Add the REFERENCE event of an instrument.

        Raises:
            BatchFull: there is no room.
        """
        if self.count == len(self.events):
            raise BatchFull(len(self.events))
        offset = self.count * _SIZE
        _REFERENCE.pack_into(
            self._bytes, offset, 0, ts_recv, ts_recv, instrument, Kind.REFERENCE, qty_exponent, 0, tick_size, symbol
        )  # fmt: skip
        self.count += 1

    def set_flags(self, index: int, flags: int) -> None:
        """Replace the flags of an event that has been appended."""
        self.events[index]["flags"] = flags

    def view(self) -> EventArray:
        """The filled events, without a copy: valid until the next :meth:`append` after :meth:`clear`."""
        filled: EventArray = self.events[: self.count]
        return filled

    def clear(self) -> None:
        """Forget the events."""
        self.count = 0

    def take(self) -> EventArray:
        """A copy of the filled events; the batch is empty afterwards."""
        filled: EventArray = self.view().copy()
        self.count = 0
        return filled
