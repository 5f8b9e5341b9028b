"""Asking a venue's re-request server for what neither line has brought, before it is given up as a gap.

The receive loop calls :func:`ask` while the arbiter waits for missing sequences. After `wait_ns`, the time that the other line has, it
sends a MoldUDP64 request packet (session, first sequence, count; MoldUDP64 1.00, "Request Packet") from a socket that only the server
can answer, again after every `timeout_ns`, at most `tries_max` times in a row without progress. Then it lets the arbiter emit the GAP.
Answers are packets of the feed, and take the same way; those of another session, or that are no answer, are dropped and counted.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np
from numba import types

from tickmesh.node.arbiter import EXPECTED, FORCE_TO, HELD_COUNT, HELD_SEQ_MIN, KNOWN_NEXT, SESSION
from tickmesh.node.protocol import Framing
from tickmesh.transports.multicast import open_answers, receive_batch, warm_line
from tickmesh.transports.toolbox import address_of, be16, be64, inlined, le16, le64, outlined, put_be16, put_be64, put_le16, put_le64

ANSWER_LINE = 3
"""The arbiter's line of answers: A is 0, B is 1."""
FOREVER_NS = 1 << 62
"""What the arbiter is told to wait for: it is :func:`ask` that ends the wait."""
_COUNT_MAX = 0xFFFE
_HEADER_BYTES = 20
_MSG_DONTWAIT, _MSG_NOSIGNAL = 0x40, 0x4000
_send = types.ExternalFunction("send", types.int64(types.int32, types.uint64, types.uint64, types.int32))

REQUEST = np.dtype(
    [
        (name, "<i8")
        for name in (
            "socket", "wait_ns", "timeout_ns", "tries_max", "first", "end", "tries", "due", "requests", "recovered", "given_up",
            "foreign", "refused", "session", "has_session",
        )
    ]
)  # fmt: skip
"""State and counters (array of one): the hole ``[first, end)`` that is being asked for, how often, and when again."""
Request = namedtuple("Request", "state packet answers buffer packets")


@outlined
def note_session(request: Any, arbiter: Any, buffer: Any, packets: Any, count: Any) -> Any:
    """Remember the session that a request must name: the arbiter's, not that of a line which lags behind in the session before.

    To be called after the packets were decoded: where the session is a new one, a packet of it is among them.
    """
    r, session = request.state[0], arbiter.state[SESSION]
    if r.has_session != 0 and r.session == session:
        return
    for i in range(count):
        at = np.int64(packets[i].offset)
        if packets[i].length >= _HEADER_BYTES and np.int64(be64(buffer, at)) ^ np.int64(be16(buffer, at + 8)) << 17 == session:
            put_le64(request.packet, 0, le64(buffer, at))
            put_le16(request.packet, 8, le16(buffer, at + 8))
            r.has_session, r.session, r.end = 1, session, 0  # what was missing in the session before is not asked for any more
            return


@inlined
def lacks(arbiter: Any) -> Any:
    """Whether the arbiter waits for something."""
    s = arbiter.state
    return s[EXPECTED] != 0 and (s[HELD_COUNT] > 0 or s[KNOWN_NEXT] > s[EXPECTED])


@outlined
def ask(request: Any, arbiter: Any, now_ns: Any) -> Any:
    """Request what is missing if it is time, or give it up; whether answers are to be looked for."""
    r, s = request.state[0], arbiter.state
    first = s[EXPECTED]
    end = s[HELD_SEQ_MIN] if s[HELD_COUNT] > 0 else s[KNOWN_NEXT]
    if end <= first:
        r.end = 0
        return False
    if first < r.first or first >= r.end:  # another hole
        r.first, r.tries, r.due = first, 0, now_ns + r.wait_ns
    elif first != r.first:  # a part has come: the rest is asked for at once
        if r.tries > 0:
            r.due = now_ns
        r.first, r.tries = first, 0
    r.end = end  # heartbeats may move it on, which is no progress
    if now_ns >= r.due:
        if r.tries >= r.tries_max:
            r.given_up += end - first
            r.end = 0
            s[FORCE_TO] = end
        else:
            _send_request(request, first, min(end - first, _COUNT_MAX))
            r.tries += 1
            r.due = now_ns + r.timeout_ns
    return r.tries > 0


