"""The store in a JetStream key-value bucket.

The bucket is an ordinary one (``nats kv`` shows it), with atomic batches and markers for entries whose time is over. ``/`` of a key is a
dot in the subject; a dot is written ``=2E``.

A whole state is read in four steps: the last message under the prefix, the stream's end, all keys, the last message again. It counts if
the last message is the same before and after, is among what was read (any replica may answer the second step), and is not inside a batch
whose end is not stored yet. A watch reads it once and then takes what an ordered consumer brings, entries that expire among it, a batch
as a whole. It asks for the last message every `confirm_s`, and reads anew if that is another one: a consumer that died costs time, not
truth.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import nats.errors
import nats.js.errors as js_errors
from nats.js.api import DeliverPolicy, DiscardPolicy, StorageType, StreamConfig

from tickmesh.control.store import (
    Backoff,
    Delete,
    Entry,
    Feed,
    Lease,
    LeaseHeld,
    LeaseLost,
    Put,
    Reading,
    Service,
    Store,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    TooManyKeys,
    Unchanged,
    VersionMismatch,
    check_key,
    now_s,
)

_KEYS_MAX = 1024  # of one read; the server's limit
_WRONG_LAST = frozenset({10071, 10164})
_FORBIDDEN_BATCH = 10174
_MARKER_TTL_S = 60
_TRIES = 40
_SLICE_S = 0.1
_BATCH_S = 0.02
"""A batch is stored at once: the rest of it comes within this time, or is read."""
_EXPECTED_OF = "Nats-Expected-Last-Subject-Sequence-Subject"
_EXPECTED, _BATCH, _EPOCH, _HOLDER, _TTL = "Nats-Expected-Last-Subject-Sequence", "Tm-Batch", "Tm-Epoch", "Tm-Holder", "Nats-TTL"
_SERVICES = "services/"


@dataclass(frozen=True)
class _Message:
    """A stored message; `seq` 0: there is none."""

    seq: int
    subject: str = ""
    value: bytes = b""
    headers: Mapping[str, str] | None = None

    def header(self, name: str) -> str:
        return (self.headers or {}).get(name, "")

    @property
    def live(self) -> bool:
        return self.seq > 0 and not self.header("KV-Operation") and not self.header("Nats-Marker-Reason")

    @property
    def place(self) -> tuple[int, int]:
        """Which message of its batch it is, from 1, and how many those are; (1, 1): it stands alone."""
        number, _, count = self.header(_BATCH).partition("/")
        return (int(number), int(count)) if count else (1, 1)

    @property
    def complete_at(self) -> int:
        """The stream's sequence at which the batch that it belongs to is stored."""
        number, count = self.place
        return self.seq + count - number

    @property
    def epoch(self) -> int:
        return int(self.header(_EPOCH) or self.seq) if self.header(_HOLDER) else 0


