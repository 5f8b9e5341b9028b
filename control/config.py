"""The configuration of a node: a TOML document, checked as a whole.

``load_config(path)`` gives a :class:`Config`, or raises :class:`ConfigError` with every problem of the document at once, each with
its path, line, value, reason and hint. Every key declares its meaning, unit, default, bounds, and whether a running node takes a new
value (`live`) or has to restart (`restart`); ``tickmesh config schema`` prints that table (:mod:`tickmesh.ops.config_cmd`).

The model knows no calculation and no protocol: those are checked by hooks (:class:`Checks`) of whoever knows them.
"""

from __future__ import annotations

import datetime
import difflib
import functools
import math
import os
import re
import tomllib
import typing
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from tickmesh.control.tomllines import key_lines, line_of

TableT = typing.TypeVar("TableT", bound=BaseModel)
KeyPath = tuple[str | int, ...]
PRICE_DECIMALS = 9
"""Prices are fixed point in units of 1e-9."""

SOURCE_TYPES = ("file", "pcap", "multicast", "websocket", "http", "tcp", "nats", "fix", "rdma", "custom", "simulator")
CONNECTED = ("websocket", "http", "tcp", "nats", "fix", "custom")
"""Types of source that connect to a server, and come back when they have lost it."""
_RECONNECTS = (*CONNECTED, "rdma")
DELIVERY_METHODS = ("nats", "shm", "rdma")
SERIES = ("trade.price", "trade.qty", "bbo.mid", "bbo.spread", "bbo.microprice")
"""Series that calculations and alerts can take, beside the outputs of calculations."""
RawTables = dict[str, dict[str, Any]]
"""Tables as the document has them, by name."""
NOT_BUILT_YET = {
    "type": (),
    "method": ("websocket", "redis"),
}
FIELD_NAMES = {
    "volume": "qty", "size": "qty", "quantity": "qty", "amount": "qty", "timestamp": "ts_event", "time": "ts_event", "sequence": "seq",
    "instrument": "symbol", "ticker": "symbol", "order_id": "id", "trade_id": "id", "match_id": "id", "bid_size": "bid_qty",
    "ask_size": "ask_qty", "bid_price": "bid", "ask_price": "ask",
}  # fmt: skip
"""Usual names of other systems, read as the event field at the right when `fields` is a plain list."""


# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a configuration.

    Attributes:
        path: dotted path of the key, e.g. ``data_sources.nasdaq.endpoint``.
        line: its line in the file (of the enclosing table if the key is missing); None if there is no text.
        value: what is there; None if the key is missing.
        reason: what is wrong with it.
        hint: what to do, may be empty.
        part: name of the text that `line` counts in, if the configuration has several (keys of the store).
    """

    path: str
    line: int | None
    value: Any
    reason: str
    hint: str = ""
    part: str = ""

    def __str__(self) -> str:
        shown = "" if self.value is None or isinstance(self.value, dict | list) else f" = {self.value!r}"
        place = f"{self.path}{shown}: " if self.path else ""
        return f"{place}{self.reason}" + (f" ({self.hint})" if self.hint else "")


class ConfigError(Exception):
    """A configuration is refused.

    Attributes:
        errors: every problem found, in the order of the file.
        name: the file, or what the text was called.
    """

    def __init__(self, errors: list[Problem], name: str = "configuration") -> None:
        self.errors, self.name = errors, name
        super().__init__("\n".join(f"{e.part or name}:{e.line}: {e}" if e.line else f"{e.part or name}: {e}" for e in errors))


@dataclass(frozen=True)
class Refusal:
    """One problem as a check states it: `key` is relative to the table that was checked ("" for the table itself)."""

    key: str
    reason: str
    hint: str = ""
    judged_by: tuple[str, ...] = ()
    """Other keys of the table that this depends on: while one of them is wrong, nothing is said."""


def _refused(problems: list[Refusal]) -> None:
    if problems:
        raise PydanticCustomError("refused", "{reason}", {"reason": problems[0].reason, "problems": problems})


# ---------------------------------------------------------------- kinds of value


def _decimal(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("must be a number")
    try:
        result = Decimal(str(value))
    except InvalidOperation:
        raise ValueError("must be a number, e.g. 0.01 or '0.01'") from None
    if not result.is_finite():
        raise ValueError("must be a finite number")
    return result


def _pace(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if number or value in ("max", "realtime"):
        return value
    raise ValueError("must be 'max', 'realtime' or a positive number (2 = twice as fast as recorded)")


def _scalar(value: Any) -> Any:
    if not isinstance(value, str | int):
        raise ValueError("must be a text, an integer, true or false")
    return value


def _paths(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _date(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime) else value


def _valid_date(value: str) -> str:
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError("must be a date, e.g. 2024-05-08") from None


def _valid_timezone(value: str) -> str:
    try:
        zoneinfo.ZoneInfo(value)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("is not a known time zone, e.g. 'UTC' or 'America/New_York'") from None
    return value


def _field_map(value: Any) -> Any:
    """``["symbol", "price"]`` and ``{price = "p"}`` are short forms of ``{price = {path = "p"}}``."""
    if isinstance(value, list):
        if not all(isinstance(item, str) for item in value):
            raise ValueError("must be a list of field names or a table of event field = source field")
        return {FIELD_NAMES.get(item, item): {"path": item} for item in value}
    if not isinstance(value, dict):
        return value
    short = {k: {"path": str(v)} for k, v in value.items() if isinstance(v, str | int) and not isinstance(v, bool)}
    return {**value, **short}


def _per_event(value: Any) -> Any:
    return list(OUTPUT_KINDS) if value is True else [] if value is False else value


def _acks(value: Any) -> Any:
    if isinstance(value, bool) or value not in (0, 1, "all"):
        raise ValueError('must be 0, 1 or "all"')
    return value


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"must be a power of two, e.g. {1 << value.bit_length()}")
    return value


def _built(key: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, str) and value in NOT_BUILT_YET[key]:
            raise ValueError(f"{value!r} is not built yet")
        if key == "type" and value == "afxdp":
            raise ValueError('is no type of its own: use type = "multicast" with bypass = "afxdp"')
        return value

    return check


_PACE_SCHEMA = WithJsonSchema({"anyOf": [{"enum": ["max", "realtime"]}, {"type": "number", "exclusiveMinimum": 0}]})
_NUMBER = WithJsonSchema({"type": ["number", "string"]})
PreciseNumber = Annotated[Decimal, BeforeValidator(_decimal), _NUMBER]
"""An exact decimal number: 0.01 and "0.01" are the same, and neither becomes a float."""
_HOST = r"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])$"
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$")]
Symbol = Annotated[str, StringConstraints(min_length=1, max_length=24, pattern=r"^[\x21-\x7e]*$")]
PowerOfTwo = Annotated[int, BeforeValidator(lambda v: _power_of_two(v) if type(v) is int and v > 0 else v)]
MatchedValue = Annotated[Any, BeforeValidator(_scalar), WithJsonSchema({"type": ["string", "integer", "boolean"]})]
PathList = Annotated[list[str], BeforeValidator(_paths), WithJsonSchema({"type": ["string", "array"], "items": {"type": "string"}})]
Pace = Annotated[Any, BeforeValidator(_pace), _PACE_SCHEMA]
Date = Annotated[str, BeforeValidator(lambda v: _valid_date(d) if isinstance(d := _date(v), str) else v)]
TimeZone = Annotated[str, BeforeValidator(lambda v: _valid_timezone(v) if isinstance(v, str) else v)]
SourceType = Annotated[
    Literal["file", "pcap", "multicast", "websocket", "http", "tcp", "nats", "fix", "rdma", "custom", "simulator"],
    BeforeValidator(_built("type")),
]
DeliveryMethod = Annotated[Literal["nats", "shm", "rdma"], BeforeValidator(_built("method"))]
OutputKind = Literal[
    "bbo", "trade", "signal", "alert", "bar", "intent", "risk", "status", "gap", "reference",
    "quote", "imbalance", "break", "system", "level", "order", "clear",
]  # fmt: skip
"""What a shard can put out; `order` stands for add, execute, cancel, delete, replace and modify."""
OUTPUT_KINDS: tuple[str, ...] = typing.get_args(OutputKind)
PerEvent = Annotated[list[OutputKind], BeforeValidator(_per_event)]
MappedEvent = Literal[
    "trade", "quote", "level", "add", "execute", "cancel", "delete", "replace", "modify", "clear", "break", "status", "imbalance"
]  # fmt: skip
"""Kinds of event that a field mapping (json, csv) can make."""
EventField = Literal["symbol", "price", "qty", "side", "id", "aux", "ts_event", "seq", "bid", "bid_qty", "ask", "ask_qty"]
"""Fields of an event that a field mapping can fill; bid..ask_qty belong to quotes."""
Overflow = Literal["block", "drop_oldest", "gap"]
Channel = Literal["book", "trade", "quote"]
"""What a venue's own subscription can ask for."""
EnvironmentVariable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
HeaderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,64}$")]


