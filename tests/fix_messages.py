"""FIX messages for tests: one by one from text, and arbitrary ones, good and damaged, for hypothesis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tickmesh.control.config import Source, parse_config
from tickmesh.node.event import EVENT, EventArray
from tickmesh.node.fix_feed import FixFeed
from tickmesh.node.instruments import InstrumentTable

CORPUS = Path(__file__).parent / "corpus" / "fix"
HEAD = "49=VENUE|56=ME|52=20260102-10:00:00.123456"
TICK, EXPONENT = 10_000_000, 2


def message(body: str | bytes, begin: str = "FIX.4.4") -> bytes:
    """A whole message; ``|`` stands for the separator in a text."""
    raw = body.replace("|", "\x01").encode("latin-1") if isinstance(body, str) else body
    raw = raw if raw.endswith(b"\x01") else raw + b"\x01"
    framed = f"8={begin}\x019={len(raw)}\x01".encode() + raw
    return framed + b"10=%03d\x01" % (sum(framed) % 256)


def of_type(kind: str, seq: int, body: str = "", head: str = HEAD) -> bytes:
    """A message of a type, with a header."""
    return message(f"35={kind}|34={seq}|{head}|{body}".rstrip("|"))


def options_of(data_format: str = "fix44", body: str = "tick_size = 0.01\nquantity_exponent = 2\n") -> Source:
    """A FIX source's options."""
    text = f'[data_sources.s]\ntype = "file"\npath = "x"\ndata_format = "{data_format}"\n{body}'
    return parse_config(text).data_sources["s"]


def feed_of(options: Source | None = None, capacity: int = 64) -> FixFeed:
    """A feed with a table of its own."""
    return FixFeed(options or options_of(), InstrumentTable(capacity))


def read_all(feed: FixFeed, chunks: list[bytes], room: int = 4096, end: bool = True) -> EventArray:
    """Events of a stream that comes in these chunks."""
    out, parts = np.zeros(room, EVENT), [np.zeros(0, EVENT)]
    for chunk in chunks:
        feed.append(chunk)
        while count := feed.read(out):
            parts.append(out[:count].copy())
    if end:
        feed.end()
        while count := feed.read(out):
            parts.append(out[:count].copy())
    return np.concatenate(parts)


def rows_of(events: EventArray) -> list[tuple[Any, ...]]:
    """Events as tuples of Python's numbers."""
    return [tuple(event) for event in events.tolist()]


# ---------------------------------------------------------------- arbitrary ones

_digits = st.text("0123456789", min_size=0, max_size=12)
NUMBERS = st.one_of(
    st.sampled_from(["1", "100", "0", "10.25", "-3.5", ".5", "1.", "99.123456789", "0.0000000001", "9223372036.854775807", "1e5", "x", "",
                     "-", "9223372037", "00012.5000000000000", "123456789012345678901"]),
    st.tuples(_digits, _digits).map(lambda pair: f"{pair[0]}.{pair[1]}"),
    st.integers(-(10**10), 10**10).map(str),
)  # fmt: skip
TIMES = st.sampled_from(
    ["20260102-10:00:00", "20260102-10:00:00.5", "20260102-23:59:60.123456789", "20260229-00:00:00", "20240229-24:00:00",
     "20240229-00:00:00.", "20260102-10:00:00.1234567890", "20260102-10:00:00.12345678912", "2026-01-02", "", "20261302-10:00:00.123"]
)  # fmt: skip
SYMBOLS = st.sampled_from(["ABC", "A", "LONGSYMBOL1234567890", "EIGHTCHR", "A B", "", "X" * 25, "ESZ6", "EUR/USD"])
IDS = st.one_of(st.integers(0, 10**19).map(str), st.text("ABC0189-", max_size=20))
_one = st.sampled_from(["0", "1", "2", "J", "4", "8", "", "10", "3"])
_VALUES: dict[int, st.SearchStrategy[str]] = {
    55: SYMBOLS, 270: NUMBERS, 271: NUMBERS, 269: _one, 279: st.sampled_from(["0", "1", "2", "3", ""]), 346: NUMBERS, 278: IDS, 280: IDS,
    272: st.sampled_from(["20260102", "20260231", "2026010", ""]), 273: st.sampled_from(["10:00:01.5", "10:00:01", "25:00:00", "1"]),
    54: st.sampled_from(["1", "2", "5", "9", ""]), 31: NUMBERS, 32: NUMBERS, 17: IDS, 37: IDS, 19: IDS, 60: TIMES,
    150: st.sampled_from(["F", "H", "1", "2", "0", "FF"]), 20: st.sampled_from(["0", "1", "2"]),
    326: st.sampled_from(["2", "17", "99", "x", "-1"]),
    969: NUMBERS, 132: NUMBERS, 133: NUMBERS, 134: NUMBERS, 135: NUMBERS, 571: IDS, 572: IDS, 487: st.sampled_from(["0", "1", "2"]),
    58: st.text("abc =8", max_size=70), 22: st.just("8"), 1023: st.just("1"), 5001: IDS, 20001: IDS, 70001: IDS, 95: st.just("3"),
}  # fmt: skip
_BODIES = {"8": (55, 54, 31, 32, 17, 37, 60, 150, 20, 19, 58), "f": (55, 326, 60, 58), "d": (55, 969, 5001),
           "S": (55, 132, 133, 134, 135, 60),
           "AE": (55, 31, 32, 571, 487, 572), "0": (), "B": (58, 20001, 70001), "V": (55,)}  # fmt: skip