@outlined
def _send_request(request: Any, first: Any, count: Any) -> Any:
    r = request.state[0]
    put_be64(request.packet, 10, np.uint64(first))
    put_be16(request.packet, 18, np.uint16(count))
    flags = np.int32(_MSG_DONTWAIT | _MSG_NOSIGNAL)
    sent = np.int64(_send(np.int32(r.socket), address_of(request.packet, 0), np.uint64(_HEADER_BYTES), flags))
    r.requests += 1
    r.refused += sent != _HEADER_BYTES


@outlined
def take_answers(request: Any, now_ns: Any) -> Any:
    """Receive answers, those that are some packed together in ``request.packets``; returns how many."""
    count, kept = receive_batch(request.answers, request.buffer, request.packets, ANSWER_LINE, now_ns), np.int64(0)
    for i in range(count):
        packet, at = request.packets[i], np.int64(request.packets[i].offset)
        if packet.length < _HEADER_BYTES or not _answers(request, at):
            request.state[0].foreign += 1
            continue
        request.packets[kept].offset, request.packets[kept].length = packet.offset, packet.length
        request.packets[kept].ts_recv = packet.ts_recv
        kept += 1
    return kept


@inlined
def _answers(request: Any, at: Any) -> Any:
    """Whether a packet has messages of our session, not beyond what we lack."""
    same = le64(request.buffer, at) == le64(request.packet, 0) and le16(request.buffer, at + 8) == le16(request.packet, 8)
    sequence, count = np.int64(be64(request.buffer, at + 10)), np.int64(be16(request.buffer, at + 18))
    return same and 0 < count <= _COUNT_MAX and 0 < sequence <= request.state[0].end


@outlined
def drop_answers(request: Any, now_ns: Any) -> Any:
    """Receive what comes while nothing is asked for (late, twice, an ICMP error) and count it: else epoll would never wait again."""
    request.state[0].foreign += receive_batch(request.answers, request.buffer, request.packets, ANSWER_LINE, now_ns)


@inlined
def count_recovered(request: Any, before: Any, arbiter: Any) -> Any:
    """After answers were decoded: how many missing sequences they have brought."""
    request.state[0].recovered += max(np.int64(0), min(arbiter.state[EXPECTED], request.state[0].end) - before)


# ---------------------------------------------------------------- the Python face


class RerequestCounters(NamedTuple):
    """`requests` sent, sequences `recovered` by answers and `given_up` (then a GAP), `foreign` packets: no answer, or too late."""

    requests: int
    recovered: int
    given_up: int
    foreign: int


class Rerequest:
    """The requests of one source.

    Args:
        endpoint: ``udp://HOST:PORT`` of the server.
        wait_ns: how long what is missing may still come by itself.
        timeout_ns: how long an answer may take.
        tries_max: requests without progress before it is given up.

    Raises:
        MulticastError: the endpoint is none, or cannot be reached.
    """

    def __init__(self, endpoint: str, wait_ns: int, timeout_ns: int, tries_max: int) -> None:
        self._receiver = open_answers(endpoint)
        state = np.zeros(1, REQUEST)
        state["socket"], state["wait_ns"], state["timeout_ns"] = self._receiver.fileno(), wait_ns, timeout_ns
        state["tries_max"] = tries_max
        self.kernel = Request(
            state, np.zeros(_HEADER_BYTES + 4, np.uint8), self._receiver.kernel, self._receiver.buffer, self._receiver.packets
        )

    def fileno(self) -> int:
        """For epoll: readable when an answer has come."""
        return self._receiver.fileno()

    def counters(self) -> RerequestCounters:
        """Counters so far."""
        return RerequestCounters(*(int(self.kernel.state[0][name]) for name in RerequestCounters._fields))

    def close(self) -> None:
        """Close the socket; the loop has ended."""
        self._receiver.close()


def can_rerequest(framing: Framing) -> bool:
    """Whether a framing's header is that of MoldUDP64, whose requests these are."""
    sequence, count = framing.sequence, framing.count
    if sequence is None or count is None or framing.header_bytes != _HEADER_BYTES:
        return False
    fields = (*framing.session, sequence, count)
    return [(one.offset, one.size, one.big) for one in fields] == [(0, 8, True), (8, 2, True), (10, 8, True), (18, 2, True)]


def warm_request() -> Request:
    """A request of the types that a loop is compiled for; nothing is open."""
    return Request(np.zeros(1, REQUEST), np.zeros(_HEADER_BYTES + 4, np.uint8), *warm_line())
