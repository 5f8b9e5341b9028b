"""The event: one 64-byte record, the only currency inside a node.

Little-endian, one cache line. The header (first 32 bytes) means the same for every kind; the body (last 32 bytes) is named
by the kind's typed view::

    seq u64 | ts_event i64 ns | ts_recv i64 ns | instrument u32, kind u8, side u8, flags u16 | price i64 | qty i64 | id u64 | aux i64

Prices are fixed point in units of 1e-9. Quantities are integers in the instrument's exponent (``real = qty * 10**-exponent``).
"""

from __future__ import annotations

from decimal import Decimal
from enum import IntEnum, IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt

_HEADER = [("seq", "<u8"), ("ts_event", "<i8"), ("ts_recv", "<i8"), ("instrument", "<u4"), ("kind", "u1"), ("side", "u1"), ("flags", "<u2")]


def _view(price: str, qty: str, id: str, aux: str, aux_type: str = "<i8") -> np.dtype[Any]:
    dtype = np.dtype([*_HEADER, (price, "<i8"), (qty, "<i8"), (id, "<u8"), (aux, aux_type)])
    assert dtype.itemsize == 64
    return dtype


EVENT = _view("price", "qty", "id", "aux")
"""The plain event. Every other dtype here is a view of the same 64 bytes."""
assert EVENT.fields is not None
assert EVENT.names is not None
assert [EVENT.fields[n][1] for n in EVENT.names or ()] == [0, 8, 16, 24, 28, 29, 30, 32, 40, 48, 56]

ORDER = _view("price", "qty", "order_id", "previous_id")
TRADE = _view("price", "qty", "match_id", "order_id")
LEVEL = _view("price", "qty", "_unused", "orders")
QUOTE = _view("bid", "bid_qty", "ask_qty", "ask")
"""A venue's quote and our own BBO: an absent side has price :data:`NO_PRICE` and quantity 0."""
SIGNAL = _view("price", "qty", "calculation", "value", "<f8")
"""`calculation` = calculation index | output index << 32; `value` is a float64; `price`/`qty` are those of the event it came from."""
ALERT = _view("price", "threshold_bits", "calculation", "value", "<f8")
GAP = _view("_unused", "missing", "first", "last")
STATUS = _view("code", "detail", "reason", "previous")
RISK = _view("price", "qty", "intent", "reason")
BAR = np.dtype(
    [*_HEADER, ("open", "<i8"), ("volume", "<i8"), ("high_ticks", "<u4"), ("low_ticks", "<u4"), ("close_ticks", "<i4"), ("trades", "<u4")]
)
"""One OHLCV bar in one event: high/low/close are exact distances from `open` in the instrument's ticks (low counted downwards)."""
REFERENCE = np.dtype([*_HEADER, ("tick_size", "<i8"), ("symbol", "S24")])
"""An instrument's definition: `side` holds the quantity exponent, `tick_size` is in 1e-9. First event of every instrument in a journal."""
assert BAR.itemsize == REFERENCE.itemsize == 64

_ALL_BODIES = [
    ("price", "<i8", 32), ("bid", "<i8", 32), ("open", "<i8", 32),
    ("qty", "<i8", 40), ("bid_qty", "<i8", 40), ("volume", "<i8", 40), ("threshold", "<f8", 40),
    ("id", "<u8", 48), ("match_id", "<u8", 48), ("calculation", "<u8", 48), ("ask_qty", "<i8", 48),
    ("high_ticks", "<u4", 48), ("low_ticks", "<u4", 52),
    ("aux", "<i8", 56), ("previous_id", "<i8", 56), ("ask", "<i8", 56), ("value", "<f8", 56),
    ("close_ticks", "<i4", 56), ("trades", "<u4", 60),
]  # fmt: skip
ANY_VIEW = np.dtype(
    {
        "names": [*EVENT.names[:7], *(body[0] for body in _ALL_BODIES)],
        "formats": [*(kind for _, kind in _HEADER), *(body[1] for body in _ALL_BODIES)],
        "offsets": [*(EVENT.fields[name][1] for name in EVENT.names[:7]), *(body[2] for body in _ALL_BODIES)],
        "itemsize": 64,
    }
)
"""The views' names over the same 64 bytes at once: what calculations read and fill. `threshold` is the f64 in `threshold_bits`; names
that mean different places in different views (`order_id`, `reason`) are left out."""

EventArray = npt.NDArray[np.void]


