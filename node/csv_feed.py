"""CSV recordings: LOBSTER order messages, and any other CSV by a field mapping, to events.

LOBSTER (lobsterdata.com, "Output structure") gives two files: messages of one stock's best levels, and the book after each message.
Orders that rest before the first message, or beyond the levels shown, are known only by what happens to them later. So each level
that comes into view holds one **unnamed order** with the quantity that no known order explains; a message about an unknown order
takes from the unnamed order of its level. Prices and quantities of the shown levels are then exact after every message; the
number of orders and their queue places are not, for orders that were never shown arriving. Without the book file nothing is known
of such orders: their executions become plain trades, their cancellations are counted and ignored.
"""

from __future__ import annotations

import csv
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tickmesh.control.config import Refusal, Source
from tickmesh.node.event import ASK, BID, NO_SIDE, EventArray, Flag, Kind, TradingStatus
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.fields import MappingError
from tickmesh.node.fixed_point import BadNumber, fixed_point
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.json_feed import Malformed, MappedFeed
from tickmesh.transports.recording import SLACK, Problem, read_bytes

LINE_BYTES_MAX = 1 << 20
UNNAMED_ORDER = 1 << 62
"""Ids of unnamed orders start here: the price in 1e-4 times 2, plus the side, is added."""

_CHUNK_BYTES = 1 << 20
_PRICE_UNIT = 100_000
"""A LOBSTER price is in 1e-4; an event's in 1e-9."""
_DEFAULT_TICK = 10_000_000
_EMPTY_PRICE = 9_999_999_999
_MORE, _SNAPSHOT = int(Flag.MORE), int(Flag.SNAPSHOT)
_STATUS = {-1: TradingStatus.HALTED, 0: TradingStatus.QUOTE_ONLY, 1: TradingStatus.TRADING}
_NAME = re.compile(r"([^_]+)_(\d{4}-\d\d-\d\d)_.*_message_\d+")

Shard = Callable[[str], int | None]


# ---------------------------------------------------------------- generic


class CsvFeed(MappedFeed):
    """Rows of a CSV file to events by the field mapping of the configuration.

    Args:
        columns: names of the columns: the file's header row, or `columns` of the source.

    Raises:
        MappingError: the mapping cannot work, e.g. it names a column that is not there.
    """

    venue = "csv"

    def __init__(self, options: Source, table: InstrumentTable, columns: list[str], source: int = 0, shard: Shard | None = None) -> None:
        super().__init__(options, table, source, shard, columns)
        self._columns = len(columns)

    def _parse(self, payload: bytes) -> Any:
        """The cells of a row; an empty one counts as absent."""
        if len(payload) > LINE_BYTES_MAX:
            raise Malformed("too_long")
        try:
            rows = list(csv.reader([payload.decode("utf-8")], delimiter=self.options.delimiter, strict=True))
        except (UnicodeDecodeError, csv.Error):
            raise Malformed("bad_csv") from None
        if len(rows) != 1 or len(rows[0]) != self._columns:
            raise Malformed("wrong_number_of_cells")
        return [cell.strip() or None for cell in rows[0]]


def _lines(path: Path, problems: list[Problem]) -> Iterator[bytes]:
    """Lines that hold something, of a plain or compressed file; damage is noted in `problems`."""
    data = read_bytes(path, problems=problems)[:-SLACK]
    rest = b""
    for start in range(0, len(data), _CHUNK_BYTES):
        head, *lines = data[start : start + _CHUNK_BYTES].tobytes().split(b"\n")
        rest += head
        for line in lines:
            if stripped := rest.strip(b"\r"):
                yield stripped
            rest = line
    if stripped := rest.strip(b"\r"):
        yield stripped


def csv_events(
    path: Path, options: Source, table: InstrumentTable, batch: EventBatch, source: int = 0, shard: Shard | None = None
) -> Iterator[tuple[CsvFeed, EventArray]]:
    """Read a CSV file through its field mapping; each step gives the feed (for its counters) and the filled part of the batch.

    The first row is a header unless the source names its `columns`.

    Raises:
        MappingError: the mapping does not fit the file.
        RecordingTooLarge: it does not fit. Damage is counted, and what can be read is.
    """
    problems: list[Problem] = []
    lines = _lines(path, problems)
    columns = list(options.columns)
    if not columns:
        header = next(lines, b"").decode("utf-8-sig", errors="replace")
        columns = [cell.strip() for cell in next(csv.reader([header], delimiter=options.delimiter), [])]
        if not columns:
            raise MappingError([Refusal("path", f"{path} has no header row", "name the columns")])
    feed = CsvFeed(options, table, columns, source, shard)
    for line in lines:
        if batch.room < feed.events_max:
            yield feed, batch.view()
            batch.clear()
        feed.feed(line, 0, batch)
    feed.malformed.update(f"recording_{problem.kind}" for problem in problems)
    yield feed, batch.view()
    batch.clear()