def key(
    default: Any, meaning: str, *, unit: str = "", live: bool = False, only: tuple[str, ...] = (), per_node: bool = False, **bounds: Any
) -> Any:
    """A key of the configuration.

    Args:
        default: its value if the document does not name it (``...``: it must).
        meaning: one sentence.
        unit: of the value, empty if it has none.
        live: whether a running node takes a new value; otherwise it needs a restart.
        only: the types (or methods) of table that the key is for; empty: all.
        per_node: whether each node has its own value, in its own file, also where the cluster's configuration is in a store.
        bounds: pydantic's `ge`, `le`, `gt`, `lt`, `min_length`, `pattern`.
    """
    extra: dict[str, Any] = {"unit": unit, "change": "live" if live else "restart", "only": list(only), "per_node": per_node}
    return Field(default, description=meaning, json_schema_extra=extra, **bounds)


class Table(BaseModel):
    """A table of the document: its keys are known, typed strictly, and do not change once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def _not_for(self, kind: str) -> list[Refusal]:
        """Keys that were given although they belong to other types of this table."""
        wrong = []
        for name in sorted(self.model_fields_set):
            only = key_extra(type(self), name)["only"]
            if only and kind not in only:
                wrong.append(Refusal(name, f"has no meaning for {kind!r}, only for {' and '.join(only)}", "remove it"))
        return wrong


def key_extra(model: type[BaseModel], name: str) -> dict[str, Any]:
    """What :func:`key` declared beside the type: `unit`, `change`, `only`, `per_node`."""
    extra = model.model_fields[name].json_schema_extra
    nothing: dict[str, Any] = {"unit": "", "change": "restart", "only": [], "per_node": False}
    return typing.cast(dict[str, Any], extra) if isinstance(extra, dict) else nothing


# ---------------------------------------------------------------- the tables


class Cluster(Table):
    """``[cluster]``: this node and what all nodes share."""

    name: str = key("local", "Name of the cluster; part of every NATS subject.", pattern=r"^[A-Za-z0-9_-]{1,32}$")
    node: str = key("node1", "Name of this node, unique in the cluster.", per_node=True, pattern=r"^[A-Za-z0-9_-]{1,32}$")
    address: str = key(
        "127.0.0.1", "Name or address of this host: where other nodes reach this one, and where it listens.", per_node=True, pattern=_HOST
    )
    listen: str | None = key(
        None, "Where it listens instead: 0.0.0.0 or [::] if `address` is not this host's own, behind NAT.", per_node=True, pattern=_HOST
    )
    shards: int = key(1, "Partitions of the instruments; each has its own thread, journal and output stream.", ge=1, le=64)
    replicas: int = key(
        2, "Nodes that hold each shard, its leader included; fewer if there are fewer. With [leadership].", live=True, ge=1, le=16
    )
    shard_overrides: dict[Symbol, Annotated[int, Field(ge=0)]] = key({}, "Symbols that are placed by hand: symbol = shard (from 0).")
    data_dir: str = key(
        "~/.local/share/tickmesh", "Folder of journals, counters and the embedded server's data.", per_node=True, min_length=1
    )
    instruments_max: int = key(4096, "Most instruments of a shard.", ge=1, le=1 << 20)
    orders_max: int = key(1 << 20, "Most resting orders of a shard.", unit="orders", ge=16, le=1 << 27)
    idle: Literal["spin", "yield", "sleep"] = key(
        "sleep", "What a hot thread does with nothing to do: spin (own core, least delay), yield, or sleep (a laptop).", per_node=True
    )
    cpus: list[Annotated[int, Field(ge=0, le=4095)]] = key(
        [], "Processors for the hot threads: receivers, then shards; empty: any.", per_node=True
    )
    rdma_device: str | None = key(None, "RDMA device, as `tickmesh doctor` names it; none: the first one.", per_node=True, min_length=1)
    ring_capacity: PowerOfTwo = key(65536, "Events that a ring holds.", unit="events", ge=256, le=1 << 26)
    output_overflow: Overflow = key(
        "block", "When the output ring is full: wait, overwrite the oldest, or drop and emit a gap; always counted."
    )

    @property
    def listens_at(self) -> str:
        """Where ports for other nodes are opened."""
        return self.listen or self.address

    @property
    def data_path(self) -> Path:
        """`data_dir` with ``~`` and environment variables expanded; a relative one starts at the current folder."""
        return Path(os.path.expandvars(self.data_dir)).expanduser().absolute()

    @model_validator(mode="after")
    def _check(self) -> Cluster:
        bad = [
            Refusal(f"shard_overrides.{symbol}", f"there is no such shard: shards is {self.shards}", f"0 to {self.shards - 1}", ("shards",))
            for symbol, shard in self.shard_overrides.items()
            if shard >= self.shards
        ]
        if len(set(self.cpus)) != len(self.cpus):
            bad.append(Refusal("cpus", "names a processor twice"))
        _refused(bad)
        return self


class FieldOptions(Table):
    """One field of a mapping: where an event field comes from."""

    path: str = key("", 'JSON: a path like "data.p" or "b[].0" ([]: one event per element). CSV: column name or index from 0.', live=True)
    constant: str | None = key(None, "In place of a path: the same text for every record.", live=True)
    scale: PreciseNumber = key(Decimal(1), "The number is multiplied by this, exactly.", live=True, gt=0)
    unit: Literal["ns", "us", "ms", "s", "iso8601"] = key(
        "ns", "ts_event only: what the time counts from 1970 (s: may have decimals).", live=True
    )
    values: dict[str, str] = key({}, 'side and status only: words of the source, e.g. {B = "bid", S = "ask"}.', live=True)
    default: str | None = key(None, "Text used if the field is absent; without it an absent field makes the record malformed.", live=True)

    @model_validator(mode="after")
    def _check(self) -> FieldOptions:
        if bool(self.path) == (self.constant is not None):
            _refused([Refusal("path", "and constant are alternatives: give one of them", 'e.g. price = "data.p"')])
        return self


FieldMap = Annotated[dict[EventField, FieldOptions], BeforeValidator(_field_map)]


class MessageOptions(Table):
    """``[[data_sources.NAME.messages]]``: one kind of record of a json or csv source."""

    match: dict[str, MatchedValue] = key({}, 'Only records with these values at these paths, e.g. {e = "trade"}; empty: all.', live=True)
    event: MappedEvent = key(..., "Kind of event that the record becomes.", live=True)
    fields: FieldMap = key(..., "Event field = path in the record.", live=True, min_length=1)
    snapshot: bool = key(False, "The record replaces the book: a clear comes first.", live=True)


class InstrumentOptions(Table):
    """``[data_sources.NAME.instruments.SYMBOL]``: what differs for one symbol."""

    tick_size: PreciseNumber | None = key(None, "Smallest price step.", live=True, unit="price", gt=0)
    quantity_exponent: int | None = key(None, "Decimals of a quantity: real = integer / 10^exponent.", live=True, ge=0, le=18)


class FixOptions(Table):
    """``[data_sources.NAME.fix]``: the session of a FIX source, which logs on to a venue."""

    begin_string: Literal["FIX.4.2", "FIX.4.3", "FIX.4.4", "FIXT.1.1"] = key(
        "FIX.4.4", "Version of the session; FIXT.1.1 carries FIX 5.0 SP2.", live=True
    )
    sender: str = key(..., "Our CompID (SenderCompID).", live=True, pattern=r"^[!-~]{1,64}$")
    target: str = key(..., "The venue's CompID (TargetCompID).", live=True, pattern=r"^[!-~]{1,64}$")
    heartbeat_s: int = key(30, "HeartBtInt (108): longest silence of either side.", live=True, unit="s", ge=1, le=3600)
    reset: Literal["logon", "never"] = key(
        "logon", "Whether sequences begin at 1 with each logon; never: what was missed is sent again, as drop copies want it.", live=True
    )
    store: str | None = key(
        None, "Folder in which sequences and messages are kept; none: in memory, until the node ends.", live=True, min_length=1
    )
    next_expected: bool = key(
        False, "Whether Logons carry NextExpectedMsgSeqNum (789): what was missed comes unasked, where the venue does so.", live=True
    )
    subscribe: bool = key(True, "Whether to ask for market data of `symbols` after the logon.", live=True)
    depth: int = key(0, "Levels of a book to ask for; 0: all of them.", live=True, unit="levels", ge=0, le=10_000)


class Source(Table):
    """``[data_sources.NAME]``: a feed: transport, framing, protocol and field mapping."""

    type: SourceType = key(..., "Where the bytes come from.", live=True)
    path: PathList = key(
        [], "File or files, read in this order; a relative path starts at the configuration file.", live=True, only=("file", "pcap")
    )
    endpoint: str | None = key(
        None,
        "Where it is: multicast group of line A, udp://GROUP:PORT; ws:// or wss://, http:// or https://, tcp:// or tls://HOST:PORT, "
        "nats:// or tls:// (several, separated by commas), rdma://HOST:PORT of a node's delivery.",
        live=True,
        only=("multicast", *_RECONNECTS),
    )
    endpoint_b: str | None = key(
        None,
        "Multicast group of line B; the first of two equal packets is used. rdma: the other node that may lead the shard.",
        live=True,
        only=("multicast", "rdma"),
    )
    interface: str | None = key(
        None,
        "Network interface (name or address) that joins the groups; none: the system's choice.",
        live=True,
        only=("multicast",),
        min_length=1,
    )
    shard: int = key(0, "Whose outputs to take of the other cluster's shards.", live=True, only=("rdma",), ge=0, le=63)
    strict: bool = key(
        False,
        "Be told of each write by a completion, in place of looking at memory: slower, and does not lean on the order of the host's bus.",
        live=True,
        only=("rdma",),
    )
    data_format: str | None = key(
        None,
        'Protocol: a shipped spec ("itch50"), a spec file (.toml), an SBE schema ("sbe:FILE.xml"), "fix44" or a FIX dictionary '
        '("fix:FILE.xml"), a venue ("binance", "bybit", "coinbase", "kraken", "kraken_futures", "okx"), "lobster", "dbn_mbo", "json" '
        'or "csv".',
        live=True,
    )
    framing: str | None = key(
        None,
        'How messages lie in packets or streams, e.g. "moldudp64", "binaryfile", tcp: "soupbintcp"; none: the one usual for the protocol.',
        live=True,
        pattern=r"^([a-z0-9_]{1,32}|.+\.toml)$",
    )
    venue: str | None = key(None, "Name of the venue; none: the name of the source.", live=True, pattern=r"^[A-Za-z0-9_-]{1,32}$")
    date: Date | None = key(
        None, "Day of a feed that counts time from midnight, e.g. 2024-05-08; none: times count from midnight.", live=True
    )
    timezone: TimeZone = key("UTC", "Time zone of that midnight, e.g. America/New_York.", live=True)
    pace: Pace = key("max", "Speed of a replay: max, realtime, or a multiple of real time.", live=True, only=("file", "pcap", "simulator"))
    symbols: list[Symbol] = key(
        [], "Symbols to take, as globs: * any run of characters, ? one; empty: all. A simulator: names to make.", live=True
    )
    exclude: list[Symbol] = key([], "Symbols to leave out, as globs.", live=True)
    tick_size: PreciseNumber | None = key(
        None, "Smallest price step; none: the protocol's own, or inferred.", live=True, unit="price", gt=0
    )
    quantity_exponent: int | None = key(None, "Decimals of a quantity; none: the protocol's own.", live=True, ge=0, le=18)
    price_scale: PreciseNumber | None = key(None, "Real price = wire price times this; none: the protocol's own.", live=True, gt=0)
    instruments: dict[Symbol, InstrumentOptions] = key({}, "What differs for single symbols.", live=True)
    event: MappedEvent | None = key(None, "json and csv with one kind of record: the kind of event it becomes.", live=True)
    fields: FieldMap = key({}, "Field mapping: a list of fields, or a table event field = source field.", live=True)
    messages: list[MessageOptions] = key([], "json and csv with several kinds of record: every entry that matches makes events.", live=True)
    columns: list[Annotated[str, StringConstraints(min_length=1)]] = key(
        [], "csv: names of the columns, for a file without a header row.", live=True
    )
    delimiter: str = key(",", "csv: character between columns.", live=True, min_length=1, max_length=1)
    gap_wait_ms: float = key(
        5.0,
        "How long a missing packet may still come from the other line before a gap is declared.",
        live=True,
        unit="ms",
        ge=0,
        le=60000,
        only=("multicast", "pcap", "simulator"),
    )
    follow: bool = key(
        False, "Go on reading as the file grows, also over rotation and truncation; the last of several.", live=True, only=("file",)
    )
    channels: list[Channel] = key(
        ["book", "trade"], "What to subscribe to at a venue that is built in, for each of `symbols`.", live=True, only=("websocket",)
    )
    subscribe: list[Annotated[str, StringConstraints(min_length=1)]] = key(
        [], "Messages to send after each connect, in place of the venue's own.", live=True, only=("websocket",)
    )
    snapshot_endpoint: str | None = key(
        None,
        "binance: where a book's snapshot is, with {symbol} in it; none: https://api.binance.com/api/v3/depth. multicast and pcap, CME: "
        "the group of the snapshot (market recovery) channel, udp://GROUP:PORT, which brings books back after a gap.",
        live=True,
        only=("websocket", "multicast", "pcap"),
    )
    definition_endpoint: str | None = key(
        None,
        "SBE: the group of the instrument definition (CME: instrument replay) channel, udp://GROUP:PORT, which tells names, tick sizes and "
        "how many levels books have.",
        live=True,
        only=("multicast", "pcap"),
    )
    snapshot_interval_ms: float = key(
        500.0, "Least time between two requests for snapshots.", live=True, unit="ms", ge=0, le=600_000, only=("websocket",)
    )
    reading: Literal["poll", "lines", "sse"] = key(
        "poll",
        "How to read: the whole body again and again, a body of lines that does not end, or server-sent events.",
        live=True,
        only=("http",),
    )
    poll_interval_ms: float = key(1000.0, "Time between two polls.", live=True, unit="ms", ge=1, le=86_400_000, only=("http",))
    headers: dict[HeaderName, str] = key({}, "Sent with every request; no secrets.", live=True, only=("http", "websocket"))
    subject: str | None = key(None, "Subject to subscribe to; wildcards are allowed.", live=True, only=("nats",), pattern=r"^[^\s]{1,255}$")
    stream: str | None = key(
        None,
        "JetStream stream to read in place of a plain subscription: nothing is lost over reconnects and restarts.",
        live=True,
        only=("nats",),
        pattern=r"^[^\s.*>/\\]{1,255}$",
    )
    begin: Literal["first", "next"] | None = key(
        None,
        "Where a source begins when it has nothing to go on from: with the first message there is, or the next; none: first, of multicast "
        "next. multicast, first: what came in the session before the first packet seen is missing, asked for (rerequest) or a gap.",
        live=True,
        only=("tcp", "nats", "multicast"),
    )
    session: str = key("", "SoupBinTCP session to ask for; none: the current one.", live=True, only=("tcp",), pattern=r"^[!-~]{0,10}$")
    user: str | None = key(None, "User to log in as.", live=True, only=("tcp", "nats", "fix", "http", "websocket"), min_length=1)
    password_env: EnvironmentVariable | None = key(
        None, "Environment variable that holds its password.", live=True, only=("tcp", "nats", "fix", "http", "websocket")
    )
    password_file: str | None = key(
        None, "File that holds it, instead.", live=True, only=("tcp", "nats", "fix", "http", "websocket"), min_length=1
    )
    token_env: EnvironmentVariable | None = key(
        None, "Environment variable that holds a bearer token.", live=True, only=("nats", "http", "websocket", "rdma")
    )
    token_file: str | None = key(None, "File that holds it, instead.", live=True, only=("nats", "http", "websocket", "rdma"), min_length=1)
    credentials_file: str | None = key(None, "NATS credentials file (.creds).", live=True, only=("nats",), min_length=1)
    tls_ca_file: str | None = key(
        None,
        "Certificate authority that the server's certificate must come from; none: the system's.",
        live=True,
        only=CONNECTED,
        min_length=1,
    )
    tls_certificate_file: str | None = key(
        None, "Our own certificate, if the server asks for one.", live=True, only=CONNECTED, min_length=1
    )
    tls_key_file: str | None = key(None, "The key of that certificate.", live=True, only=CONNECTED, min_length=1)
    connect_timeout_ms: float = key(
        10_000.0, "How long connecting and logging in may take.", live=True, unit="ms", ge=10, le=600_000, only=_RECONNECTS
    )
    heartbeat_ms: float | None = key(
        None,
        "How often we show that we live; none: 15 s websocket, 1 s SoupBinTCP.",
        live=True,
        unit="ms",
        ge=10,
        le=600_000,
        only=("websocket", "tcp"),
    )
    silence_ms: float | None = key(
        None,
        "Silence after which a connection is given up; none: 60 s websocket and http, 15 s SoupBinTCP, else no limit.",
        live=True,
        unit="ms",
        ge=10,
        le=86_400_000,
        only=CONNECTED,
    )
    reconnect_min_ms: float = key(
        100.0,
        "First wait before connecting again; it doubles with every failure.",
        live=True,
        unit="ms",
        ge=1,
        le=600_000,
        only=_RECONNECTS,
    )
    reconnect_max_ms: float = key(
        30_000.0, "Longest wait before connecting again.", live=True, unit="ms", ge=1, le=3_600_000, only=_RECONNECTS
    )
    retry_after_max_ms: float = key(
        3_600_000.0, "Longest wait that a server may ask for (Retry-After, or retry of its events).", live=True, unit="ms", ge=1,
        le=604_800_000, only=CONNECTED,
    )  # fmt: skip
    message_max_kb: int = key(
        4096,
        "Longest message, unpacked; a longer one ends the connection.",
        live=True,
        unit="KiB",
        ge=1,
        le=1 << 18,
        only=(*CONNECTED, "file"),
    )
    buffer_kb: int = key(
        4096,
        "Most bytes received and not yet decoded, while shards have no room; rdma: of the ring that is written into.",
        live=True,
        unit="KiB",
        ge=1,
        le=1 << 20,
        only=(*_RECONNECTS, "file"),
    )
    overflow: Overflow = key(
        "block",
        "When that buffer is full: stop reading, drop the oldest messages, or the newest; what is dropped is a gap.",
        live=True,
        only=(*CONNECTED, "file"),
    )
    fix: FixOptions | None = key(None, "The session of a FIX source.", live=True, only=("fix",))
    use: str | None = key(
        None,
        'The adapter of a custom source: an installed package\'s ("tickmesh.sources" entry point), or "file.py:Class".',
        live=True,
        only=("custom",),
        min_length=1,
    )
    options: dict[str, Any] = key({}, "Its own options.", live=True, only=("custom",))
    recv_buffer_kb: int = key(
        4096, "How much may wait for the loop: socket buffer, packet ring or AF_XDP frames.", live=True, unit="KiB", ge=64, le=1 << 20,
        only=("multicast",),
    )  # fmt: skip
    bypass: Literal["auto", "none", "afxdp", "packet"] = key(
        "none",
        "How datagrams come in: none (sockets), packet (a packet ring), afxdp (past the network stack; nobody else on the host gets them), "
        "or auto: the best that this host allows.",
        live=True,
        only=("multicast",),
    )
    busy_poll_us: int = key(
        0, "How long an empty read polls the card, past its interrupts (SO_BUSY_POLL); 0: not.", live=True, unit="µs", ge=0, le=1000,
        only=("multicast",),
    )  # fmt: skip
    receive_stamps: Literal["loop", "kernel"] = key(
        "loop", "What ts_recv says: when the loop took a datagram, or when the kernel had it.", live=True, only=("multicast",)
    )
    rerequest: str | None = key(
        None,
        "Server that is asked for what neither line has brought, udp://HOST:PORT (MoldUDP64 request packets); none: it is a gap.",
        live=True,
        only=("multicast",),
    )
    rerequest_timeout_ms: float = key(
        20.0, "How long an answer of the re-request server may take.", live=True, unit="ms", ge=0.1, le=60000, only=("multicast",)
    )
    rerequest_tries: int = key(
        5, "Requests in a row without progress before a gap is declared.", live=True, ge=1, le=100, only=("multicast",)
    )
    seed: int = key(1, "Seed: the same seed makes the same market.", live=True, ge=0, le=(1 << 63) - 1, only=("simulator",))
    rate: float = key(10000.0, "Messages per second of market time.", live=True, unit="1/s", gt=0, le=1e9, only=("simulator",))
    messages_max: int = key(0, "Stop after so many messages; 0: never.", live=True, ge=0, only=("simulator",))
    loss: float = key(0.0, "Share of packets lost on each line.", live=True, ge=0, lt=1, only=("simulator",))
    duplicate: float = key(0.0, "Share of packets sent twice.", live=True, ge=0, lt=1, only=("simulator",))
    reorder: float = key(0.0, "Share of packets that change places with the next.", live=True, ge=0, lt=1, only=("simulator",))

    def midnight_ns(self) -> int:
        """Nanoseconds since 1970 of the midnight that `date` and `timezone` name; 0 without a date."""
        if self.date is None:
            return 0
        moment = datetime.datetime.combine(datetime.date.fromisoformat(self.date), datetime.time(), zoneinfo.ZoneInfo(self.timezone))
        return int(moment.timestamp()) * 1_000_000_000

    def tick_size_of(self, symbol: str) -> int | None:
        """Configured tick size in units of 1e-9, or None."""
        chosen = self.instruments.get(symbol)
        value = chosen.tick_size if chosen and chosen.tick_size is not None else self.tick_size
        return None if value is None else int(value.scaleb(PRICE_DECIMALS))

    def quantity_exponent_of(self, symbol: str) -> int | None:
        """Configured quantity exponent, or None."""
        chosen = self.instruments.get(symbol)
        return chosen.quantity_exponent if chosen and chosen.quantity_exponent is not None else self.quantity_exponent

    @model_validator(mode="after")
    def _check(self) -> Source:
        bad = self._not_for(self.type)
        if self.type in ("file", "pcap") and not self.path:
            bad.append(Refusal("path", "is missing", f"name the files that a {self.type} source reads"))
        if self.type == "multicast":
            bad += _check_endpoint("endpoint", self.endpoint, required=True) + _check_endpoint(
                "endpoint_b", self.endpoint_b, required=False
            )
            bad += _check_server("rerequest", self.rerequest)
        if self.type in ("multicast", "pcap"):
            bad += self._check_beside()
        bad += self._check_connected()
        if self.type == "simulator" and not self.symbols:
            bad.append(Refusal("symbols", "is missing", "name the symbols to simulate"))
        if self.type == "rdma":
            bad += _check_publisher("endpoint", self.endpoint, required=True) + _check_publisher("endpoint_b", self.endpoint_b)
            if self.data_format is not None:
                bad.append(Refusal("data_format", "has no meaning here: events come as they are", "remove it"))
        if self.type not in ("simulator", "rdma") and not self.data_format:
            bad.append(Refusal("data_format", "is missing", 'name the protocol, e.g. "itch50"'))
        bad += self._check_prices() + self._check_mapping()
        if both := sorted(set(self.symbols) & set(self.exclude)):
            bad.append(Refusal("exclude", f"{both[0]!r} is in symbols too"))
        _refused(bad)
        return self

    def _check_beside(self) -> list[Refusal]:
        """The channels beside the lines."""
        bad: list[Refusal] = []
        others = [self.endpoint, self.endpoint_b]
        for name in ("snapshot_endpoint", "definition_endpoint"):
            endpoint = getattr(self, name)
            if endpoint is None:
                continue
            bad += _check_endpoint(name, endpoint, required=False)
            if endpoint in others:
                bad.append(Refusal(name, "is the group of another line", "what comes on the source's own lines needs no key"))
            if self.bypass not in ("auto", "none"):
                what = f"{name.removesuffix('_endpoint')}s are received by sockets"
                bad.append(Refusal("bypass", f"goes with {name} only as none or auto", what))
            if self.rerequest:
                bad.append(Refusal("rerequest", f"goes without {name}", "a venue has the one or the other"))
            others.append(endpoint)
        return bad

    @property
    def soupbintcp(self) -> bool:
        """Whether it is a SoupBinTCP client."""
        return self.type == "tcp" and self.framing == "soupbintcp"

    @property
    def continues(self) -> bool:
        """Whether every node receives it alike, and can go on in it at any sequence."""
        return self.type in ("multicast", "rdma") or self.soupbintcp or (self.type == "nats" and self.stream is not None)

    def _check_connected(self) -> list[Refusal]:
        bad: list[Refusal] = []
        if self.type in _SCHEMES:
            bad += _check_address(self.endpoint, self.type)
        if self.snapshot_endpoint is not None and self.type == "websocket":
            bad += _check_url("snapshot_endpoint", self.snapshot_endpoint, ("http", "https"))
            if "{symbol}" not in self.snapshot_endpoint:
                bad.append(
                    Refusal("snapshot_endpoint", "does not hold {symbol}", "e.g. https://api.binance.com/api/v3/depth?symbol={symbol}")
                )
        if self.type == "nats" and not self.subject and not self.stream:
            bad.append(Refusal("subject", "is missing", "name a subject, or the JetStream stream to read"))
        if self.type == "fix" and self.fix is None:
            bad.append(Refusal("fix", "is missing", 'say who we are and who the venue is, e.g. fix = { sender = "US", target = "VENUE" }'))
        if self.type == "fix" and not (self.data_format or "fix").startswith("fix"):
            bad.append(Refusal("data_format", "is no FIX", 'e.g. "fix44", or a dictionary, "fix:FIX44.xml"'))
        if self.type == "custom" and not self.use:
            bad.append(Refusal("use", "is missing", 'name the adapter: an entry point, or "file.py:Class"'))
        if self.reconnect_max_ms < self.reconnect_min_ms:
            bad.append(
                Refusal(
                    "reconnect_max_ms", "is less than reconnect_min_ms", "the wait grows from the one to the other", ("reconnect_min_ms",)
                )
            )
        if self.tls_key_file is not None and self.tls_certificate_file is None:
            bad.append(Refusal("tls_certificate_file", "is missing", "tls_key_file is the key of a certificate: name both"))
        return bad + self._check_secrets() + self._check_overflow()

    def _check_secrets(self) -> list[Refusal]:
        bad = [
            Refusal(f"{name}_file", f"and {name}_env are alternatives", "remove one of them")
            for name in ("password", "token")
            if getattr(self, f"{name}_env") and getattr(self, f"{name}_file")
        ]
        if (self.password_env or self.password_file) and not self.user:
            bad.append(Refusal("user", "is missing", "say whose password it is"))
        bad += [
            Refusal(f"headers.{name}", "holds a secret", "use token_env, or user and password_env")
            for name in self.headers
            if any(word in name.lower() for word in ("authorization", "cookie", "key", "token", "secret"))
        ]
        if self.session and not self.soupbintcp:
            bad.append(Refusal("session", "has no meaning without SoupBinTCP", 'set framing = "soupbintcp"', ("framing",)))
        return bad

    def _check_overflow(self) -> list[Refusal]:
        stream = self.type in ("tcp", "file") or (self.type == "http" and self.reading == "lines")
        if self.overflow != "block" and (self.continues or stream):
            what = "a stream of bytes cannot lose some of its middle" if stream else "it can go on where it stopped"
            return [Refusal("overflow", f"must be block here: {what}", "remove it")]
        return []

    def _check_prices(self) -> list[Refusal]:
        ticks = [("tick_size", self.tick_size), *((f"instruments.{s}.tick_size", o.tick_size) for s, o in self.instruments.items())]
        return [Refusal(k, "is finer than prices are kept", "the finest step is 1e-9") for k, v in ticks if v is not None and _too_fine(v)]

    def _check_mapping(self) -> list[Refusal]:
        generic = self.data_format in ("json", "csv")
        bad = []
        if generic and not self.messages and not self.fields:
            bad.append(Refusal("fields", "is missing", f"a {self.data_format} source needs a field mapping: fields or messages"))
        if generic and self.fields and not self.event:
            bad.append(Refusal("event", "is missing", 'say what a record becomes, e.g. event = "trade"'))
        if self.messages and (self.fields or self.event):
            bad.append(Refusal("messages", "excludes fields and event", "put them into [[messages]]"))
        if not generic and self.data_format:
            given = [name for name in ("event", "messages", "columns") if name in self.model_fields_set]
            bad += [Refusal(name, f'has no meaning for {self.data_format!r}, only for "json" and "csv"', "remove it") for name in given]
        return bad


def _too_fine(value: Decimal) -> bool:
    scaled = value.scaleb(PRICE_DECIMALS)
    return scaled != scaled.to_integral_value()


def _check_endpoint(name: str, endpoint: str | None, required: bool) -> list[Refusal]:
    if endpoint is None:
        return [Refusal(name, "is missing", "e.g. udp://239.1.1.1:26400")] if required else []
    match = re.fullmatch(r"udp://(\d{1,3}(?:\.\d{1,3}){3}):(\d{1,5})", endpoint)
    if match is None:
        return [Refusal(name, "must be udp://ADDRESS:PORT", "e.g. udp://239.1.1.1:26400")]
    parts = [int(part) for part in match[1].split(".")]
    if max(parts) > 255 or not 0 < int(match[2]) < 65536:
        return [Refusal(name, "has an impossible address or port")]
    if not 224 <= parts[0] <= 239 and parts[0] != 127:
        return [Refusal(name, f"{match[1]} is not a multicast group", "groups are 224.0.0.0 to 239.255.255.255")]
    return []


def _check_publisher(name: str, endpoint: str | None, *, required: bool = False) -> list[Refusal]:
    """Where a node delivers over RDMA."""
    if endpoint is None:
        return [Refusal(name, "is missing", "e.g. rdma://10.0.0.1:4240")] if required else []
    return _check_url(name, endpoint, ("rdma",), port=True, example="rdma://10.0.0.1:4240")


_SCHEMES = {"websocket": ("ws", "wss"), "http": ("http", "https"), "tcp": ("tcp", "tls"), "nats": ("nats", "tls"), "fix": ("tcp", "tls")}
_EXAMPLES = {
    "websocket": "wss://stream.example.com/ws",
    "http": "https://api.example.com/prices",
    "tcp": "tcp://10.0.0.1:15000",
    "nats": "nats://127.0.0.1:4222",
    "fix": "tls://fix.example.com:9880",
}
_SECRET_WORDS = ("token", "secret", "password", "apikey", "api_key", "signature", "listenkey")


def _check_address(endpoint: str | None, kind: str) -> list[Refusal]:
    """The endpoint of a source that connects."""
    if endpoint is None:
        return [Refusal("endpoint", "is missing", f"e.g. {_EXAMPLES[kind]}")]
    if kind == "nats":
        return [problem for address in endpoint.split(",") for problem in _check_nats_address(address, "endpoint")]
    return _check_url("endpoint", endpoint, _SCHEMES[kind], port=kind in ("tcp", "fix"), example=_EXAMPLES[kind])


def _check_url(name: str, url: str, schemes: tuple[str, ...], *, port: bool = False, example: str = "https://host/path") -> list[Refusal]:
    try:
        parts = urlsplit(url)
        number = parts.port
    except ValueError:
        return [Refusal(name, "has an impossible address or port", f"e.g. {example}")]
    if parts.username or parts.password or any(word in parts.query.lower() for word in _SECRET_WORDS):
        return [Refusal(name, "holds a secret", "use user and password_env, or token_env")]
    port_text = ":PORT" if port else ""
    if parts.scheme not in schemes or not parts.hostname or (port and number is None):
        return [Refusal(name, f"must be {' or '.join(f'{s}://HOST{port_text}' for s in schemes)}", f"e.g. {example}")]
    return [Refusal(name, "has an impossible port")] if number == 0 else []


def _check_server(name: str, endpoint: str | None) -> list[Refusal]:
    match = re.fullmatch(r"udp://(\d{1,3}(?:\.\d{1,3}){3}):(\d{1,5})", endpoint or "udp://127.0.0.1:1")
    if match is None:
        return [Refusal(name, "must be udp://ADDRESS:PORT", "e.g. udp://10.0.0.5:26500")]
    parts = [int(part) for part in match[1].split(".")]
    if max(parts) > 255 or not 0 < int(match[2]) < 65536:
        return [Refusal(name, "has an impossible address or port")]
    return [Refusal(name, "is a multicast group", "name the server's own address")] if 224 <= parts[0] <= 239 else []


def _check_nats_address(address: str, name: str = "target") -> list[Refusal]:
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return [Refusal(name, "has an impossible port")]
    if parts.password or parts.username:
        return [Refusal(name, "holds a secret", "use token_env or credentials_file")]
    if parts.scheme not in ("nats", "tls") or not parts.hostname:
        return [Refusal(name, "must be nats://HOST:PORT or tls://HOST:PORT", "e.g. nats://127.0.0.1:4222")]
    return [] if port != 0 else [Refusal(name, "has an impossible port")]


def _check_consul_address(address: str) -> list[Refusal]:
    host, _, port = address.rpartition(":")
    if re.fullmatch(r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:]+\]", host) and port.isdigit() and 0 < int(port) < 65536:
        return []
    return [Refusal("address", "must be HOST:PORT of Consul's HTTP interface", "e.g. 127.0.0.1:8500; tokens go into token_env")]


class Calculation(BaseModel):
    """``[processing.calculations.NAME]``: a calculation; keys other than these are its parameters."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    use: str = key(..., 'A built-in calculation ("ema"), an installed package\'s, or "file.py:function".', live=True, min_length=1)
    of: str | None = key(
        None, f"Series it takes: {', '.join(SERIES)}, a calculation, or bars; none: its own default.", live=True, min_length=1
    )
    against: str | None = key(None, "Second series, for a calculation of two.", live=True, min_length=1)
    symbols: list[Symbol] = key([], "Symbols it runs for, as globs: * any run of characters, ? one; empty: all.", live=True)
    inputs: list[Annotated[str, StringConstraints(min_length=1, max_length=64)]] = key(
        [], 'For one calculation over several instruments: what it takes, "bbo:SYMBOL" or "trade:SYMBOL", on whatever shards.', live=True
    )
    silent: bool = key(False, "Compute it for others, but put nothing out.", live=True)

    @property
    def parameters(self) -> dict[str, Any]:
        """The calculation's own keys (`window`, `alpha`, …), not checked here."""
        return dict(self.model_extra or {})

    def table(self) -> dict[str, Any]:
        """The table as the planner of calculations takes it: keys that are given, parameters included."""
        return {"use": self.use, **{name: getattr(self, name) for name in self.model_fields_set}, **self.parameters}


