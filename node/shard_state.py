"""The arrays of a shard: everything its loop reads and writes. A snapshot is a copy of them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from tickmesh.node.book import make_books
from tickmesh.node.event import ANY_VIEW
from tickmesh.node.joining import make_join
from tickmesh.node.risk import make_risk_state, no_limits
from tickmesh.node.symbol_filter import pattern_table
from tickmesh.transports.ring import HEADER_BYTES, RingArrays

GAPS_KEPT = 4096
"""Gaps whose bounds a shard remembers; all are counted."""
SOURCES = 1 << 16
"""Numbers that a source can have: a REFERENCE event has it in its `flags`."""
SCRATCH = 8
"""Places for records that calculations read but that do not leave the shard, a power of two; the loop's FOR_… say which is whose."""
CHANGES_KEPT = 256
"""Changes of the configuration whose place among the outputs a shard remembers."""
KINDS = 128
"""Size of the table of event counts: kinds are below it."""

CORE = np.dtype(
    [
        ("out_seq", "<u8"),
        ("events", "<u8"),
        ("config_version", "<u8"),
        ("parameters", "<i8"),
        ("instruments", "<i8"),
        ("refused", "<i8"),
        ("blocked", "<i8"),
        ("cursor", "<i8"),
        ("releasing", "<i8"),
    ]
)
"""A shard's scalars: outputs written, inputs taken, version and slot of the live parameters, highest instrument + 1, inputs that the
book refused, times that the output ring was full, next instrument of a timer or gap under way, whether events that wait in joins may
be due."""

INSTRUMENT_INFO = np.dtype(
    [
        ("tick_size", "<i8"),
        ("quantity_scale", "<f8"),
        ("exponent", "<i4"),
        ("source", "<i4"),
        ("symbol", "u1", (24,)),
        ("feed", "<i4"),
        ("_unused", "<i4"),
    ]
)
"""`source` is the number of the source that brings it here (of another shard's: PEERS + shard); `feed` that of the one where it lives."""

STATISTICS = np.dtype(
    [
        ("trades", "<i8"),
        ("volume", "<i8"),
        ("notional", "<f8"),
        ("bbo_updates", "<i8"),
        ("first_bbo", "<i8", (4,)),
        ("last_bbo", "<i8", (4,)),
    ]
)
"""Per instrument: printed trades, their quantity, sum of price x quantity, BBO events, first and last BBO (bid, qty, ask, qty)."""


def make_arrays(
    module: ModuleType | Any, output: RingArrays, patterns: Any, instruments_max: int, orders_max: int, order_ids: str = "sequential"
) -> Any:
    """The arrays of a fresh shard as the generated module's ``Shard`` namedtuple. Memory is touched only as instruments appear.

    Args:
        module: a generated shard module (its ``Shard``, ``SLOTS`` and ``DTYPES``).
        output: the ring that takes the outputs.
        patterns: symbol filters of the calculations (:func:`tickmesh.node.symbol_filter.pattern_table`).
        instruments_max: highest instrument id + 1.
        orders_max: resting orders of all instruments together.
        order_ids: how the venue numbers orders, see :func:`tickmesh.node.book.make_books`.
    """
    last = np.full((module.SLOTS, instruments_max), np.nan)
    calculations: list[Any] = []
    for k, (state, parameters) in enumerate(module.DTYPES):
        calculations += [np.zeros(instruments_max, state), np.zeros(2, parameters)]
        if k in module.JOINS:
            name, legs = module.JOINS[k]
            calculations.append(make_join(name, legs, instruments_max))
    return module.Shard(
        make_books(instruments_max, orders_max, order_ids),
        np.zeros(1, CORE),
        np.zeros(instruments_max, INSTRUMENT_INFO),
        np.zeros(instruments_max, STATISTICS),
        np.zeros(KINDS, np.int64),
        np.zeros((GAPS_KEPT, 2), np.int64),
        np.zeros(SOURCES, np.uint8),
        patterns,
        np.zeros((max(1, len(module.DTYPES)), instruments_max), np.uint8),
        last,
        np.zeros(SCRATCH, ANY_VIEW),
        RingArrays(output.words, output.slots.view(ANY_VIEW)),
        np.repeat(no_limits(), 2),
        make_risk_state(instruments_max),
        np.zeros((CHANGES_KEPT + 1, 2), np.uint64),
        *calculations,
    )


def warm_arrays(module: ModuleType | Any) -> Any:
    """Small arrays of the final types, for compiling a loop."""
    ring = RingArrays(np.zeros(HEADER_BYTES // 8, np.uint64), np.zeros(8, ANY_VIEW))
    return make_arrays(module, ring, pattern_table([()]), 1, 16)
