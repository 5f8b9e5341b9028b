"""Messages out of byte chunks, for sessions and tools."""

from __future__ import annotations

from collections import Counter

import pytest
from fix_messages import HEAD, message, of_type, streams
from fix_twin import frame
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.fix_frame import BODY_BYTES_MAX, MessageStream

FIRST = message(f"35=0|34=1|{HEAD}")
DATA = message(b"35=B\x0134=2\x0195=9\x0196=a\x01b=\x0110=0\x0158=x\x01", "FIXT.1.1")


def all_of(chunks: list[bytes]) -> tuple[list[bytes], Counter[str]]:
    stream = MessageStream()
    found = [found.raw for chunk in chunks for found in stream.feed(chunk)]
    return [*found, *(last.raw for last in stream.end())], stream.malformed


def test_fields_with_data() -> None:
    stream = MessageStream()
    (found,) = stream.feed(DATA)
    assert found.type == "B"
    assert found.fields[0] == (8, b"FIXT.1.1")
    assert found.fields[2:-1] == ((35, b"B"), (34, b"2"), (95, b"9"), (96, b"a\x01b=\x0110=0"), (58, b"x"))
    assert (found.get(58), found.get(59)) == (b"x", None)


def test_groups() -> None:
    (found,) = MessageStream().feed(of_type("X", 1, "268=2|279=0|269=0|270=1|279=2|269=1"))
    assert found.group(268, 279) == [[(279, b"0"), (269, b"0"), (270, b"1")], [(279, b"2"), (269, b"1")]]
    assert found.group(555, 600) == []


@pytest.mark.parametrize(
    ("between", "malformed"),
    [
        (b"", {}), (b"\r\n", {}), (b"noise", {"garbage": 1}), (FIRST[:-3], {"bad_checksum": 1}), (FIRST[:40], {"bad_body_length": 1}),
        (b"8=FIX.4.4\x019=x\x01", {"bad_body_length": 1}), (b"8=FIX.4.4\x0135=0\x01", {"bad_header": 1}),
        (b"8=FIX.4.4\x019=%d\x01" % (BODY_BYTES_MAX + 1), {"bad_body_length": 1}), (b"8=FIX.4.4\x019=9999\x0135=", {"truncated": 1}),
        (message("35=0|x=1"), {"bad_field": 1}), (message("35=0|95=99|96=a"), {"bad_field": 1}),
    ],
)  # fmt: skip
def test_after_a_fault_it_goes_on(between: bytes, malformed: dict[str, int]) -> None:
    data = FIRST + between + DATA
    for chunks in ([data], [data[k : k + 1] for k in range(len(data))]):
        found, reasons = all_of(chunks)
        assert (found[0], found[-1], len(found)) == (FIRST, DATA, 2)
        assert dict(reasons) == malformed


@settings(max_examples=60, deadline=None)
@given(streams(), st.integers(1, 200))
def test_any_chunks_give_the_same_messages(data: bytes, size: int) -> None:
    whole, reasons = all_of([data])
    pieces, again = all_of([data[k : k + size] for k in range(0, len(data), size)])
    assert whole == pieces
    assert {**reasons, "garbage": 0} == {**again, "garbage": 0}
    for raw in whole:
        assert frame(raw, 0) == ("", len(raw))


def test_a_chunk_larger_than_the_buffer() -> None:
    stream = MessageStream(buffer_bytes=4096)
    assert len(list(stream.feed(FIRST * 200))) == 200
