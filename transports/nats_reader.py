"""Reading a JetStream stream in order from any place on, each message once, over lost connections and restarted servers.

A pull consumer asks for a bounded number of messages at a time, so a slow reader is never flooded. When the connection or the consumer is
lost, a new consumer continues after the last message that was handed out.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

import nats.errors
import nats.js.errors as js_errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from tickmesh.transports.connection import backoff_s
from tickmesh.transports.nats import LinkError, NatsLink, StreamMissing

_EXPIRES_S, _HEARTBEAT_S = 5.0, 0.5
_SILENCE_S = 3 * _HEARTBEAT_S
_BYTES_PER_PULL = 32 << 20
_INACTIVE_S = 60.0
_STRETCH = 16
"""Messages that are handed out without a pause."""


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message of a stream.

    Attributes:
        sequence: in the stream.
        subject: as published.
        headers: as published.
        data: as published.
    """

    sequence: int
    subject: str
    headers: dict[str, str]
    data: bytes


class StreamReader:
    """Reads one stream from stream sequence `start` on."""

    def __init__(
        self, link: NatsLink, stream: str, start: int, *, batch: int = 256, subject: str | None = None, created: datetime | None = None
    ) -> None:
        """Nothing is asked for yet.

        Args:
            link: the connection; may be shared.
            stream: name.
            start: sequence of the first message wanted.
            batch: messages asked for at a time.
            subject: only messages on it.
            created: when the stream was made, by :func:`stream_state`; one that was made later is read from its beginning.
        """
        self.created = created
        self._link, self._stream, self._next, self._batch, self._subject = link, stream, start, batch, subject
        self._left = self._delivered = 0
        self._consumer = ""
        self._inbox = ""
        self._subscription: Any = None
        self._come: deque[Any] = deque()
        self._at_a_stretch = 0
        self._news = asyncio.Event()
        self._lost = False
        self._created_once = False
        link.on_disconnect(self._on_disconnect)

    async def next(self) -> StoredMessage:
        """The next message; waits for it.

        Raises:
            StreamMissing: there is no such stream (only at first: one that is gone later is waited for).
            NatsUnreachable: the link was closed.
        """
        attempt = 0
        while True:
            if not self._consumer or self._lost:
                if not await self._continue(attempt):
                    attempt += 1
                    continue
                attempt = 0
            if self._left <= 0:
                await self._ask()
            found = await self._receive()
            if found is not None:
                return found

    async def close(self) -> None:
        """Stop; the server forgets the consumer."""
        self._link.forget(self._on_disconnect)
        await self._forget()
        if self._consumer and self._link.connected:
            with contextlib.suppress(Exception):
                await self._link.client.jetstream(timeout=1).delete_consumer(self._stream, self._consumer)
        self._consumer = ""

    def _on_disconnect(self) -> None:
        self._lost = True
        self._news.set()

    async def _take(self, come: deque[Any], news: asyncio.Event, message: Any) -> None:
        come.append(message)
        news.set()

    async def _receive(self) -> StoredMessage | None:
        if self._come:
            self._at_a_stretch += 1
            if self._at_a_stretch % _STRETCH == 0:
                await asyncio.sleep(0)  # others have something to do too
        else:
            self._news.clear()
            if self._lost:
                return None
            try:
                async with asyncio.timeout(_SILENCE_S):
                    await self._news.wait()
            except TimeoutError:
                self._consumer = ""  # no heartbeat: the consumer is gone
                return None
            if not self._come:
                return None  # the connection is lost
        message = self._come.popleft()
        headers = message.headers or {}
        status = headers.get("Status")
        if status is not None and not message.data:
            self._on_status(status, headers.get("Description", ""))
            return None
        self._left -= 1
        sequence, delivered = _sequences(message.reply)
        if delivered != self._delivered + 1:  # one was lost on its way, as between two servers
            self._consumer = ""
            return None
        self._delivered = delivered
        if sequence < self._next:
            return None
        self._next = sequence + 1
        return StoredMessage(sequence, message.subject, headers, message.data)

    def _on_status(self, status: str, description: str) -> None:
        """100: heartbeat. 404, 408 and some 409: this request is over. Anything else: the consumer is gone."""
        if status == "100":
            return
        over = status in ("404", "408") or (status == "409" and ("exceed" in description.lower() or "completed" in description.lower()))
        self._left = 0
        if not over:
            self._consumer = ""

    async def _ask(self) -> None:
        request = {"batch": self._batch, "expires": int(_EXPIRES_S * 1e9), "idle_heartbeat": int(_HEARTBEAT_S * 1e9)}
        request["max_bytes"] = _BYTES_PER_PULL
        try:
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}"
            await self._link.client.publish(subject, json.dumps(request).encode(), reply=self._inbox)
            self._left = self._batch
        except (nats.errors.Error, OSError):
            self._lost = True

    async def _forget(self) -> None:
        if self._subscription is not None:
            with contextlib.suppress(Exception):
                await self._subscription.unsubscribe()
            self._subscription = None

    async def _continue(self, attempt: int) -> bool:
        """Make a consumer that starts at the next message; false if it did not work this time."""
        if attempt:
            await asyncio.sleep(backoff_s(attempt))
        await self._link.wait_connected()
        self._lost, self._consumer = False, ""
        await self._forget()
        try:
            jetstream = self._link.client.jetstream(timeout=2)
            info = await jetstream.stream_info(self._stream)
            if (self._created_once and info.state.last_seq < self._next - 1) or self.created not in (None, info.created):
                self._next = 1  # the stream was made anew
            self.created = info.created
            config = ConsumerConfig(
                ack_policy=AckPolicy.NONE,
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=max(1, self._next),
                inactive_threshold=_INACTIVE_S,
                filter_subject=self._subject,
                mem_storage=True,
                num_replicas=1,
            )
            made = await jetstream.add_consumer(self._stream, config)
            self._inbox = f"_INBOX.{os.urandom(9).hex()}"
            self._come, self._news = deque(), asyncio.Event()
            take = partial(self._take, self._come, self._news)
            self._subscription = await self._link.client.subscribe(self._inbox, cb=take, pending_msgs_limit=0, pending_bytes_limit=0)
            self._consumer = made.name
        except js_errors.NotFoundError:
            if not self._created_once:
                raise StreamMissing(self._stream) from None
            return False
        except (nats.errors.Error, js_errors.Error, OSError):
            return False
        self._left = self._delivered = 0
        self._created_once = True
        return True