class Kind(IntEnum):
    """What an event is. Below 64: inputs of a shard. From 64: what a shard makes of them."""

    ADD = 1
    EXECUTE = 2
    """`qty` of resting order `id` traded, at the order's price unless PRICED; `aux` = match id."""
    CANCEL = 3
    """`qty` taken off resting order `id`."""
    DELETE = 4
    REPLACE = 5
    """Order `aux` becomes order `id` with a new price and quantity (side stays)."""
    MODIFY = 6
    """Order `id` keeps its id; `price` and `qty` are new (side too, if it is 0 or 1)."""
    CLEAR = 7
    """Empty one side (side 0/1) or both (side 2); the book is no longer stale. Of a whole source: a new session of the venue, `id`."""
    LEVEL = 8
    """Set the quantity at `price` to `qty` (0 removes the level): books by level."""
    TRADE = 9
    """A trade; input: without a resting order of ours; `side` = aggressor if known, `id` = match id."""
    QUOTE = 10
    STATUS = 11
    IMBALANCE = 12
    """Auction: `price` = reference, `qty` = imbalance, `id` = paired quantity, `aux` = indicative price, `side` of the imbalance."""
    REFERENCE = 13
    SYSTEM = 14
    """Venue session message; `aux` = its code byte."""
    GAP = 15
    """Source sequence `id`..`aux` is missing; instrument = ALL_INSTRUMENTS: every book of the source is stale."""
    TIMER = 16
    """`ts_event` of source `price` has come: ends a bar that no trade ends. `aux`: see :class:`Told`."""
    CONFIG = 17
    """Configuration `id` takes effect; bit 0 of `aux` is the slot of its parameters, and with NEW_CODE another loop goes on."""
    BREAK = 18
    """Trade `id` is cancelled by the venue."""
    CODE = 19
    """The instrument's numeric code at its source is `id` (0: none), its book by position shows `aux` levels (0: not told); follows its
    REFERENCE, so that a journal knows it. Of a whole source: what comes next has at least sequence `seq`, in the venue's session `id`
    (0: the same as before)."""
    PEER_BBO = 32
    """A BBO of another shard, taken from its output stream. Of all PEER kinds `seq` is the output's sequence there."""
    PEER_TRADE = 33
    PEER_TIMER = 34
    """Another shard (`price` = its source number here, from PEERS on) has put out all of source `aux` before `ts_event`."""
    PEER_REFERENCE = 35
    """An instrument of another shard (`flags` as `price` above); `seq` is the number of its source there."""
    BBO = 64
    SIGNAL = 65
    ALERT = 66
    INTENT = 67
    """An order a calculation would like to send: side, price, qty; `id` = calculation."""
    RISK = 68
    """Decision on an intent: REFUSED flag, `aux` = :class:`RiskReason`."""
    BAR = 69


class Flag(IntFlag):
    """Bits of an event's `flags`."""

    MORE = 1
    """More events of the same venue transaction follow: no BBO is emitted before the last one."""
    SNAPSHOT = 2
    NON_PRINTABLE = 4
    """An execution that must not be counted in volume (it is printed by another message)."""
    HIDDEN = 8
    STALE = 16
    CROSSED = 32
    HALTED = 64
    LOCKED = 128
    AUCTION = 256
    PRICED = 512
    """EXECUTE: `price` is given and may differ from the order's."""
    REFUSED = 1024
    NEW_CODE = 1
    """CONFIG: other code, or other arrays, from the next event on."""
    ROUNDED = 2048
    """BAR: a price was no multiple of the tick, or too far from the open; it is rounded to what fits."""


class Told(IntEnum):
    """`aux` of a TIMER: what has told the time."""

    BY_EVENT = 0
    """The event behind it: no earlier one of its source follows."""
    BY_CLOCK = 1
    """The host's clock, in a silence: an earlier one may follow."""
    LATE = 2
    """The event behind it, after a clock had told a later time: time does not go back for what waits for timers."""


class TradingStatus(IntEnum):
    """`aux` of a STATUS event."""

    UNKNOWN = 0
    TRADING = 1
    HALTED = 2
    PAUSED = 3
    QUOTE_ONLY = 4
    PRE_OPEN = 5
    CLOSED = 6
    AUCTION = 7


class RiskReason(IntEnum):
    """`aux` of a RISK event."""

    ACCEPTED = 0
    KILL_SWITCH = 1
    MAX_QTY = 2
    MAX_NOTIONAL = 3
    PRICE_COLLAR = 4
    MAX_RATE = 5
    NO_BOOK = 6
    STALE_BOOK = 7
    BAD_INTENT = 8
    HALTED_BOOK = 9


BID, ASK, NO_SIDE = 0, 1, 2
NO_INSTRUMENT = 0xFFFFFFFF
ALL_INSTRUMENTS = 0xFFFFFFFF
NO_PRICE = -(1 << 63)
PEERS = 0xF000
"""Source numbers from here on are other shards: PEERS + shard."""
DERIVED = 0xFFFE
"""Source number of instruments that stand for a calculation over several instruments; they have its name."""
PRICE_SCALE = 1_000_000_000
PRICE_DECIMALS = 9

VIEWS: dict[Kind, np.dtype[Any]] = {
    Kind.ADD: ORDER, Kind.EXECUTE: ORDER, Kind.CANCEL: ORDER, Kind.DELETE: ORDER, Kind.REPLACE: ORDER, Kind.MODIFY: ORDER,
    Kind.LEVEL: LEVEL, Kind.TRADE: TRADE, Kind.QUOTE: QUOTE, Kind.BBO: QUOTE, Kind.STATUS: EVENT, Kind.REFERENCE: REFERENCE,
    Kind.PEER_BBO: QUOTE, Kind.PEER_TRADE: TRADE, Kind.PEER_REFERENCE: REFERENCE,
    Kind.GAP: GAP, Kind.SIGNAL: SIGNAL, Kind.ALERT: ALERT, Kind.RISK: RISK, Kind.BAR: BAR,
}  # fmt: skip


def decimal_text(value: int, decimals: int) -> str:
    """Exact decimal text of a scaled integer, without trailing zeros: ``decimal_text(61685990000000, 9) == '61685.99'``."""
    sign = "-" if value < 0 else ""
    digits = str(abs(value)).rjust(decimals + 1, "0")
    whole, fraction = (digits[:-decimals], digits[-decimals:].rstrip("0")) if decimals else (digits, "")
    return f"{sign}{whole}.{fraction}" if fraction else f"{sign}{whole}"


def price_text(price: int) -> str | None:
    """A fixed-point price as exact decimal text; ``None`` where there is no price."""
    return None if price == NO_PRICE else decimal_text(int(price), PRICE_DECIMALS)


def scaled(text: str, decimals: int) -> int:
    """Decimal text -> integer scaled by ``10**decimals``, exactly.

    Raises:
        ValueError: the text is not a number, or has more decimals than fit.
    """
    value = Decimal(text).scaleb(decimals)
    result = int(value)
    if result != value:
        raise ValueError(f"{text!r} has more than {decimals} decimals")
    return result
