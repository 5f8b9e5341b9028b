"""Values of FIX fields against Python's own exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fix_twin
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tickmesh.node.fix_text import BAD_TIME, NOT_A_NUMBER, TOO_LARGE, TOO_PRECISE, identity, price, quantity, timestamp, whole_number
from tickmesh.transports.byte_masks import SLACK_BYTES, _put_places_by_bits, byte_sum, find_all
from tickmesh.transports.toolbox import loop

PROBLEMS = {NOT_A_NUMBER: "bad_number", TOO_PRECISE: "too_precise", TOO_LARGE: "number_too_large", BAD_TIME: "bad_time"}
TEXTS = st.one_of(
    st.from_regex(r"-?[0-9]{0,12}\.?[0-9]{0,12}", fullmatch=True), st.text("0123456789.-+e:\x00/", max_size=24), st.integers().map(str)
)
TIMES = st.one_of(
    st.datetimes(min_value=fix_twin.datetime.datetime(1970, 1, 1), max_value=fix_twin.datetime.datetime(2200, 12, 31)).map(
        lambda t: t.strftime("%Y%m%d-%H:%M:%S.%f")
    ),
    st.from_regex(r"(19|20)[0-9]{2}[01][0-9][0-3][0-9]-[0-2][0-9]:[0-6][0-9]:[0-6][0-9](\.[0-9]{0,13})?", fullmatch=True),
    st.text("0123456789-:.", max_size=30),
)


@loop
def _values(buf: Any, end: Any, decimals: Any, cache: Any, out: Any) -> Any:
    first = np.int64(1)
    out[0], out[1] = price(buf, first, np.int64(end))
    out[2], out[3] = quantity(buf, first, np.int64(end), np.int64(decimals))
    out[4], out[5] = whole_number(buf, first, np.int64(end))
    out[6], out[7] = timestamp(buf, first, np.int64(end), cache)
    out[8] = np.int64(identity(buf, first, np.int64(end)))


@loop
def _places(mask: Any, places: Any) -> Any:
    _put_places_by_bits(np.uint64(mask), np.int64(0), places, np.int64(0))


@loop
def _bytes(buf: Any, first: Any, end: Any, byte: Any, places: Any, out: Any) -> Any:
    out[0] = np.int64(byte_sum(buf, first, end - first))
    out[1] = find_all(buf, first, end, np.uint8(byte), places, np.int64(0))


def values(text: bytes, decimals: int = 3, cache: Any = None) -> list[Any]:
    """What each reader makes of a text that stands between digits: values and problems by turns."""
    buf = np.frombuffer(b"7" + text + b"9" * SLACK_BYTES, np.uint8)
    out = np.zeros(9, np.int64)
    _values(buf, 1 + len(text), decimals, np.zeros(2, np.int64) if cache is None else cache, out)
    return out.tolist()


def expected(read: Callable[[bytes], int], text: bytes) -> tuple[int | None, str | None]:
    try:
        return read(text), None
    except fix_twin.Bad as error:
        return None, str(error)


def same(value: int, problem: int, wanted: tuple[int | None, str | None]) -> bool:
    return (value, None) == wanted if problem == 0 else PROBLEMS[problem] == wanted[1]


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.integers(0, 18))
@example("9223372036.854775807", 9)
@example("-9223372036.854775808", 9)
@example("99999999", 18)
@example("00000000000000000000001.500000000000000000000", 1)
def test_numbers(text: str, decimals: int) -> None:
    raw = text.encode("latin-1")
    found = values(raw, decimals)
    assert same(found[0], found[1], expected(lambda t: fix_twin.decimal(t, 9), raw))
    assert same(found[2], found[3], expected(lambda t: fix_twin.decimal(t, decimals), raw))
    assert same(found[4], found[5], expected(fix_twin.whole, raw))
    assert found[8] == fix_twin.identity(raw)


@settings(max_examples=400, deadline=None)
@given(st.lists(TIMES, min_size=1, max_size=3))
@example(["20240229-23:59:60.123456789", "20230229-00:00:00", "20240229-00:00:00"])
def test_times(texts: list[str]) -> None:
    cache = np.zeros(2, np.int64)  # one date after the other: the cache must not lend its value
    for text in texts:
        raw = text.encode()
        found = values(raw, 0, cache)
        assert same(found[6], found[7], expected(fix_twin.timestamp, raw)), text


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 70), st.sampled_from([1, 0, 255]))
def test_sums_and_places(data: bytes, first: int, byte: int) -> None:
    first = min(first, len(data))
    buf, out, places = np.frombuffer(data + bytes([byte]) * SLACK_BYTES, np.uint8), np.zeros(2, np.int64), np.zeros(400, np.int32)
    _bytes(buf, first, len(data), byte, places, out)
    assert out[0] == sum(data[first:]) % 256
    assert places[: out[1]].tolist() == [k for k in range(first, len(data)) if data[k] == byte]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, (1 << 64) - 1))
@example((1 << 64) - 1)
@example(0)
def test_places_without_a_compressing_processor(mask: int) -> None:
    places = np.zeros(160, np.int32)
    _places(np.uint64(mask), places)
    wanted = [k for k in range(64) if mask >> k & 1]
    assert places[: len(wanted)].tolist() == wanted
