"""Decode and full-depth book from an ITCH 5.0 image in memory: tickmesh against two books in C++ and two Python packages.

A seeded image is generated (:func:`write_image`), then every contestant rebuilds all books from it. Runs alternate; a number is the median
of thread CPU time per message over the repeats, a ratio the median of the ratios within a repeat. Before anything is timed, the books of
all contestants are compared side by side: number of levels, best price, and the sum of price times quantity.

Run it: ``python -m tickmesh.ops.bench_book``.
"""

from __future__ import annotations

import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tickmesh.node.book import FAR_AHEAD, NEAR_AHEAD, Books, counts, make_books, top
from tickmesh.node.decoder import load_decoder, make_feed
from tickmesh.node.event import EVENT
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.protocol import Framing, Spec, load_framing, load_spec
from tickmesh.node.shard import BATCH_EVENTS
from tickmesh.ops.cpp_peer import built_peers
from tickmesh.ops.itch_writer import (
    FRAME_BYTES_MAX,
    put_add,
    put_cancelled,
    put_deleted,
    put_directory,
    put_executed,
    put_replaced,
)  # fmt: skip
from tickmesh.transports.codecache import load_generated
from tickmesh.transports.toolbox import inlined, loop, zeros_aligned

Result = dict[str, Any]
Image = npt.NDArray[np.uint8]
BATCH = BATCH_EVENTS
_PREFIX = 20_000
_TARGET = 1.9
_ORDERS_PER_SYMBOL = 128
"""Resting orders on average, both sides: a million orders over the venue's 8,000 symbols."""
_ITCH_SCALE = 100_000
"""From ITCH's prices (1e-4) to events' (1e-9)."""
_S31, _S33 = np.uint64(31), np.uint64(33)

# ---------------------------------------------------------------- the image


@inlined
def _random(state: Any) -> Any:
    """Next 31 random bits (xorshift64*), i64."""
    word = state[0]
    word ^= word >> np.uint64(12)
    word ^= word << np.uint64(25)
    word ^= word >> np.uint64(27)
    state[0] = word
    return np.int64((word * np.uint64(0x2545F4914F6CDD1D)) >> _S33)


@inlined
def _distance(state: Any) -> Any:
    """Ticks from the middle: mostly near the touch, 1 in 16 far out."""
    a, b = _random(state), _random(state)
    near = min(a & 31, b & 31)
    return near + (a >> 12) % 2000 if (a >> 5) & 15 == 0 else near


@loop
def _write_flow(buf: Any, pos: Any, stocks: Any, mids: Any, live: Any, state: Any, messages: Any) -> Any:
    """45% adds, 42% deletes, 5% replaces, 6% executions, 2% partial cancels; 70% adds until the books are filled. Returns the end.

    `live`: (id, locate, side, qty) of every resting order. Half of the changes hit one of the newest 512, as short-lived orders do.
    """
    filled = stocks.size * _ORDERS_PER_SYMBOL
    count, next_id, when = np.int64(0), np.int64(1), np.int64(34_200_000_000_000)
    for _ in range(messages):
        when += 1 + (_random(state) & 2047)
        draw = _random(state) % 100
        if draw < 45 or (count < filled and draw < 70) or count < 64:
            popular = _random(state) % stocks.size
            symbol = popular if _random(state) & 1 else _random(state) % (popular + 1)
            if _random(state) & 63 == 0:
                mids[symbol] = max(3000, mids[symbol] + (_random(state) & 1) * 2 - 1)
            side, qty = _random(state) & 1, (1 + (_random(state) & 7)) * 100
            price = mids[symbol] + (1 + _distance(state)) * (2 * side - 1)
            pos = put_add(buf, pos, symbol + 1, 0, when, next_id, side, qty, stocks[symbol], price * 100)
            live[count, 0], live[count, 1], live[count, 2], live[count, 3] = next_id, symbol, side, qty
            count += 1
            next_id += 1
            continue
        recent = _random(state) & 1
        at = count - 1 - _random(state) % min(512, count) if recent else _random(state) % count
        order, symbol, side, qty = live[at, 0], live[at, 1], live[at, 2], live[at, 3]
        part = 100 if qty > 100 else qty
        gone = False
        if draw < 87:
            pos = put_deleted(buf, pos, symbol + 1, 0, when, order)
            gone = True
        elif draw < 92:
            price = mids[symbol] + (1 + _distance(state)) * (2 * side - 1)
            pos = put_replaced(buf, pos, symbol + 1, 0, when, order, next_id, qty, price * 100)
            live[at, 0] = next_id
            next_id += 1
        elif draw < 98:
            pos = put_executed(buf, pos, symbol + 1, 0, when, order, part, next_id)
            gone = part == qty
        elif part < qty:
            pos = put_cancelled(buf, pos, symbol + 1, 0, when, order, part)
        else:
            pos = put_deleted(buf, pos, symbol + 1, 0, when, order)
            gone = True
        if gone:
            count -= 1
            for field in range(4):
                live[at, field] = live[count, field]
        elif draw >= 92:
            live[at, 3] = qty - part
    return pos