class KvStore(Store):
    """A store in a bucket. Make one with :meth:`open`; closing it leaves the client open.

    Attributes:
        bucket: its name.
    """

    def __init__(self, client: Any, bucket: str, *, confirm_s: float, timeout_s: float, rng: random.Random | None) -> None:
        """Use :meth:`open`."""
        super().__init__(f"bucket {bucket}", confirm_s, rng)
        self.bucket, self._client, self._timeout_s = bucket, client, timeout_s
        self._stream, self._root = f"KV_{bucket}", f"$KV.{bucket}."
        self._jetstream = client.jetstream(timeout=timeout_s)

    @classmethod
    async def open(
        cls,
        client: Any,
        bucket: str,
        *,
        replicas: int = 1,
        bytes_max: int = 64 << 20,
        confirm_s: float = 2.0,
        timeout_s: float = 2.0,
        rng: random.Random | None = None,
    ) -> KvStore:
        """Open a bucket, and make it if it is absent.

        Args:
            client: a connected nats-py client that reconnects for ever and buffers nothing (``pending_size=0``): no write is sent late.
            bucket: letters, digits, ``_`` and ``-``.
            replicas: of a bucket that is made: 1, or 3 and more in a NATS cluster.
            bytes_max: of a bucket that is made; writes are refused when it is full.
            confirm_s: how often a watch has an unchanged state confirmed.
            timeout_s: how long to wait for an answer.
            rng: for jitter.

        Raises:
            ValueError: the client buffers what is written while it is disconnected.
            StoreUnavailable: nobody answers, or the server cannot make such a bucket.
        """
        if client._max_pending_size > 0:
            raise ValueError("this NATS client would send writes late, after a lost connection: make it with pending_size=0")
        store = cls(client, bucket, confirm_s=confirm_s, timeout_s=timeout_s, rng=rng)
        config = StreamConfig(
            name=store._stream,
            subjects=[f"{store._root}>"],
            max_msgs_per_subject=1,
            max_bytes=bytes_max,
            discard=DiscardPolicy.NEW,
            storage=StorageType.FILE,
            num_replicas=replicas,
            allow_direct=True,
            allow_rollup_hdrs=True,
            allow_atomic=True,
            allow_msg_ttl=True,
            subject_delete_marker_ttl=_MARKER_TTL_S,
            deny_delete=True,
        )
        try:
            await store._jetstream.stream_info(store._stream)
        except js_errors.NotFoundError:
            async with store._asking(changes=True):
                await store._jetstream.add_stream(config)
        except (nats.errors.Error, TimeoutError, OSError, js_errors.Error) as error:
            raise store._unavailable(error, changes=False) from error
        return store

    # ------------------------------------------------------------ reading

    async def _get(self, key: str) -> Entry | None:
        return self._entry(await self._last(self._subject(key)))

    async def _read(self, prefix: str) -> Reading:
        return (await self._read_to(prefix))[0]

    async def _read_to(self, prefix: str) -> tuple[Reading, int]:
        """The state under a prefix, and the sequence of the last message in it."""
        backoff = Backoff(first_s=0.001, last_s=0.05, rng=self._rng)
        for _ in range(_TRIES):
            before = await self._last(self._subject(prefix) + ">")
            async with self._asking():
                info = await self._jetstream.stream_info(self._stream)
            found = await self._all(prefix) if before.seq else []
            after = await self._last(self._subject(prefix) + ">")
            seen = not after.seq or any(message.seq == after.seq for message in found)
            if before.seq == after.seq and seen and info.state.last_seq >= after.complete_at:
                entries = [entry for entry in map(self._entry, found) if entry is not None]
                ordered = {entry.key: entry for entry in sorted(entries, key=lambda e: e.key)}
                return Reading(ordered, info.state.last_seq, str(info.created)), after.seq
            await backoff.wait()
        raise StoreUnavailable(self.address, f"the keys under {prefix or 'it'} change faster than they can be read")

    async def _keys(self, prefix: str) -> list[str]:
        async with self._asking():
            info = await self._jetstream.stream_info(self._stream, subjects_filter=self._subject(prefix) + ">")
        return sorted(map(self._key, info.state.subjects or {}))

    async def _last(self, subject: str) -> _Message:
        """The last message of a subject or wildcard, from the stream's leader; also a marker."""
        async with self._asking():
            try:
                message = await self._jetstream.get_msg(self._stream, subject=subject)
            except js_errors.NotFoundError as error:
                if error.err_code != 10037:  # not "no message found": the bucket itself is gone
                    raise StoreUnavailable(self.address, "the bucket is not there") from error
                return _Message(0)
        return _Message(int(message.seq), message.subject, message.data or b"", message.headers)

    async def _all(self, prefix: str) -> list[_Message]:
        """The last message of each key under a prefix, markers included."""
        request: dict[str, Any] = {"multi_last": [self._subject(prefix) + ">"], "batch": _KEYS_MAX}
        found: list[_Message] = []
        async with self._asking(), asyncio.timeout(self._timeout_s * 2):
            inbox = self._client.new_inbox()
            subscription = await self._client.subscribe(inbox)
            try:
                while True:
                    await self._client.publish(f"$JS.API.DIRECT.GET.{self._stream}", json.dumps(request).encode(), reply=inbox)
                    end = await self._collect(subscription, found)
                    if end.get("Status") == "413":
                        raise TooManyKeys(prefix, _KEYS_MAX)
                    if end.get("Status") != "204" or end.get("Nats-Num-Pending", "0") == "0":
                        return found
                    request |= {"seq": found[-1].seq + 1, "up_to_seq": int(end["Nats-UpTo-Sequence"])}
            finally:
                with contextlib.suppress(nats.errors.Error):
                    await subscription.unsubscribe()

    async def _collect(self, subscription: Any, found: list[_Message]) -> Mapping[str, str]:
        while True:
            message = await subscription.next_msg(self._timeout_s)
            headers = dict(message.headers or {})
            if "Nats-Sequence" not in headers:
                return headers
            found.append(_Message(int(headers["Nats-Sequence"]), headers["Nats-Subject"], message.data, headers))

    def _entry(self, message: _Message) -> Entry | None:
        if not message.live:
            return None
        return Entry(self._key(message.subject), message.value, message.seq, message.epoch)

    def _subject(self, key: str) -> str:
        return self._root + key.replace("=", "=3D").replace(".", "=2E").replace("/", ".")

    def _key(self, subject: str) -> str:
        return subject.removeprefix(self._root).replace(".", "/").replace("=2E", ".").replace("=3D", "=")

    # ------------------------------------------------------------ changing

    async def _transaction(
        self, operations: Sequence[Put | Delete], lease: Lease | None, unchanged: Unchanged | None
    ) -> dict[str, int]:
        last = max(unchanged.versions.values(), default=0) if unchanged else 0
        for _ in range(_TRIES):
            messages = [await self._prepare(one) for one in operations]
            if isinstance(lease, _KvLease):
                messages.insert(0, lease.renewal())  # stored with the rest or not at all: the store checks who holds it
            if unchanged is not None:
                messages.insert(0, self._guard(unchanged.prefix, last))
            first = await self._store(messages)
            if first is not None:
                versions = {message[0]: first + number for number, message in enumerate(messages)}
                if isinstance(lease, _KvLease):
                    lease.version = versions[self._subject(lease.key)]
                return {one.key: versions[self._subject(one.key)] for one in operations if isinstance(one, Put)}
            if isinstance(lease, _KvLease):
                await lease.confirm()
            for one in operations:
                if one.expected is not None:
                    await self._check_version(one.key, one.expected)
            if unchanged is not None:
                reading, last = await self._read_to(unchanged.prefix)
                unchanged.check(reading.entries)
            # a marker came or went between looking and writing: look again
        raise StoreUnavailable(self.address, "other writers were faster every time")

    async def _prepare(self, operation: Put | Delete) -> tuple[str, bytes, dict[str, str]]:
        subject, headers = self._subject(operation.key), {}
        if operation.expected == 0:
            last = await self._last(subject)
            if last.live:
                raise VersionMismatch(operation.key, 0, last.seq)
            headers[_EXPECTED] = str(last.seq)
        elif operation.expected is not None:
            headers[_EXPECTED] = str(operation.expected)
        if isinstance(operation, Put):
            return subject, operation.value, headers
        return subject, b"", headers | {"KV-Operation": "DEL", _TTL: f"{_MARKER_TTL_S}s"}

    def _guard(self, prefix: str, last: int) -> tuple[str, bytes, dict[str, str]]:
        """A marker that is stored only if the last message below a prefix is `last`; the others keep the conditions of their own keys."""
        subject = self._subject(prefix)
        headers = {_EXPECTED: str(last), _EXPECTED_OF: f"{subject}>", "KV-Operation": "DEL", _TTL: f"{_MARKER_TTL_S}s"}
        return subject.rstrip("."), b"", headers

    async def _check_version(self, key: str, expected: int) -> None:
        last = await self._last(self._subject(key))
        if (last.seq if last.live else 0) != expected:
            raise VersionMismatch(key, expected, last.seq if last.live else 0)

    async def _store(self, messages: Sequence[tuple[str, bytes, dict[str, str]]]) -> int | None:
        """Store all messages in one step; returns the sequence of the first, or None if one was not at its expected sequence.

        A guard, which is the first then, is no part of what watches wait for: its key is another one than theirs.
        """
        count, guards = len(messages), int(_EXPECTED_OF in messages[0][2])
        batch: dict[str, str] = {"Nats-Batch-Id": os.urandom(9).hex()} if count > 1 else {}
        async with self._asking(changes=True):
            for number, (subject, value, headers) in enumerate(messages[:-1], 1):
                place = {"Nats-Batch-Sequence": str(number)}
                if number > guards:
                    place[_BATCH] = f"{number - guards}/{count - guards}"
                await self._client.publish(subject, value, headers=headers | batch | place)
            subject, value, headers = messages[-1]
            if batch:
                whole = f"{count - guards}/{count - guards}"
                batch |= {"Nats-Batch-Sequence": str(count), _BATCH: whole, "Nats-Batch-Commit": "1"}
            answer = await self._client.request(subject, value, timeout=self._timeout_s, headers=(headers | batch) or None)
        reply = json.loads(answer.data)
        error = reply.get("error")
        if error is None:
            return int(reply["seq"]) - count + 1
        if error.get("err_code") in _WRONG_LAST:
            return None
        hint = "; it was not made by tickmesh" if error.get("err_code") == _FORBIDDEN_BATCH else ""
        raise StoreUnavailable(self.address, f"{error.get('description')} (JetStream error {error.get('err_code')}){hint}")

    # ------------------------------------------------------------ watching

    def _open_feed(self, prefix: str) -> Feed:
        return _KvFeed(self, prefix)

    # ------------------------------------------------------------ leases

    async def _acquire(self, key: str, value: bytes, ttl_s: float) -> Lease:
        subject, holder = self._subject(key), os.urandom(9).hex()
        for _ in range(_TRIES):
            last = await self._last(subject)
            if last.live:
                raise LeaseHeld(key, last.value, last.epoch)
            since_s = now_s()
            lease = _KvLease(self, key, value, ttl_s, since_s, holder)
            version = await self._store([(subject, value, lease.headers(last.seq))])
            if version is not None:
                lease.epoch = lease.version = version
                return lease
        raise StoreUnavailable(self.address, "other writers were faster every time")

    async def _depose(self, key: str, epoch: int) -> bool:
        for _ in range(_TRIES):
            last = await self._last(self._subject(key))
            if not last.live or last.epoch != epoch:
                return False
            with contextlib.suppress(VersionMismatch):  # its holder lives, and has just renewed it
                await self.transaction([Delete(key, last.seq)])
                return True
        raise StoreUnavailable(self.address, "the holder was faster every time")

    # ------------------------------------------------------------ services

    def _service(self, service: Service, ttl_s: float) -> tuple[Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]]:
        key = f"{_SERVICES}{service.name}/{service.instance}"
        value = json.dumps(asdict(service)).encode()

        async def announce() -> None:
            await self._store([(self._subject(key), value, {_TTL: _duration(ttl_s)})])

        async def withdraw() -> None:
            await self.delete(key)

        return announce, withdraw

    async def services(self, name: str) -> Sequence[Service]:
        """See :meth:`Store.services`."""
        entries = await self.list(f"{_SERVICES}{check_key(name)}/")
        return [Service(**json.loads(entry.value)) for entry in entries.values()]

    # ------------------------------------------------------------ errors

    def _asking(self, *, changes: bool = False) -> _Asking:
        return _Asking(self, changes)

    def _unavailable(self, error: BaseException, *, changes: bool) -> StoreError:
        if isinstance(error, js_errors.ServiceUnavailableError | nats.errors.NoRespondersError):
            reason = "no JetStream answers, or the bucket is not there or has no leader"
        elif isinstance(error, nats.errors.TimeoutError | TimeoutError):
            reason = f"no answer within {self._timeout_s} s"
        else:
            reason = str(error) or type(error).__name__
        if "permissions violation" in reason.lower():
            return StoreRefused(self.address, reason)
        return StoreUnavailable(self.address, reason, maybe_done=changes)


