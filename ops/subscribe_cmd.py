"""``tickmesh subscribe PATTERN``: print a cluster's outputs as they come, or from any place of their streams.

A pattern is a subject, ``tm.CLUSTER.KIND.SYMBOL``, with ``*`` for any kind or symbol. Without ``--from`` the maps of core NATS are printed,
from now on and at most once. With ``--from`` the JetStream streams of all shards are read: every output, exactly once.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import uvloop

from tickmesh.node.event import Kind
from tickmesh.node.frames import event_maps, kind_name, token_symbol
from tickmesh.node.subscription import Batch, MapSubscription, Subscription, subscribe
from tickmesh.transports.nats import LinkError

EXIT_OK, EXIT_USAGE, EXIT_SERVER, EXIT_INTERRUPTED = 0, 2, 3, 130
_HEAD = ("kind", "symbol", "seq", "ts_event", "ts_recv")
_KINDS = {kind_name(kind): kind for kind in Kind}


class PatternError(ValueError):
    """The pattern is no subject of ours."""

    def __init__(self, pattern: str, reason: str) -> None:
        super().__init__(f"{pattern!r} {reason}: write tm.CLUSTER.KIND.SYMBOL, e.g. 'tm.demo.bbo.*' or 'tm.demo.>'")


@dataclass(frozen=True)
class Wanted:
    """What a pattern means when streams are read: `None` stands for any."""

    cluster: str
    kinds: list[Kind] | None
    symbols: list[str] | None


def parse_pattern(pattern: str) -> Wanted:
    """Cluster, kinds and symbols of a pattern.

    Raises:
        PatternError: it has another form, or names an unknown kind.
    """
    tokens = pattern.split(".")
    if tokens[-1] == ">":
        tokens = [*tokens[:-1], *["*"] * max(0, 4 - len(tokens) + 1)]
    if len(tokens) != 4 or tokens[0] != "tm" or tokens[1] in ("", "*"):
        raise PatternError(pattern, "is not a subject of a cluster's outputs")
    kind, symbol = tokens[2], tokens[3]
    if kind != "*" and kind not in _KINDS:
        raise PatternError(pattern, f"names the unknown kind {kind!r} (known: {', '.join(sorted(_KINDS))})")
    return Wanted(tokens[1], None if kind == "*" else [_KINDS[kind]], None if symbol == "*" else [token_symbol(symbol)])


def map_line(fields: dict[str, Any]) -> str:
    """One event as a line for people: UTC time, kind, symbol, sequence, then its own fields."""
    time_ns = fields.get("ts_event") or fields.get("ts_recv") or 0
    symbol = "-" if fields.get("symbol") is None else fields["symbol"]
    own = "  ".join(f"{name}={_shown(value)}" for name, value in fields.items() if name not in _HEAD)
    return f"{_time(int(time_ns))}  {fields.get('kind', '?')!s:<10} {symbol!s:<10} {fields.get('seq', '')!s:>10}  {own}"


def batch_line(batch: Batch) -> str:
    """One batch as a line for people."""
    last = batch.first + max(len(batch.events), batch.missing) - 1
    what = f"{batch.missing} missing" if batch.missing else f"{len(batch.events)} events"
    return f"shard {batch.shard}  outputs {batch.first}..{last}  {what}  epoch {batch.epoch}  config {batch.config_version}"


def _time(ns: int) -> str:
    seconds, rest = divmod(ns, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return ",".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)


class _Printer:
    """Prints until enough was printed."""

    def __init__(self, out: TextIO, as_json: bool, count: int | None) -> None:
        self._out, self._json, self._left = out, as_json, count

    def put(self, value: Any, line: Callable[[Any], str], plain: Callable[[Any], dict[str, Any]]) -> bool:
        """Print one thing; true if that was the last."""
        print(json.dumps(plain(value)) if self._json else line(value), file=self._out, flush=True)
        if self._left is not None:
            self._left -= 1
        return self._left == 0


async def _print_maps(subscription: MapSubscription, printer: _Printer) -> None:
    async with subscription:
        async for _, fields in subscription:
            if printer.put(fields, map_line, dict):
                return


async def _print_stream(subscription: Subscription, printer: _Printer, batches: bool) -> None:
    async with subscription:
        async for batch in subscription:
            if batches or batch.missing:
                if printer.put(batch, batch_line, _batch_map):
                    return
                continue
            names = subscription.calculations(batch.shard, batch.first)
            for fields in event_maps(batch.events, subscription.names(batch.shard), names):
                if printer.put(fields, map_line, dict):
                    return


def _batch_map(batch: Batch) -> dict[str, Any]:
    names = ("shard", "epoch", "config_version", "first", "missing", "stream_sequence")
    return {**{name: getattr(batch, name) for name in names}, "events": len(batch.events)}


async def _subscribe(
    pattern: str, server: str, start: int | Literal["now", "all"] | None, count: int | None, batches: bool, as_json: bool, out: TextIO
) -> None:
    printer = _Printer(out, as_json, count)
    if start is None and not batches:
        await _print_maps(subscribe(server, pattern=pattern), printer)
        return
    wanted = parse_pattern(pattern)
    subscription = subscribe(server, cluster=wanted.cluster, kinds=wanted.kinds, symbols=wanted.symbols, from_sequence=start)
    await _print_stream(subscription, printer, batches)


def subscribe_command(
    pattern: str,
    *,
    server: str = "nats://127.0.0.1:4222",
    from_sequence: int | Literal["now", "all"] | None = None,
    count: int | None = None,
    batches: bool = False,
    as_json: bool = False,
    out: TextIO | None = None,
) -> int:
    """Print what matches `pattern` until `count` lines, Ctrl-C or a closed pipe.

    Args:
        pattern: ``tm.CLUSTER.KIND.SYMBOL`` with wildcards.
        server: NATS address.
        from_sequence: read the streams from this output sequence (or ``"all"``, ``"now"``) instead of core NATS.
        count: end after so many lines.
        batches: print batches of the streams instead of events.
        as_json: one JSON object per line.
        out: default: standard output.

    Returns:
        Exit status: 0; 2 for a wrong pattern; 3 if the server or the stream cannot be used; 130 after Ctrl-C.
    """
    try:
        uvloop.run(_subscribe(pattern, server, from_sequence, count, batches, as_json, out or sys.stdout))
    except PatternError as error:
        print(f"tickmesh: {error}", file=sys.stderr)
        return EXIT_USAGE
    except LinkError as error:
        print(f"tickmesh: {error}", file=sys.stderr)
        return EXIT_SERVER
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, so does the interpreter's own complaint
        return EXIT_OK
    except (KeyboardInterrupt, asyncio.CancelledError):
        return EXIT_INTERRUPTED
    return EXIT_OK