class Alert(Calculation):
    """``[processing.alerts.NAME]``: an alert; keys other than these are its parameters (threshold: above, below, hysteresis, …)."""

    use: str = key(
        "threshold", 'Kind of alert: "threshold", "zscore_alert", "move", "cross", or "file.py:function".', live=True, min_length=1
    )


class Bars(Calculation):
    """``[processing.bars.NAME]``: OHLCV bars; keys other than these are its parameters (interval_ms)."""

    use: str = key("bars", 'Kind of bars: "bars" (by time), or "file.py:function".', live=True, min_length=1)


class Processing(Table):
    """``[processing]``: what is computed, and what of it goes out."""

    outputs: list[OutputKind] = key(
        ["bbo", "trade", "signal", "alert", "bar", "intent", "risk", "status", "gap", "reference"],
        "Kinds of event that the shard puts out.",
        live=True,
    )
    timer_interval_ms: int = key(
        1000,
        "A source's time passes this often to what waits for it: ends a bar that no trade ends; 0: never.",
        unit="ms",
        ge=0,
        le=3_600_000,
    )
    calculations: dict[Name, Calculation] = key({}, "Calculations by name.", live=True)
    alerts: dict[Name, Alert] = key({}, "Alerts by name.", live=True)
    bars: dict[Name, Bars] = key({}, "Bars by name.", live=True)


