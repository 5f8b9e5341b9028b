"""SBE: schemas and their faults, encoders, decoders against a slow twin, real captures, cut and damaged messages."""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sbe_twin
from bounds import with_bounds_checks
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import free_endpoints, until
from test_decoder import DATA, captured, image

from tickmesh.control.config import parse_config
from tickmesh.node import decoder as D
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, NO_PRICE, REFERENCE, Flag, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.protocol import SpecError, load_framing, load_spec
from tickmesh.node.receivers import MulticastReceiver, ReceiverContext
from tickmesh.node.replay import replay
from tickmesh.node.sbe_encoder import EncodeError, Encoder, Failure, block_dtype
from tickmesh.node.sbe_mapping import SbeSpec
from tickmesh.node.sbe_schema import Composite, Enum, Level, Schema, SchemaError, Set, leaves, load_schema
from tickmesh.transports.capture import PACKET
from tickmesh.transports.ring import Ring
from tickmesh.transports.toolbox import IDLE_SLEEP

HERE = Path(__file__).parent
CORPUS = HERE / "corpus" / "sbe"
SCHEMAS = DATA / "sbe_schemas"
CME_XML, B3_XML = SCHEMAS / "cme_templates_FixBinary_v9.xml", SCHEMAS / "b3-market-data-messages-1.6.0.xml"
BINANCE_XML = SCHEMAS / "binance_spot-fixsbe-1_1.xml"
need_data = pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"no schemas in {SCHEMAS} (set TICKMESH_DATA)")
_loaded: dict[str, Any] = {}


def trial() -> tuple[SbeSpec, Any, Encoder]:
    """The made-up venue: its mapping, decoder of a stream, and encoder."""
    if "trial" not in _loaded:
        spec = load_spec(HERE / "sbe_trial.toml")
        assert isinstance(spec, SbeSpec)
        decoder = D.load_decoder(spec, load_framing("sofh_compact"))
        _loaded["trial"] = spec, decoder, Encoder(spec.schema, [message.name for message in spec.schema.messages])
    return _loaded["trial"]


def odd() -> tuple[SbeSpec, Any, Encoder]:
    """The venue that does everything in an unusual way, big-endian: its mapping, decoder of a stream, and encoder."""
    if "odd" not in _loaded:
        spec = load_spec(HERE / "sbe_odd.toml")
        assert isinstance(spec, SbeSpec)
        decoder = D.load_decoder(spec, load_framing("sofh"))
        _loaded["odd"] = spec, decoder, Encoder(spec.schema, [message.name for message in spec.schema.messages])
    return _loaded["odd"]


def framed_big(*messages: bytes) -> bytes:
    return b"".join(struct.pack(">IH", len(message) + 6, 0x5BE0) + message for message in messages)


def framed(*messages: bytes) -> bytes:
    return b"".join(struct.pack("<HH", len(message) + 4, 0xEB50) + message for message in messages)


def stream(raw: bytes, room: int = 64, venue: Any = trial) -> tuple[list[Any], Any, InstrumentTable]:
    """Events of a byte stream of a made-up venue, with the decoder's feed and the instruments."""
    spec, decoder, _ = venue()
    table = InstrumentTable(256)
    feed = D.make_feed(spec, table, framing=load_framing(spec.framing))
    buf, out, events, pos = image(raw), np.zeros(room, EVENT), [], 0
    while True:
        before = pos
        pos, n = decoder.decode_stream(buf, pos, len(raw), 5, feed, out)
        events += [out[i].copy() for i in range(n)]
        assert pos >= before
        if n == 0:
            D.end_of_stream(feed, len(raw) - pos)
            return events, feed, table


def rows_of(events: list[Any], table: InstrumentTable) -> list[list[Any]]:
    """Events as the twin writes them."""
    rows = []
    for e in events:
        whole = e["instrument"] == ALL_INSTRUMENTS
        name = ALL_INSTRUMENTS if whole else bytes(table.record(int(e["instrument"]))["symbol"]).decode("latin-1")
        if e["kind"] == Kind.REFERENCE:
            assert e.view(REFERENCE)["symbol"].decode("latin-1") == name
            rows.append([int(Kind.REFERENCE), name, 0, 0, int(e["price"]), 0, 0, 0])
        else:
            rows.append([int(e["kind"]), name, *(int(e[k]) for k in ("side", "flags", "price", "qty", "id", "aux"))])
    return rows


# ---------------------------------------------------------------- schemas


def test_everything_of_a_schema() -> None:
    schema = load_schema(HERE / "sbe_trial.xml")
    assert (schema.package, schema.id, schema.version, schema.big) == ("trial", 77, 3, False)
    assert (schema.header.name, schema.header.size) == ("head", 12)
    book, deals = schema.messages[:2]
    places = {leaf.path: (leaf.offset, leaf.null, leaf.constant, leaf.since) for leaf in leaves(book)}
    assert places["at.time"] == (0, None, None, 0)
    assert places["at.unit"][2] == 9
    assert places["venue"][2] == b"XTRL"
    assert places["kind"][2] == 1
    assert places["marks"] == (14, None, None, 0)
    assert places["phase"] == (16, 255, None, 2)
    assert book.block_length == 24  # longer than its fields
    levels, orders = book.groups
    assert (levels.block_length, levels.dimension.size, levels.dimension.count.offset, levels.dimension.count_max) == (17, 4, 3, 255)
    assert {leaf.path: leaf.null for leaf in leaves(levels)}["side"] == 200
    assert orders.since == 2
    inner = schema.types["inner"]
    assert isinstance(inner, Composite)
    assert inner.size == 8 + 7 + 2
    assert isinstance(schema.types["marks"], Set)
    assert isinstance(schema.types["action"], Enum)
    symbols = deals.groups[0]
    assert [group.name for group in symbols.groups] == ["deals"]
    assert (symbols.data[0].name, symbols.data[0].size, symbols.data[0].length_max) == ("symbol", 1, 40)
    assert schema.messages[3].deprecated == 3
    assert (schema.messages[3].since, schema.messages[3].block_length) == (1, 0)


