"""The market simulator: seeded order flow against a price-time priority exchange, as ITCH 5.0.

Same configuration, same bytes, timestamps included: simulated time starts before 09:30 (nanoseconds since midnight) and follows the
configured message rate, never a clock. How it is cut into blocks changes nothing. ::

    simulator = Simulator(SimulatorConfig(seed=7, symbols=8, messages=100_000))
    while (block := simulator.next_block(4096))[1]:
        image, end = block          # BinaryFILE: u16 length + message, repeated; 64 bytes of slack after `end`
    simulator.truth()               # the exchange's own books, to hold a decoder and a book against

:func:`generate` and :func:`write_itch` make whole days; :mod:`tickmesh.ops.simulated_lines` sends one as MoldUDP64 over two lines.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickmesh.node.event import ASK, BID
from tickmesh.ops.itch_writer import FRAME_BYTES_MAX, code_word, stock_word
from tickmesh.ops.matching_engine import Engine, book_levels, make_engine
from tickmesh.ops.order_flow import (
    CLOCK,
    DONE,
    FLOW,
    FOREVER,
    LATEST_NS,
    TRANSACTION_SLACK,
    Market,
    messages_before_open,
    messages_least,
    run,
)

Bytes = npt.NDArray[np.uint8]

OPEN_NS = 34_200_000_000_000
"""09:30 in nanoseconds since midnight."""
SYMBOLS_MAX = 8000
RATE_MAX = 10_000_000
SLACK_BYTES = 64
MPIDS = ("TMAA", "TMBB", "TMCC", "TMDD", "TMEE", "TMFF", "TMGG", "TMHH")
_NAMES = (
    "ALFA", "BRVO", "CHRL", "DLTA", "EKKO", "FXTR", "GLFF", "HTEL", "INDY", "JULT", "KYLO", "LIMA", "MYKE",
    "NVMB", "OSKR", "PAPA", "QBEK", "ROMO", "SYRA", "TNGO", "UNFM", "VKTR", "WHSK", "XRAY", "YANK", "ZULU",
)  # fmt: skip
_SECTORS = 6
_TICK_Q16 = 65536
_MASK = (1 << 64) - 1
_BLOCK_MESSAGES = 1 << 16


class SimulatorConfigError(ValueError):
    """A simulator setting that cannot be used.

    Attributes:
        field: its name.
        value: what was given.
        expected: what to give instead.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"simulator: {field} = {value!r} cannot be used; give {expected}")
        self.field, self.value, self.expected = field, value, expected


@dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """What to simulate. Every field changes the bytes.

    Args:
        seed: any integer from 0 to 2**64 - 1.
        symbols: number of instruments, 1 to 8000.
        rate: mean messages per simulated second, 1 to 10,000,000.
        messages: length of the day in messages, exactly; None = no such limit.
        seconds: trading time after 09:30 in simulated seconds; None = no such limit. With neither the day ends after 78 hours.
        halts_per_million: trading halts per million transactions.
        breaks_per_million: broken trades per million transactions.
        halt_messages: length of a halt, in messages of the whole market.
        depth_orders: most resting orders per instrument.
        names: of the instruments, at most 8 characters each; None = fictitious ones.

    Raises:
        SimulatorConfigError: a value is out of range, or `messages` is too few for a whole day of that many symbols.
    """

    seed: int = 1
    symbols: int = 8
    rate: int = 5000
    messages: int | None = None
    seconds: float | None = None
    halts_per_million: int = 8
    breaks_per_million: int = 10
    halt_messages: int = 30_000
    depth_orders: int = 512
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check("seed", self.seed, 0, _MASK)
        _check("symbols", self.symbols, 1, SYMBOLS_MAX)
        if self.names is not None and (len(set(self.names)) != self.symbols or not all(_is_name(name) for name in self.names)):
            raise SimulatorConfigError("names", self.names, f"{self.symbols} different names of 1 to 8 printable characters without spaces")
        _check("rate", self.rate, 1, RATE_MAX)
        _check("halts_per_million", self.halts_per_million, 0, 100_000)
        _check("breaks_per_million", self.breaks_per_million, 0, 100_000)
        _check("halt_messages", self.halt_messages, 1, 10_000_000)
        _check("depth_orders", self.depth_orders, 16, 4096)
        if self.messages is not None:
            least = messages_least(self.symbols, _FILLS_MAX)
            if self.messages < least:
                raise SimulatorConfigError("messages", self.messages, f"at least {least}, a whole day of {self.symbols} symbols")
        if self.seconds is not None and not 0 < self.seconds <= 200_000:
            raise SimulatorConfigError("seconds", self.seconds, "more than 0 and at most 200000")