def _duration(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


class _Asking:
    """Turns the client's errors into ours."""

    def __init__(self, store: KvStore, changes: bool) -> None:
        self._store, self._changes = store, changes

    async def __aenter__(self) -> None:
        if not self._store._client.is_connected:
            raise StoreUnavailable(self._store.address, "the connection is lost")

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, nats.errors.Error | TimeoutError | OSError | js_errors.Error):
            raise self._store._unavailable(error, changes=self._changes) from error


class _KvLease(Lease):
    """A lease: an entry with a time to live, whose renewal is a put at the version that we wrote last."""

    def __init__(self, store: KvStore, key: str, value: bytes, ttl_s: float, since_s: float, holder: str) -> None:
        super().__init__(key, 0, ttl_s, since_s)
        self.version = 0
        self._store, self._value, self._holder = store, value, holder

    def headers(self, expected: int) -> dict[str, str]:
        found = {_EXPECTED: str(expected), _TTL: _duration(self.ttl_s), _HOLDER: self._holder}
        return found | {_EPOCH: str(self.epoch)} if self.epoch else found

    def renewal(self) -> tuple[str, bytes, dict[str, str]]:
        return self._store._subject(self.key), self._value, self.headers(self.version)

    async def confirm(self) -> None:
        """Learn the version of our own last renewal, whose answer may have been lost."""
        last = await self._store._last(self._store._subject(self.key))
        if not last.live or last.header(_HOLDER) != self._holder:
            raise LeaseLost(self.key, self.epoch, f"epoch {last.epoch} holds it" if last.live else "it has ended in the store")
        self.version = last.seq

    async def _renew(self) -> None:
        for _ in range(_TRIES):
            version = await self._store._store([self.renewal()])
            if version is not None:
                self.version = version
                return
            await self.confirm()
        raise StoreUnavailable(self._store.address, "other writers were faster every time")

    async def _end(self) -> None:
        for _ in range(_TRIES):
            try:
                await self._store.transaction([Delete(self.key, self.version)])
                return
            except VersionMismatch:
                try:
                    await self.confirm()
                except LeaseLost:
                    return