def faults(tmp_path: Path, *changes: tuple[str, str]) -> list[tuple[int, str, str]]:
    """Line, element and reason of every fault of the trial schema after some changes to its text."""
    text = (HERE / "sbe_trial.xml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "changed.xml"
    path.write_text(text)
    with pytest.raises(SchemaError) as caught:
        load_schema(path)
    assert all(problem.path == str(path) for problem in caught.value.problems)
    return [(problem.line, problem.key, problem.reason) for problem in caught.value.problems]


FAULTS = [
    ('name="x" id="1" type="uint8"', 'name="x" id="1" type="nowhere"', "message Ignored/field x", "there is no type 'nowhere'"),
    ('blockLength="24"', 'blockLength="12"', "message Book", "blockLength 12 is shorter than its fields"),
    ('type="marks" offset="14"', 'type="marks" offset="3"', "message Book/field marks", "offset 3 lies within"),
    ('name="Reset" id="4"', 'name="Reset" id="3"', "message Reset", "id 3 is that of Listing already"),
    ('<validValue name="sell">S</validValue>', '<validValue name="sell">SS</validValue>', "validValue sell", "is not one character"),
    ('<validValue name="top">4</validValue>', '<validValue name="top">400</validValue>', "validValue top", "'400' does not fit int8"),
    ('<choice name="last">9</choice>', '<choice name="last">16</choice>', "set marks/choice last", "'16' is not a bit of uint16"),
    ('valueRef="action.set"', 'valueRef="action.sat"', "message Book/field kind", "is not ENUM.VALUE"),
    ('<ref name="when" type="stamp"/>', '<ref name="when" type="inner"/>', "composite inner/ref when", "contains itself"),
    ('primitiveType="uint16" length="3"', 'primitiveType="uint17" length="3"', "type numbers", "'uint17' is not a primitive type"),
    ('headerType="head"', 'headerType="hat"', "messageSchema", "headerType 'hat' is not a composite"),
    ('byteOrder="littleEndian"', 'byteOrder="middleEndian"', "messageSchema", "is not littleEndian or bigEndian"),
    ('dimensionType="bigDim"', 'dimensionType="text8"', "message Deals/group symbols", "is not a composite with an unsigned 'blockLength'"),
    ('type="text32"', 'type="price7"', "message Deals/data comment", "is not a composite with an unsigned 'length'"),
    ('name="x" id="1"', 'name="x" id="one"', "message Ignored/field x", "id='one' is not a whole number"),
    ('name="Ignored" id="9"', 'name="Ignored" id="70000"', "message Ignored", "id=70000 is not within 0 to 65535"),
    ('presence="constant">XTRL</type>', 'presence="constant"></type>', "type venue", "is constant, so it needs a value"),
    ('presence="optional" sinceVersion="2"', 'presence="maybe" sinceVersion="2"', "message Book/field phase", "presence='maybe'"),
    ('name="Book" id="1" blockLength="24"', 'name="Book" id="1" blockLength="x4"', "message Book", "is not a whole number"),
    ('<data name="comment" id="40"', '<data name="number" id="40"', "message Deals/data number", "of this name already"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "element", "reason"), FAULTS, ids=[fault[3][:30] for fault in FAULTS])
def test_a_fault_names_element_and_line(tmp_path: Path, old: str, new: str, element: str, reason: str) -> None:
    found = faults(tmp_path, (old, new))
    lines = (HERE / "sbe_trial.xml").read_text().splitlines()
    at = next(number for number, line in enumerate(lines, 1) if old in line)
    fitting = [fault for fault in found if element in fault[1] and reason in fault[2]]
    assert fitting, found
    if element != "messageSchema":
        assert any(abs(line - at) <= 1 for line, _, _ in fitting), (at, fitting)


def test_all_faults_at_once(tmp_path: Path) -> None:
    found = faults(tmp_path, ('type="marks" offset="14"', 'type="mark"'), ('name="x" id="1"', 'name="" id="1"'), ('id="40"', 'id="-1"'))
    assert len(found) == 3
    assert sorted(line for line, _, _ in found) == [line for line, _, _ in found]


def test_ids_and_lengths_fit_their_headers(tmp_path: Path) -> None:
    small = ('<type name="templateId" primitiveType="uint16"/>', '<type name="templateId" primitiveType="uint8"/>')
    found = faults(tmp_path, small, ('name="Ignored" id="9"', 'name="Ignored" id="256"'))
    assert "templateId 256 does not fit uint8, its type in composite 'head'" in found[0][2]
    large = ('<type name="blockLength" primitiveType="uint16"/>', '<type name="blockLength" primitiveType="uint64"/>')
    assert "'blockLength' of at most 32 bits" in faults(tmp_path, large)[0][2]
    rest = '\n            <type name="numInGroup" primitiveType="uint8" offset="3"/>'
    wide = f'<type name="blockLength" primitiveType="uint16"/>{rest}'
    long = ('<group name="orders" id="20"', '<group name="orders" id="20" blockLength="300"')
    found = faults(tmp_path, (wide, wide.replace("uint16", "uint8")), long)
    assert found[0][1:] == ("message Book/group orders", "blockLength 300 does not fit uint8, its type in composite 'dim'")


def test_order_of_fields_groups_and_data(tmp_path: Path) -> None:
    found = faults(tmp_path, ('<data name="comment" id="40" type="text32"/>', '<field name="late" id="9" type="uint8"/>'))
    assert "stands too late" in found[0][2]


def test_what_is_no_schema(tmp_path: Path) -> None:
    path = tmp_path / "s.xml"
    entity = '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'
    for text, reason in (("", "no element"), ("<a>", "no element"), ("<fix/>", "must be messageSchema"), (entity, "entities are not read"),
                         ("<a>" * 70, "deeper than 64")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(SchemaError, match=reason):
            load_schema(path)
    with pytest.raises(SchemaError, match="cannot be read"):
        load_schema(tmp_path / "absent.xml")


def test_included_files(tmp_path: Path) -> None:
    text = (HERE / "sbe_trial.xml").read_text()
    body = re.search(r"<types>.*</types>", text, re.DOTALL)
    assert body
    (tmp_path / "types.xml").write_text(f"<?xml version='1.0'?>\n{body[0]}")
    path = tmp_path / "outer.xml"
    outer = text.replace(body[0], '<include href="types.xml"/>')
    path.write_text(outer)
    assert load_schema(path).messages[0].block_length == 24
    for href, reason in (("../types.xml", "own folder"), ("/etc/passwd", "own folder"), ("outer.xml", "includes itself"),
                         ("gone.xml", "cannot be read")):  # fmt: skip
        path.write_text(outer.replace("types.xml", href))
        with pytest.raises(SchemaError, match=reason):
            load_schema(path)


@need_data
def test_schemas_of_venues_and_of_the_reference(tmp_path: Path) -> None:
    shutil.copy(SCHEMAS / "reallogic_common-types.xml", tmp_path / "common-types.xml")
    shutil.copy(SCHEMAS / "reallogic_example-schema.xml", tmp_path / "example.xml")
    car = load_schema(tmp_path / "example.xml").messages[0]
    assert (car.block_length, [group.block_length for group in car.groups], len(car.data)) == (45, [6, 1], 3)
    known = {"binance_spot-fixsbe-1_1": 29, "binance_spot_3_0": 77, "binance_spot_3_5": 92, "cme_templates_FixBinary_v9": 29,
             "reallogic_car": 1, "b3-market-data-messages-1.6.0": 28, "reallogic_FixBinary": 29,
             "reallogic_fix-message-samples": 6}  # fmt: skip
    assert {name: len(load_schema(SCHEMAS / f"{name}.xml").messages) for name in known} == known


# ---------------------------------------------------------------- encoders


def values_of(data: st.DataObject, level: Level, depth: int = 0) -> dict[str, Any]:
    """A drawn value for everything of a level."""
    result: dict[str, Any] = {}
    for field in level.fields:
        if field.presence != "constant":
            result[field.name] = value_of(data, field.type, field.presence == "optional")
    for group in level.groups:
        result[group.name] = [values_of(data, group, depth + 1) for _ in range(data.draw(st.integers(0, 4 if depth == 0 else 2)))]
    for part in level.data:
        result[part.name] = data.draw(st.sampled_from([b"", b"AB", b"AB C  ", b"0123456789", b"x" * 25, b"\0a"]))
    return result


def value_of(data: st.DataObject, type: Any, optional: bool) -> Any:
    if isinstance(type, Composite):
        return {member.name: value_of(data, member.type, optional) for member in type.members
                if not (hasattr(member.type, "presence") and member.type.presence == "constant")}  # fmt: skip
    if isinstance(type, Enum):
        return data.draw(st.sampled_from([*type.values, *([None] if optional else [])]))
    if isinstance(type, Set):
        return data.draw(st.lists(st.sampled_from(sorted(type.choices)), unique=True))
    optional = optional or type.presence == "optional"
    if type.primitive.is_float:
        return data.draw(st.floats(width=32, allow_nan=False))
    if type.primitive.name == "char" or (type.length != 1 and type.primitive.size == 1):
        return data.draw(st.sampled_from(["", "ABC", "A B", "X" * type.length]))
    least = type.primitive.least if type.least is None else type.least
    most = type.primitive.most if type.most is None else type.most
    some = [n for n in (0, 1, 2, 3, 5, 100, 10**9) if least <= n <= most]
    number = st.one_of(st.sampled_from(some), st.sampled_from(some), st.integers(least, most))
    if type.length != 1:
        return [data.draw(number) for _ in range(type.length)]
    return data.draw(st.one_of(st.none(), number, number, number) if optional else number)


def check_read_back(schema: Schema, level: Level, tree: dict[str, Any], values: dict[str, Any]) -> None:
    """What the twin reads is what was given, nulls and constants included."""
    for leaf in leaves(level):
        given: Any = values
        for step in leaf.path.split("."):
            given = given.get(step) if isinstance(given, dict) else None
        there = tree[leaf.path]
        if leaf.constant is not None:
            assert there == leaf.constant
        elif isinstance(leaf.type, Enum) and given is not None:
            assert there == leaf.type.values[given]
        elif isinstance(leaf.type, Set):
            assert there == sum(1 << leaf.type.choices[name] for name in given)
        elif isinstance(given, str):
            assert there.rstrip(b"\0") == given.encode()
        elif isinstance(given, list):
            assert list(struct.unpack(f"<{len(given)}H", there)) == given
        else:
            assert there == (leaf.null if given is None else given)
    for group in level.groups:
        assert len(tree[group.name]) == len(values[group.name])
        for entry, wanted in zip(tree[group.name], values[group.name]):
            check_read_back(schema, group, entry, wanted)
    assert [tree[part.name] for part in level.data] == [values[part.name] for part in level.data]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_round_trip(data: st.DataObject) -> None:
    spec, _, encoder = trial()
    message = data.draw(st.sampled_from(spec.schema.messages))
    values = values_of(data, message)
    raw = encoder.encode(message.name, values)
    level, tree = sbe_twin.decode(spec.schema, raw)
    assert level is message
    check_read_back(spec.schema, level, tree, values)
    assert sbe_twin.header(spec.schema, raw)["version"] == 3


BAD_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("Ignored", {"x": 255}, "Ignored/x: 255 is not a whole number within 0 to 254"),
    ("Ignored", {}, "Ignored/x: is missing, and it is not optional"),
    ("Ignored", {"y": 1}, "Ignored/y: is not there; there are x"),
    ("Listing", {"instrument": 1, "symbol": "X" * 11}, "Listing/symbol"),
    ("Listing", {"instrument": 1, "symbol": "A", "tick": 5}, "must be a table of mantissa, exponent"),
    ("Book", {"at": {"time": 1}, "instrument": 1, "marks": ["shown"]}, "is not a list of hidden, last"),
    ("Book", {"at": {"time": 1}, "instrument": 1, "kind": 2}, "is always 1"),
    ("Deals", {"scale": 1, "number": 1, "comment": b"x" * 70000}, "does not fit 65536 bytes"),
    ("Deals", {"scale": 1, "number": 1, "symbols": [{"weight": 1.0, "numbers": [1, 2, 3], "symbol": b"x" * 41}]}, "the schema allows 40"),
    ("Deals", {"scale": 1, "number": 1, "symbols": [{"weight": 1.0, "numbers": [1, 2]}]}, "must be 3 values"),
    ("Deals", {"scale": 1, "number": 1, "comment": 5}, "5 is neither text nor bytes"),
    ("Deals", {"scale": 1, "number": 1, "symbols": 5}, "must be a list of tables"),
    ("Deals", {"scale": 1, "number": 1, "symbols": [{"weight": "x", "numbers": [1, 2, 3]}]}, "'x' is not a number"),
    ("Listing", {"instrument": 1, "symbol": 5}, "5 is neither text nor bytes"),
    ("Listing", {"instrument": 1, "symbol": "\u20ac"}, "beyond Latin-1"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "values", "reason"), BAD_VALUES, ids=[case[2][:40] for case in BAD_VALUES])
def test_what_cannot_be_encoded(message: str, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(EncodeError) as caught:
        trial()[2].encode(message, values)
    assert reason in str(caught.value)


def test_a_compiled_writer_stays_in_bounds() -> None:
    spec, _, encoder = trial()
    book = spec.schema.messages[0]
    root, entries = np.zeros(1, block_dtype(book)), np.zeros(3, block_dtype(book.groups[0]))
    root["instrument"], entries["price.mantissa"] = 7, [1, 2, 3]
    blocks = np.concatenate([root.view(np.uint8).ravel(), entries.view(np.uint8).ravel()])
    write, texts = encoder._module.encode_Book, np.zeros(1, np.uint8)
    buf = np.full(256, 0xAA, np.uint8)
    end = write(buf, 10, 256, blocks, np.array([3, 0]), texts)
    assert end == 10 + 12 + 24 + 4 + 3 * 17 + 4
    assert [entry["price.mantissa"] for entry in sbe_twin.decode(spec.schema, bytes(buf[10:end]))[1]["levels"]] == [1, 2, 3]
    assert set(buf[:10]) | set(buf[end:]) == {0xAA}
    assert write(buf, 10, end - 1, blocks, np.array([3, 0]), texts) == Failure.NO_ROOM
    assert write(buf, 250, 256, blocks, np.array([3, 0]), texts) == Failure.NO_ROOM
    assert set(buf[end:]) == {0xAA}
    assert write(buf, 0, 256, blocks, np.array([4, 0]), texts) == Failure.SHORT_INPUT
    assert write(buf, 0, 256, blocks, np.array([3]), texts) == Failure.SHORT_INPUT
    assert write(buf, -8, 256, blocks, np.array([3, 0]), texts) == Failure.NO_ROOM
    for count in (256, -1):
        assert write(buf, 0, 256, blocks, np.array([count, 0]), texts) == Failure.BAD_COUNT


# ---------------------------------------------------------------- decoders against the twin


def compare(raw_messages: list[bytes], room: int = 64, venue: Any = trial) -> None:
    """The compiled decoder makes the twin's events, and refuses what it refuses."""
    twin = sbe_twin.Twin(venue()[0])
    wanted = [row for message in raw_messages for row in twin.events(message)]
    raw = framed(*raw_messages) if venue is trial else framed_big(*raw_messages)
    events, feed, table = stream(raw, room, venue)
    assert rows_of(events, table) == wanted
    assert D.malformed(feed) == twin.malformed


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_decoder_is_its_twin(data: st.DataObject) -> None:
    spec, _, encoder = trial()
    messages = []
    for _ in range(data.draw(st.integers(1, 6))):
        message = data.draw(st.sampled_from(spec.schema.messages))
        raw = bytearray(encoder.encode(message.name, values_of(data, message)))
        if data.draw(st.integers(0, 3)) == 0:
            raw[6] = data.draw(st.integers(0, 3))  # an older version, which may lack fields and groups
        if data.draw(st.integers(0, 3)) == 0:
            at = data.draw(st.integers(0, len(raw) - 1))
            raw[at] = data.draw(st.integers(0, 255))
        if data.draw(st.integers(0, 5)) == 0:
            del raw[data.draw(st.integers(0, len(raw))) :]
        messages.append(bytes(raw) or b"\0")
    compare(messages, data.draw(st.sampled_from([64, 64, 17, 16])))


ODD_BLOCKS = {1: [21, 26, 201], 2: [8], 3: [4, 14, 16]}
"""Bytes of the root blocks of older versions, by template."""


def older(raw: bytes, version: int, block: int) -> bytes:
    """An odd message of an older version: its root has `block` bytes."""
    whole = int.from_bytes(raw[9:13], "big")
    return bytes([version]) + raw[1:9] + block.to_bytes(4, "big") + raw[13 : 13 + block] + raw[13 + whole :]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_unusual_schemas_are_as_their_twin(data: st.DataObject) -> None:
    """Big-endian, other headers, decimals with their exponents on the wire, nulls of every kind, versions that lack fields."""
    spec, _, encoder = odd()
    messages = []
    for _ in range(data.draw(st.integers(1, 4))):
        message = data.draw(st.sampled_from(spec.schema.messages))
        values = values_of(data, message)
        if message.name == "Tick" and data.draw(st.booleans()):
            values |= {"scale": data.draw(st.sampled_from([None, -9, 0, 9, 127, -127])), "code": data.draw(st.sampled_from([None, 5]))}
        raw = bytearray(encoder.encode(message.name, values))
        if data.draw(st.integers(0, 2)) == 0:
            version = data.draw(st.integers(0, 4))
            raw = bytearray(older(bytes(raw), version, data.draw(st.sampled_from([3, *ODD_BLOCKS[message.id], message.block_length]))))
        if data.draw(st.integers(0, 3)) == 0:
            at = data.draw(st.integers(0, min(len(raw), 80) - 1))
            raw[at] = data.draw(st.sampled_from([0, 1, 4, 127, 128, 255]))
        if data.draw(st.integers(0, 5)) == 0:
            del raw[data.draw(st.integers(0, len(raw))) :]
        messages.append(bytes(raw) or b"\0")
    compare(messages, data.draw(st.sampled_from([64, 17])), odd)


def test_what_an_older_version_lacks_is_never_read() -> None:
    """The fields' places lie far beyond the message: before, they were read where the message was not."""
    _, _, encoder = odd()
    tick = encoder.encode("Tick", {"raw": 5, "sign": "minus", "code": 3, "size": {"mantissa": 2}, "scale": 1})
    old = older(tick, 1, 21)
    events, feed, _ = stream(framed_big(old), 64, odd)
    assert (events, D.malformed(feed)) == ([], {"bad_field": 1})  # a mantissa without an exponent is no price
    new, feed, table = stream(framed_big(tick), 64, odd)
    assert rows_of(new, table)[1] == [Kind.TRADE, "#3", 1, int(Flag.HIDDEN), 50 * 10**9, 200_000, 0, 0]
    named = older(encoder.encode("Named", {"code": 3, "symbol": "ABC", "tick": {"exponent": -2}}), 1, 4)
    events, feed, table = stream(framed_big(named), 64, odd)
    assert (rows_of(events, table), D.malformed(feed)) == ([[Kind.REFERENCE, "#3", 0, 0, 5 * 10**8, 0, 0, 0]], {})
    null = encoder.encode("Named", {"symbol": "ABC", "tick": {"exponent": -2}})
    events, feed, _ = stream(framed_big(null), 64, odd)
    assert (events, D.malformed(feed)) == ([], {"unknown_instrument": 1})


@pytest.mark.parametrize(
    ("mantissa", "exponent", "price"),
    [
        (1, 9, 10**18), (9, 9, 9 * 10**18), (10, 9, None), (-9, 9, -9 * 10**18), (-10, 9, None), (1, 10, None), (0, 127, 0),
        ((1 << 63) - 1, -9, (1 << 63) - 1), (1 - (1 << 63), -9, 1 - (1 << 63)), (-(1 << 63), -9, None), (123, -12, None),
        (123_000, -12, 123), (-123_000, -12, -123), (5, -128, None), (1, -27, None), (9_223_372_036, 0, 9_223_372_036 * 10**9),
        (9_223_372_037, 0, None),
    ],
)  # fmt: skip
def test_a_decimal_is_exact_or_refused(mantissa: int, exponent: int, price: int | None) -> None:
    _, _, encoder = odd()
    tick = encoder.encode("Tick", {"raw": 0, "sign": "plus", "code": 3, "size": {"mantissa": None}, "scale": 0})
    tick = bytearray(tick)
    tick[13:21], tick[13 + 200] = mantissa.to_bytes(8, "big", signed=True), exponent & 0xFF
    events, feed, _ = stream(framed_big(bytes(tick)), 64, odd)
    refused = D.malformed(feed)
    if price is None:
        assert (len(events), refused) == (0, {"bad_field" if exponent == -128 else "price_overflow": 1})
    else:
        assert (refused, int(events[1]["price"])) == ({}, price)


def test_the_room_does_not_matter() -> None:
    _, _, encoder = trial()
    level = {"price": {"mantissa": 0}, "qty": 5, "position": 1, "action": "insert", "side": "bid"}
    levels = [{**level, "price": {"mantissa": i * 10**7}, "side": ("bid", "ask", None)[i % 7 % 3]} for i in range(200)]
    raw = framed(*[encoder.encode("Book", {"at": {"time": 9}, "instrument": i, "levels": levels}) for i in range(3)])
    large, _, table = stream(raw, 4096)
    assert len(large) > 600
    for room in (15, 16, 17, 23, 64, 258):
        some, _, names = stream(raw, room)
        assert rows_of(some, names) == rows_of(large, table)


def longer(raw: bytes, spec: SbeSpec, extra: int) -> bytes:
    """A Book message of a newer version: root and entries have more bytes at their ends."""
    tree = sbe_twin.decode(spec.schema, raw)[1]
    body = bytearray(struct.pack("<HHHH", 24 + extra, 1, 77, 4) + raw[8:12] + raw[12:36] + bytes(extra))
    at = 36
    for name, size in (("levels", 17), ("orders", 13)):
        count = len(tree[name])
        body += struct.pack("<HBB", size + extra, 0, count)
        at += 4
        for _ in range(count):
            body += raw[at : at + size] + b"\xee" * extra
            at += size
    return bytes(body)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_newer_version_with_longer_blocks(data: st.DataObject) -> None:
    spec, _, encoder = trial()
    raw = encoder.encode("Book", values_of(data, spec.schema.messages[0]))
    old, _, names = stream(framed(raw))
    new, feed, names_new = stream(framed(longer(raw, spec, data.draw(st.integers(1, 40)))))
    assert rows_of(new, names_new) == rows_of(old, names)
    assert "bad_group" not in D.malformed(feed)


def test_hostile_counts() -> None:
    head = struct.pack("<HHHHI", 24, 1, 77, 3, 0)
    root = struct.pack("<QiHHB", 1, 5, 0, 0, 255).ljust(24, b"\0")
    deals = struct.pack("<HHHHI", 9, 2, 77, 3, 0) + bytes(9)
    for message in (
        head + root + struct.pack("<HBB", 17, 0, 255),  # entries that are not there
        head + root + struct.pack("<HBB", 0, 0, 200) + bytes(300),  # entries of no bytes
        head + root + struct.pack("<HBB", 65535, 0, 1) + bytes(100),  # an entry longer than the message
        deals + struct.pack("<II", 0, 0xFFFFFFFF) + bytes(60),
        deals + struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF) + bytes(60),
        deals + struct.pack("<II", 0, 0) + struct.pack("<I", 0xFFFFFFF0),  # data longer than the message
    ):
        events, feed, _ = stream(framed(message))
        assert (len(events), D.malformed(feed)) == (0, {"bad_group": 1})
        compare([message])


def test_unknown_and_unmapped_messages_are_counted() -> None:
    spec, _, encoder = trial()
    ignored, reset = encoder.encode("Ignored", {"x": 1}), encoder.encode("Reset", {})
    unknown = struct.pack("<HHHHI", 0, 500, 77, 3, 0)
    other = struct.pack("<HHHHI", 0, 4, 78, 3, 0)
    raw = framed(ignored, ignored, unknown, other, b"short", reset) + struct.pack("<HH", 16, 0x5BE0) + reset
    events, feed, table = stream(raw)
    assert rows_of(events, table) == [[Kind.CLEAR, ALL_INSTRUMENTS, 2, 0, 0, 0, 0, 1]]
    assert D.message_counts(feed, spec) == {"Ignored": 2, "Reset": 1}
    assert D.malformed(feed) == {"unknown_message": 1, "other_schema": 1, "bad_length": 1, "bad_encoding": 1}


def level_of(action: str, position: int, price: int = 0, qty: int = 1, side: str | None = "bid") -> dict[str, Any]:
    return {"price": {"mantissa": price * 10**7}, "qty": qty, "position": position, "action": action, "side": side}


def test_a_ladder_tells_what_falls_off() -> None:
    _, _, encoder = trial()
    book = lambda *levels: encoder.encode("Book", {"at": {"time": 9}, "instrument": 5, "levels": list(levels)})  # noqa: E731
    filled = book(*[level_of("insert", i + 1, 100 - i) for i in range(4)])
    messages = [filled, book(level_of("insert", 2, 200)), book(level_of("remove", 1)), book(level_of("top", 2)), book(level_of("all", 1))]
    events, feed, _ = stream(framed(*messages))
    changes = [(int(e["kind"]), int(e["price"]) // 10**9, int(e["qty"]), int(e["flags"])) for e in events[1:]]
    more = int(Flag.MORE)
    assert changes == [
        (8, 100, 1, more), (8, 99, 1, more), (8, 98, 1, more), (8, 97, 1, 0),
        (8, 97, 0, more), (8, 200, 1, 0),
        (8, 100, 0, 0),
        (8, 200, 0, more), (8, 99, 0, 0),
        (7, 0, 0, 0),
    ]  # fmt: skip
    assert not D.malformed(feed)
    compare(messages)


def test_implied_levels_are_a_book_of_their_own() -> None:
    _, _, encoder = trial()
    listing = encoder.encode("Listing", {"instrument": 5, "symbol": "WIDGET", "tick": {"mantissa": 25 * 10**5}, "depth": 4})
    levels = [level_of("insert", 1, 100), level_of("insert", 1, 99, side=None)]
    book = encoder.encode("Book", {"at": {"time": 9}, "instrument": 5, "levels": levels})
    events, _, table = stream(framed(book, listing, book))
    rows = rows_of(events, table)
    told = [(row[1], Kind(int(e["kind"])).name) for row, e in zip(rows, events)]
    assert told[:4] == [("#5", "REFERENCE"), ("#5", "LEVEL"), ("#5.I", "REFERENCE"), ("#5.I", "LEVEL")]
    assert told[4:8] == [("WIDGET", "REFERENCE"), ("#5", "CLEAR"), ("#5.I", "CLEAR"), ("WIDGET", "GAP")], "what rests is not known by name"
    assert told[8:] == [("WIDGET", "CODE"), ("WIDGET", "LEVEL"), ("WIDGET.I", "REFERENCE"), ("WIDGET.I", "GAP"), ("WIDGET.I", "LEVEL")]
    assert {table.symbol(i): int(table.record(i)["tick_size"]) for i in range(4)} == {
        "#5": 5 * 10**8, "#5.I": 5 * 10**8, "WIDGET": 25 * 10**7, "WIDGET.I": 25 * 10**7}  # fmt: skip
    compare([book, listing, book])


# ---------------------------------------------------------------- live


def test_two_live_lines_with_a_lost_packet() -> None:
    """Line A loses packet 3 and B packet 5: nothing is missing; both lose 7: a gap, then what follows."""
    _, _, encoder = trial()
    endpoints = free_endpoints()
    text = f"""
[cluster]
name = "t"
[data_sources.trial]
type = "multicast"
endpoint = "{endpoints[0]}"
endpoint_b = "{endpoints[1]}"
interface = "lo"
data_format = "{HERE / "sbe_trial.toml"}"
framing = "cme_mdp3"
gap_wait_ms = 50.0
"""
    options = parse_config(text).data_sources["trial"]
    ring = Ring.create(None, 1 << 10, EVENT, mode="lossy")
    events = ring.reader("test")
    receiver = MulticastReceiver("trial", options, ReceiverContext(InstrumentTable(64), [ring], 0, IDLE_SLEEP))
    try:
        receiver.start()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            for number in range(1, 10):
                levels = [level_of("set", 1, 100 + number, number)]
                message = encoder.encode("Book", {"at": {"time": number}, "instrument": 5, "levels": levels})
                packet = struct.pack("<IQH", number, 0, len(message) + 2) + message
                for line, lost in enumerate(((3, 7), (5, 7))):
                    if number not in lost:
                        address, port = endpoints[line].removeprefix("udp://").split(":")
                        sender.sendto(packet, (address, int(port)))
        got: list[Any] = []
        until(lambda: got.extend(events.read().view(EVENT)) or any(e["seq"] == 9 for e in got), "the last packet's events")
        counted = receiver.counters()
    finally:
        receiver.ask_stop()
        assert receiver.join(10)
        receiver.close()
    sets = [int(e["seq"]) for e in got if e["kind"] == Kind.LEVEL and e["qty"]]
    assert sets == [1, 2, 3, 4, 5, 6, 8, 9]
    assert [(int(e["id"]), int(e["aux"])) for e in got if e["kind"] == Kind.GAP] == [(7, 7)]
    assert (counted["gaps"], counted["missing"], counted["malformed"]) == (1, 1, 0)


# ---------------------------------------------------------------- mappings


def mapping_faults(tmp_path: Path, old: str, new: str) -> list[str]:
    text = (HERE / "sbe_trial.toml").read_text()
    assert old in text
    (tmp_path / "m.toml").write_text(text.replace(old, new, 1))
    shutil.copy(HERE / "sbe_trial.xml", tmp_path)
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "m.toml")
    return [f"{problem.line}: {problem.key}: {problem.reason}" for problem in caught.value.problems]


MAPPING_FAULTS = [
    ('price = "price"', 'price = "prize"', "there is no field 'prize' here; fields: price.mantissa"),
    ('group = "levels"', 'group = "level"', "has no group 'level'; groups: levels, orders"),
    ("[messages.Reset.event]", "[messages.Reboot.event]", "the schema has no message 'Reboot'"),
    ('position = "position"\nflag_if', "flag_if", "goes with `position`"),
    ('aux = "more.deep.b"', 'aux = "weight"', "floats are not taken"),
    ('aux = "more.deep.b"', 'aux = "numbers"', "is an array of uint16"),
    ('qty = "size"', 'qty = "more"', "is a composite: name one of its parts, more.when.time"),
    ('side = ["bid", "ask"]', 'side = ["bid", "offer"]', "is not a value of side: bid, ask"),
    ('bits = "hidden"', 'bits = "hiddn"', "'hiddn' is not a value of marks"),
    ('side = { field = "more.deep.side", map = "side" }', 'side = "more.deep.side"', "needs a map"),
    ('side = { field = "more.deep.side", map = "side" }', "side = 7", "7 is not a side: allowed are BID (0), ASK (1), NO_SIDE (2)"),
    ('side = { field = "more.deep.side", map = "side" }', 'side = { field = "more.deep.side", map = { buy = 9, "*" = 0 } }',
     "the map of field 'more.deep.side': 9 is not a side"),
    ('all = "REMOVE_ALL"', "all = 5", "5 is not a change: allowed are INSERT (0), SET (1)"),
    ('qty = "size"\n', 'qty = "size"\ntick_size = 5\n', "goes with kind 'reference' only"),
    ("book = 1\nprice", "book = 2\nprice", "2 is not a book: allowed are OWN (0), IMPLIED (1)"),
    ('position = "position"\nflag_if', "position = 0\nflag_if", "0 is not a position: allowed are 1, 2, 3"),
    ('price = { mantissa = "mantissa", exponent = "scale" }', 'price = "mantissa"', "needs `decimals` or an exponent"),
    ('kind = "depth"', 'kind = "dept"', "'dept' is not one of"),
    ('of = { group = "levels", number = "level" }', 'of = { group = "orders", number = "level" }', "is not a group before orders"),
    ('schema = "sbe_trial.xml"', 'schema = "sbe_trail.xml"', "cannot be read"),
    ('aux = "orders"', 'aux = { field = "orders", null = "none" }', "null: 'none' is not a value of orders"),
    ('[timestamp]', '[recovery]\nprocessed = "last"\n[timestamp]', "no message that is mapped has an unsigned field 'last'"),
    ('[messages.Deals]', """[[messages.Book.event]]
group = "orders"
of = { group = "levels", number = "id" }
kind = "delete"
id = "id"
[messages.Deals]""", "events of one group refer to one other group"),
    ('name = "trial"', 'name = "trial"\npackage = "mktdata"', "this mapping is for schemas of package 'mktdata'"),
]


@pytest.mark.parametrize(("old", "new", "reason"), MAPPING_FAULTS, ids=[fault[2][:30] for fault in MAPPING_FAULTS])
def test_a_mapping_that_does_not_fit(tmp_path: Path, old: str, new: str, reason: str) -> None:
    found = mapping_faults(tmp_path, old, new)
    assert any(reason in fault for fault in found), found


def test_a_schema_without_a_mapping() -> None:
    with pytest.raises(SpecError, match="no shipped mapping is for package 'trial'"):
        load_spec(f"sbe:{HERE / 'sbe_trial.xml'}")
    with pytest.raises(SpecError, match="cme_mdp3"):
        load_spec(f"nasdaq:{HERE / 'sbe_trial.xml'}")
    with pytest.raises(SpecError, match="this mapping is for schemas of package"):
        load_spec(f"cme_mdp3:{HERE / 'sbe_trial.xml'}")


# ---------------------------------------------------------------- damaged input


CORPUS_PROGRAM = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import numpy as np
import test_sbe as t
rng = np.random.default_rng(7)
inputs = [path.read_bytes() for path in sorted(t.CORPUS.glob("*.bin"))]
assert inputs
for raw in inputs:
    t.stream(raw, 17)
    for _ in range(40):
        changed = bytearray(raw)
        for _ in range(int(rng.integers(1, 6))):
            changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
        t.stream(bytes(changed[: int(rng.integers(1, len(changed) + 1))]), 17)
print("fine")
"""


def test_damaged_input_stays_in_bounds() -> None:
    done = with_bounds_checks("-c", CORPUS_PROGRAM)
    assert "fine" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.bin")), ids=lambda path: path.stem)
def test_corpus_is_refused_as_the_twin_does(path: Path) -> None:
    raw, messages, at = path.read_bytes(), [], 0
    while at + 4 <= len(raw):
        size = struct.unpack_from("<H", raw, at)[0]
        if size <= 4 or at + size > len(raw):
            break
        messages.append(raw[at + 4 : at + size])
        at += size
    compare(messages)


# ---------------------------------------------------------------- real captures


def venue(name: str, xml: Path) -> tuple[SbeSpec, Any, Any]:
    if name not in _loaded:
        spec = load_spec(f"{name}:{xml}")
        assert isinstance(spec, SbeSpec)
        framing = load_framing(spec.framing or "")
        _loaded[name] = spec, framing, D.load_decoder(spec, framing)
    return _loaded[name]


def packets_of(name: str, xml: Path, paths: list[Path], **options: Any) -> tuple[list[Any], Any, InstrumentTable, list[bytes]]:
    """Events of captures, feed, instruments, and the messages in them."""
    spec, framing, decoder = venue(name, xml)
    table = InstrumentTable(512)
    feed, out, events, messages = D.make_feed(spec, table, framing=framing, gap_wait_ns=0, **options), np.zeros(258, EVENT), [], []
    for path in paths:
        buf, packets = captured(path)
        at = 0
        while True:
            at, n = decoder.decode_packets(buf, packets, at, len(packets), feed, out)
            events += [out[i].copy() for i in range(n)]
            if n == 0 and at == len(packets):
                break
        seen = set()
        for packet in packets:
            payload = bytes(buf[packet["offset"] : packet["offset"] + packet["length"]])
            if payload in seen:
                continue  # the other line's copy
            seen.add(payload)
            at = framing.header_bytes
            while at < len(payload):
                size = struct.unpack_from("<H", payload, at)[0]
                messages.append(payload[at + framing.message_offset : at + size])
                at += size
    return events, feed, table, messages


CME = sorted(path for path in (DATA / "omi_pcaps/Cme").rglob("*.pcap") if "v1.12" not in str(path)) if DATA.is_dir() else []
CME_AB = sorted((DATA / "cme_mdp3_v8_AB_small").glob("*.pcap"))


@need_data
@pytest.mark.parametrize("path", CME, ids=lambda path: f"{path.parent.name[-4:]}_{path.stem}")
def test_cme_captures(path: Path) -> None:
    events, feed, table, messages = packets_of("cme_mdp3", CME_XML, [path])
    twin = sbe_twin.Twin(venue("cme_mdp3", CME_XML)[0])
    wanted = [row for message in messages for row in twin.events(message)]
    assert rows_of(events, table) == wanted
    assert D.malformed(feed) == twin.malformed == {}
    assert sum(D.message_counts(feed, venue("cme_mdp3", CME_XML)[0]).values()) == len(messages)


@need_data
def test_cme_by_hand() -> None:
    path = next(path for path in CME if "v1.9" in str(path) and path.stem == "MdIncrementalRefreshTradeSummary")
    events, _, table, _ = packets_of("cme_mdp3", CME_XML, [path])
    trade = next(e for e in events if e["kind"] == Kind.TRADE)
    # 00 f0 5b 9f c7 0b 00 00 | 02 00 00 00 | 0a 9a 02 00 | d9 4e 00 00 | 03 00 00 00 | 02
    # price, quantity, security, report, orders, aggressor
    assert table.symbol(int(trade["instrument"])) == f"#{0x029A0A}"
    assert (trade["price"], trade["qty"], trade["side"], trade["id"], trade["aux"]) == (0x0BC79F5BF000, 2, 1, 0x4ED9, 3)
    assert (trade["seq"], trade["ts_event"]) == (0x0D7DAC, 0x1553AB90A9759306)


@need_data
def test_cme_market_by_order() -> None:
    """Orders beside a book's levels, orders alone, and a snapshot in chunks, as the twin makes them; the real ones from captures."""
    spec = venue("cme_mdp3_mbo", CME_XML)[0]
    paths = [path for path in CME if "v1.9" in str(path) and path.stem.startswith("MdIncrementalRefresh")]
    seen = set()
    for path in paths:
        events, feed, table, messages = packets_of("cme_mdp3_mbo", CME_XML, [path])
        twin = sbe_twin.Twin(spec)
        assert rows_of(events, table) == [row for message in messages for row in twin.events(message)]
        assert D.malformed(feed) == twin.malformed == {}
        seen |= {int(e["kind"]) for e in events}
    assert seen >= {Kind.REFERENCE, Kind.TRADE}
    assert seen & {Kind.ADD, Kind.MODIFY, Kind.DELETE}
    encoder = Encoder(spec.schema, ["SnapshotFullRefreshOrderBook53", "MDIncrementalRefreshBook46"])
    order = lambda number, kind, price: {"OrderID": number, "MDEntryPx": {"mantissa": price * 10**9}, "MDDisplayQty": 3,  # noqa: E731
                                         "MDEntryType": kind}  # fmt: skip
    head = {"LastMsgSeqNumProcessed": 1, "TotNumReports": 1, "SecurityID": 42, "NoChunks": 2, "TransactTime": 1}
    chunks = [[order(1, "Bid", 10), order(2, "Bid", 10)], [order(3, "Offer", 11)]]
    level = {"MDEntryPx": {"mantissa": 12 * 10**9}, "MDEntrySize": 1, "SecurityID": 42, "RptSeq": 1, "MDPriceLevel": 1,
             "MDUpdateAction": "New", "MDEntryType": "Offer"}  # fmt: skip
    beside = [{"OrderID": 4, "MDDisplayQty": 1, "ReferenceID": 1, "OrderUpdateAction": "New"},
              {"OrderID": 1, "MDDisplayQty": 2, "ReferenceID": 1, "OrderUpdateAction": "Delete"},
              {"OrderID": 9, "ReferenceID": 2, "OrderUpdateAction": "New"}]  # fmt: skip
    messages = [encoder.encode("SnapshotFullRefreshOrderBook53", {**head, "CurrentChunk": i + 1, "NoMDEntries": chunk})
                for i, chunk in enumerate(chunks)]  # fmt: skip
    messages.append(encoder.encode("MDIncrementalRefreshBook46", {"TransactTime": 1, "MatchEventIndicator": [], "NoMDEntries": [level],
                                                                  "NoOrderIDEntries": beside}))  # fmt: skip
    twin = sbe_twin.Twin(spec)
    rows = [row for message in messages for row in twin.events(message)]
    assert [(row[0], row[2], row[4] // 10**9, row[5], row[6]) for row in rows[1:]] == [
        (Kind.CLEAR, 2, 0, 0, 0), (Kind.ADD, 0, 10, 3, 1), (Kind.ADD, 0, 10, 3, 2), (Kind.ADD, 1, 11, 3, 3),
        (Kind.ADD, 1, 12, 1, 4), (Kind.DELETE, 2, 0, 0, 1),
    ]  # fmt: skip
    assert twin.malformed == {"bad_field": 1}  # an order of an entry that is not there


@need_data
@pytest.mark.parametrize("path", CME_AB, ids=lambda path: path.stem)
def test_cme_lines_a_and_b(path: Path) -> None:
    events, feed, table, messages = packets_of("cme_mdp3", CME_XML, [path])
    counted = D.arbitration(feed)
    assert counted["duplicates"] * 2 == counted["packets"]
    twin = sbe_twin.Twin(venue("cme_mdp3", CME_XML)[0])
    wanted = [row for message in messages for row in twin.events(message)]
    assert [row for row in rows_of(events, table) if row[0] != Kind.GAP] == wanted
    assert not D.malformed(feed)


@need_data
@pytest.mark.parametrize("path", CME_AB, ids=lambda path: path.stem)
def test_cme_replay_to_books(path: Path) -> None:
    text = f"""
[cluster]
name = "t"
[data_sources.cme]
type = "pcap"
path = ["{path}"]
data_format = "sbe:{CME_XML}"
"""
    summary = replay(parse_config(text), [path])
    assert summary["malformed"] == summary["refused"] == {}
    assert summary["duplicates"] > 50
    assert summary["events"]["bbo"] > 20
    books = [book for book in summary["instruments"].values() if book["bids"] and book["asks"]]
    assert len(books) >= 3
    for book in books:
        bids, asks = ([float(level[0]) for level in book[side]] for side in ("bids", "asks"))
        assert bids == sorted(bids, reverse=True)
        assert asks == sorted(asks)
        assert len(bids) <= 10


@need_data
def test_cme_definition_snapshot_and_reset() -> None:
    spec, framing, decoder = venue("cme_mdp3", CME_XML)
    encoder = Encoder(spec.schema, ["SnapshotFullRefresh52", "ChannelReset4", "MDIncrementalRefreshBook46"])
    level = lambda kind, position, price, **more: {"MDEntryPx": {"mantissa": price * 10**9}, "MDEntrySize": 3, "NumberOfOrders": 2,  # noqa: E731
                                                   "MDPriceLevel": position, "MDEntryType": kind, **more}  # fmt: skip
    snapshot = encoder.encode("SnapshotFullRefresh52", {
        "LastMsgSeqNumProcessed": 1, "TotNumReports": 1, "SecurityID": 42, "RptSeq": 1, "TransactTime": 10**18, "LastUpdateTime": 1,
        "MDSecurityTradingStatus": "ReadyToTrade",
        "NoMDEntries": [level("Bid", 1, 100), level("Bid", 2, 99), level("Offer", 1, 101), level("ImpliedBid", 1, 98),
                        level("OpenPrice", None, 5)],
    })  # fmt: skip
    book = encoder.encode("MDIncrementalRefreshBook46", {
        "TransactTime": 10**18, "MatchEventIndicator": [],
        "NoMDEntries": [level("Bid", 1, 102, SecurityID=42, RptSeq=1, MDUpdateAction="New"), level("Bid", 3, 99, SecurityID=42, RptSeq=2,
                                                                                                  MDUpdateAction="Delete")],
    })  # fmt: skip
    reset = encoder.encode("ChannelReset4", {"TransactTime": 1, "MatchEventIndicator": ["EndOfEvent"], "NoMDEntries": [{"ApplID": 310}]})
    table = InstrumentTable(16)
    feed, out = D.make_feed(spec, table, framing=framing), np.zeros(64, EVENT)
    rows = []
    for number, message in enumerate((snapshot, book, reset), 1):
        packet = struct.pack("<IQ", number, 0) + struct.pack("<H", len(message) + 2) + message
        packets = np.zeros(1, PACKET)
        packets["length"] = len(packet)
        at, n = decoder.decode_packets(image(packet), packets, 0, 1, feed, out)
        assert at == 1
        rows += [(row[0], row[1], row[2], row[4] // 10**9, row[5], row[7]) for row in rows_of(list(out[:n]), table)]
    assert rows == [
        (Kind.REFERENCE, "#42", 0, 0, 0, 0), (Kind.STATUS, "#42", 2, 0, 0, 1), (Kind.CLEAR, "#42", 2, 0, 0, 0),
        (Kind.LEVEL, "#42", 0, 100, 3, 2), (Kind.LEVEL, "#42", 0, 99, 3, 2), (Kind.LEVEL, "#42", 1, 101, 3, 2),
        (Kind.REFERENCE, "#42.I", 0, 0, 0, 0), (Kind.LEVEL, "#42.I", 0, 98, 3, 2),
        (Kind.LEVEL, "#42", 0, 102, 3, 2), (Kind.LEVEL, "#42", 0, 99, 0, 0),
        (Kind.CLEAR, ALL_INSTRUMENTS, 2, 0, 0, 1),
    ]  # fmt: skip
    assert (feed.ladders == NO_PRICE).all()


B3 = sorted((DATA / "omi_pcaps/B3").glob("BinaryUmdf*/*.pcap"))


@need_data
def test_b3_captures() -> None:
    spec = venue("b3_umdf", B3_XML)[0]
    events, feed, table, _ = packets_of("b3_umdf", B3_XML, [path for path in B3 if "v1.8" in str(path)])
    assert D.malformed(feed) == {"unknown_message": 1}  # template 12 came with a newer schema
    counted = D.arbitration(feed)
    assert (counted["heartbeats"], counted["gaps"], counted["expected"]) == (1, 1, 0x00012D44)  # the heartbeat tells what comes next
    assert [(int(e["kind"]), int(e["id"]), int(e["aux"])) for e in events] == [(Kind.GAP, 7, 0x00012D43)]
    events, feed, table, messages = packets_of("b3_umdf", B3_XML, [next(path for path in B3 if path.stem == "SecurityStatus")])
    twin = sbe_twin.Twin(spec)
    assert rows_of(events, table) == [row for message in messages for row in twin.events(message)]
    assert D.message_counts(feed, spec) == {"SecurityStatus_3": 1}


@need_data
def test_binance_depth() -> None:
    spec, framing, decoder = venue("binance_fix_sbe", BINANCE_XML)
    encoder = Encoder(spec.schema, ["MarketDataIncrementalDepth", "MarketDataIncrementalTrade"])
    head = {"FirstBookUpdateID": 1, "LastBookUpdateID": 2, "PriceExponent": -2, "QtyExponent": -5}
    side = lambda *levels: [{"MDEntryPx": price, "MDEntrySize": qty} for price, qty in levels]  # noqa: E731
    depth = encoder.encode("MarketDataIncrementalDepth", {**head, "MDEntriesBids": side((6500012, 100), (6500011, None)),
                                                          "MDEntriesAsks": side((6500013, 7)), "Symbol": "BTCUSDT"})  # fmt: skip
    trade = encoder.encode("MarketDataIncrementalTrade", {
        "TransactTime": 1_700_000_000_000_001, "PriceExponent": -2, "QtyExponent": -9, "Symbol": "BTCUSDT",
        "MDEntries": [{"TradeID": 9, "MDEntryPx": 6500012, "MDEntrySize": 10, "AggressorSide": "Sell"},
                      {"TradeID": 9, "MDEntryPx": 1, "MDEntrySize": 1}],
    })  # fmt: skip
    raw = b"".join(struct.pack("<IH", len(message) + 6, 0xEB50) + message for message in (depth, trade))
    table = InstrumentTable(16)
    feed, out = D.make_feed(spec, table, framing=framing), np.zeros(64, EVENT)
    pos, n = decoder.decode_stream(image(raw), 0, len(raw), 0, feed, out)
    assert pos == len(raw)
    assert rows_of(list(out[:n]), table) == [
        [Kind.REFERENCE, "BTCUSDT", 0, 0, 10, 0, 0, 0],
        [Kind.LEVEL, "BTCUSDT", 0, Flag.MORE, 65000_120_000_000, 100_000, 0, 0],
        [Kind.LEVEL, "BTCUSDT", 0, Flag.MORE, 65000_110_000_000, 0, 0, 0],
        [Kind.LEVEL, "BTCUSDT", 1, 0, 65000_130_000_000, 7_000, 0, 0],
        [Kind.TRADE, "BTCUSDT", 1, 0, 65000_120_000_000, 1, 9, 0],
    ]  # fmt: skip
    assert out[n - 1]["ts_event"] == 1_700_000_000_000_001_000
    assert D.malformed(feed) == {"price_overflow": 1}  # 1e-9 of a coin does not fit eight decimals


@need_data
def test_shipped_mappings_fit_the_schemas() -> None:
    for name, xml in (("cme_mdp3", CME_XML), ("cme_mdp3_mbo", CME_XML), ("b3_umdf", B3_XML), ("binance_fix_sbe", BINANCE_XML),
                      ("binance_spot", SCHEMAS / "binance_spot_3_0.xml"), ("sbe", SCHEMAS / "binance_spot_3_5.xml")):  # fmt: skip
        spec = load_spec(f"{name}:{xml}")
        json.dumps(spec.counters)
        compile(D.decoder_source(spec, load_framing(getattr(spec, "framing", ""))), "decoder", "exec")