def _is_name(name: str) -> bool:
    return 0 < len(name) <= 8 and name.isascii() and name.isprintable() and " " not in name


_FILLS_MAX = 32


def _check(field: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SimulatorConfigError(field, value, f"an integer from {low} to {high}")


# ---------------------------------------------------------------- setting a market up (integers only)


class _Random:
    """splitmix64 in Python, for the set-up only."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def below(self, bound: int) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK
        word = self.state
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _MASK
        return ((word ^ (word >> 31)) >> 32) * bound >> 32


@functools.cache
def symbol_names(count: int) -> tuple[str, ...]:
    """The first `count` invented symbols: the same for every seed."""
    consonants, vowels = "BCDFGHJKLMNPQRSTVWXZ", "AEIOUY"
    names = dict.fromkeys(_NAMES[:count])
    k = 0
    while len(names) < count:
        k += 1
        code = k * 7919 % 48_000
        name = consonants[code % 20] + vowels[code // 20 % 6] + consonants[code // 120 % 20] + consonants[code // 2400 % 20]
        names[name] = None
    return tuple(names)


@functools.cache
def _waits() -> tuple[int, ...]:
    """Exponential quantiles by exact decimal logarithms, scaled so that their mean is 65536."""
    raw = [-(1 - (Decimal(k) + Decimal("0.5")) / 1024).ln() for k in range(1024)]
    scale = Decimal(1024 * 65536) / sum(raw)
    return tuple(int(x * scale) for x in raw)


def _activity(weights: list[int]) -> npt.NDArray[np.int32]:
    """A table of 2**k instruments, each in proportion to its weight, at least once."""
    size = 1 << max(10, (16 * len(weights) - 1).bit_length())
    total, spare = sum(weights), size - len(weights)
    table = [i for i, weight in enumerate(weights) for _ in range(1 + spare * weight // total)]
    table += [i % len(weights) for i in range(size - len(table))]
    return np.array(table, np.int32)


def _fill_flow(flow: Any, name: str, random: _Random, ticks: int, depth_orders: int, start_ns: int) -> None:
    """One instrument's character: price 18 to 400 dollars, volatility and spread in proportion to it."""
    dollars = 18 + (random.below(100) * random.below(100) * 382) // 10_000
    home = dollars * 100 + random.below(100)
    base = max(1, home - ticks // 2)
    flow["stock"], flow["base"] = stock_word(name), base
    flow["fair"] = flow["home"] = (home - base) * _TICK_Q16
    flow["low"] = max(256, (home - base) // 2) * _TICK_Q16
    flow["high"] = (ticks - 256) * _TICK_Q16
    flow["volatility"] = dollars * (200 + random.below(350))
    flow["half_spread"] = 24_000 + dollars * (300 + random.below(700))
    flow["depth"] = 1 + dollars // 90
    flow["beta"] = dollars * 256 * (60 + random.below(90)) // 10_000
    flow["sector"], flow["target"] = random.below(_SECTORS), depth_orders * (30 + random.below(25)) // 100
    flow["moved_ns"] = start_ns
    flow["category"], flow["tier"] = ord("QGS"[random.below(3)]), ord("12"[random.below(2)])
    flow["status"], flow["short_sale"] = ord("T"), ord("1" if random.below(12) == 0 else "0")


def _make_clock(config: SimulatorConfig, random: _Random) -> npt.NDArray[np.void]:
    clock = np.zeros(1, CLOCK)
    gap_q8 = 256_000_000_000 // config.rate
    span_ns = min(messages_before_open(config.symbols) * gap_q8 >> 8, OPEN_NS)
    clock["random"] = random.below(1 << 32) << 32 | random.below(1 << 32)
    clock["gap_q8"], clock["open_ns"] = gap_q8, OPEN_NS
    clock["now_ns"] = clock["next_ns"] = clock["factor_ns"] = OPEN_NS - span_ns
    clock["limit_messages"] = FOREVER if config.messages is None else config.messages
    clock["limit_ns"] = LATEST_NS if config.seconds is None else min(LATEST_NS, OPEN_NS + int(Decimal(str(config.seconds)) * 1_000_000_000))
    clock["halted"], clock["halt_messages"] = -1, config.halt_messages
    clock["halt_odds"] = (config.halts_per_million << 30) // 1_000_000
    clock["break_odds"] = (config.breaks_per_million << 30) // 1_000_000
    return clock


def _make_market(config: SimulatorConfig) -> Market:
    random = _Random(config.seed)
    engine = make_engine(config.symbols, capacity=config.depth_orders, fills_max=_FILLS_MAX)
    ticks = int(engine.state["ticks"][0])
    clock = _make_clock(config, random)
    flows = np.zeros(config.symbols, FLOW)
    weights = []
    for i, name in enumerate(config.names or symbol_names(config.symbols)):
        _fill_flow(flows[i], name, random, ticks, config.depth_orders, int(clock["now_ns"][0]))
        weights.append((1000 + random.below(3000)) * 8 // (i + 8) + 20)
    roots = np.array([math.isqrt(k * 65536) for k in range(1025)], np.int64)
    mpids = np.array([code_word(m) for m in MPIDS], np.uint32)
    sectors, counts, waits = np.zeros(_SECTORS, np.int64), np.zeros(256, np.int64), np.array(_waits(), np.int64)
    return Market(engine, flows, sectors, clock, counts, _activity(weights), waits, roots, mpids, np.zeros(0, np.uint8))


# ---------------------------------------------------------------- what it offers


class Block(NamedTuple):
    """A stretch of the feed: ``image[:end]`` is BinaryFILE framed (u16 length + message), followed by 64 bytes of slack.
    The memory is reused by the next call."""

    image: Bytes
    end: int


def warm() -> None:
    """Make the exchange and its order flow ready to run: machine code is loaded, or made."""
    Simulator(SimulatorConfig(symbols=1, messages=None)).next_block(1, 0)


class Simulator:
    """One simulated market, pulled block by block from one thread."""

    def __init__(self, config: SimulatorConfig) -> None:
        self.config = config
        self.symbols = config.names or symbol_names(config.symbols)
        self._numbers = {name: number for number, name in enumerate(self.symbols)}
        self._market = _make_market(config)
        self._clock = self._market.clock

    def next_block(self, max_messages: int, until_ns: int = FOREVER) -> Block:
        """The next messages.

        Args:
            max_messages: stop at the first transaction that reaches it (a sweep writes several messages, so up to 47 more can come).
            until_ns: stop before the first transaction later than this simulated time; with it a source paces itself.

        Returns:
            A block; ``end`` 0 if nothing is due by `until_ns`, or if the day is over (:attr:`finished`).
        """
        if max_messages < 1:
            raise SimulatorConfigError("max_messages", max_messages, "at least 1")
        most = max_messages + 2 * (_FILLS_MAX + TRANSACTION_SLACK)
        if len(self._market.out) < most * FRAME_BYTES_MAX + SLACK_BYTES:
            self._market = self._market._replace(out=np.zeros(most * FRAME_BYTES_MAX + SLACK_BYTES, np.uint8))
        return Block(self._market.out, int(run(self._market, np.int64(max_messages), np.int64(until_ns))))

    @property
    def time_ns(self) -> int:
        """Simulated time of the last message, nanoseconds since midnight (before the first: that of the first)."""
        return int(self._clock["now_ns"][0])

    @property
    def next_ns(self) -> int:
        """Simulated time of the next transaction."""
        return int(self._clock["next_ns"][0])

    @property
    def messages(self) -> int:
        """Messages so far."""
        return int(self._clock["messages"][0])

    @property
    def finished(self) -> bool:
        """Whether the end of messages has been written."""
        return bool(self._clock["phase"][0] >= DONE)

    @property
    def engine(self) -> Engine:
        """The exchange."""
        return self._market.engine

    def counts(self) -> dict[str, int]:
        """Messages so far by type."""
        return {chr(k): int(n) for k, n in enumerate(self._market.counts) if n}

    def book(self, symbol: str, depth: int | None = None) -> dict[str, Any]:
        """The exchange's own book of one symbol: ``bids`` and ``asks`` as in :meth:`truth`; without `depth` all levels."""
        i = self._numbers[symbol]
        base = int(self._market.flows[i]["base"])
        return {
            word: [[(base + tick) * 100, qty, orders] for tick, qty, orders in book_levels(self.engine, i, side, depth)]
            for word, side in (("bids", BID), ("asks", ASK))
        }

    def truth(self, depth: int = 10) -> dict[str, dict[str, Any]]:
        """The exchange's own view of every symbol.

        Args:
            depth: levels per side.

        Returns:
            symbol -> ``bids`` and ``asks`` (lists of [price, quantity, orders], best first, price in 1e-4), ``orders`` resting,
            ``trades`` and ``volume`` (E, printable C, P, Q with shares; broken trades stay in), ``broken``, ``last`` price
            (None before the first trade), ``status`` (letter of the last H) and ``locate``.
        """
        found = {}
        for i, name in enumerate(self.symbols):
            flow = self._market.flows[i]
            found[name] = self.book(name, depth) | {
                "orders": int(self.engine.touches["live"][i]),
                "trades": int(flow["trades"]),
                "volume": int(flow["volume"]),
                "broken": int(flow["broken"]),
                "last": int(flow["last_price"]) or None,
                "status": chr(flow["status"]),
                "locate": i + 1,
            }
        return found


def _require_end(config: SimulatorConfig) -> None:
    if config.messages is None and config.seconds is None:
        raise SimulatorConfigError("messages", None, "messages or seconds, so that the day ends")


def generate(config: SimulatorConfig) -> Bytes:
    """A whole day as one BinaryFILE image (without slack).

    Raises:
        SimulatorConfigError: neither messages nor seconds are bounded.
    """
    _require_end(config)
    simulator, parts = Simulator(config), []
    while not simulator.finished:
        image, end = simulator.next_block(_BLOCK_MESSAGES)
        parts.append(image[:end].copy())
    return np.concatenate(parts)


@dataclass(frozen=True)
class Written:
    """What :func:`write_itch` wrote: the simulator in its last state, size in bytes, SHA-256 of the file's content."""

    simulator: Simulator
    bytes: int
    sha256: str


def write_itch(path: str | os.PathLike[str], config: SimulatorConfig, progress: Callable[[int], None] | None = None) -> Written:
    """Write a whole day to a BinaryFILE file, as the venue's own daily files are; the file appears when it is complete.

    Args:
        path: the file.
        config: bounded by messages or seconds.
        progress: told the number of messages written so far, about every 65,000.

    Raises:
        SimulatorConfigError: the day has no end.
        OSError: the path cannot be written.
    """
    _require_end(config)
    target = Path(path)
    partial = target if target.exists() and not target.is_file() else target.with_name(target.name + ".partial")
    try:
        written = _write_day(partial, config, progress)
        if partial is not target:
            os.replace(partial, target)
    except OSError as error:
        if partial is not target:
            partial.unlink(missing_ok=True)
        error.filename, error.filename2 = str(target), None
        raise
    return written


def _write_day(path: Path, config: SimulatorConfig, progress: Callable[[int], None] | None) -> Written:
    simulator, digest, size = Simulator(config), hashlib.sha256(), 0
    with open(path, "wb") as file:
        while not simulator.finished:
            image, end = simulator.next_block(_BLOCK_MESSAGES)
            part = image[:end].data
            file.write(part)
            digest.update(part)
            size += end
            if progress:
                progress(simulator.messages)
    return Written(simulator, size, digest.hexdigest())
