"""A source that logs on to a FIX venue, subscribes to its symbols, and hands what comes in sequence to the compiled decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import structlog

from tickmesh.control.config import FixOptions, Source
from tickmesh.node.adapters import Adapter, Sink
from tickmesh.node.connected_sources import connect
from tickmesh.node.fix_session import Event, Fields, LoggedOn, Received, SequenceReset, Session, SessionOptions, warm
from tickmesh.node.fix_store import FileStore, MemoryStore, Store, StoreError
from tickmesh.node.fix_tcp import Link
from tickmesh.node.reader import SourceError
from tickmesh.node.venues import unsubscribable
from tickmesh.transports.connection import ConnectionLost, LoginRefused, Refused

_REFUSALS = {b"\x0135=Y\x01": "market_data_refused", b"\x0135=j\x01": "business_rejects", b"\x0135=3\x01": "rejects"}
"""What a venue says when it does not like a request, and what it is counted under."""
_SHOWN_BYTES = 300
_log = structlog.get_logger("source")


class FixSource(Adapter):
    """An initiator. Sequences begin anew with each logon, unless there is a store in which they are kept."""

    carries = "messages"

    def __init__(self, name: str, options: Source, sink: Sink, resolve: Callable[[str], Path] = Path) -> None:
        super().__init__(name, options, sink, resolve)
        assert options.fix is not None, "the configuration says so"
        self._fix: FixOptions = options.fix
        self._address = urlsplit(options.endpoint or "")
        if self._fix.subscribe and (not options.symbols or unsubscribable(options.symbols)):
            wrong = ", ".join(unsubscribable(options.symbols)) or "none are given"
            raise SourceError(name, f"symbols must be names, to subscribe to them ({wrong}); or set fix.subscribe = false")
        if self._address.scheme == "tls":
            self.tls()  # what is missing is said now
        self._memory = MemoryStore()
        self._requests = 0
        try:
            self._session_options = self._made_options()
        except ValueError as error:
            raise SourceError(name, f"fix: {error}") from None
        warm()

    def _made_options(self) -> SessionOptions:
        fix = self._fix
        return SessionOptions(
            begin_string=fix.begin_string, sender=fix.sender, target=fix.target, initiator=True, heartbeat_s=fix.heartbeat_s,
            appl_version="9" if fix.begin_string == "FIXT.1.1" else "", reset=fix.reset, username=self.options.user,
            next_expected=fix.next_expected,
            password=self.secret("password"), logon_s=self.options.connect_timeout_ms / 1e3,
        )  # fmt: skip

    async def run(self) -> None:
        store = self._store()
        try:
            session = Session(self._session_options, store)
            reader, writer = await connect(self, self._address.hostname or "", self._address.port or 0, tls=self._address.scheme == "tls")
            link = Link(session, reader, writer, self._handle)
            self._session = session
            try:
                ended = await link.run()
            except StoreError as error:
                raise Refused(self.endpoint, str(error)) from error
            finally:
                for name in ("garbled", "duplicates", "resend_requests_sent", "test_requests_sent"):
                    self.sink.count(name, session.counters[name])
        finally:
            store.close()
        raise LoginRefused(self.endpoint, ended.reason) if ended.refused else ConnectionLost(self.endpoint, ended.reason)

    def _store(self) -> Store:
        if self._fix.store is None:
            return self._memory
        try:
            return FileStore(self.resolve(self._fix.store))
        except StoreError as error:
            raise Refused(self.endpoint, str(error)) from error

    async def _handle(self, event: Event) -> None:
        if isinstance(event, Received):
            self._look_at(event.data)
            await self.sink(event.data)
        elif isinstance(event, LoggedOn):
            self.sink.connected()
            if self._fix.subscribe:
                self._session.send("V", self._subscription())
        elif isinstance(event, SequenceReset):
            await self.sink.gap()

    def _look_at(self, data: bytes) -> None:
        for word, name in _REFUSALS.items():
            if word in data:
                self.sink.count(name)
                at = data.index(word)
                shown = data[at : at + _SHOWN_BYTES].decode("latin-1").replace("\x01", "|")
                _log.warning("the venue answers with a reject", source=self.name, answer=shown)

    def _subscription(self) -> Fields:
        """MarketDataRequest: snapshots and changes of every symbol, bids, offers and trades."""
        self._requests += 1
        symbols = [(55, symbol.encode("latin-1")) for symbol in self.options.symbols]
        name = f"{self.name}-{self._requests}".encode("latin-1", "replace")
        return [
            (262, name), (263, b"1"), (264, b"%d" % self._fix.depth), (265, b"1"), (267, b"3"), (269, b"0"), (269, b"1"), (269, b"2"),
            (146, b"%d" % len(symbols)), *symbols,
        ]  # fmt: skip