def _sequences(reply: str) -> tuple[int, int]:
    """Sequences in stream and consumer, of a delivered message's reply subject:
    ``$JS.ACK.[domain.account.]stream.consumer.delivered.STREAM.CONSUMER…``"""
    tokens = reply.split(".")
    at = 5 if len(tokens) == 9 else 7
    return int(tokens[at]), int(tokens[at + 1])


async def stream_bounds(link: NatsLink, stream: str) -> tuple[int, int]:
    """(first, last) sequence in a stream; last is first - 1 if it is empty.

    Raises:
        StreamMissing: there is none.
        LinkError: the server does not answer.
    """
    state = await stream_state(link, stream)
    return state.first, state.last


class StreamState(NamedTuple):
    """What a stream holds.

    Attributes:
        first, last: sequences; last is first - 1 if it is empty.
        created: when it was made.
    """

    first: int
    last: int
    created: datetime | None

    @property
    def session(self) -> str:
        """Ten characters that tell it from another stream of its name, made before or after it; empty: the server does not say when."""
        return hashlib.blake2b(self.created.isoformat().encode(), digest_size=5).hexdigest() if self.created else ""


async def stream_state(link: NatsLink, stream: str) -> StreamState:
    """What a stream holds now.

    Raises:
        StreamMissing: there is none.
        LinkError: the server does not answer.
    """
    try:
        info = await link.client.jetstream(timeout=3).stream_info(stream)
    except js_errors.NotFoundError:
        raise StreamMissing(stream) from None
    except (nats.errors.Error, js_errors.Error) as error:
        raise LinkError(f"the server at {link.url} does not answer JetStream requests ({error or type(error).__name__})") from error
    return StreamState(int(info.state.first_seq), int(info.state.last_seq), info.created)


async def find_by_header(link: NatsLink, stream: str, subject: str, header: str, wanted: int) -> int:
    """Stream sequence of the first message whose (rising) integer `header` is at least `wanted`; after the last one if none is.

    A binary search, one request per step.

    Raises:
        StreamMissing: there is no such stream.
    """
    low, last = await stream_bounds(link, stream)
    jetstream, high = link.client.jetstream(timeout=3), last + 1
    while low < high:
        middle = (low + high) // 2
        try:
            message = await jetstream.get_msg(stream, seq=middle, subject=subject, next=True)
        except js_errors.NotFoundError:
            high = middle  # nothing from here on
            continue
        if int((message.headers or {}).get(header, "0")) < wanted:
            low = int(message.seq or middle) + 1
        else:
            high = middle
    return low