@loop
def _write_directory(buf: Any, stocks: Any) -> Any:
    pos = np.int64(0)
    for i in range(stocks.size):
        pos = put_directory(buf, pos, i + 1, 0, np.int64(1), stocks[i], ord("Q"), ord("1"))
    return pos


def write_image(messages: int, symbols: int, seed: int = 1) -> tuple[Image, int]:
    """A BinaryFILE image: a directory message per symbol, then `messages` of order flow; (bytes with 64 of slack, where they end)."""
    rng = np.random.default_rng(seed)
    names = [f"S{i:<7d}".encode() for i in range(symbols)]
    stocks = np.frombuffer(b"".join(names), "<u8").copy()
    mids = rng.integers(5_000, 40_000, symbols)
    buf = np.zeros((messages + symbols) * FRAME_BYTES_MAX, np.uint8)
    state = np.array([2 * seed + 1], np.uint64)
    pos = _write_directory(buf, stocks)
    end = int(_write_flow(buf, pos, stocks, mids, np.zeros((messages + 64, 4), np.int64), state, messages))
    return buf[: end + 64].copy(), end


# ---------------------------------------------------------------- tickmesh

_LOOPS = '''\
# Decoder and books in one loop, as a shard has them, without anything else. Generated by the benchmark.
import numpy as np

from tickmesh.node.book import book_apply_planned, book_plan, book_prefetch, make_books
from tickmesh.node.event import EVENT
from tickmesh.transports.toolbox import loop
import tickmesh_generated.{decoder} as decoder_module
from tickmesh_generated.{decoder} import decode_stream


@loop
def decode(buf, pos, end, feed, batch):
    events = np.int64(0)
    while pos < end:
        pos, count = decode_stream(buf, pos, end, 0, feed, batch)
        if count == 0:
            break
        events += count
    return events


@loop
def rebuild(buf, pos, end, feed, batch, books):
    events = np.int64(0)
    while pos < end:
        pos, count = decode_stream(buf, pos, end, 0, feed, batch)
        if count == 0:
            break
        for i in range(min({far}, count)):
            book_prefetch(books, batch[np.uint64(i)])
        for i in range(min({near}, count)):
            book_plan(books, batch[np.uint64(i)], i)
        for i in range(count):
            if i + {far} < count:
                book_prefetch(books, batch[np.uint64(i + {far})])
            if i + {near} < count:
                book_plan(books, batch[np.uint64(i + {near})], i + {near})
            book_apply_planned(books, batch[np.uint64(i)], i)
        events += count
    return events


def warm():
    feed, buf, batch = decoder_module.warm(), np.zeros(64, np.uint8), np.zeros(8, EVENT)
    decode(buf, 0, 0, feed, batch)
    rebuild(buf, 0, 0, feed, batch, make_books(1))
'''


class Tickmesh:
    """Our own decoder and books; rebuilt in the same memory every time."""

    def __init__(self, symbols: int, batch: int = BATCH, far: int = FAR_AHEAD, near: int = NEAR_AHEAD) -> None:
        self.spec: Spec = load_spec("itch50")
        self.framing: Framing = load_framing("binaryfile")
        decoder: Any = load_decoder(self.spec, self.framing)
        source = _LOOPS.format(decoder=decoder.__name__.rpartition(".")[2], far=far, near=near)
        self.loops: Any = load_generated("bench_book", source)
        self.symbols = symbols
        self.batch = zeros_aligned(batch, EVENT)
        self.books = make_books(symbols)

    def _feed(self) -> Any:
        return make_feed(self.spec, InstrumentTable(self.symbols + 1), framing=self.framing)

    def decode_ns(self, image: Image, end: int) -> float:
        """Thread CPU time of decoding alone."""
        feed = self._feed()
        begun = time.thread_time_ns()
        self.loops.decode(image, 0, end, feed, self.batch)
        return time.thread_time_ns() - begun

    def book_ns(self, image: Image, end: int) -> float:
        """Thread CPU time of decoding and books, from empty books in memory that has been touched."""
        feed = self._feed()
        for part in self.books:
            if isinstance(part, np.ndarray):
                part.view(np.uint8)[:] = 0
        begun = time.thread_time_ns()
        self.loops.rebuild(image, 0, end, feed, self.batch, self.books)
        return time.thread_time_ns() - begun


