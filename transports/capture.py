"""Captures: what was on the wire, as datagrams (:data:`PACKET`) in one buffer."""

from __future__ import annotations

import numpy as np

PACKET = np.dtype(
    [("offset", "<u8"), ("ts_recv", "<i8"), ("length", "<u4"), ("address", "<u4"), ("port", "<u2"), ("line", "u1"), ("flags", "u1"), ("_pad", "<u4")]
)
"""One datagram in a buffer: payload is ``buffer[offset : offset + length]``; `address` and `port` are the destination (IPv4 as a
number); `line` is 0 for A, 1 for B, …; `flags` are :class:`PacketFlag` bits."""
assert PACKET.itemsize == 32
