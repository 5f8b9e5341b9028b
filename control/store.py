"""The store: small values under keys, with versions, transactions, watches, leases and services. One face, two servers behind it.

``control/consul_store.py`` keeps them in Consul, ``control/kv_store.py`` in a JetStream key-value bucket. What this module promises holds
for both, and one contract test runs against both:

* A **version** rises with every change of a key, also across its deletion. A transaction changes all of its keys or none, and nobody
  sees it half done.
* A **watch** never ends and never lies: it gives whole states of a prefix, keeps the last good one while the store cannot be read, says
  that it is stale and since when, and reads everything anew after any error.
* A **lease** has an **epoch**, a number that rises with every holder of the key: the fencing token. It counts as lost from the moment at
  which another could have it, whether or not the store can be asked.

A store belongs to the asyncio loop that it was made in.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, TypeVar

VALUE_BYTES_MAX = 320 << 10
"""Of one value, and of all values of one transaction: what Consul's limit of 512 KiB for a request leaves after its encoding."""
OPERATIONS_MAX = 64
"""Of one transaction; Consul's limit."""
_KEY = re.compile(r"[A-Za-z0-9_.=-]+(/[A-Za-z0-9_.=-]+)*")
_KEY_CHARACTERS_MAX = 200
_T = TypeVar("_T")


# ---------------------------------------------------------------- errors


class StoreError(Exception):
    """The store cannot do as asked. The message says what to do."""


class StoreUnavailable(StoreError):
    """The store does not answer, or has no leader.

    Attributes:
        address: of the store, without secrets.
        reason: the last failure.
        maybe_done: a change may have been made nevertheless; read before you repeat it.
    """

    def __init__(self, address: str, reason: str, *, maybe_done: bool = False) -> None:
        doubt = "; the change may have been made all the same: read before repeating it" if maybe_done else ""
        super().__init__(f"the store at {address} cannot be used ({reason}): check that it runs and can be reached{doubt}")
        self.address, self.reason, self.maybe_done = address, reason, maybe_done


class StoreRefused(StoreError):
    """The store does not let us do this.

    Attributes:
        address: of the store, without secrets.
        reason: what it said.
    """

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"the store at {address} refuses ({reason}): give a token or login that may do this")
        self.address, self.reason = address, reason


class VersionMismatch(StoreError):
    """A key does not have the version that was expected; nothing was changed.

    Attributes:
        key: the key.
        expected: the version it should have had; 0: it should have been absent.
        found: the version that it had when looked at afterwards; 0: absent.
    """

    def __init__(self, key: str, expected: int, found: int) -> None:
        def said(version: int) -> str:
            return f"at version {version}" if version else "absent"

        super().__init__(f"{key} is {said(found)}, it was expected {said(expected)}: read it again and repeat the change")
        self.key, self.expected, self.found = key, expected, found


class ValueTooLarge(StoreError):
    """A value, or the values of a transaction together, are too large.

    Attributes:
        key: the key; of a transaction, the one that was too much.
        size, limit: bytes.
    """

    def __init__(self, key: str, size: int, limit: int = VALUE_BYTES_MAX) -> None:
        super().__init__(f"{size} bytes with {key} are more than the {limit} that a store takes: split the value, or shorten it")
        self.key, self.size, self.limit = key, size, limit


