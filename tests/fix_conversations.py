"""Conversations of the FIX acceptance suite, held with our acceptor over TCP.

A ``.def`` script has lines ``iCONNECT``, ``I<message>`` (send), ``E<message>`` (expect), ``iDISCONNECT``, ``eDISCONNECT``; ``i1,``, ``I1,``
and so on for several connections. Body length and checksum are added where the script leaves them out. Time is the test's own: it goes on
only when the acceptor has handled and sent everything and the script still expects something.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tickmesh.node.fix_dictionary import Dictionary
from tickmesh.node.fix_frame import Message, MessageStream
from tickmesh.node.fix_session import Clock, Event, Received, SessionOptions, utc_timestamp
from tickmesh.node.fix_store import MemoryStore
from tickmesh.node.fix_tcp import Accepted, Acceptor, Link

PEER, OURS = "TW44", "ISLD"
_HEADER = {8, 9, 35, 34, 49, 52, 56, 43, 97, 115, 116, 122, 128, 129, 144, 145}
_STEP_NS, _STEPS_MAX = 500_000_000, 200
_TICK_S, _LIMIT_S = 0.001, 20.0
_TIMES = {52, 60, 122}
_TIME = re.compile(rb"\d{8}-\d\d:\d\d:\d\d(\.\d{3})?")
_STEP = re.compile(r"^([iIeE])(?:(\d+),)?(.*)$")


class Unexpected(Exception):
    """What came is not what the script says."""


class Time:
    """A clock that a test moves."""

    def __init__(self, wall_ns: int = 1_700_000_000_000_000_000) -> None:
        self.passed_ns, self._wall_ns = 0, wall_ns
        self.clock = Clock(lambda: self._wall_ns + self.passed_ns, lambda: self.passed_ns)

    def stamp(self, seconds: int = 0) -> str:
        return utc_timestamp(self.clock.wall() + seconds * 1_000_000_000, 0).decode()


class Echo:
    """Sends orders and security definitions back, once; rejects what else an application might be sent."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    async def handle(self, link: Link, event: Event) -> None:
        if isinstance(event, Received) and not event.admin:
            for message in event.messages():
                self._take(link, message)

    def _take(self, link: Link, message: Message) -> None:
        if message.type not in ("D", "d"):
            link.session.business_reject(message, 3, "Unsupported Message Type")
            return
        order = message.get(11) or b""
        if message.get(97) == b"Y" and order in self._seen:
            return
        self._seen.add(order)
        header = [pair for pair in message.fields if pair[0] == 97]
        link.session.send(message.type, sorted(pair for pair in message.fields[:-1] if pair[0] not in _HEADER), header)


@dataclass(frozen=True)
class Step:
    """A line of a script."""

    kind: str
    connection: int
    text: str


def steps(path: Path) -> Iterator[Step]:
    """What a script says to do."""
    for line in path.read_bytes().decode("latin-1").replace("\r", "").split("\n"):
        if line.strip() and not line.startswith("#"):
            found = _STEP.match(line)
            assert found, f"{path}: {line!r}"
            yield Step(found[1], int(found[2] or 1), found[3])


def wire(text: str, time: Time) -> bytes:
    """A message of a script as it is sent."""
    text = re.sub(r"<TIME([+-]\d+)?>", lambda found: time.stamp(int(found[1] or 0)), text)
    raw = text.encode("latin-1")
    given = re.search(rb"\x0110=[^\x01]*\x01$", raw)
    body = raw if given is None else raw[: given.start() + 1]
    if b"\x019=" not in body:
        begin, _, rest = body.partition(b"\x01")
        body = b"%b\x019=%d\x01%b" % (begin, len(rest), rest)
    return body + (b"10=%03d\x01" % (sum(body) & 0xFF) if given is None else raw[given.start() + 1 :])


