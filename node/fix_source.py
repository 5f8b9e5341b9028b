"""A source that logs on to a FIX venue, subscribes to its symbols, and hands what comes in sequence to the compiled decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import structlog

from tickmesh.control.config import FixOptions, Source
from tickmesh.node.adapters import Adapter, Sink, session_number
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
    """An initiator. Sequences begin anew with each logon, or are never reset: then the venue is asked for everything from the place on that
    our decoder has come to, after a restart that the journals have come to. The store's own place is ahead of that: it knows what was
    handed on, not what became of it."""

    carries = "messages"
    counted = True

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
        self.resumes = self._fix.reset == "never" and "seq" not in options.fields  # places are MsgSeqNums
        self.renews = self._fix.subscribe
        self._memory = MemoryStore()
        self._begins_at, self._begun = 1, False
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
            if self.resumes:
                self._go_on(store)
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

    def _go_on(self, store: Store) -> None:
        """Have the session begin where we have come to in its sequences; at their beginning, if ours are of an earlier run of them."""
        place, run = self.sink.next_sequence, self.sink.session
        if place and run not in (0, session_number(_run_name(store))):
            place = 1
        elif place and not run:
            place = min(place, store.next_in)  # nobody knows whether it is of this run
        elif self._begun:
            place = max(place, store.next_in)  # what the session has rejected is not asked for again, and is a gap
        store.set_next_in(place or store.next_in)
        self._begins_at = store.next_in

    async def _begin(self, event: LoggedOn) -> None:
        """Say where the sequences stand; a run of them that is new to us empties the books."""
        await self.sink.begin(1 if event.reset else self._begins_at, _run_name(self._session.store))
        self._begun = True

    async def _handle(self, event: Event) -> None:
        if isinstance(event, Received):
            self._look_at(event.data)
            await self.sink(event.data)
        elif isinstance(event, LoggedOn):
            if self.resumes:
                await self._begin(event)
            else:
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


def _run_name(store: Store) -> str:
    """What a run of sequences is called, by when it began."""
    return f"{store.begun_ms & ((1 << 40) - 1):010x}"