class TransactionRefused(StoreError):
    """A transaction that no store can do.

    Attributes:
        reason: why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"this is no transaction: {reason}")
        self.reason = reason


class BadKey(StoreError):
    """A key or prefix that no store takes.

    Attributes:
        key: as given.
    """

    def __init__(self, key: str) -> None:
        what = f"parts of letters, digits and _ . = -, separated by /, at most {_KEY_CHARACTERS_MAX} characters; a prefix ends with /"
        super().__init__(f"{key!r} is no key: write {what}")
        self.key = key


class BadTtl(StoreError):
    """A lease or a service cannot live so short a time in this store.

    Attributes:
        ttl_s: as given.
        least_s: what the store allows.
    """

    def __init__(self, ttl_s: float, least_s: float) -> None:
        super().__init__(f"a time to live of {ttl_s} s is too short: this store takes {least_s} s and more")
        self.ttl_s, self.least_s = ttl_s, least_s


class TooManyKeys(StoreError):
    """A prefix holds more keys than can be read at once.

    Attributes:
        prefix: the prefix.
        limit: how many can be read.
    """

    def __init__(self, prefix: str, limit: int) -> None:
        super().__init__(f"more than {limit} keys are, or were lately, under {prefix}: ask for a longer prefix")
        self.prefix, self.limit = prefix, limit


class LeaseHeld(StoreError):
    """Somebody else holds the lease.

    Attributes:
        key: of the lease.
        holder: the value that the holder gave.
        epoch: of the holder.
    """

    def __init__(self, key: str, holder: bytes, epoch: int) -> None:
        super().__init__(f"{key} is held by {holder.decode(errors='replace')!r} under epoch {epoch}: wait until it is free")
        self.key, self.holder, self.epoch = key, holder, epoch


class LeaseLost(StoreError):
    """The lease is not ours any more: stop doing what it allows.

    Attributes:
        key: of the lease.
        epoch: ours.
        reason: why.
    """

    def __init__(self, key: str, epoch: int, reason: str) -> None:
        super().__init__(f"the lease {key}, epoch {epoch}, is lost ({reason}): what it allows must stop")
        self.key, self.epoch, self.reason = key, epoch, reason


# ---------------------------------------------------------------- values


@dataclass(frozen=True)
class Entry:
    """A key as the store holds it.

    Attributes:
        key, value: what was put.
        version: > 0, rises with every change of the key.
        epoch: of the lease, if the key is one that is held; else 0.
    """

    key: str
    value: bytes
    version: int
    epoch: int = 0


@dataclass(frozen=True)
class Put:
    """Give a key a value. `expected`: only if it has this version; 0: only if it is absent; None: in any case."""

    key: str
    value: bytes
    expected: int | None = None


@dataclass(frozen=True)
class Delete:
    """Remove a key. `expected`: only if it has this version; None: in any case, also if it is absent."""

    key: str
    expected: int | None = None


@dataclass(frozen=True)
class Unchanged:
    """A condition of a transaction: the keys under a prefix are at the versions that were read, which need not be long ago.

    A key that has been added meanwhile is noticed by a bucket, and not by Consul. A bucket with replicas does not notice a plain put of
    another key that its servers are agreeing on at that very moment; keys of the transaction itself have their own versions for that.

    Attributes:
        prefix: ends with ``/``.
        versions: of every key under it.
    """

    prefix: str
    versions: Mapping[str, int]

    def check(self, found: Mapping[str, Entry], *, added: bool = True) -> None:
        """Raise VersionMismatch for the first key that is not as it was; `added`: also for one that was not there."""
        there = {key: entry.version for key, entry in found.items()}
        for key in sorted({*self.versions, *there} if added else self.versions):
            if there.get(key, 0) != self.versions.get(key, 0):
                raise VersionMismatch(key, self.versions.get(key, 0), there.get(key, 0))


@dataclass(frozen=True)
class Snapshot:
    """All keys under a prefix as they were at one moment.

    Attributes:
        prefix: what is watched.
        entries: by key.
        version: the highest version among them; 0 if there are none.
        stale: it could not be confirmed lately; the store may hold something else.
        reason: why it is stale.
    """

    prefix: str
    entries: Mapping[str, Entry]
    version: int
    stale: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Service:
    """A process that others may want to find.

    Attributes:
        name: what it is, one part of a key.
        instance: which one, unique for the name, one part of a key.
        address, port: where it listens.
        meta: further facts.
    """

    name: str
    instance: str
    address: str = ""
    port: int = 0
    meta: Mapping[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- waiting


class Backoff:
    """How long to wait before the next try: doubles from `first_s` to `last_s`, with jitter, until :meth:`reset`."""

    def __init__(self, first_s: float = 0.05, last_s: float = 2.0, rng: random.Random | None = None) -> None:
        self._first_s, self._last_s, self._rng, self._tries = first_s, last_s, rng or random.Random(), 0

    def reset(self) -> None:
        """The last try was good."""
        self._tries = 0

    async def wait(self) -> None:
        """Wait before the next try."""
        await asyncio.sleep(self.next_s())

    def next_s(self) -> float:
        """How long to wait before the next try, for one who waits for something else too."""
        pause = min(self._last_s, self._first_s * 2.0 ** min(self._tries, 16))
        self._tries += 1
        return pause * self._rng.uniform(0.5, 1.0)


def now_s() -> float:
    """Seconds on a clock that also runs while the host sleeps, as the store's does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def end_task(task: asyncio.Task[Any], again_s: float = 0.1) -> None:
    """Cancel a task until it has ended: ``asyncio.wait_for`` of Python 3.11, which client libraries use, may lose a cancellation."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=again_s)


async def surely(work: Coroutine[Any, Any, _T]) -> _T:
    """Wait for work so that a cancellation of the waiting is never lost, as it may be where client libraries wait; see :func:`end_task`."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task})
    finally:
        await end_task(task, again_s=1.0)  # it may have something to put in order first
    return task.result()