class Risk(Table):
    """``[risk]``: limits that every intent (an order that a calculation would send) must pass."""

    enabled: bool = key(False, "Check intents; without it they go out unchecked.", live=True)
    kill_switch: bool = key(False, "Refuse every intent.", live=True)
    max_qty: PreciseNumber | None = key(None, "Largest quantity of one intent, in real units.", live=True, gt=0)
    max_notional: PreciseNumber | None = key(None, "Largest price times quantity of one intent.", unit="quote currency", live=True, gt=0)
    price_collar_bps: PreciseNumber | None = key(None, "Largest distance of an intent's price.", unit="bps", live=True, gt=0, le=10000)
    collar_reference: Literal["opposite", "mid"] = key("opposite", "What that is from: the price it would trade with, or mid.", live=True)
    max_rate: int | None = key(None, "Most intents of one instrument in a window.", live=True, ge=1, le=1 << 20)
    max_rate_total: int | None = key(None, "Most intents of a whole shard in a window.", live=True, ge=1, le=1 << 20)
    rate_window_ms: float = key(1000.0, "Length of that window.", unit="ms", live=True, gt=0, le=3_600_000)


class Journal(Table):
    """``[journal]``: the log of a shard's inputs, from which it can be replayed."""

    enabled: bool = key(True, "Keep a journal.")
    segment_mb: int = key(64, "Size of one segment file.", unit="MiB", ge=1, le=4096)
    sync: Literal["none", "segment"] = key("segment", "When a helper thread forces data to the disk: never, or once a segment is full.")
    restore: bool = key(
        True, "A node with live sources goes on from its journal; without it, it starts afresh, and the journal may be trimmed as it grows."
    )
    keep_mb: int = key(
        65536,
        "Most of a shard's journal that is kept; the oldest segments go, but none that a restart or an unsent output needs; 0: no limit.",
        live=True,
        unit="MiB",
        ge=0,
        le=1 << 30,
    )
    snapshot_interval_s: float = key(
        300.0,
        "How often a live node's shards are written down, by a process beside them; a restart goes on from there, and older segments may "
        "go. 0: never.",
        live=True,
        unit="s",
        ge=0,
        le=1e7,
    )
    keep_hours: int = key(
        0, "Longest time that a full segment is kept, under the same condition; 0: no limit.", live=True, unit="h", ge=0, le=1 << 20
    )