def compare(expected: str, got: Message) -> None:
    """Fields, their order and values; times by their form; body length and checksum have been checked by whoever cut the stream.

    Raises:
        Unexpected: they differ.
    """
    wanted = [pair for pair in _pairs(expected) if pair[0] not in (9, 10)]
    found = [pair for pair in got.fields if pair[0] not in (9, 10)]
    same = len(wanted) == len(found) and all(
        a[0] == b[0] and (_TIME.fullmatch(b[1]) if a[0] in _TIMES else a[1] == b[1]) for a, b in zip(wanted, found)
    )
    if not same:
        raise Unexpected(f"expected {_shown(wanted)}, got {_shown(found)}")


def _pairs(text: str) -> list[tuple[int, bytes]]:
    return [(int(tag), value.encode("latin-1")) for tag, _, value in (part.partition("=") for part in text.split("\x01") if part)]


def _shown(fields: list[tuple[int, bytes]]) -> str:
    return "|".join(f"{tag}={value.decode('latin-1')}" for tag, value in fields)


class _Connection:
    """The initiator's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.stream = MessageStream()
        self.waiting: deque[Message] = deque()
        self.sent = self.received = 0
        self.ended = False
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            while data := await self.reader.read(65_536):
                self.received += len(data)
                self.waiting.extend(self.stream.feed(data))
        except OSError:
            pass  # closed with a reset is closed too
        self.ended = True

    def send(self, data: bytes) -> None:
        self.sent += len(data)
        self.writer.write(data)


class Conversation:
    """One script's run.

    Args:
        dictionary: against which the acceptor holds messages.
    """

    def __init__(self, path: Path, dictionary: Dictionary) -> None:
        self.path, self.time = path, Time()
        options = SessionOptions(
            begin_string="FIX.4.4", sender=OURS, target=PEER, initiator=False, reset="disconnect", dictionary=dictionary
        )
        accepted = Accepted(options, MemoryStore(), Echo())
        self.acceptor = Acceptor([accepted], clock=self.time.clock, tick_s=_TICK_S)
        self.connections: dict[int, _Connection] = {}

    async def run(self) -> None:
        """Hold it.

        Raises:
            Unexpected: the acceptor does something else.
        """
        port = await self.acceptor.start()
        try:
            for step in steps(self.path):
                await self._do(step, port)
        finally:
            for connection in self.connections.values():
                connection.reading.cancel()
                connection.writer.close()
            await self.acceptor.stop()

    async def _do(self, step: Step, port: int) -> None:
        if step.kind == "i" and step.text == "CONNECT":
            while self.acceptor.links and step.connection == 1:  # the last connection's end is not over yet
                await asyncio.sleep(_TICK_S)
            self.connections[step.connection] = _Connection(*await asyncio.open_connection("127.0.0.1", port))
            return
        connection = self.connections[step.connection]
        if step.kind == "i":
            connection.writer.close()
        elif step.kind == "I":
            connection.send(wire(step.text, self.time))
        elif step.kind == "E":
            await self._until(connection, step)
            compare(step.text, connection.waiting.popleft())
        else:
            await self._until(connection, step)
            if connection.waiting:
                raise Unexpected(f"expected the end of the connection, got {connection.waiting[0].raw!r}")
            connection.writer.close()

    async def _until(self, connection: _Connection, step: Step) -> None:
        """Wait for a message, or the end; let time go on only when nothing is under way."""
        moved = 0
        async with asyncio.timeout(_LIMIT_S):
            while not connection.waiting and not connection.ended:
                link = self.acceptor.links.get((PEER, OURS))
                idle = link is not None and link.bytes_in == connection.sent and link.bytes_out == connection.received
                if idle and step.connection == 1:
                    moved += 1
                    self.time.passed_ns += _STEP_NS
                    if moved > _STEPS_MAX:
                        raise Unexpected(f"nothing has come in place of {step.text!r}")
                await asyncio.sleep(4 * _TICK_S)
        if step.kind == "E" and not connection.waiting:
            raise Unexpected(f"the connection has ended in place of {step.text!r}")
