"""A link between nodes over RDMA: the two begin on TCP, which says who they are, and go over to a channel once both have one.

The TCP connection stays open beside it: it ends when the other process does, which one-sided writes would never tell.
"""

from __future__ import annotations

import json
import select
from collections.abc import Mapping
from typing import Any

import structlog

from tickmesh.node.replication_link import Frame, Link, LinkOptions, SocketWire
from tickmesh.transports.rdma import ChannelError, RdmaChannel, shared_device
from tickmesh.transports.verbs import VerbsError

LEADER_RECORDS, STANDBY_RECORDS = 1 << 10, 1 << 16
"""Inboxes: a standby says little (64 KiB), a leader its whole journal (4 MiB)."""
_LOOK_S = 0.02
_log = structlog.get_logger("rdma")
_told: set[str] = set()


class RdmaWire:
    """A :class:`tickmesh.node.replication_link.Wire` over a channel, with the TCP connection that it began on."""

    name = "rdma"

    def __init__(self, channel: RdmaChannel, beside: SocketWire) -> None:
        self.channel, self._beside = channel, beside
        self._ended = select.poll()
        self._ended.register(beside.socket, select.POLLIN)

    def send(self, parts: list[memoryview], limit_s: float) -> int:
        """Send all of it."""
        try:
            return self.channel.send(parts, limit_s)
        except (ChannelError, VerbsError) as error:
            raise ConnectionError(str(error)) from error

    def receive_into(self, room: memoryview, limit_s: float) -> int | None:
        """Take what has come; 0 once the other side's process or connection has ended."""
        while True:
            step_s = min(max(limit_s, 0.0), _LOOK_S)
            try:
                count = self.channel.receive_into(room, step_s)
            except (ChannelError, VerbsError) as error:
                raise ConnectionError(str(error)) from error
            limit_s -= step_s
            if count:
                return count
            if self._ended.poll(0):  # nothing is said there any more, but the end
                return 0
            if limit_s <= 0:
                return None

    def interrupt(self) -> None:
        """End both."""
        self._beside.interrupt()
        self.channel.interrupt()

    def close(self) -> None:
        """Free both."""
        self._beside.interrupt()
        self.channel.close()
        self._beside.close()


def offered_channel(options: LinkOptions, records: int, peer: str) -> RdmaChannel | None:
    """A channel to offer to a peer; None: RDMA is not wanted, or there is no device for it, which is said once."""
    if not options.rdma:
        return None
    try:
        return RdmaChannel(shared_device(options.rdma_device), records, idle_mode=options.idle, peer=peer)
    except VerbsError as error:
        _tell("no RDMA here: links stay on TCP", error)
        return None


def answered_channel(options: LinkOptions, offer: Any, records: int, peer: str) -> RdmaChannel | None:
    """A channel connected to the one that a peer offers; None: there is none, or it cannot be, which is said once."""
    if not isinstance(offer, Mapping) or (channel := offered_channel(options, records, peer)) is None:
        return None
    return channel if connected(channel, offer) else None


def connected(channel: RdmaChannel, offer: Any) -> bool:
    """Connect a channel to the peer's; false: it cannot be, which is said once, and it is closed."""
    try:
        channel.connect(offer)
    except (ChannelError, VerbsError) as error:
        channel.close()
        _tell("RDMA does not come about: a link stays on TCP", error)
        return False
    return True


def go_over(link: Link, channel: RdmaChannel) -> None:
    """Carry a link's frames over a channel from now on."""
    beside = link.wire
    assert isinstance(beside, SocketWire)
    link.go_over_to(RdmaWire(channel, beside))


def offer_in(frame: Frame) -> Any:
    """The offer in a READY frame; None: there is none.

    Raises:
        FrameDamaged: its payload is something else.
    """
    return frame.json().get("rdma") if len(frame.payload) else None


def payload_of(channel: RdmaChannel | None) -> bytes:
    """The payload of a READY frame."""
    return json.dumps({"rdma": channel.offer()}).encode() if channel is not None else b""


def _tell(what: str, error: Exception) -> None:
    if str(error) not in _told:
        _told.add(str(error))
        _log.warning(what, reason=str(error))