# ---------------------------------------------------------------- watches


@dataclass(frozen=True)
class Reading:
    """What a backend read.

    Attributes:
        entries: all keys under the prefix, at one moment.
        index: a number that never falls while the store keeps its data.
        origin: another one if the store was made anew.
    """

    entries: Mapping[str, Entry]
    index: int
    origin: str = ""


class Feed(Protocol):
    """A backend's side of a watch. Any error ends it; the watch then opens another one."""

    async def next(self) -> Reading:
        """The first time at once; then when something has changed, or after the store's `confirm_s` as a confirmation."""
        ...

    async def close(self) -> None:
        """Let go of what it holds."""
        ...


class Watch:
    """Follows a prefix. Iterate over it, or look at :attr:`snapshot`; close it, or use it as a context manager.

    An iteration gives a snapshot when the keys have changed, when it becomes stale, and when it is confirmed again; a slow reader gets the
    newest only. A store that comes back without its data (an index that fell, and no keys) changes nothing: the last good snapshot stays,
    stale.

    Attributes:
        prefix: what is watched.
        restarts: how often everything was read anew after an error.
    """

    def __init__(self, prefix: str, feed: Callable[[], Feed], backoff: Backoff) -> None:
        self.prefix, self.restarts = prefix, 0
        self._feed, self._backoff = feed, backoff
        self._snapshot: Snapshot | None = None
        self._serial = self._given = 0
        self._confirmed_s: float | None = None
        self._index, self._origin, self._emptied = 0, "", False
        self._error = ""
        self._news = asyncio.Event()
        self._closed = False
        self._task = asyncio.create_task(self._run(), name=f"watch {prefix}")

    @property
    def snapshot(self) -> Snapshot | None:
        """The last good one; None until the first."""
        return self._snapshot

    @property
    def age_s(self) -> float:
        """Seconds since the store last confirmed the snapshot; infinite before the first. While all is well, about `confirm_s` at most."""
        return float("inf") if self._confirmed_s is None else now_s() - self._confirmed_s

    @property
    def last_error(self) -> str:
        """Why the store cannot be read now; empty if it can."""
        return self._error

    async def close(self) -> None:
        """End it, and every iteration over it."""
        self._closed = True
        await end_task(self._task)
        self._news.set()

    async def __aenter__(self) -> Watch:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[Snapshot]:
        return self

    async def __anext__(self) -> Snapshot:
        while not self._closed:
            if self._snapshot is not None and self._serial > self._given:
                self._given = self._serial
                return self._snapshot
            self._news.clear()
            await self._news.wait()
        raise StopAsyncIteration

    # -- how

    async def _run(self) -> None:
        while True:
            feed = self._feed()
            try:
                while True:
                    self._take(await feed.next())
            except Exception as error:  # whatever it is, a watch goes on
                self._suspect(str(error) or type(error).__name__)
            finally:
                with contextlib.suppress(Exception):
                    await feed.close()
            self.restarts += 1
            await self._backoff.wait()

    def _take(self, reading: Reading) -> None:
        fell = reading.index < self._index or reading.origin != self._origin
        held = self._snapshot is not None and bool(self._snapshot.entries)
        self._emptied = held and not reading.entries and (fell or self._emptied)
        self._index, self._origin = reading.index, reading.origin
        self._backoff.reset()
        if self._emptied:
            self._suspect("the store has lost its data: what was under this prefix is not there any more")
            return
        self._confirmed_s, self._error = now_s(), ""
        old = self._snapshot
        if old is None or old.stale or old.entries != reading.entries:
            version = max((entry.version for entry in reading.entries.values()), default=0)
            self._publish(Snapshot(self.prefix, MappingProxyType(dict(reading.entries)), version))

    def _suspect(self, reason: str) -> None:
        self._error = reason
        old = self._snapshot
        if old is not None and not old.stale:
            self._publish(Snapshot(old.prefix, old.entries, old.version, stale=True, reason=reason))

    def _publish(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._serial += 1
        self._news.set()


# ---------------------------------------------------------------- leases


class Lease(ABC):
    """A key that we hold for a time. Made by :meth:`Store.acquire`, which also keeps it renewed unless told otherwise.

    Attributes:
        key: of the lease.
        epoch: the fencing token, higher than that of every holder before.
        ttl_s: how long it lives without a renewal.
    """

    def __init__(self, key: str, epoch: int, ttl_s: float, since_s: float) -> None:
        self.key, self.epoch, self.ttl_s = key, epoch, ttl_s
        self._deadline_s = since_s + ttl_s
        self._loss: LeaseLost | None = None
        self._over = asyncio.Event()
        self._busy = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def held(self) -> bool:
        """Whether it is surely ours now. False as soon as another could have it, without asking the store."""
        if self._loss is None and now_s() >= self._deadline_s:
            self._lose("it was not renewed in time")
        return self._loss is None

    def check(self) -> None:
        """Do nothing while it is held.

        Raises:
            LeaseLost: it is not.
        """
        if not self.held:
            assert self._loss is not None
            raise self._loss

    async def wait_lost(self) -> LeaseLost:
        """Wait until it is lost or released; says why."""
        while self.held:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._deadline_s - now_s()) + 0.001):
                    await self._over.wait()
        assert self._loss is not None
        return self._loss

    async def renew(self) -> None:
        """Hold it for `ttl_s` from now.

        Raises:
            LeaseLost: it is not ours any more.
            StoreUnavailable: the store did not answer; the lease may still be held.
        """
        async with self._busy:
            self.check()
            asked_s = now_s()
            try:
                await self._renew()
            except LeaseLost as loss:
                self._lose(loss.reason)
                raise
            self.check()
            self._deadline_s = asked_s + self.ttl_s

    async def release(self) -> None:
        """Give it up, so that another may have it at once. If the store does not answer, it ends by itself.

        Raises:
            StoreUnavailable: the store did not answer.
        """
        await self.stop_keeping()
        async with self._busy:
            if self.held:
                self._lose("it was released")
                await self._end()

    def keep(self) -> None:
        """Renew it from now on, three times in its time to live, until it is released or lost."""
        self._keeper = self._keeper or asyncio.create_task(self._keep(), name=f"lease {self.key}")

    async def stop_keeping(self) -> None:
        """Renew it no more; without a renewal it is lost after `ttl_s`."""
        if self._keeper is not None:
            await end_task(self._keeper)
            self._keeper = None

    async def _keep(self) -> None:
        pause_s = self.ttl_s / 3
        while self.held:
            await asyncio.sleep(max(0.0, min(pause_s, self._deadline_s - now_s())))
            try:
                async with asyncio.timeout(max(0.0, self._deadline_s - now_s())):
                    await self.renew()
                pause_s = self.ttl_s / 3
            except LeaseLost:
                return
            except (StoreError, TimeoutError):
                pause_s = self.ttl_s / 20

    def _lose(self, reason: str) -> None:
        self._loss = self._loss or LeaseLost(self.key, self.epoch, reason)
        self._over.set()

    @abstractmethod
    async def _renew(self) -> None:
        """Ask the store. Raises LeaseLost, StoreUnavailable."""

    @abstractmethod
    async def _end(self) -> None:
        """Tell the store that it is free. Raises StoreUnavailable."""