# ---------------------------------------------------------------- LOBSTER


class _Side:
    """One side of the book as the messages tell it: orders, levels, and the unnamed order of each level."""

    def __init__(self, side: int) -> None:
        self.side = side
        self._sign = -1 if side == BID else 1
        self._ranks: list[int] = []
        self.levels: dict[int, int] = {}
        self.unnamed: dict[int, int] = {}

    def add(self, price: int, qty: int) -> None:
        """Change the quantity of a level; it goes at 0."""
        before = self.levels.get(price, 0)
        after = before + qty
        rank = self._sign * price
        if before <= 0 < after:
            self._ranks.insert(bisect_left(self._ranks, rank), rank)
        elif after <= 0 < before:
            del self._ranks[bisect_left(self._ranks, rank)]
        if after > 0:
            self.levels[price] = after
        else:
            self.levels.pop(price, None)

    def down_to(self, price: int) -> list[int]:
        """Prices at least as good as `price`, best first."""
        count = bisect_left(self._ranks, self._sign * price + 1)
        return [self._sign * rank for rank in self._ranks[:count]]


class LobsterFeed:
    """Decoder of LOBSTER message rows, with or without the book rows.

    Attributes:
        messages: rows by type.
        malformed: refused rows by reason.
        counters: `unknown_orders` (a message about an order that nothing is known of), `levels_revealed` (came into view),
            `levels_mismatched` (shown before and after, but not as the messages say: the files do not belong together).
        events_max: most events of one row.
    """

    events_max = 1 << 14
    _TYPES = {1: "add", 2: "cancel", 3: "delete", 4: "execute", 5: "execute_hidden", 6: "cross", 7: "halt"}

    def __init__(
        self, options: Source, table: InstrumentTable, symbol: str, source: int = 0, shard: int | None = None, midnight_ns: int = 0
    ) -> None:
        self.messages: Counter[str] = Counter()
        self.malformed: Counter[str] = Counter()
        self.counters: Counter[str] = Counter()
        tick = options.tick_size_of(symbol)
        self._symbol = symbol
        self._instrument = table.intern(symbol, source, _DEFAULT_TICK if tick is None else tick, 0, shard)
        self._record = table.record(self._instrument)
        self._midnight_ns = midnight_ns
        self._sides = (_Side(BID), _Side(ASK))
        self._orders: dict[int, tuple[int, int, int]] = {}
        self._visible: tuple[dict[int, int], dict[int, int]] | None = None

    # ---- rows

    def feed(self, message: bytes, out: EventBatch, book: bytes | None = None) -> None:
        """Append the events of one message row.

        Args:
            message: ``time,type,order,size,price,direction``.
            out: with room for :attr:`events_max`.
            book: the row of the book file that belongs to it.
        """
        try:
            ts, kind, order, size, price, direction = self._parsed(message)
            shown = None if book is None else _shown(book)
        except (BadNumber, Malformed) as error:
            self.malformed[error.reason] += 1
            return
        self.messages[self._TYPES[kind]] += 1
        if not self._record["announced"]:
            self._record["announced"] = 1
            exponent = int(self._record["qty_exponent"])
            out.append_reference(self._instrument, ts, self._symbol.encode(), int(self._record["tick_size"]), exponent)
        mark = out.count
        if self._visible is None and shown is not None:
            self._open_book(shown, (kind, order, size, price, direction), ts, out)
        self._message(kind, order, size, price, direction, ts, out)
        if shown is not None:
            self._reconcile(shown, ts, out)
            self._visible = shown
        for i in range(mark, out.count - 1):
            out.set_flags(i, int(out.events[i]["flags"]) | _MORE)

    def _parsed(self, line: bytes) -> tuple[int, int, int, int, int, int]:
        cells = line.decode("ascii", errors="replace").split(",")
        if len(cells) != 6:
            raise Malformed("wrong_number_of_cells")
        ts = fixed_point(cells[0], 9) + self._midnight_ns
        kind, order, size, price, direction = (fixed_point(cell, 0) for cell in cells[1:])
        if kind not in self._TYPES:
            raise Malformed("unknown_type")
        if direction not in (1, -1) and kind in range(1, 6):
            raise Malformed("bad_side")
        sane = 0 <= order < UNNAMED_ORDER and 0 <= size < 1 << 40 and (kind == 7 or 0 < price < _EMPTY_PRICE)
        if kind <= 6 and not sane:
            raise Malformed("out_of_range")
        if not 0 <= ts < 1 << 62 or (kind == 7 and price not in _STATUS):
            raise Malformed("out_of_range")
        return ts, kind, order, size, price, direction

    def _append(self, out: EventBatch, kind: Kind, ts: int, side: int, price: int, qty: int, id: int, aux: int = 0, flags: int = 0) -> None:
        out.append(kind, self._instrument, ts, ts, side, price * _PRICE_UNIT, qty, id, aux, flags)

    def _message(self, kind: int, order: int, size: int, price: int, direction: int, ts: int, out: EventBatch) -> None:
        side = BID if direction == 1 else ASK
        if kind == 1:
            self._add(order, side, size, price, ts, out)
        elif kind in (2, 3, 4):
            self._reduce(kind, order, side, size, price, ts, out)
        elif kind == 5:
            self._append(out, Kind.TRADE, ts, 1 - side, price, size, 0, 0, int(Flag.HIDDEN))
        elif kind == 6:
            self._append(out, Kind.TRADE, ts, NO_SIDE, price, size, 0, 0, int(Flag.AUCTION))
        else:
            self._append(out, Kind.STATUS, ts, NO_SIDE, 0, 0, 0, int(_STATUS[price]))

    def _add(self, order: int, side: int, size: int, price: int, ts: int, out: EventBatch) -> None:
        if order in self._orders or size == 0:
            self.malformed["duplicate_order" if size else "out_of_range"] += 1
            return
        self._orders[order] = (side, price, size)
        self._sides[side].add(price, size)
        self._append(out, Kind.ADD, ts, side, price, size, order)

    def _reduce(self, kind: int, order: int, side: int, size: int, price: int, ts: int, out: EventBatch) -> None:
        """Cancel, delete or execute: a known order, or the unnamed order of its level."""
        known = self._orders.get(order)
        if known is None:
            self._reduce_unnamed(kind, side, size, price, ts, out)
            return
        side, price, resting = known
        if kind == 3 or size >= resting:
            del self._orders[order]
            gone, last = resting, Kind.DELETE
        else:
            self._orders[order] = (side, price, resting - size)
            gone, last = size, Kind.CANCEL
        self._sides[side].add(price, -gone)
        self._append(out, Kind.EXECUTE if kind == 4 else last, ts, side, price, gone, order)

    def _reduce_unnamed(self, kind: int, side: int, size: int, price: int, ts: int, out: EventBatch) -> None:
        book = self._sides[side]
        resting = book.unnamed.get(price, 0)
        gone = min(size, resting)
        if gone < size:
            self.counters["unknown_orders"] += 1
            if kind == 4:
                self._append(out, Kind.TRADE, ts, 1 - side, price, size - gone, 0)
        if gone:
            kinds = (Kind.EXECUTE if kind == 4 else Kind.CANCEL, Kind.EXECUTE if kind == 4 else Kind.DELETE)
            self._set_unnamed(side, price, resting - gone, kinds[gone == resting], ts, out)

    # ---- the book rows

    def _unnamed_id(self, side: int, price: int) -> int:
        return UNNAMED_ORDER + price * 2 + side

    def _set_unnamed(self, side: int, price: int, qty: int, kind: Kind, ts: int, out: EventBatch, flags: int = 0) -> None:
        """Change the unnamed order of a level to `qty`, by an event of `kind`."""
        book = self._sides[side]
        change = qty - book.unnamed.pop(price, 0)
        if qty:
            book.unnamed[price] = qty
        book.add(price, change)
        event_qty = qty if kind in (Kind.ADD, Kind.MODIFY) else -change
        self._append(out, kind, ts, side, price, event_qty, self._unnamed_id(side, price), 0, flags)

    def _open_book(
        self, shown: tuple[dict[int, int], dict[int, int]], first: tuple[int, int, int, int, int], ts: int, out: EventBatch
    ) -> None:  # fmt: skip
        """The book before the first message: the first row with the message undone, as unnamed orders."""
        kind, _, size, price, direction = first
        before: tuple[dict[int, int], dict[int, int]] = (dict(shown[BID]), dict(shown[ASK]))
        undone = {1: -size, 2: size, 3: size, 4: size}.get(kind, 0)
        side = BID if direction == 1 else ASK
        if undone:
            before[side][price] = before[side].get(price, 0) + undone
        self._append(out, Kind.CLEAR, ts, NO_SIDE, 0, 0, 0, 0, _SNAPSHOT)
        for side in (BID, ASK):
            for level, qty in before[side].items():
                if qty > 0:
                    self._set_unnamed(side, level, qty, Kind.ADD, ts, out, _SNAPSHOT)
        self._visible = before

    def _reconcile(self, shown: tuple[dict[int, int], dict[int, int]], ts: int, out: EventBatch) -> None:
        """Make the levels of the row hold what it says; only levels that were out of view can differ."""
        for side in (BID, ASK):
            row, book = shown[side], self._sides[side]
            if not row:
                continue
            worst = min(row) if side == BID else max(row)
            for price in {*row, *book.down_to(worst)}:
                if book.levels.get(price, 0) != row.get(price, 0):
                    assert self._visible is not None
                    seen = price in self._visible[side] and price in row
                    self.counters["levels_mismatched" if seen else "levels_revealed"] += 1
                    self._set_level(side, price, row.get(price, 0), ts, out)

    def _set_level(self, side: int, price: int, qty: int, ts: int, out: EventBatch) -> None:
        """Bring a level to a quantity: grow its unnamed order, or take from that and then from the oldest known orders."""
        book = self._sides[side]
        excess = book.levels.get(price, 0) - qty
        unnamed = book.unnamed.get(price, 0)
        if excess < 0:
            self._set_unnamed(side, price, unnamed - excess, Kind.MODIFY if unnamed else Kind.ADD, ts, out)
            return
        if unnamed:
            taken = min(unnamed, excess)
            self._set_unnamed(side, price, unnamed - taken, Kind.DELETE if taken == unnamed else Kind.CANCEL, ts, out)
            excess -= taken
        for order in [o for o, (s, p, _) in self._orders.items() if s == side and p == price] if excess else []:
            if excess:
                taken = min(excess, self._orders[order][2])
                self._reduce(2, order, side, taken, price, ts, out)
                excess -= taken