_ENTRIES = {"W": (270, 271, 272, 273, 346, 54, 278, 58), "X": (269, 55, 270, 271, 346, 272, 273, 278, 280, 22, 1023, 54), "y": (969, 58)}
_LEADS = {"W": (268, 269), "X": (268, 279), "y": (146, 55)}


@st.composite
def bodies(draw: st.DrawFn, seq: int) -> bytes:
    """Body of a message with sequence `seq`, mostly sensible."""
    kind = draw(st.sampled_from(["X", "X", "X", "W", "W", *_BODIES, "y", "4", "A"]))
    sender = draw(st.sampled_from(["VENUE", "VENUE", "VENUE", "ALONGERSENDERNAME", "ME"]))
    seq = draw(st.sampled_from([seq] * 12 + [seq + 3, 1]))
    fields = [(35, kind), (49, sender), (34, str(seq)), (52, draw(st.one_of(st.just("20260102-10:00:00.123"), TIMES)))]
    if draw(st.integers(0, 9)) == 0:
        fields.append((43, draw(st.sampled_from("YN"))))
        if draw(st.booleans()):
            fields.append((122, draw(TIMES)))
    if kind == "4":
        fields += [(123, draw(st.sampled_from("YYN"))), (36, str(max(1, seq + draw(st.sampled_from([2, 2, 0, -3])))))]
    if kind in ("W", "X") and draw(st.booleans()):
        fields.append((55, draw(SYMBOLS)))
    if kind in _ENTRIES:
        count, lead = _LEADS[kind]
        entries = draw(st.lists(_entry(kind, lead), max_size=6))
        told = len(entries) + draw(st.sampled_from([0] * 12 + [1, -1, 4_000_000_000]))
        fields += [(count, str(told)), *(pair for entry in entries for pair in entry)]
    else:
        for tag in draw(st.permutations(_BODIES.get(kind, ()))):
            if draw(st.integers(0, 5)):
                fields.append((tag, draw(_VALUES[tag])))
    raw = b"".join(f"{tag}={value}\x01".encode("latin-1") for tag, value in fields)
    if draw(st.integers(0, 6)) == 0:
        data = draw(st.binary(max_size=40))
        raw += b"95=%d\x0196=%s\x01" % (len(data) + draw(st.sampled_from([0, 0, 0, 1])), data)
    return raw


@st.composite
def _entry(draw: st.DrawFn, kind: str, lead: int) -> list[tuple[int, str]]:
    tags = [tag for tag in draw(st.permutations(_ENTRIES[kind])) if draw(st.integers(0, 4))]
    return [(lead, draw(_VALUES[lead])), *((tag, draw(_VALUES[tag])) for tag in tags)]


_NOISE = [b"\n", b"\r\n", b"20260102-10:00:00 : ", b"\x01junk\x01", b"8=FIX.9", b"8=FIX.4.4\x019=99999\x01"]
_BETWEEN = st.sampled_from([b""] * 6 + _NOISE)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Some messages, perhaps with noise between them and damage in them."""
    out = bytearray()
    for seq in range(1, draw(st.integers(2, 8))):
        out += message(draw(bodies(seq)))
        out += draw(_BETWEEN)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(out) - 1))
        out[at] = draw(st.sampled_from(b"\x01=089X"))
    cut = draw(st.sampled_from([0] * 5 + [1, 5, 30]))
    return bytes(out[: len(out) - cut])
