"""The store in Consul: KV, transactions, blocking queries, sessions, services with TTL checks.

All changes go through ``/v1/txn``, which tells the new ``ModifyIndex`` of each key: the version, and of a lease the epoch (``LockIndex``
counts anew when a key is made again, so it is no fencing token). A lease is a lock of a session of its own, with lock-delay 0 and
``delete``: the key goes when the session ends. Consul ends a session between one and two times its time to live after the last renewal,
10 s at least; who knows that a holder is dead does not wait for it (:meth:`Store.depose`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import random
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import consul
import consul.aio
from consul.callback import CB

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
    Unchanged,
    VersionMismatch,
    check_key,
    now_s,
)

_SESSION_TTL_MIN_S = 10.0
_TRIES = 20


@dataclass(frozen=True)
class ConsulOptions:
    """Where Consul is and how to log in.

    Attributes:
        host, port: of an agent's HTTP interface.
        token: ACL token; None: none, also if the environment has one.
        ca: PEM file of the authority of its certificate; with any of these three, everything goes by TLS.
        certificate, key: PEM files of our own, if the agent asks for them.
        confirm_s: how often a watch has an unchanged state confirmed.
        timeout_s: how long to wait for an answer.
    """

    host: str = "127.0.0.1"
    port: int = 8500
    token: str | None = field(default=None, repr=False)
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    confirm_s: float = 2.0
    timeout_s: float = 2.0

    @property
    def address(self) -> str:
        """For showing."""
        return f"{'https' if self.secure else 'http'}://{self.host}:{self.port}"

    @property
    def secure(self) -> bool:
        """Whether everything goes by TLS."""
        return any((self.ca, self.certificate, self.key))

    def client(self, timeout_s: float) -> Any:
        """A py-consul client whose requests take `timeout_s` at most."""
        own = (
            (str(self.certificate), str(self.key)) if self.certificate and self.key else str(self.certificate) if self.certificate else None
        )
        made = consul.aio.Consul(
            self.host,
            self.port,
            scheme="https" if self.secure else "http",
            verify=(str(self.ca) if self.ca else True) if self.secure else False,
            cert=own,
            connections_limit=1000,
            connections_timeout=timeout_s,
        )
        made.token = self.token  # its constructor prefers the environment's
        return made


class ConsulStore(Store):
    """A store in Consul. Make it inside the loop that uses it; :meth:`close` it."""

    ttl_least_s = _SESSION_TTL_MIN_S

    def __init__(self, options: ConsulOptions, *, rng: random.Random | None = None) -> None:
        """Nothing is asked yet.

        Raises:
            StoreUnavailable: a file for TLS cannot be used.
        """
        super().__init__(options.address, options.confirm_s, rng)
        self.options = options
        try:
            self._client = options.client(options.timeout_s)
            # watches wait in Consul, each on a connection: they get a client of their own, so that nothing else waits for one
            self._watcher = options.client(options.timeout_s + options.confirm_s * 17 / 16)
        except (OSError, ssl.SSLError) as error:
            raise StoreUnavailable(options.address, f"TLS cannot be set up with {options.ca}, {options.certificate}: {error}") from error

    async def close(self) -> None:
        """See :meth:`Store.close`."""
        await super().close()
        await self._watcher.close()
        await self._client.close()

    # ------------------------------------------------------------ reading

    async def _get(self, key: str) -> Entry | None:
        _, row = await self._ask(self._client.kv.get(key))
        return _entry(row) if row else None

    async def _read(self, prefix: str) -> Reading:
        return _reading(prefix, *await self._ask(self._client.kv.get(prefix, recurse=True)))

    async def _keys(self, prefix: str) -> list[str]:
        return sorted((await self._ask(self._client.kv.get(prefix, keys=True)))[1] or [])

    # ------------------------------------------------------------ changing

    async def _transaction(
        self, operations: Sequence[Put | Delete], lease: Lease | None, unchanged: Unchanged | None
    ) -> dict[str, int]:
        failed, changing = "", {one.key for one in operations}
        for _ in range(_TRIES):
            verbs = [_verb(one) for one in operations]
            if unchanged is not None:
                rest = [(key, version) for key, version in unchanged.versions.items() if key not in changing]
                verbs += [{"Verb": "check-index", "Key": key, "Index": version} for key, version in rest]
            if isinstance(lease, _ConsulLease):
                verbs.append({"Verb": "check-session", "Key": lease.key, "Session": lease.session})
            rows, failed = await self._commit(verbs)
            if not failed:
                return {row["Key"]: int(row["ModifyIndex"]) for row in rows if row["Key"] in changing}
            if isinstance(lease, _ConsulLease):
                await lease.confirm()
            for one in operations:
                if one.expected is not None:
                    entry = await self._get(one.key)
                    found = entry.version if entry else 0
                    if found != one.expected:
                        raise VersionMismatch(one.key, one.expected, found)
            if unchanged is not None:
                unchanged.check((await self._read(unchanged.prefix)).entries, added=False)
        raise StoreUnavailable(self.address, f"other writers were faster every time: {failed}")

    async def _commit(self, verbs: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        """Do a transaction: the rows that it wrote, or why it was not done."""
        body = json.dumps([{"KV": verb} for verb in verbs])
        headers = self._client.prepare_headers()  # py-consul's own `txn.put` sends no token
        try:
            reply = await self._ask(self._client.http.put(CB.json(), "/v1/txn", headers=headers, data=body), changes=True)
        except _Conflict as conflict:
            if "ermission denied" in conflict.reason:
                raise StoreRefused(self.address, conflict.reason) from conflict
            return [], conflict.reason
        return [result["KV"] for result in reply.get("Results") or []], ""

    async def _ask(self, request: Awaitable[Any], *, changes: bool = False) -> Any:
        try:
            return await request
        except consul.ACLPermissionDenied as error:
            raise StoreRefused(self.address, str(error)) from error
        except consul.ACLDisabled as error:
            raise StoreRefused(self.address, str(error)) from error
        except consul.ConsulException as error:
            text = str(error)
            if text.startswith("409 "):
                raise _Conflict(text) from error
            raise StoreUnavailable(self.address, text or type(error).__name__, maybe_done=changes and text.startswith("5")) from error
        except TimeoutError as error:
            raise StoreUnavailable(self.address, f"no answer within {self.options.timeout_s} s", maybe_done=changes) from error
        except (aiohttp.ClientConnectorError, aiohttp.ClientSSLError) as error:
            raise StoreUnavailable(self.address, str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise StoreUnavailable(self.address, str(error) or type(error).__name__, maybe_done=changes) from error

    # ------------------------------------------------------------ watching

    def _open_feed(self, prefix: str) -> Feed:
        return _ConsulFeed(self, prefix)

    # ------------------------------------------------------------ leases

    async def _acquire(self, key: str, value: bytes, ttl_s: float) -> Lease:
        since_s = now_s()
        named = {"name": key, "ttl": math.ceil(ttl_s), "lock_delay": 0, "behavior": "delete"}
        session = await self._ask(self._client.session.create(checks=[], **named), changes=True)
        failed = ""
        try:
            for _ in range(_TRIES):
                # a key that is there is a lease that is held, also if nobody's session locks it; so the lock needs it to be absent
                absent = {"Verb": "check-not-exists", "Key": key}
                lock = {"Verb": "lock", "Key": key, "Value": _encoded(value), "Session": session}
                rows, failed = await self._commit([absent, lock])
                if not failed:
                    return _ConsulLease(self, key, int(rows[-1]["ModifyIndex"]), ttl_s, since_s, session)
                entry = await self._get(key)
                if entry is not None:
                    raise LeaseHeld(key, entry.value, entry.epoch)
            raise StoreUnavailable(self.address, f"other holders were faster every time: {failed}")
        except BaseException:
            with contextlib.suppress(StoreError):
                await self._ask(self._client.session.destroy(session))
            raise

    async def _depose(self, key: str, epoch: int) -> bool:
        _, row = await self._ask(self._client.kv.get(key))
        if not row or not row.get("Session") or int(row["ModifyIndex"]) != epoch:
            return False
        await self._ask(self._client.session.destroy(row["Session"]), changes=True)
        return True

    # ------------------------------------------------------------ services

    def _service(self, service: Service, ttl_s: float) -> tuple[Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]]:
        agent, unique = self._client.agent, f"{service.name}/{service.instance}"
        check = {**consul.Check.ttl(f"{round(ttl_s * 1000)}ms"), "DeregisterCriticalServiceAfter": "1m"}
        meta = {**service.meta, "tickmesh-instance": service.instance}
        named = {"service_id": unique, "address": service.address or None, "port": service.port or None}

        async def announce() -> None:
            known = False
            with contextlib.suppress(StoreUnavailable):
                known = await self._ask(agent.check.ttl_pass(f"service:{unique}"), changes=True)
            if not known:  # the first time, or the agent has lost its data
                await self._ask(agent.service.register(service.name, check=check, meta=meta, **named), changes=True)
                await self._ask(agent.check.ttl_pass(f"service:{unique}"), changes=True)

        async def withdraw() -> None:
            await self._ask(agent.service.deregister(unique), changes=True)

        return announce, withdraw

    async def services(self, name: str) -> Sequence[Service]:
        """See :meth:`Store.services`."""
        _, rows = await self._ask(self._client.health.service(check_key(name), passing=True))
        found = []
        for row in rows or []:
            meta = dict(row["Service"].get("Meta") or {})
            instance = meta.pop("tickmesh-instance", row["Service"]["ID"])
            found.append(Service(name, instance, row["Service"]["Address"], int(row["Service"]["Port"]), meta))
        return sorted(found, key=lambda one: one.instance)


class _Conflict(Exception):
    """A transaction was refused as a whole.

    Attributes:
        reason: why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _ConsulLease(Lease):
    """A lease: a key locked by a session of its own."""

    def __init__(self, store: ConsulStore, key: str, epoch: int, ttl_s: float, since_s: float, session: str) -> None:
        super().__init__(key, epoch, ttl_s, since_s)
        self.session, self._store = session, store

    async def confirm(self) -> None:
        """Raises LeaseLost if the key is not locked by us."""
        _, row = await self._store._ask(self._store._client.kv.get(self.key))
        if not row or row.get("Session") != self.session:
            raise LeaseLost(self.key, self.epoch, f"epoch {row['ModifyIndex']} holds it" if row else "it has ended in the store")

    async def _renew(self) -> None:
        try:
            await self._store._ask(self._store._client.session.renew(self.session))
        except StoreUnavailable as error:
            if isinstance(error.__cause__, consul.NotFound):
                raise LeaseLost(self.key, self.epoch, "its session has ended in the store") from error
            raise
        await self.confirm()

    async def _end(self) -> None:
        await self._store._ask(self._store._client.session.destroy(self.session), changes=True)