def _shown(line: bytes) -> tuple[dict[int, int], dict[int, int]]:
    """A row of the book file: bids and asks, price in 1e-4 -> quantity."""
    cells = line.decode("ascii", errors="replace").split(",")
    if len(cells) % 4 or len(cells) > 4 * 1000:
        raise Malformed("wrong_number_of_cells")
    numbers = [fixed_point(cell, 0) for cell in cells]
    sides: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for i in range(0, len(numbers), 4):
        for side, at in ((ASK, i), (BID, i + 2)):
            price, qty = numbers[at], numbers[at + 1]
            if abs(price) != _EMPTY_PRICE and qty > 0:
                if not 0 < price < _EMPTY_PRICE or qty >= 1 << 40:
                    raise Malformed("out_of_range")
                sides[side][price] = qty
    return sides


def lobster_events(
    path: Path, options: Source, table: InstrumentTable, batch: EventBatch, source: int = 0, shard: Shard | None = None
) -> Iterator[tuple[LobsterFeed, EventArray]]:
    """Read a LOBSTER message file, with the book file beside it if there is one; each step gives the feed and the filled batch.

    Symbol and day come from the configuration, else from the file's name (``AAPL_2012-06-21_…_message_10.csv``); midnight is New
    York's unless the source says otherwise.

    Raises:
        MappingError: the symbol is neither configured nor in the name.
        RecordingTooLarge: a file does not fit. Damage is counted, and what can be read is.
    """
    name = _NAME.search(path.name)
    symbol = options.symbols[0] if options.symbols else name[1] if name else ""
    if not symbol:
        raise MappingError([Refusal("symbols", f"{path.name} does not tell the symbol", "name it in symbols")])
    dated = options.model_copy(
        update={
            "date": options.date or (name[2] if name else None),
            "timezone": options.timezone if "timezone" in options.model_fields_set else "America/New_York",
        }
    )
    feed = LobsterFeed(options, table, symbol, source, shard(symbol) if shard else None, dated.midnight_ns())
    problems: list[Problem] = []
    book_path = path.with_name(path.name.replace("_message_", "_orderbook_"))
    books: Iterator[bytes | None] = _lines(book_path, problems) if book_path != path and book_path.exists() else iter(())
    for line in _lines(path, problems):
        if batch.room < feed.events_max:
            yield feed, batch.view()
            batch.clear()
        feed.feed(line, batch, next(books, None))
    feed.malformed.update(f"recording_{problem.kind}" for problem in problems)
    yield feed, batch.view()
    batch.clear()