class Registration:
    """A service that is announced again and again until :meth:`close`. Made by :meth:`Store.register`."""

    def __init__(
        self, service: Service, announce: Callable[[], Awaitable[None]], withdraw: Callable[[], Awaitable[None]], ttl_s: float
    ) -> None:
        self.service, self.last_error = service, ""
        self._announce, self._withdraw, self._ttl_s = announce, withdraw, ttl_s
        self._task = asyncio.create_task(self._run(), name=f"service {service.name}/{service.instance}")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / (10 if self.last_error else 3))
            try:
                await self._announce()
                self.last_error = ""
            except StoreError as error:
                self.last_error = str(error)

    async def stop(self) -> None:
        """Announce it no more; others see it until its time to live is over."""
        await end_task(self._task)

    async def close(self) -> None:
        """Withdraw it.

        Raises:
            StoreUnavailable: the store did not answer; the service vanishes after its time to live.
        """
        await self.stop()
        await self._withdraw()


# ---------------------------------------------------------------- the store


class Store(ABC):
    """The face of both stores.

    Attributes:
        address: of the server, without secrets.
        ttl_least_s: the shortest time to live of a lease.
        confirm_s: how often a watch has an unchanged state confirmed.
    """

    ttl_least_s: float = 1.0

    def __init__(self, address: str, confirm_s: float, rng: random.Random | None) -> None:
        self.address, self.confirm_s, self._rng = address, confirm_s, rng or random.Random()
        self._watches: list[Watch] = []

    async def get(self, key: str) -> Entry | None:
        """The key's entry; None if it is absent.

        Raises:
            BadKey, StoreUnavailable, StoreRefused: see there.
        """
        return await self._get(check_key(key))

    async def list(self, prefix: str) -> Mapping[str, Entry]:
        """All entries under a prefix (it ends with ``/``; empty: all), as they were at one moment, by key.

        Raises:
            BadKey, TooManyKeys, StoreUnavailable, StoreRefused: see there.
        """
        return (await self._read(check_prefix(prefix))).entries

    async def keys(self, prefix: str) -> builtins.list[str]:
        """The keys under a prefix, without their values; perhaps with some that were removed a minute ago. Raises as :meth:`list` does."""
        return await self._keys(check_prefix(prefix))

    async def put(self, key: str, value: bytes, *, expected: int | None = None) -> int:
        """Give a key a value, if it has the `expected` version (0: absent; None: in any case). Returns its new version.

        Raises:
            VersionMismatch: it has another one; nothing was changed.
            BadKey, ValueTooLarge, StoreUnavailable, StoreRefused: see there.
        """
        return (await self.transaction([Put(key, value, expected)]))[key]

    async def delete(self, key: str, *, expected: int | None = None) -> None:
        """Remove a key, if it has the `expected` version (None: in any case, also if it is absent). Raises as :meth:`put` does."""
        await self.transaction([Delete(key, expected)])

    async def transaction(
        self, operations: Sequence[Put | Delete], *, lease: Lease | None = None, unchanged: Unchanged | None = None
    ) -> dict[str, int]:
        """Do all of it or nothing; nobody sees a part of it. Returns the new versions of the keys put.

        Args:
            operations: at most 64, each of another key, with at most 320 KiB of values together.
            lease: do it only while this lease is held, which the store itself checks: a deposed holder changes nothing.
            unchanged: do it only if these keys are as they were; with those of the operations at most 64.

        Raises:
            VersionMismatch: a key does not have its expected version; nothing was changed.
            LeaseLost: the lease is not held; nothing was changed.
            TransactionRefused: it is empty, too long, or names a key twice.
            BadKey, ValueTooLarge, StoreUnavailable, StoreRefused: see there.
        """
        _check_transaction(operations, lease, unchanged)
        if lease is not None:
            lease.check()
        return await self._transaction(operations, lease, unchanged)

    def watch(self, prefix: str) -> Watch:
        """Follow all keys under a prefix (it ends with ``/``; empty: all). It starts at once, also while the store cannot be reached.

        Raises:
            BadKey: it is no prefix.
        """
        check_prefix(prefix)
        watch = Watch(prefix, lambda: self._open_feed(prefix), Backoff(rng=self._rng))
        self._watches = [one for one in self._watches if not one._closed] + [watch]
        return watch

    async def acquire(self, key: str, value: bytes, ttl_s: float, *, keep: bool = True) -> Lease:
        """Take a lease that nobody holds. It is renewed from then on, unless not `keep`.

        Args:
            key: an ordinary key, used for nothing else: it is there while the lease is held.
            value: who we are, for others to read.
            ttl_s: the lease ends so long after the last renewal.

        Raises:
            LeaseHeld: another has it.
            BadTtl, BadKey, ValueTooLarge, StoreUnavailable, StoreRefused: see there.
        """
        check_key(key)
        check_ttl(ttl_s, self.ttl_least_s)
        check_size(key, len(value))
        lease = await self._acquire(key, value, ttl_s)
        if keep:
            lease.keep()
        return lease

    async def depose(self, key: str, epoch: int) -> bool:
        """End somebody else's lease, for one who knows that its holder is dead. False if this epoch does not hold it.

        Raises:
            BadKey, StoreUnavailable, StoreRefused: see there.
        """
        return await self._depose(check_key(key), epoch)

    async def register(self, service: Service, ttl_s: float) -> Registration:
        """Announce a service until the registration is closed; others see it until `ttl_s` after the last announcement.

        Raises:
            BadKey: name or instance is not one part of a key.
            BadTtl, StoreUnavailable, StoreRefused: see there.
        """
        for part in (service.name, service.instance):
            if "/" in check_key(part):
                raise BadKey(part)
        check_ttl(ttl_s, 1.0)
        announce, withdraw = self._service(service, ttl_s)
        await announce()
        return Registration(service, announce, withdraw, ttl_s)

    @abstractmethod
    async def services(self, name: str) -> Sequence[Service]:
        """The instances of a service that are alive, by instance.

        Raises:
            BadKey, StoreUnavailable, StoreRefused: see there.
        """

    async def close(self) -> None:
        """End the watches and let go of connections of the store's own. Leases and registrations are the caller's to end."""
        for watch in self._watches:
            await watch.close()
        self._watches.clear()

    # -- what a backend does; keys are checked

    @abstractmethod
    async def _get(self, key: str) -> Entry | None: ...

    @abstractmethod
    async def _read(self, prefix: str) -> Reading: ...

    @abstractmethod
    async def _keys(self, prefix: str) -> builtins.list[str]: ...

    @abstractmethod
    async def _transaction(
        self, operations: Sequence[Put | Delete], lease: Lease | None, unchanged: Unchanged | None
    ) -> dict[str, int]: ...

    @abstractmethod
    def _open_feed(self, prefix: str) -> Feed: ...

    @abstractmethod
    async def _acquire(self, key: str, value: bytes, ttl_s: float) -> Lease: ...

    @abstractmethod
    async def _depose(self, key: str, epoch: int) -> bool: ...

    @abstractmethod
    def _service(self, service: Service, ttl_s: float) -> tuple[Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]]: ...


