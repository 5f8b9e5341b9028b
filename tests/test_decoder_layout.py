"""The layout of the common messages: which they are, and that a message read through it makes the event that the branches make."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node import decoder as D
from tickmesh.node.event import EVENT, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.layout import common_layout
from tickmesh.node.protocol import Message, Spec, load_framing, load_spec
from tickmesh.transports.capture import PACKET

SLACK = 64
FRAMINGS = {"itch50": "binaryfile", "dbn_mbo": "dbn", "iex_deep_plus": "iex_tp"}
_loaded: dict[str, Any] = {}


def load(name: str) -> tuple[Spec, Any, Any]:
    if name not in _loaded:
        spec, framing = load_spec(name), load_framing(FRAMINGS[name])
        _loaded[name] = (spec, framing, D.load_decoder(spec, framing))
    return _loaded[name]


# ---------------------------------------------------------------- which messages


@pytest.mark.parametrize(
    ("name", "key", "code", "rows"),
    [
        ("itch50", "type_field", None, "ADUEXFPB"),
        ("dbn_mbo", "action", 0xA0, "ACMTR"),
        ("iex_deep_plus", "type_field", None, "aRMLTB"),
    ],
)
def test_layouts_of_the_shipped_protocols(name: str, key: str, code: int | None, rows: str) -> None:
    layout = common_layout(load_spec(name))
    assert layout is not None
    assert (layout.key.name, layout.code) == (key, code)
    assert "".join(chr(c) for row in layout.rows for c in row.codes) == rows
    assert load_spec(name).counters[layout.rows[0].counter].startswith(layout.rows[0].message.name)


@pytest.mark.parametrize("name", FRAMINGS)
def test_nothing_behind_the_slack_is_read(name: str) -> None:
    layout = common_layout(load_spec(name))
    assert layout is not None
    for column in layout.columns.values():
        for row, offset, present in zip(layout.rows, column.offsets, column.present):
            assert offset + 8 <= row.message.length + SLACK
            assert not present or offset < row.message.length


def test_a_message_that_differs_stays_with_the_branches() -> None:
    spec = load_spec("itch50")
    names = {m.name for m in spec.messages}
    attributed = common_layout(D.select(spec, {"attribution": "aux"}, []))
    assert attributed is not None
    assert "add_order_mpid" not in {row.message.name for row in attributed.rows}, "its aux is text, the others' a number"
    assert common_layout(D.select(spec, (), ["order_delete"])) is None, "one message needs no table"
    without_adds = common_layout(D.select(spec, (), names - {"add_order"}))
    assert without_adds is not None
    assert "add_order" not in {row.message.name for row in without_adds.rows}
    wide = dataclasses.replace(spec, type_field=dataclasses.replace(spec.type_field, size=2))
    assert common_layout(wide) is None, "a table of 256 rows is for types of one byte"
    far = dataclasses.replace(spec, type_field=dataclasses.replace(spec.type_field, offset=SLACK))
    assert common_layout(far) is None, "the type is read before the length is known to reach it"


# ---------------------------------------------------------------- the same events


def decode(name: str, messages: Sequence[bytes]) -> tuple[list[tuple[Any, ...]], dict[str, int], dict[str, int]]:
    """Events without their number, refusals and counts of a fresh feed."""
    spec, framing, decoder = load(name)
    feed, out = D.make_feed(spec, InstrumentTable(8), framing=framing), np.zeros(64, EVENT)
    if name == "itch50":
        raw = b"".join(struct.pack(">H", len(m)) + m for m in messages)
    elif name == "dbn_mbo":
        raw = b"DBN\1\0\0\0\0" + b"".join(messages)
    else:
        body = b"".join(struct.pack("<H", len(m)) + m for m in messages)
        raw = struct.pack("<4sIIHHQQQ", bytes(4), 1, 1, len(body), len(messages), 0, 1, 0) + body
    buf = np.frombuffer(raw + bytes(SLACK), np.uint8).copy()
    if framing.packets:
        packets = np.zeros(1, PACKET)
        packets[0]["length"], packets[0]["ts_recv"] = len(raw), 5
        _, n = decoder.decode_packets(buf, packets, 0, 1, feed, out)
    else:
        _, n = decoder.decode_stream(buf, 0, len(raw), 5, feed, out)
    events = [tuple(int(e[k]) for k in EVENT.names[1:]) for e in out[:n] if e["kind"] != Kind.REFERENCE]
    return events, D.malformed(feed), D.message_counts(feed, spec)


def a_message(data: st.DataObject, spec: Spec, message: Message, size: int, choose: bool = True) -> bytes:
    """Random bytes that are mostly what the spec allows, always of the same instrument."""
    body = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    for case in message.cases[:1]:
        for field, values in case.when.items():
            others = [v for c in message.cases for v in c.when.get(field, ())] if choose else list(values)
            body[message.fields[field].offset] = data.draw(st.sampled_from(others)) if size > message.fields[field].offset else 0
    for field in message.fields.values():
        if field.map and field.offset < size and (not choose or data.draw(st.integers(0, 9))):
            body[field.offset] = data.draw(st.sampled_from(sorted(field.map)))
    fixed = {spec.code: 1, spec.symbol: int.from_bytes(b"ABC     ", "little"), "price": data.draw(st.integers(0, 10**6))}
    if not choose or data.draw(st.integers(0, 3)):
        fixed["timestamp"] = 7
    else:
        del fixed["price"]
    for name, value in fixed.items():
        field = message.fields.get(name or "")
        if field is not None and field.offset + field.size <= size:
            body[field.offset : field.offset + field.size] = value.to_bytes(field.size, "big" if field.big and not field.text else "little")
    at = spec.type_field.offset
    if at < size:
        body[at] = message.code
    if spec.name == "dbn_mbo":
        body[0] = size // 4
    return bytes(body)


@pytest.mark.parametrize("name", FRAMINGS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_known_instruments_message_makes_the_event_of_a_first_mention(name: str, data: st.DataObject) -> None:
    """The first message of an instrument takes the branches, later ones the layout; refusals are the same too."""
    spec = load_spec(name)
    step = 4 if name == "dbn_mbo" else 1
    chosen = data.draw(st.sampled_from([m for m in spec.messages if all(c.kind not in ("reference", "time") for c in m.cases)]))
    size = chosen.length + step * data.draw(st.sampled_from([0, 0, 0, 3, -1]))
    message = a_message(data, spec, chosen, size)
    good = a_message(data, spec, spec.messages[0], spec.messages[0].length, choose=False)
    first_events, first_refusals, first_counts = decode(name, [message])
    events, refusals, counts = decode(name, [good, message, message])
    assert len(events) == 1 + 2 * len(first_events)
    assert events[1:] == 2 * first_events
    assert refusals == {reason: 2 * n for reason, n in first_refusals.items()}
    good_counts = decode(name, [good])[2]
    assert counts == {k: good_counts.get(k, 0) + 2 * first_counts.get(k, 0) for k in {**good_counts, **first_counts}}
