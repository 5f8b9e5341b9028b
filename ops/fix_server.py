"""The simulated market as a FIX venue that programs connect to: what ``tickmesh simulate --fix`` runs.

Every client that may log on has a session of its own, told apart by its CompID. The market stands still while nobody is subscribed, so
that who comes late misses nothing of the day; after the day's end its last books stay there to be asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tickmesh.node.fix_session import SessionOptions
from tickmesh.node.fix_store import FileStore, MemoryStore, Store
from tickmesh.ops.fix_market_data import FixVenue, Market
from tickmesh.ops.simulator import SimulatorConfig, SimulatorConfigError
from tickmesh.transports.pacing import Pace

_LOOK_S = 0.1
_COUNTED = ("logons", "sent", "resent", "resend_requests_received", "rejects_sent")


@dataclass(frozen=True, kw_only=True)
class FixServerOptions:
    """How the venue is reached.

    Attributes:
        host, port: where it listens; port 0: any free one.
        sender: its CompID.
        clients: CompIDs of those who may log on.
        user, password: what a Logon must say (553, 554); None: anything.
        store: folder in which each client's session has one of its own; None: sessions begin anew with the program.

    Raises:
        SimulatorConfigError: CompIDs that cannot be, or are there twice.
    """

    host: str = "127.0.0.1"
    port: int = 0
    sender: str = "TICKMESH"
    clients: tuple[str, ...] = ("CLIENT",)
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    store: Path | None = None

    def __post_init__(self) -> None:
        bad = [name for name in self.clients if "/" in name or name in (".", "..")]  # each is a folder's name
        if bad or not self.clients or len(set(self.clients)) < len(self.clients):
            raise SimulatorConfigError("fix_client", self.clients, "different CompIDs without a slash, at least one")
        self.sessions()

    def sessions(self) -> list[SessionOptions]:
        """The options of every client's session."""
        try:
            return [
                SessionOptions(
                    begin_string="FIX.4.4", sender=self.sender, target=client, initiator=False, username=self.user,
                    password=self.password if self.user is not None else None,
                )
                for client in self.clients
            ]  # fmt: skip
        except ValueError as error:
            raise SimulatorConfigError("fix_client", self.clients, str(error)) from None

    def make_store(self, session: SessionOptions) -> Store:
        """Where a session is kept."""
        return MemoryStore() if self.store is None else FileStore(self.store / session.target)


@dataclass(frozen=True)
class Served:
    """What came of it: the market as it stands, and what happened, by name."""

    market: Market
    counts: dict[str, Any]


def factor_of(speed: str) -> float:
    """Simulated seconds per second.

    Raises:
        PaceError: the speed is none.
        SimulatorConfigError: it has no limit.
    """
    factor = float(Pace(speed).state["factor"][0])
    if not factor:
        raise SimulatorConfigError("speed", speed, "realtime or a factor: a FIX session has no use for all of a day at once")
    return factor


async def serve(
    config: SimulatorConfig,
    options: FixServerOptions,
    speed: str = "realtime",
    stop: threading.Event | None = None,
    progress: Callable[[int], None] | None = None,
    listening: Callable[[str], None] | None = None,
) -> Served:
    """Serve the market until `stop` is set, or the task is cancelled (Ctrl-C); everybody is logged out in the end.

    Args:
        progress: told the number of messages so far, several times a second.
        listening: told the address.

    Raises:
        OSError: the address cannot be used.
        StoreError: the folder cannot.
        PaceError, SimulatorConfigError: the speed cannot.
    """
    venue = FixVenue(config, options.sessions(), stores=options.make_store, speed=factor_of(speed))
    try:
        endpoint = f"tcp://{options.host}:{await venue.start(options.host, options.port)}"
        if listening:
            listening(endpoint)
        with contextlib.suppress(asyncio.CancelledError):
            await _watch(venue, stop or threading.Event(), progress)
    finally:
        await venue.stop()
    return Served(venue.market, {"endpoint": endpoint} | _counts(venue))


async def _watch(venue: FixVenue, stop: threading.Event, progress: Callable[[int], None] | None) -> None:
    while not stop.is_set():
        await asyncio.sleep(_LOOK_S)
        venue.check()
        if progress:
            progress(venue.market.simulator.messages)


def _counts(venue: FixVenue) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for counters in venue.acceptor.session_counters.values():
        total.update(counters)
    refused = venue.acceptor.counters["refused"]
    return {name: total[name] for name in _COUNTED} | {"refused": refused, "orders": sum(one.orders for one in venue.venues)}