class Leadership(Table):
    """``[leadership]``: the nodes of a store share the shards, each led by one of them; needs live sources and a delivery over NATS."""

    enabled: bool = key(False, "Share the shards among the nodes of the store; without it, every node runs all of them by itself.")
    heartbeat_ms: float = key(20.0, "A node says so often that it is alive.", unit="ms", ge=1, le=10_000)
    suspect_ms: float = key(100.0, "Silence after which a node is taken for dead.", unit="ms", ge=3, le=60_000)
    suspect_ms_max: float = key(
        500.0,
        "The same on a host so busy that heartbeats come late: half as long again as the longest silence lately, up to this.",
        unit="ms",
        ge=3,
        le=60_000,
    )
    lease_ttl_s: float = key(
        10.0, "A leader that nobody watches loses its lease after this; Consul takes 10 s and more.", unit="s", ge=1, le=3600
    )
    grace_s: float = key(60.0, "How long leaders go on while the store is away.", unit="s", ge=0, le=86_400)
    balance_after_s: float = key(
        30.0,
        "A node that leads more shards than its share for so long passes one to a standby that leads less; 0: never.",
        unit="s",
        ge=0,
        le=86_400,
    )

    @model_validator(mode="after")
    def _check(self) -> Leadership:
        if self.suspect_ms < 3 * self.heartbeat_ms:
            reason, hint = "is less than three heartbeats", "one late heartbeat must not look like a death"
            _refused([Refusal("suspect_ms", reason, hint, ("heartbeat_ms",))])
        return self


