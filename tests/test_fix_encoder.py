"""FIX messages out: what is written is what other readers read."""

from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import pytest
from fix_twin import frame
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.fix_encoder import EncodeError, Encoder
from tickmesh.node.fix_frame import MessageStream

ENCODER = Encoder("FIX.4.4")
TAGS = st.one_of(st.sampled_from([1, 11, 37, 38, 44, 55, 58, 60, 108, 269]), st.integers(5_002, 99_999))  # none that announces data
TEXTS = st.text(st.characters(min_codepoint=2, max_codepoint=255), min_size=1, max_size=40)
FIELDS = st.one_of(
    st.tuples(st.just("text"), TAGS, TEXTS),
    st.tuples(st.just("number"), TAGS, st.integers(-(1 << 63), (1 << 63) - 1)),
    st.tuples(st.just("decimal"), TAGS, st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 18)),
    st.tuples(st.just("time"), TAGS, st.integers(0, 9_000_000_000 * 10**9), st.sampled_from([0, 3, 6, 9])),
    st.tuples(st.just("data"), st.just(95), st.just(96), st.binary(min_size=1, max_size=60)),
)


def plain(field: tuple[Any, ...]) -> list[tuple[int, bytes]]:
    """What a field must be on the wire, made without our code."""
    kind, tag, value, *more = field
    if kind == "data":
        return [(tag, b"%d" % len(more[0])), (value, more[0])]
    if kind == "decimal":
        text = format(Decimal(value).scaleb(-more[0]), "f")
        return [(tag, (text.rstrip("0").rstrip(".") if "." in text else text).replace("-0", "-0").encode())]
    if kind == "time":
        moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=value // 10**9)
        fraction = f".{value % 10**9:09d}"[: more[0] + 1] if more[0] else ""
        return [(tag, (moment.strftime("%Y%m%d-%H:%M:%S") + fraction).encode())]
    return [(tag, value.encode("latin-1") if kind == "text" else str(value).encode())]


def encoded(fields: list[tuple[Any, ...]], kind: str = "D") -> bytes:
    ENCODER.begin(kind)
    for name, *arguments in fields:
        getattr(ENCODER, name)(*arguments)
    return bytes(ENCODER.finish())


@settings(max_examples=200, deadline=None)
@given(st.lists(FIELDS, max_size=20))
def test_a_plain_reader_and_ours_read_it_back(fields: list[tuple[Any, ...]]) -> None:
    raw = encoded(fields)
    assert frame(raw, 0) == ("", len(raw))
    wanted = [(35, b"D"), *(pair for field in fields for pair in plain(field))]
    body = b"".join(b"%d=%s\x01" % pair for pair in wanted)
    assert raw[raw.index(b"\x0135=") + 1 : -7] == body
    (found,) = MessageStream().feed(raw)
    assert list(found.fields[2:-1]) == wanted


@settings(max_examples=100, deadline=None)
@given(st.lists(FIELDS.filter(lambda f: f[0] != "data"), max_size=12))
def test_simplefix_reads_the_same(fields: list[tuple[Any, ...]]) -> None:
    simplefix = pytest.importorskip("simplefix")
    raw = encoded(fields)
    parser = simplefix.FixParser()
    parser.append_buffer(raw)
    found = parser.get_message()
    assert [(int(tag), value) for tag, value in found.pairs][2:-1] == [(35, b"D"), *(pair for f in fields for pair in plain(f))]
    theirs = simplefix.FixMessage()
    theirs.append_pair(8, "FIX.4.4")
    for tag, value in found.pairs[2:-1]:
        theirs.append_pair(tag, value)
    assert theirs.encode() == raw


def test_quickfix_takes_it_and_we_take_what_it_writes() -> None:
    fix = pytest.importorskip("quickfix")
    raw = encoded([("text", 49, "ME"), ("text", 56, "YOU"), ("number", 34, 7), ("time", 52, 1_767_348_000_123_456_789, 3),
                   ("decimal", 44, 10_250_000_000, 9), ("text", 55, "ABC")])  # fmt: skip
    theirs = fix.Message(raw.decode("latin-1"), True)  # it verifies length and checksum
    assert theirs.getField(44) == "10.25"
    assert theirs.getHeader().getField(52) == "20260102-10:00:00.123"
    (found,) = MessageStream().feed(theirs.toString().encode("latin-1"))
    assert dict(found.fields)[44] == b"10.25"


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (("text", 58, "a\x01b"), "separator"), (("text", 58, ""), "empty"), (("data", 95, 96, b""), "empty"), (("text", 9, "1"), "no tag"),
        (("text", 10_000_000, "1"), "no tag"), (("data", 0, 96, b"x"), "no tag"), (("time", 60, -1), "out of range"),
        (("time", 60, 0, 5), "out of range"), (("decimal", 44, 1, 19), "out of range"), (("number", 38, 1 << 63), "out of range"),
        (("text", 58, "€"), "Latin-1"), (("text", 58, "x" * 65_536), "does not fit"), (("text", 58, "x" * 65_500), "does not fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(field: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(EncodeError, match=reason) as caught:
        encoded([("text", 49, "ME"), field, *([("text", 60, "y" * 200)] if len(str(field)) > 65_000 else [])])
    assert caught.value.tag in (field[1], field[2], 60)
    assert frame(encoded([]), 0)[0] == ""  # and the next message is as if nothing had been


def test_many_fields_and_the_limit() -> None:
    small = Encoder("FIXT.1.1", size_bytes=256, fields_max=4)
    small.begin("0")
    for tag in (49, 56, 34):
        small.number(tag, 1)
    with pytest.raises(EncodeError, match="does not fit"):
        small.number(52, 1)
    assert bytes(small.finish()).startswith(b"8=FIXT.1.1\x019=20\x0135=0\x01")
    with pytest.raises(ValueError, match="BeginString"):
        Encoder("")