def sides_of(books: Books, symbols: int) -> npt.NDArray[np.int64]:
    """(levels, best in 1e-4, sum of price times quantity) of every side, as the C++ books report it."""
    out = np.zeros((symbols, 2, 3), np.int64)
    for symbol in range(symbols):
        for side, levels in enumerate(top(books, symbol, 1 << 30)):
            if levels:
                total = sum(price // _ITCH_SCALE * qty for price, qty, _ in levels)
                out[symbol, side] = len(levels), levels[0][0] // _ITCH_SCALE, total
    return out


# ---------------------------------------------------------------- C++


class Peer:
    """One of the books in book_peer.cpp."""

    def __init__(self, library: Path, name: str, symbols: int, references: int) -> None:
        code = ctypes.CDLL(str(library))
        self._new, self._run = code[f"{name}_new"], code[f"{name}_run"]
        self._sides, self._delete = code[f"{name}_sides"], code[f"{name}_delete"]
        self._new.restype, self._run.restype = ctypes.c_void_p, ctypes.c_int64
        self.symbols, self.references = symbols, references

    def book_ns(self, image: Image, end: int) -> float:
        """Thread CPU time of decoding and books."""
        return self.rebuild(image, end)[0]

    def rebuild(self, image: Image, end: int, compare: bool = False) -> tuple[float, npt.NDArray[np.int64]]:
        """Thread CPU time, and what the books hold if asked for (see :func:`sides_of`)."""
        sides = np.zeros((self.symbols, 2, 3), np.int64)
        books = ctypes.c_void_p(self._new(ctypes.c_uint32(self.symbols), ctypes.c_uint64(self.references), ctypes.c_int64(BATCH)))
        elapsed = self._run(books, ctypes.c_void_p(image.ctypes.data), ctypes.c_int64(end))
        if compare:
            self._sides(books, ctypes.c_uint32(self.symbols), ctypes.c_void_p(sides.ctypes.data))
        self._delete(books)
        return elapsed, sides


def _peers(symbols: int, references: int) -> tuple[dict[str, Peer], dict[str, str]]:
    """The C++ books that could be built, by "name, compiler", and why others could not."""
    built, skipped = built_peers("book_peer.cpp")
    names = ("conventional", "same")
    return {f"{name}, {compiler}": Peer(path, name, symbols, references) for compiler, path in built.items() for name in names}, skipped


# ---------------------------------------------------------------- Python packages, for scale


def _frames(image: Image, end: int, limit: int) -> list[bytes]:
    data, pos = image[:end].tobytes()[: limit * FRAME_BYTES_MAX], 0
    found: list[bytes] = []
    while pos < len(data) and len(found) < limit:
        size = int.from_bytes(data[pos : pos + 2], "big")
        found.append(data[pos + 2 : pos + 2 + size])
        pos += 2 + size
    return [frame for frame in found if frame[:1] in b"ADUEX"]


def order_book_ns(image: Image, end: int, limit: int = _PREFIX) -> float:
    """ns per message of the PyPI package order-book (levels in C), driven message by message from Python.

    Raises:
        ModuleNotFoundError: the package is missing.
    """
    from order_book import OrderBook

    frames, orders = _frames(image, end, limit), dict[int, list[int]]()
    books: dict[int, Any] = {}
    begun = time.thread_time_ns()

    def change(locate: int, ask: int, price: int, delta: int) -> None:
        book = books.get(locate) or books.setdefault(locate, OrderBook())
        side = book.asks if ask else book.bids
        qty = (side[price] if price in side else 0) + delta  # noqa: SIM401  (its sides have no get)
        if qty:
            side[price] = qty
        else:
            del side[price]

    for m in frames:
        kind, reference = m[0], int.from_bytes(m[11:19], "big")
        if kind == 65:
            order = [int.from_bytes(m[1:3], "big"), m[19] == 83, int.from_bytes(m[32:36], "big"), int.from_bytes(m[20:24], "big")]
            orders[reference] = order
            change(*order)
            continue
        order = orders[reference]
        taken = int.from_bytes(m[19:23], "big") if kind in (69, 88) else order[3]
        order[3] -= taken
        change(order[0], order[1], order[2], -taken)
        if not order[3]:
            del orders[reference]
        if kind == 85:
            new = [order[0], order[1], int.from_bytes(m[31:35], "big"), int.from_bytes(m[27:31], "big")]
            orders[int.from_bytes(m[19:27], "big")] = new
            change(*new)
    return (time.thread_time_ns() - begun) / len(frames)


def itchfeed_ns(image: Image, end: int, limit: int = _PREFIX) -> float:
    """ns per message of the PyPI package itchfeed, decoding alone.

    Raises:
        ModuleNotFoundError: the package is missing.
    """
    from itch.messages import create_message  # noqa: F401  (checks the version)
    from itch.parser import MessageParser

    frames = _frames(image, end, limit)
    data = b"".join(b"\x00" + bytes([len(frame)]) + frame for frame in frames)
    parser = MessageParser()
    begun = time.thread_time_ns()
    decoded = sum(1 for _ in parser.parse_stream(data)) if hasattr(parser, "parse_stream") else 0
    if decoded != len(frames):
        raise RuntimeError(f"itchfeed decoded {decoded} of {len(frames)} messages")
    return (time.thread_time_ns() - begun) / decoded


def _python_packages(image: Image, end: int) -> tuple[dict[str, float], dict[str, str]]:
    figures: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, measure in {"order-book (PyPI)": order_book_ns, "itchfeed (PyPI), decode only": itchfeed_ns}.items():
        try:
            figures[name] = measure(image, end)
        except (ImportError, RuntimeError) as error:
            skipped[name] = str(error)
    return figures, skipped


# ---------------------------------------------------------------- the comparison


class BooksDiffer(Exception):
    """Two contestants made different books of the same messages: no number would mean anything.

    Attributes:
        peer: the contestant that differs from tickmesh.
        sides: how many sides differ.
    """

    def __init__(self, peer: str, sides: int) -> None:
        super().__init__(f"{peer} and tickmesh disagree on {sides} sides: one of them has a bug, report it")
        self.peer, self.sides = peer, sides


def _check_equal(ours: Tickmesh, peers: dict[str, Peer], image: Image, end: int) -> None:
    ours.book_ns(image, end)
    refused = {name: count for name, count in list(counts(ours.books).items())[:12] if count}
    if refused:
        raise BooksDiffer(f"refusals {refused}", 0)
    mine = sides_of(ours.books, ours.symbols)
    for name, peer in peers.items():
        differ = int(np.any(peer.rebuild(image, end, compare=True)[1] != mine, axis=2).sum())
        if differ:
            raise BooksDiffer(name, differ)


def measure(messages: int, symbols: int, repeats: int) -> Result:
    """One size: ns per message of every contestant, and how many times faster tickmesh is than each."""
    image, end = write_image(messages, symbols)
    ours = Tickmesh(symbols)
    peers, skipped = _peers(symbols, messages)
    _check_equal(ours, peers, image, end)
    runs: dict[str, Callable[[Image, int], float]] = {
        "tickmesh": ours.book_ns, "tickmesh, decode only": ours.decode_ns, **{name: peer.book_ns for name, peer in peers.items()},
    }  # fmt: skip
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in runs if repeat % 2 == 0 else reversed(runs):
            samples[name].append(runs[name](image, end) / messages)
    ratios = {n: statistics.median(x / y for x, y in zip(samples[n], samples["tickmesh"])) for n in runs if n != "tickmesh"}
    figures, missing = _python_packages(image, end)
    medians = {name: statistics.median(values) for name, values in samples.items()} | figures
    ratios |= {name: value / medians["tickmesh"] for name, value in figures.items()}
    return {"ns_per_message": medians, "ratio": ratios, "skipped": skipped | missing, "window_moves": counts(ours.books)["window_moves"]}


def bench_book(messages: int = 4_000_000, symbols: tuple[int, ...] = (400, 4_000), repeats: int = 7) -> Result:
    """Measure and compare at each number of symbols.

    Returns:
        ``{"machine", "messages", "repeats", "rows": [...], "skipped", "sizes": {symbols: {"ns_per_message": {contestant: median},
        "ratio": {contestant: contestant / tickmesh}, ...}}}``; rows are for ``tickmesh bench``.

    Raises:
        BooksDiffer: the contestants' books are not equal.
    """
    sizes = {count: measure(messages, count, repeats) for count in symbols}
    rows: list[Result] = []
    for count, size in sizes.items():
        medians = size["ns_per_message"]
        for name, ratio in size["ratio"].items():
            if name == "tickmesh, decode only":
                continue
            rows.append({
                "name": f"ITCH decode + full-depth book, {count} symbols", "unit": "ns per message", "ours": medians["tickmesh"],
                "theirs": medians[name], "peer": _peer_text(name), "ratio": ratio,
                "target": _TARGET if name == "conventional, g++" else None,
            })  # fmt: skip
    skipped = {name: why for size in sizes.values() for name, why in size["skipped"].items()}
    return {"machine": platform.platform(), "messages": messages, "repeats": repeats, "rows": rows, "skipped": skipped, "sizes": sizes}


def _peer_text(name: str) -> str:
    titles = {"conventional": "conventional C++ book", "same": "the same data layout in C++"}
    kind, _, compiler = name.partition(", ")
    return f"{titles[kind]} ({compiler})" if kind in titles else name


if __name__ == "__main__":
    arguments = [int(word) for word in sys.argv[1:]]
    given: dict[str, Any] = dict(zip(("messages", "repeats"), arguments))
    json.dump(bench_book(**given), sys.stdout, indent=2)