class _ConsulFeed:
    """Blocking queries on a prefix; begins anew when the index falls."""

    def __init__(self, store: ConsulStore, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._index: int | None = None
        self._empty_backoff = Backoff(first_s=0.002, last_s=0.05)

    async def next(self) -> Reading:
        """See :class:`Feed`."""
        wait = f"{round(self._store.confirm_s * 1000)}ms"
        request = self._store._watcher.kv.get(self._prefix, recurse=True, index=self._index, wait=wait)
        reading = _reading(self._prefix, *await self._store._ask(request))
        fell = self._index is not None and reading.index < self._index
        self._index = None if fell else max(1, reading.index)
        if not reading.entries:  # an empty prefix has the whole store's index, and wakes up with every change of it
            await self._empty_backoff.wait()
        else:
            self._empty_backoff.reset()
        return reading

    async def close(self) -> None:
        """See :class:`Feed`."""


def _encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _verb(operation: Put | Delete) -> dict[str, Any]:
    key, expected = operation.key, operation.expected
    if isinstance(operation, Put):
        put = {"Key": key, "Value": _encoded(operation.value)}
        return put | ({"Verb": "set"} if expected is None else {"Verb": "cas", "Index": expected})
    return {"Key": key} | ({"Verb": "delete"} if expected is None else {"Verb": "delete-cas", "Index": expected})


def _entry(row: dict[str, Any]) -> Entry:
    version = int(row["ModifyIndex"])
    return Entry(row["Key"], row["Value"] or b"", version, version if row.get("Session") else 0)


def _reading(prefix: str, index: str, rows: list[dict[str, Any]] | None) -> Reading:
    entries = {row["Key"]: _entry(row) for row in rows or [] if row["Key"] != prefix}
    return Reading(entries, int(index))