class _KvFeed:
    """A prefix as its messages change it: read once, then kept up with by an ordered consumer, which brings every message once, in order.

    Whatever is odd (a consumer that missed something, a batch whose end does not come) is put right by reading everything again.
    """

    def __init__(self, store: KvStore, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._subject = store._subject(prefix) + ">"
        self._woken = asyncio.Event()
        self._subscription: Any = None
        self._reading: Reading | None = None
        self._last_seq = 0
        self._pushed: deque[_Message] = deque()
        self._reconnects = store._client.stats["reconnects"]

    async def next(self) -> Reading:
        """See :class:`Feed`."""
        if self._reading is None:
            await self._subscribe()
            return await self._read_all()
        await self._wait(self._store.confirm_s)
        if not self._pushed and (await self._store._last(self._subject)).seq == self._last_seq:
            return self._reading
        while self._pushed:
            whole = self._whole()
            if whole is None:
                break
            if whole or not self._pushed:
                return self._apply(self._reading, whole)
            self._woken.clear()
            await self._wait(_BATCH_S)
            if not self._woken.is_set():
                break  # the rest of the batch has another prefix, or is lost
        return await self._read_all()

    async def close(self) -> None:
        """See :class:`Feed`."""
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    async def _read_all(self) -> Reading:
        self._woken.clear()
        self._reading, self._last_seq = await self._store._read_to(self._prefix)
        return self._reading

    def _whole(self) -> int | None:
        """How many of the messages brought make whole batches, from the first on; None: a part of one is missing, and will not come.

        A bucket keeps one message per key, so that a part which was overwritten before it was brought is never brought.
        """
        while self._pushed and self._pushed[0].seq <= self._last_seq:
            self._pushed.popleft()
        waiting, whole = list(self._pushed), 0
        while whole < len(waiting):
            first, (_, count) = waiting[whole], waiting[whole].place
            parts = waiting[whole : whole + count]
            if any((part.seq, part.place) != (first.seq + n, (n + 1, count)) for n, part in enumerate(parts)):
                return None
            if len(parts) < count:
                break
            whole += count
        return whole

    def _apply(self, reading: Reading, count: int) -> Reading:
        """The state after so many of the messages that have been brought."""
        entries = dict(reading.entries)
        for message in [self._pushed.popleft() for _ in range(count)]:
            self._last_seq = message.seq
            entries.pop(self._store._key(message.subject), None)
            if (entry := self._store._entry(message)) is not None:
                entries[entry.key] = entry
        if not self._pushed:
            self._woken.clear()
        ordered = {key: entries[key] for key in sorted(entries)}
        self._reading = Reading(ordered, max(reading.index, self._last_seq), reading.origin)
        return self._reading

    async def _subscribe(self) -> None:
        async with self._store._asking():
            self._subscription = await self._store._jetstream.subscribe(
                self._subject,
                stream=self._store._stream,
                cb=self._take,
                ordered_consumer=True,
                deliver_policy=DeliverPolicy.NEW,
                inactive_threshold=30.0,
            )

    async def _take(self, message: Any) -> None:
        self._pushed.append(_Message(int(message.metadata.sequence.stream), message.subject, message.data or b"", message.headers))
        self._woken.set()

    async def _wait(self, limit_s: float) -> None:
        """Until something has been brought, at most so long."""
        client, end = self._store._client, asyncio.get_running_loop().time() + limit_s
        while not self._woken.is_set() and asyncio.get_running_loop().time() < end:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_SLICE_S, limit_s)):
                    await self._woken.wait()
            if not client.is_connected or cast(int, client.stats["reconnects"]) != self._reconnects:
                raise StoreUnavailable(self._store.address, "the connection was lost")
