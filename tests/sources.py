"""One source under test: its receiver alone, routing into rings that the test reads; and local servers for it to connect to."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from aiohttp import web
from nodes import until

from tickmesh.control.config import Config, parse_config
from tickmesh.node.adapters import AdapterReceiver, open_adapter
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, EventArray, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.pipeline import make_table
from tickmesh.node.reader import open_reader
from tickmesh.node.receivers import ReceiverContext
from tickmesh.transports.ring import Ring
from tickmesh.transports.toolbox import IDLE_SLEEP, zeros_aligned

FAST = "reconnect_min_ms = 5\nreconnect_max_ms = 20\n"
"""Waits between connections, for tests."""


_ROUTERS = (Kind.TIMER, Kind.CODE)
"""Kinds of event that the router adds."""


def source_text(body: str) -> str:
    return f"[data_sources.feed]\n{body}\n"


def source_config(body: str, folder: Path | None = None) -> Config:
    return parse_config(source_text(body), file=None if folder is None else folder / "mesh.toml")


@dataclass
class Received:
    """A running receiver and what it has routed."""

    receiver: AdapterReceiver
    table: InstrumentTable
    ring: Ring
    reader: Any
    _events: list[EventArray] = field(default_factory=list)
    _made: int = 0

    @property
    def events(self) -> EventArray:
        """All events so far, in order."""
        self._take()
        return np.concatenate([np.zeros(0, EVENT), *self._events])

    def _take(self) -> None:
        while len(found := self.reader.read(1 << 14)):
            self._events.append(found.view(EVENT).copy())
            self._made += int(np.count_nonzero(~np.isin(self._events[-1]["kind"], _ROUTERS)))
        assert self.receiver.error is None, self.receiver.error

    def count(self) -> int:
        """How many events of the source there are so far."""
        self._take()
        return self._made

    def kinds(self, *kinds: Kind) -> EventArray:
        """Those of some kinds."""
        events = self.events
        return events[np.isin(events["kind"], kinds)]

    def wait(self, count: int, limit_s: float = 30.0) -> EventArray:
        """Wait for so many events of the source; returns them."""
        until(lambda: self.count() >= count, f"{count} events", limit_s)
        return self.made()

    def made(self) -> EventArray:
        """All but what the router adds: timers, and instruments' codes."""
        events = self.events
        return events[~np.isin(events["kind"], _ROUTERS)]

    def counter(self, name: str) -> int:
        assert self.receiver.error is None, self.receiver.error
        return self.receiver.counters().get(name, 0)

    def wait_for(self, **counters: int) -> None:
        """Wait until counters have reached these numbers."""
        for name, number in counters.items():
            end = time.monotonic() + 30
            while self.counter(name) < number:
                assert time.monotonic() < end, f"not within 30 s: {name} = {number}: {self.receiver.counters()}"
                time.sleep(0.005)


def opened(config: Config, capacity: int = 1 << 17) -> Received:
    """The receiver of source `feed`, not started."""
    table, ring = make_table(config), Ring.create(None, capacity, EVENT, reader_timeout_ms=60_000)
    reader = ring.reader("test")
    return Received(open_adapter("feed", config, ReceiverContext(table, [ring], 0, IDLE_SLEEP)), table, ring, reader)


@contextmanager
def receiving(
    body: str, folder: Path | None = None, *, capacity: int = 1 << 17, before: Callable[[Received], None] | None = None
) -> Iterator[Received]:
    """The receiver of a source, running; in the end it must stop."""
    received = opened(source_config(body, folder), capacity)
    if before:
        before(received)
    received.receiver.start()
    try:
        yield received
    finally:
        received.receiver.ask_stop()
        assert received.receiver.join(5), "the receiver does not stop"
        received.receiver.close()
        received.ring.close()


def file_events(data_format: str, path: Path, body: str = "") -> EventArray:
    """What a replay of a recording makes."""
    config = source_config(f'type = "file"\npath = "{path}"\ndata_format = "{data_format}"\n{body}')
    reader = open_reader("feed", config.data_sources["feed"], [path], make_table(config))
    out, parts = zeros_aligned(256, EVENT), []
    while count := reader.read(out):
        parts.append(out[:count].copy())
    return np.concatenate(parts)


def assert_same_events(found: EventArray, expected: EventArray) -> None:
    """The same but for times of receipt, and for times of events that have none of the venue's."""
    assert len(found) == len(expected)
    for name in ("kind", "side", "flags", "instrument", "price", "qty", "id", "aux", "seq"):
        routed = (expected["instrument"] == ALL_INSTRUMENTS) & (name == "price")  # the router's: the source's number
        different = np.flatnonzero((found[name] != expected[name]) & ~routed)
        assert not len(different), f"{name} differs first at {different[0]}: {found[different[0]]} and not {expected[different[0]]}"
    timed = expected["ts_event"] != expected["ts_recv"]
    assert np.array_equal(found["ts_event"][timed], expected["ts_event"][timed])


# ---------------------------------------------------------------- servers

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WebServer:
    """An aiohttp server on a free loopback port, in a thread of its own.

    Attributes:
        port: where it listens.
        requests: what was asked for, in order.
    """

    def __init__(self, routes: Mapping[str, Handler], tls: ssl.SSLContext | None = None) -> None:
        self._routes, self._tls, self.port = routes, tls, 0
        self.requests: list[tuple[str, dict[str, str]]] = []
        self._loop = asyncio.new_event_loop()
        self._started, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def ws(self) -> str:
        return f"{'wss' if self._tls else 'ws'}://127.0.0.1:{self.port}"

    @property
    def http(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        for path, handler in self._routes.items():
            app.router.add_get(path, self._noted(handler))
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        self.port = runner.addresses[0][1]
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()

    def _noted(self, handler: Handler) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.requests.append((request.path_qs, dict(request.headers)))
            return await handler(request)

        return handle


class RawServer:
    """A TCP server that answers every connection by a function of its socket, in a thread of its own: for what no proper server does."""

    def __init__(self, answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        self._answer, self.port, self.connections = answer, 0, 0
        self._loop = asyncio.new_event_loop()
        self._started, self._stop = threading.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()
