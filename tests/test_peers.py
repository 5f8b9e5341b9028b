"""What a shard takes of another one's outputs: the compiled choice against a slow twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, NO_SIDE, PEERS, REFERENCE, EventArray, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.peers import PeerEvents, UnnamedInstrument

ORIGIN = 3
LEGS = {("bbo", "S0"), ("trade", "S0"), ("bbo", "S1"), ("trade", "S2"), ("bbo", "S40")}
TAKEN = {Kind.BBO: Kind.PEER_BBO, Kind.TRADE: Kind.PEER_TRADE}


def named(number: int, source: int) -> EventArray:
    event = np.zeros(1, EVENT)
    event["kind"], event["instrument"], event["flags"], event["side"] = Kind.REFERENCE, number, source, 2
    view = event.view(REFERENCE)
    view["tick_size"], view["symbol"] = 10_000_000, f"S{number}".encode()
    return event


def outputs(rows: list[tuple[Kind, int]]) -> EventArray:
    events = np.zeros(len(rows), EVENT)
    for seq, (kind, number) in enumerate(rows, 1):
        row = events[seq - 1]
        row["seq"], row["kind"], row["instrument"], row["side"] = seq, kind, number, NO_SIDE
        row["price"], row["qty"], row["aux"] = (number % 3, 0, 5) if kind == Kind.TIMER else (100 + seq, seq, seq)
    return events


def slow(rows: list[tuple[Kind, int]], known: set[int], table: InstrumentTable) -> list[tuple[Any, ...]]:
    """(seq, kind, instrument, price, aux, flags) of what is wanted."""
    found: list[tuple[Any, ...]] = []
    for seq, (kind, number) in enumerate(rows, 1):
        if kind == Kind.TIMER and number % 3 in {n % 2 for n in known if any(s == f"S{n}" for _, s in LEGS)}:
            found.append((seq, Kind.PEER_TIMER, ALL_INSTRUMENTS, PEERS + ORIGIN, number % 3, 5))
        elif kind in TAKEN and ("bbo" if kind == Kind.BBO else "trade", f"S{number}") in LEGS:
            found.append((seq, TAKEN[kind], table.find(f"S{number}", PEERS + ORIGIN), 100 + seq, seq, 0))
    return found


KINDS = st.sampled_from([Kind.BBO, Kind.TRADE, Kind.TIMER, Kind.SIGNAL, Kind.BAR])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(KINDS, st.integers(0, 60)), max_size=80), st.sets(st.integers(0, 60)))
def test_what_is_wanted_equals_its_slow_twin(rows: list[tuple[Kind, int]], known: set[int]) -> None:
    table = InstrumentTable(64, shards=4)
    peer = PeerEvents(table, ORIGIN, LEGS)
    for number in sorted(known):
        peer.take(named(number, number % 2))
    batch = outputs(rows)
    before = batch.copy()
    missing = sorted({number for kind, number in rows if kind in TAKEN and number not in known})
    if missing:
        with pytest.raises(UnnamedInstrument) as told:
            peer.take(batch)
        assert told.value.instruments == missing
        peer.do_without_names(missing)
        known_after = known
    else:
        known_after = known
    taken = peer.take(batch)
    wanted_rows = [(kind, -1 if number in missing and kind in TAKEN else number) for kind, number in rows]
    fields = ("seq", "kind", "instrument", "price", "aux", "flags")
    assert [tuple(int(event[name]) for name in fields) for event in taken] == slow(wanted_rows, known_after, table)
    assert (batch == before).all()