# ---------------------------------------------------------------- checks


def check_key(key: str) -> str:
    """The key itself. Raises BadKey."""
    if len(key) > _KEY_CHARACTERS_MAX or not _KEY.fullmatch(key):
        raise BadKey(key)
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself. Raises BadKey."""
    if prefix and not prefix.endswith("/"):
        raise BadKey(prefix)
    if prefix:
        check_key(prefix[:-1])
    return prefix


def check_ttl(ttl_s: float, least_s: float) -> None:
    """Raises BadTtl."""
    if not ttl_s >= least_s:
        raise BadTtl(ttl_s, least_s)


def check_size(key: str, size: int) -> None:
    """Raises ValueTooLarge."""
    if size > VALUE_BYTES_MAX:
        raise ValueTooLarge(key, size)


def _check_transaction(operations: Sequence[Put | Delete], lease: Lease | None, unchanged: Unchanged | None) -> None:
    keys = [check_key(one.key) for one in operations] + ([lease.key] if lease is not None else [])
    if unchanged is not None:
        check_prefix(unchanged.prefix)
        check_key(unchanged.prefix[:-1])
        keys += [key for key in unchanged.versions if key not in keys]
    if not operations:
        raise TransactionRefused("it changes nothing")
    if len(keys) > OPERATIONS_MAX:
        raise TransactionRefused(f"it has {len(keys)} operations, {OPERATIONS_MAX} are allowed")
    if len(set(keys)) < len(keys):
        raise TransactionRefused("it names a key twice, or the lease's own")
    size = 0
    for one in operations:
        if isinstance(one, Put):
            size += len(one.value)
            check_size(one.key, size)
        elif one.expected == 0:
            raise TransactionRefused(f"{one.key} cannot be removed if it is absent")