class Replication(Table):
    """``[replication]``: with ``[leadership]``, journals go to standbys, and outputs wait for that."""

    port: int = key(
        0, "TCP port at which standbys find a node's journals, at that node's `cluster.address`; 0: any free one.", ge=0, le=65535
    )
    acks: Annotated[Literal[0, 1, "all"], BeforeValidator(_acks)] = key(
        1, "On how many standbys the inputs of an output must be before it leaves the node: 0, 1, or all that keep up."
    )
    solo: bool = key(True, "Go on alone while no standby keeps up; without it, outputs are held until one does.")
    solo_after_ms: float = key(1000.0, "How long a leader waits for a standby before it goes on alone.", unit="ms", ge=0, le=3_600_000)
    lag_ms_max: float = key(
        5000.0, "A standby keeps up if it has what the journal had so long ago; others hold nobody up.", unit="ms", ge=10, le=3_600_000
    )
    heartbeat_ms: float = key(50.0, "Both sides say something at least this often.", unit="ms", ge=1, le=60_000)
    timeout_ms: float = key(500.0, "A side that is silent, or takes nothing, for so long is given up.", unit="ms", ge=10, le=600_000)
    link: Literal["tcp", "rdma"] = key(
        "tcp", "What carries journals: TCP, or RDMA between nodes that both have a device for it (TCP between the others)."
    )
    token_env: str | None = key(
        None, "Environment variable with a secret that all nodes share; it is proved, not sent.", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"
    )
    tls_certificate_file: str | None = key(None, "This node's certificate, for TLS on both sides; needs the other two.", min_length=1)
    tls_key_file: str | None = key(None, "Its private key.", min_length=1)
    tls_ca_file: str | None = key(None, "Certificate authority from which every node's certificate must come.", min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Replication:
        bad = []
        if self.timeout_ms < 3 * self.heartbeat_ms:
            bad.append(
                Refusal("timeout_ms", "is less than three heartbeats", "one late heartbeat must not look like a death", ("heartbeat_ms",))
            )
        files = {name: getattr(self, name) for name in ("tls_certificate_file", "tls_key_file", "tls_ca_file")}
        bad += [
            Refusal(name, "is missing", "TLS needs all three files") for name, file in files.items() if file is None and any(files.values())
        ]
        if self.link == "rdma" and all(files.values()):
            bad.append(Refusal("link", "is rdma, which TLS does not cover", "take tcp, or remove the tls_ files", ("tls_ca_file",)))
        _refused(bad)
        return self

    @property
    def guarded(self) -> bool:
        """Whether strangers are kept out."""
        return self.token_env is not None or self.tls_ca_file is not None


class Delivery(Table):
    """``[delivery.NAME]``: where outputs go."""

    method: DeliveryMethod = key(
        ..., "How: a NATS JetStream stream per shard, a shared-memory ring, or RDMA into the memory of other nodes' sources."
    )
    target: str = key(
        "nats://127.0.0.1:4222",
        "Address of the NATS server; servers of one cluster: several, separated by commas.",
        live=True,
        only=("nats",),
    )
    embedded: bool = key(False, "Start a nats-server on this host, bound to loopback, in place of `target`.", only=("nats",))
    port: int = key(4222, "Port of the embedded server; 0: any free one.", ge=0, le=65535, only=("nats",))
    batch_max_events: int = key(512, "Most events of one frame.", unit="events", live=True, ge=1, le=8192, only=("nats",))
    batch_max_wait_ms: float = key(1.0, "Longest wait for a frame to fill.", unit="ms", live=True, ge=0, le=1000, only=("nats",))
    window: int = key(64, "Most frames sent and not yet acknowledged.", unit="frames", live=True, ge=1, le=64, only=("nats",))
    per_event: PerEvent = key(
        [], "Kinds also sent as one message per event (true: all), for clients in any language.", live=True, only=("nats",)
    )
    stream_max_mb: int = key(1024, "Most data that a stream keeps; the oldest goes first.", unit="MiB", ge=1, le=1 << 24, only=("nats",))
    stream_max_age_s: int = key(86400, "Longest time that a stream keeps data; 0: no limit.", unit="s", ge=0, only=("nats",))
    replicas: int = key(1, "Servers of a NATS cluster that keep each stream made from now on; 3: one may fail.", ge=1, le=5, only=("nats",))
    token_env: str | None = key(
        None,
        "Environment variable that holds the server's token; rdma: a secret that subscribers prove to know.",
        live=True,
        only=("nats", "rdma"),
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    credentials_file: str | None = key(None, "NATS credentials file (.creds).", live=True, only=("nats",))
    tls_ca_file: str | None = key(None, "Certificate authority that the server's certificate must come from.", live=True, only=("nats",))
    rdma_port: int = key(
        4240, "TCP port at `cluster.address` where subscribers ask for a shard; 0: any free one.", live=True, only=("rdma",), ge=0, le=65535
    )
    ring: str | None = key(
        None,
        "Name of the ring in /dev/shm, the shard's number is appended; none: CLUSTER-NODE-NAME.",
        only=("shm",),
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
    )
    ring_capacity: PowerOfTwo = key(65536, "Events that this ring holds.", unit="events", ge=256, le=1 << 26, only=("shm",))

    @model_validator(mode="after")
    def _check(self) -> Delivery:
        bad = self._not_for(self.method)
        if self.method == "nats":
            bad += [problem for address in self.target.split(",") for problem in _check_nats_address(address)]
        if "port" in self.model_fields_set and not self.embedded:
            bad.append(Refusal("port", "is the embedded server's", "set embedded = true, or put the port into target", ("embedded",)))
        if self.embedded and "target" in self.model_fields_set:
            bad.append(Refusal("target", "excludes embedded", "remove one of them"))
        if self.embedded and self.replicas > 1:
            bad.append(Refusal("replicas", "is more than the one embedded server", "name a NATS cluster in target"))
        _refused(bad)
        return self


class Logging(Table):
    """``[logging]``: what the node tells about itself."""

    level: Literal["debug", "info", "warning", "error"] = key("info", "Least important message that is written.", live=True)


class StoreSettings(Table):
    """``[store]``: what the nodes of a cluster agree by. Each node's own, never part of the cluster's configuration in the store."""

    kind: Literal["none", "consul", "nats"] = key(
        "none", "What it is: none (the node runs from its file alone), Consul, or a JetStream bucket.", per_node=True
    )
    address: str | None = key(
        None,
        "Consul: HOST:PORT, none: 127.0.0.1:8500. NATS: nats://HOST:PORT, none: nats://127.0.0.1:4222; several, separated by commas.",
        only=("consul", "nats"),
        per_node=True,
    )
    bucket: str = key(
        "tickmesh", "Name of the bucket, made if it is absent.", only=("nats",), per_node=True, pattern=r"^[A-Za-z0-9_-]{1,64}$"
    )
    replicas: int = key(1, "Servers of a NATS cluster that keep a bucket that is made.", only=("nats",), per_node=True, ge=1, le=5)
    token_env: str | None = key(
        None,
        "Environment variable that holds the token.",
        only=("consul", "nats"),
        per_node=True,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    credentials_file: str | None = key(None, "NATS credentials file (.creds).", only=("nats",), per_node=True)
    ca_file: str | None = key(
        None, "Certificate authority that the server's certificate must come from; TLS.", only=("consul", "nats"), per_node=True
    )
    certificate_file: str | None = key(None, "Our own certificate, if the server asks for one.", only=("consul", "nats"), per_node=True)
    key_file: str | None = key(None, "The key of that certificate.", only=("consul", "nats"), per_node=True)

    @property
    def server(self) -> str:
        """The address, or the usual one of this kind."""
        return self.address or ("nats://127.0.0.1:4222" if self.kind == "nats" else "127.0.0.1:8500")

    @model_validator(mode="after")
    def _check(self) -> StoreSettings:
        bad = self._not_for(self.kind)
        if self.address is not None and self.kind == "nats":
            bad += [problem for one in self.address.split(",") for problem in _check_nats_address(one, "address")]
        if self.address is not None and self.kind == "consul":
            bad += _check_consul_address(self.address)
        if self.key_file is not None and self.certificate_file is None:
            bad.append(Refusal("certificate_file", "is missing", "key_file is the key of a certificate: name both"))
        _refused(bad)
        return self


class Config(Table):
    """A whole configuration."""

    cluster: Cluster = Field(default_factory=Cluster, description="This node and what all nodes share.")
    data_sources: dict[Name, Source] = Field({}, description="Feeds by name.")
    processing: Processing = Field(default_factory=Processing, description="What is computed, and what of it goes out.")
    risk: Risk = Field(default_factory=Risk, description="Limits on intents.")
    journal: Journal = Field(default_factory=Journal, description="The log of inputs.")
    leadership: Leadership = Field(default_factory=Leadership, description="Which node leads which shard, and who takes over.")
    replication: Replication = Field(default_factory=Replication, description="Standbys, and what waits for them.")
    delivery: dict[Name, Delivery] = Field({}, description="Where outputs go.")
    logging: Logging = Field(default_factory=Logging, description="What the node tells about itself.")
    store: StoreSettings = Field(default_factory=StoreSettings, description="What the nodes of a cluster agree by.")

    _file: Path | None = PrivateAttr(None)
    _code_folder: Path | None = PrivateAttr(None)
    _lines: dict[KeyPath, int] = PrivateAttr(default_factory=dict)

    @property
    def file(self) -> Path | None:
        """The file it was read from."""
        return self._file

    @property
    def folder(self) -> Path:
        """Where relative paths start: the folder of the file, else the current one."""
        return self._file.parent if self._file else Path()

    @property
    def code_folder(self) -> Path:
        """Where the files of user calculations are: a folder of its own if the configuration comes from a store, else :attr:`folder`."""
        return self._code_folder or self.folder

    def resolve(self, path: str) -> Path:
        """A path of the document: ``~`` and environment variables expanded, relative to :attr:`folder`."""
        return self.folder / Path(os.path.expandvars(path)).expanduser()

    def line(self, *path: str | int) -> int | None:
        """Line of a key, e.g. ``config.line("data_sources", "nasdaq", "path")``, or of the nearest enclosing table."""
        return line_of(self._lines, path)


SECTIONS = tuple(name for name in Config.model_fields if name != "store")
"""The sections of a cluster's configuration; a store keeps each under a key of its own."""
PER_NODE_KEYS = tuple(name for name in Cluster.model_fields if key_extra(Cluster, name)["per_node"])
"""Keys of ``[cluster]`` that each node has in its own file."""

# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Checks:
    """Hooks of those who know the calculations and the protocols; each yields a :class:`Refusal` per problem.

    Attributes:
        processing: called with the raw tables of calculations, alerts and bars by name; its keys start at the document
            (``processing.calculations.fast.window``).
        source: called with a source's name and table (its format, framing and field mapping).
    """

    processing: Callable[[RawTables, RawTables, RawTables], Iterable[Refusal]] | None = None
    source: Callable[[str, Source], Iterable[Refusal]] | None = None


@dataclass
class _Reading:
    """One document being checked: collects problems."""

    name: str
    document: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)
    """What the text of each section is called, if each has one."""

    def add(self, path: KeyPath, reason: str, hint: str = "") -> None:
        value = "(hidden)" if "secret" in reason + hint else _value_at(self.document, path)
        part = self.parts.get(str(path[0]), "") if path else ""
        problem = Problem(dotted(path), line_of(self.lines, path), value, reason, hint, part)
        if not any(p.path == problem.path for p in self.problems):  # the first word on a key counts
            self.problems.append(problem)

    def add_refusal(self, table: KeyPath, refusal: Refusal) -> None:
        self.add((*table, *_key_path(refusal.key, _value_at(self.document, table))), refusal.reason, refusal.hint)


def dotted(path: KeyPath) -> str:
    """``("data_sources", "x", "messages", 0, "event")`` -> ``data_sources.x.messages[0].event``."""
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return shown.removeprefix(".")


def _value_at(document: Any, path: KeyPath) -> Any:
    for part in path:
        if not _has(document, part):
            return None
        document = document[part]
    return document


def _key_path(relative: str, table: Any) -> KeyPath:
    """``shard_overrides.BRK.B`` -> its parts, where the last key may itself hold dots."""
    parts: list[str | int] = []
    rest = relative
    while rest:
        head = rest if isinstance(table, dict) and rest in table else rest.split(".")[0]
        rest = rest[len(head) + 1 :]
        step: str | int = int(head) if isinstance(table, list) and head.isdigit() else head
        parts.append(step)
        table = _value_at(table, (step,))
    return tuple(parts)


def parse_config(text: str, name: str = "configuration", checks: Checks | None = None, file: Path | None = None) -> Config:
    """Read a configuration from TOML text.

    Args:
        text: the document.
        name: what to call it in messages.
        checks: hooks that check calculations and sources.
        file: where it comes from, the start of relative paths.

    Raises:
        ConfigError: with every problem.
    """
    reading = _Reading(name)
    found = _read_toml(reading, text)
    if found is None:
        raise ConfigError(reading.problems, name)
    reading.document, reading.lines = found
    config = _checked(reading, checks)
    config._file = file
    _check_guarded(config, config, name)
    return config


@dataclass(frozen=True)
class Part:
    """The text of one section, TOML of its inside (of ``[risk]``: ``max_qty = 5``); `name` is what to call it in messages."""

    text: str
    name: str


def parse_parts(parts: Mapping[str, Part], own: Config, checks: Checks | None = None, code_folder: Path | None = None) -> Config:
    """Read a configuration from the texts of its sections, as a store keeps them.

    Args:
        parts: by section, one of :data:`SECTIONS`; a section that is absent has its defaults.
        own: the node's own file: its cluster's name, its :data:`PER_NODE_KEYS` and ``[store]`` hold, and relative paths start there.
        checks: hooks that check calculations and sources.
        code_folder: where the files of user calculations are.

    Raises:
        ConfigError: with every problem; each names its part, and the line in it.
    """
    reading = _Reading("configuration", parts={section: part.name for section, part in parts.items()})
    for section, part in parts.items():
        found = _read_toml(reading, part.text, part.name)
        if found is not None:
            reading.document[section], lines = found
            reading.lines[(section,)] = 1
            reading.lines |= {(section, *path): line for path, line in lines.items()}
    if reading.problems:
        raise ConfigError(reading.problems, reading.name)
    _check_own(reading, own)
    config = _checked(reading, checks)
    cluster = config.cluster.model_copy(update={"name": own.cluster.name, **{name: getattr(own.cluster, name) for name in PER_NODE_KEYS}})
    made = config.model_copy(update={"cluster": cluster, "store": own.store})
    made._file, made._code_folder = own.file, code_folder
    _check_guarded(made, own, reading.name)
    return made


def _check_guarded(config: Config, own: Config, name: str) -> None:
    """No port is open to other hosts, and to strangers there. `own` has the lines of what is the node's own."""
    host = config.cluster.listens_at
    if host in ("127.0.0.1", "localhost", "[::1]"):
        return
    which = "listen" if config.cluster.listen else "address"
    reason, open_ports = "is open to other hosts, and nothing keeps strangers away from ", list[tuple[str, str]]()
    if config.leadership.enabled and not config.replication.guarded:
        open_ports.append(("the journals", "set replication.token_env or the tls_ files there"))
    for delivery_name, delivery in config.delivery.items():
        if delivery.method == "rdma" and delivery.token_env is None:
            open_ports.append((f"delivery.{delivery_name}", f"set delivery.{delivery_name}.token_env"))
    if open_ports:
        line = own.line("cluster", which)
        raise ConfigError([Problem(f"cluster.{which}", line, host, reason + what, hint) for what, hint in open_ports], name)


def _check_own(reading: _Reading, own: Config) -> None:
    """The cluster's part names no other cluster, and nothing that is each node's own."""
    cluster = reading.document.get("cluster", {})
    if cluster.get("name", own.cluster.name) != own.cluster.name:
        reading.add(("cluster", "name"), "is another cluster's name", f"these are the keys of cluster {own.cluster.name}")
    for name in PER_NODE_KEYS:
        if name in cluster:
            reading.add(("cluster", name), "is each node's own", "put it into the file of that node")


_KEPT_TEXT = 1 << 16


@functools.lru_cache(maxsize=4 * len(SECTIONS))
def _toml_of(text: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """A document and its lines, which are the caller's to read only: of a change of one key, the other sections were read before."""
    return tomllib.loads(text), key_lines(text)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _read_toml(reading: _Reading, text: str, part: str = "") -> tuple[dict[str, Any], dict[KeyPath, int]] | None:
    """The document and the lines of its keys, or None with a problem added."""
    try:
        document, lines = _toml_of(text) if len(text) < _KEPT_TEXT else _toml_of.__wrapped__(text)
        return _copied(document), lines
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"at line (\d+)", str(error))
        line = int(where[1]) if where else text.count("\n") + 1
        reading.problems.append(Problem("", line, None, f"is not TOML: {error}", "mind quotes and brackets", part))
    return None


def _checked(reading: _Reading, checks: Checks | None) -> Config:
    """The configuration, or ConfigError with every problem."""
    config = _validated(reading)
    _check_references(reading)
    _check_shared(reading)
    if checks:
        _run_checks(reading, checks)
    if config is None or reading.problems:
        order = [*reading.parts, ""]
        found = sorted(reading.problems, key=lambda p: (order.index(p.path.split(".")[0]) if p.part else -1, p.line or 0, p.path))
        raise ConfigError(found, reading.name)
    config._lines = reading.lines
    return config


def load_config(path: str | os.PathLike[str], checks: Checks | None = None) -> Config:
    """Read a configuration from a TOML file.

    Raises:
        ConfigError: with every problem; also if the file cannot be read.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError([Problem("", None, None, f"cannot be read: {reason}", "give the path of a TOML file")], str(file)) from None
    return parse_config(text, str(file), checks, file)


def default_config() -> Config:
    """The configuration of an empty document."""
    return Config.model_validate({})


def _validated(reading: _Reading) -> Config | None:
    """The configuration, or None with problems added.

    A table is checked as a whole only if each of its keys is valid, so the second pass leaves the wrong keys out.
    """
    try:
        return Config.model_validate(reading.document)
    except ValidationError as error:
        for details in error.errors():
            _add_validation_error(reading, details)
    wrong = {problem.path for problem in reading.problems}
    try:
        Config.model_validate(_without(reading.document, wrong))
    except ValidationError as error:
        for details in error.errors():
            if details["type"] == "refused":
                _add_validation_error(reading, details, wrong)
    return None


def _without(value: Any, wrong: set[str], path: KeyPath = ()) -> Any:
    """A copy of a document without its wrong keys; a list with a wrong element goes as a whole."""
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, inner in value.items():
        here = dotted((*path, name))
        if here not in wrong and not any(w.startswith(here + "[") for w in wrong):
            kept[name] = _without(inner, wrong, (*path, name))
    return kept


def _add_validation_error(reading: _Reading, details: ErrorDetails, known_wrong: Set[str] = frozenset()) -> None:
    path = _document_path(reading.document, details["loc"], details["type"])
    problems = details.get("ctx", {}).get("problems")
    if problems:
        for refusal in problems:
            doubtful = {dotted((*path, name)) for name in (refusal.key, *refusal.judged_by)} & known_wrong
            if not doubtful and not (known_wrong and refusal.reason == "is missing"):
                reading.add_refusal(path, refusal)
    elif details["type"] == "extra_forbidden":
        reading.add(path, "is not a known key", _nearest_key(path))
    else:
        reading.add(path, _reason(details), _hint(details, path))


def _document_path(document: Any, location: tuple[str | int, ...], kind: str) -> KeyPath:
    """pydantic's location without the names of union branches and ``[key]``."""
    path: list[str | int] = []
    for position, part in enumerate(location):
        is_container = isinstance(document, dict | list)
        last = position + 1 == len(location)
        if is_container and part != "[key]" and (_has(document, part) or (last and kind == "missing")):
            path.append(part)
            document = document[part] if _has(document, part) else None
    return tuple(path)


def _has(container: Any, part: str | int) -> bool:
    if isinstance(container, dict):
        return part in container
    return isinstance(container, list) and isinstance(part, int) and part < len(container)


def _reason(details: ErrorDetails) -> str:
    kind, message = details["type"], details["msg"]
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind == "string_pattern_mismatch":
        return f"must match {details['ctx']['pattern']}"
    return re.sub(r"^Input should be", "must be", message)


def _hint(details: ErrorDetails, path: KeyPath) -> str:
    value = details["input"]
    if details["type"] == "literal_error" and isinstance(value, str):
        allowed = re.findall(r"'([^']*)'", str(details["ctx"].get("expected", "")))
        near = difflib.get_close_matches(value, allowed, 1)
        return f"did you mean {near[0]!r}?" if near else ""
    if "is not built yet" in details["msg"]:
        names = SOURCE_TYPES if path[-1] == "type" else DELIVERY_METHODS
        return f"built today: {', '.join(names)}"
    return ""


def _nearest_key(path: KeyPath) -> str:
    name = str(path[-1])
    if any(word in name.lower() for word in ("password", "secret", "token", "credential", "api_key")):
        return "secrets come from the environment or a file: token_env, credentials_file"
    model = model_at(path[:-1])
    known = list(model.model_fields) if model else []
    near = difflib.get_close_matches(name, known, 1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else (f"known here: {', '.join(known)}" if known else "")


def model_at(path: KeyPath) -> type[BaseModel] | None:
    """The model of the table at a path, e.g. of ``("data_sources", "nasdaq")``."""
    current: Any = Config
    for part in path:
        if isinstance(current, type) and issubclass(current, BaseModel):
            found = current.model_fields.get(str(part))
            current = _plain(found.annotation) if found else None
        else:
            current = _plain(element_type(current))
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _plain(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def element_type(annotation: Any) -> Any:
    """Type of what a ``dict[str, T]`` or ``list[T]`` holds; None for anything else."""
    annotation = _plain(annotation)
    arguments = typing.get_args(annotation)
    return arguments[-1] if typing.get_origin(annotation) in (dict, list) and arguments else None


# ---------------------------------------------------------------- checks across tables


def _named_tables(reading: _Reading, *path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    tables = _value_at(reading.document, path)
    if isinstance(tables, dict):
        yield from ((name, table) for name, table in tables.items() if isinstance(table, dict))


def _check_shared(reading: _Reading) -> None:
    """What nodes that share shards need: sources that every node receives alike, a journal, an output stream."""
    if (reading.document.get("leadership") or {}).get("enabled") is not True:
        return
    for name, table in _named_tables(reading, "data_sources"):
        if table.get("type") not in (None, "multicast") and not ((source := _read_table(Source, table)) and source.continues):
            reason = "cannot go on at another node, as [leadership] wants it"
            hint = "receive it by multicast, SoupBinTCP or from a JetStream stream, or take enabled out of [leadership]"
            reading.add(("data_sources", name, "type"), reason, hint)
    deliveries = [table for _, table in _named_tables(reading, "delivery")]
    if not any(table.get("method") == "nats" and not table.get("embedded") for table in deliveries):
        reading.add(("delivery",), "has no NATS server that all nodes reach", 'add [delivery.events] with method = "nats" and its target')
    if (reading.document.get("journal") or {}).get("enabled") is False:
        reading.add(("journal", "enabled"), "is false, and standbys follow the journal", "take it out")


def _check_references(reading: _Reading) -> None:
    """No two deliveries share a ring, and what a delivery needs is put out."""
    rings: dict[str, str] = {}
    for name, table in _named_tables(reading, "delivery"):
        ring = table.get("ring")
        if isinstance(ring, str) and rings.setdefault(ring, name) != name:
            reading.add(("delivery", name, "ring"), f"is the ring of delivery.{rings[ring]} too", "give it another name")
        outputs = (reading.document.get("processing") or {}).get("outputs")
        if table.get("method") == "rdma" and isinstance(outputs, list) and "reference" not in outputs:
            reason = f'lacks "reference", without which subscribers of delivery.{name} do not know the instruments'
            reading.add(("processing", "outputs"), reason, "add it")


def _run_checks(reading: _Reading, checks: Checks) -> None:
    """Run the hooks on every table that they can read, so that one broken table hides no problem of another."""
    if checks.processing:
        tables = [dict(_named_tables(reading, "processing", section)) for section in ("calculations", "alerts", "bars")]
        for refusal in checks.processing(tables[0], tables[1], tables[2]):
            reading.add_refusal((), refusal)
    for name, table in _named_tables(reading, "data_sources"):
        if checks.source and (source := _read_table(Source, table)):
            for refusal in checks.source(name, source):
                reading.add_refusal(("data_sources", name), refusal)


def _read_table(model: type[TableT], table: dict[str, Any]) -> TableT | None:
    try:
        return model.model_validate(table)
    except ValidationError:
        return None
