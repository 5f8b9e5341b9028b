"""A node's side of the live configuration: follows the store, checks what comes, has it applied, and says what became of it.

:class:`ConfigFollower` knows nothing of nodes: it is given `apply`, which makes a running node follow a checked configuration or says why
it will not, and `try_out`, which only compiles. Whatever is wrong (no TOML, a key that does not exist, a section that is gone, a store
that is away or has lost its data), the node goes on with the last good configuration, and ``status/<node>`` says what was refused and why.

:class:`FollowerThread` runs one in a thread of its own, with a loop and a store of its own, for ever.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import random
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import uvloop

from tickmesh.control.config import SECTIONS, Config, ConfigError
from tickmesh.control.config_store import (
    Change,
    ChecksOf,
    ConfigStore,
    Documents,
    HistoryEntry,
    Keys,
    Stored,
    check_documents_size,
    now_text,
    stored_of,
)
from tickmesh.control.store import (
    Backoff,
    Entry,
    Registration,
    Service,
    Store,
    StoreError,
    StoreUnavailable,
    ValueTooLarge,
    Watch,
    end_task,
    now_s,
)
from tickmesh.control.turns import undisturbed

Apply = Callable[[Config, int, Documents], Awaitable[Sequence[str] | None]]
"""``await apply(config, version, documents)``: None or nothing: done; else why not. An exception is a refusal too."""
OpenStore = Callable[[], AbstractAsyncContextManager[Store]]
"""Opens a store for one follower: watches need connections of their own."""
BY_HAND = "by hand"
_SHOW_S = 0.01
_HISTORY_S = (0.1, 0.5)
_TELL_S = 0.1
"""What is applied sooner is not told of before it is done: it would be one more message to everybody."""
_log = structlog.get_logger("config")


@dataclass(frozen=True)
class FollowerOptions:
    """What a follower is told about its node.

    Attributes:
        own: the node's own file: names of cluster and node, keys that are each node's own.
        code_folder: where the code of configurations is written, a folder below it for each.
        checks_of: hooks that check calculations and sources.
        heartbeat_s: how often the status is written while nothing happens.
        service_ttl_s: the node's registration ends so long after its last sign.
        reopen_s: a store that was silent for so long is closed and opened anew.
        service: address, port and further facts of the registration.
    """

    own: Config
    code_folder: Path
    checks_of: ChecksOf | None = None
    heartbeat_s: float = 5.0
    service_ttl_s: float = 10.0
    reopen_s: float = 30.0
    service: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Target:
    """What the node should run: of ``config/``, or of a canary."""

    source: str
    version: int
    stored: Stored
    id: str = ""

    @property
    def documents(self) -> Documents:
        return self.stored.documents

    @property
    def mark(self) -> tuple[str, int, str, str]:
        """The same for the same thing."""
        broken = ";".join(str(problem) for problem in self.stored.problems)
        return self.source, self.version, self.documents.digest, broken


@dataclass(frozen=True)
class _Order:
    """What a canary or dry run asks for; `problem` if it cannot be read."""

    id: str
    version: int
    documents: Documents
    problem: str = ""


class ConfigFollower:
    """Follows one cluster's configuration for one node. :meth:`run` it inside a loop; everything else may be called from any thread.

    Attributes:
        status: what ``status/<node>`` says, or would if the store could be reached. A new dict for each change.
    """

    def __init__(
        self,
        options: FollowerOptions,
        apply: Apply,
        try_out: Apply,
        *,
        running: tuple[int, Documents] | None = None,
        facts: Callable[[], Mapping[str, Any]] | None = None,
        told: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Nothing is asked yet.

        Args:
            options: about the node.
            apply: makes the node follow a configuration.
            try_out: compiles and checks one, and applies nothing.
            running: version and documents that the node runs already, from its journal.
            facts: further facts for the status; asked at each heartbeat, in the follower's thread.
            told: told of other statuses, the newest a moment later, also while the store is away.
        """
        self.options, self._apply, self._try_out, self._facts, self._told = options, apply, try_out, facts, told
        self._showing: asyncio.TimerHandle | None = None
        self.keys, self.node = Keys(options.own.cluster.name), options.own.cluster.node
        self._good: Documents | None = running[1] if running else None
        self._handled: tuple[str, int, str, str] | None = None
        self._running: tuple[str, int, str, str] | None = None
        self._tried = ""
        self._refused_canary = ""
        self._due: dict[int, HistoryEntry] = {}
        self._news, self._said, self._accepted = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._heard_s = 0.0
        self.status: dict[str, Any] = {
            "node": self.node,
            "state": "waiting",
            "version": running[0] if running else 0,
            "digest": running[1].digest if running else "",
            "source": "config" if running else "",
            "applied_at": "",
            "refused": None,
            "canary": None,
            "dry_run": None,
            "store": {"stale": True, "reason": "the store was not read yet", "age_s": None},
        }

    # ------------------------------------------------------------ running

    async def run(self, store: Store) -> None:
        """Follow until cancelled.

        Raises:
            StoreUnavailable: it was silent for `reopen_s`: open another one.
        """
        self._news, self._said, self._accepted, self._showing = asyncio.Event(), asyncio.Event(), asyncio.Event(), None
        if self._due:
            self._accepted.set()
        self._heard_s = now_s()
        watches = [store.watch(prefix) for prefix in (self.keys.config, self.keys.canary(), self.keys.dry_run())]
        tasks = [asyncio.create_task(self._wake(watch), name=f"follow {watch.prefix}") for watch in watches]
        tasks += [
            asyncio.create_task(self._keep_status(store, watches[0]), name="status"),
            asyncio.create_task(self._keep_history(store), name="history"),
            asyncio.create_task(self._keep_registered(store), name="registration"),
        ]
        follow = asyncio.create_task(self._follow(store, watches), name="follow")
        try:
            await asyncio.wait([follow, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in [follow, *tasks]:
                if task.done():
                    task.result()
        finally:
            for task in [follow, *tasks]:
                await end_task(task)
            for watch in watches:
                await watch.close()

    async def _wake(self, watch: Watch) -> None:
        async for _ in watch:
            self._news.set()

    async def _follow(self, store: Store, watches: Sequence[Watch]) -> None:
        backoff = Backoff()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.options.heartbeat_s):
                    await self._news.wait()
            self._news.clear()
            self._check_silence(store, watches[0])
            try:
                await self._look(store, *watches)
                backoff.reset()
            except StoreError:  # the history is needed, and cannot be read now
                self._news.set()
                await backoff.wait()

    def _check_silence(self, store: Store, watch: Watch) -> None:
        if min(watch.age_s, now_s() - self._heard_s) > self.options.reopen_s:
            raise StoreUnavailable(store.address, watch.last_error or f"it was silent for {self.options.reopen_s:g} s")

    async def _look(self, store: Store, config: Watch, canary: Watch, dry_run: Watch) -> None:
        """Do what the newest states ask for."""
        if config.snapshot is None:
            return
        stored = stored_of(self.keys, config.snapshot.entries)
        ordered = self._order(canary, self.keys.canary(self.node))
        if ordered is None:
            self._refused_canary = ""
            self._tell(canary=None)
        target = self._target(stored, ordered)
        if target is not None and target.mark == self._running != self._handled:  # what was refused is gone again
            self._handled = target.mark
            self._tell(refused=None if target.source == "config" else self.status["refused"])
        elif target is not None and target.mark != self._handled:
            await self._take(store, target)
        if ordered is not None:
            self._answer_canary(ordered, stored)
            if ordered.id == self._refused_canary and target is not None and target.source == "canary":
                self._news.set()  # back to the configuration
        await self._try(self._order(dry_run, self.keys.dry_run(self.node)))

    def _order(self, watch: Watch, key: str) -> _Order | None:
        entry = watch.snapshot.entries.get(key) if watch.snapshot else None
        return _order_of(entry) if entry else None

    def _target(self, stored: Stored, ordered: _Order | None) -> _Target | None:
        canary = ordered is not None and ordered.id != self._refused_canary and ordered.documents.digest != stored.documents.digest
        if canary and ordered is not None and not ordered.problem:
            return _Target("canary", ordered.version, Stored(ordered.version, ordered.documents, None, {}), ordered.id)
        if stored.version == 0 and self._good is None:
            return None  # an empty store: wait for a configuration
        return _Target("config", stored.version, stored)

    # ------------------------------------------------------------ applying

    async def _take(self, store: Store, target: _Target) -> None:
        if target.source == "config" and not (self._good or len(target.documents.sections) == len(SECTIONS)):
            self._good = await self._remembered(store)
        applying = {"version": target.version, "source": target.source}
        soon = asyncio.get_running_loop().call_later(_TELL_S, lambda: self._tell(state="applying", applying=applying))
        try:
            reasons = await self._judge(target, self._apply)
        finally:
            soon.cancel()
        self._handled = target.mark
        if reasons:
            self._refuse(target, reasons)
        else:
            self._accept(target)

    async def _remembered(self, store: Store) -> Documents | None:
        """The newest documents of the history: what is missing is measured by them."""
        history = await ConfigStore(store, self.keys.cluster).history()
        return history[-1].documents if history else None

    async def _judge(self, target: _Target, act: Apply) -> list[str]:
        """Why it will not do; empty: it was done."""
        before = self._good.sections if self._good is not None and target.source == "config" else {}
        problems = [*target.stored.problems, *target.stored.missing(before, self.keys)]
        if problems:
            return [f"{problem.part}: {problem}" for problem in problems]
        try:
            with undisturbed():
                config = target.documents.parse(self.options.own, self.options.checks_of, self.options.code_folder)
            return [str(reason) for reason in (await act(config, target.version, target.documents) or ())]
        except ConfigError as error:
            return str(error).splitlines()
        except Exception as error:  # a configuration never ends a node
            _log.warning("a configuration could not be applied", version=target.version, error=repr(error))
            return [str(error) or type(error).__name__]

    def _accept(self, target: _Target) -> None:
        self._running = target.mark
        done = {"version": target.version, "digest": target.documents.digest, "source": target.source, "applied_at": now_text()}
        _log.info("a configuration is applied", version=target.version, source=target.source)
        if target.source == "config":
            self._good = target.documents
            by = target.stored.change or Change(BY_HAND, now_text())
            self._due[target.version] = HistoryEntry(target.version, by, target.documents)
            self._accepted.set()
            self._tell(state="running", applying=None, refused=None, **done)
        else:
            self._tell(state="running", applying=None, canary={"id": target.id, "state": "applied", "reasons": []}, **done)

    def _refuse(self, target: _Target, reasons: list[str]) -> None:
        _log.warning("a configuration is refused", version=target.version, source=target.source, reasons=reasons)
        state = "running" if self.status["version"] else "waiting"
        if target.source == "canary":
            self._refused_canary = target.id
            self._tell(state=state, applying=None, canary={"id": target.id, "state": "refused", "reasons": reasons})
        else:
            refused = {"version": target.version, "digest": target.documents.digest, "reasons": reasons, "at": now_text()}
            self._tell(state=state, applying=None, refused=refused)

    def _answer_canary(self, ordered: _Order, stored: Stored) -> None:
        """Also to a canary that cannot be read, or that asks for what ``config/`` says anyway."""
        answered = (self.status["canary"] or {}).get("id") == ordered.id
        if ordered.problem and not answered:
            self._refused_canary = ordered.id
            self._tell(canary={"id": ordered.id, "state": "refused", "reasons": [ordered.problem]})
        elif not answered and ordered.documents.digest == stored.documents.digest:
            ran = self.status["digest"] == ordered.documents.digest
            reasons = [] if ran else (self.status["refused"] or {}).get("reasons", [])
            self._tell(canary={"id": ordered.id, "state": "applied" if ran else "refused", "reasons": reasons})

    async def _try(self, ordered: _Order | None) -> None:
        if ordered is None:
            self._tell(dry_run=None)
            return
        if ordered.id == self._tried:
            return
        self._tried = ordered.id
        target = _Target("dry_run", ordered.version, Stored(ordered.version, ordered.documents, None, {}), ordered.id)
        reasons = [ordered.problem] if ordered.problem else await self._judge(target, self._try_out)
        self._tell(dry_run={"id": ordered.id, "state": "refused" if reasons else "passed", "reasons": reasons})

    # ------------------------------------------------------------ telling

    def _tell(self, **news: Any) -> None:
        made = {**self.status, **news}
        if made != self.status:
            self.status = made
            self._said.set()
            if self._told and self._showing is None:  # the store first: others wait for that
                self._showing = asyncio.get_running_loop().call_later(_SHOW_S, self._show)

    def _show(self) -> None:
        self._showing = None
        if self._told:
            self._told(self.status)

    async def _keep_status(self, store: Store, watch: Watch) -> None:
        """Write the status when it changes and at each heartbeat."""
        backoff, written = Backoff(), True
        while True:
            if written:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.options.heartbeat_s):
                        await self._said.wait()
            self._said.clear()
            self._look_at_the_watch(watch)
            try:
                await store.put(self.keys.status(self.node), self._encoded())
                self._heard_s = now_s()
                written = True
                backoff.reset()
            except StoreError:
                written = False
                await backoff.wait()

    def _look_at_the_watch(self, watch: Watch) -> None:
        snapshot = watch.snapshot
        stale = snapshot is None or snapshot.stale
        reason = (watch.last_error or (snapshot.reason if snapshot else "the store was not read yet")) if stale else ""
        age_s = round(watch.age_s, 1) if watch.age_s != float("inf") else None
        self.status = {**self.status, "store": {"stale": stale, "reason": reason, "age_s": age_s}}

    def _encoded(self) -> bytes:
        facts: Mapping[str, Any] = {}
        try:
            facts = self._facts() if self._facts else {}
        except Exception as error:  # a status with less in it is better than none
            _log.warning("no further facts for the status", error=repr(error))
        return json.dumps({**facts, **self.status, "at": now_text()}, ensure_ascii=False, default=str).encode()

    async def _keep_history(self, store: Store) -> None:
        """Put accepted versions into the history, if nobody else does before: not while all are busy with the change, nor all at once."""
        backoff = Backoff()
        while True:
            await self._accepted.wait()
            await asyncio.sleep(random.uniform(*_HISTORY_S))
            self._accepted.clear()
            try:
                await self._remember(store)
                backoff.reset()
            except StoreError:
                self._accepted.set()
                await backoff.wait()

    async def _remember(self, store: Store) -> None:
        kept = ConfigStore(store, self.keys.cluster)
        for version, entry in sorted(self._due.items()):
            try:
                check_documents_size(self.keys, entry.documents)
                await kept.remember(entry)
            except ValueTooLarge as error:
                _log.warning("a version is too large for the history", version=version, error=str(error))
            del self._due[version]

    async def _keep_registered(self, store: Store) -> None:
        backoff = Backoff()
        registration: Registration | None = None
        service = Service(self.keys.service, self.node, **self.options.service)
        while registration is None:
            try:
                registration = await store.register(service, self.options.service_ttl_s)
            except StoreError as error:
                _log.debug("the node is not registered yet", error=str(error))
                await backoff.wait()
        try:
            await asyncio.Event().wait()
        finally:
            with contextlib.suppress(StoreError, TimeoutError):
                async with asyncio.timeout(2.0):
                    await registration.close()


def _order_of(entry: Entry) -> _Order:
    try:
        found = json.loads(entry.value)
        return _Order(str(found["id"]), entry.version, Documents.from_json(found))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _Order(f"version {entry.version}", entry.version, Documents({}), f"{entry.key}: cannot be read ({error}): remove the key")


# ---------------------------------------------------------------- in a thread


class FollowerThread:
    """A follower in a thread with an asyncio loop and a store of its own, which are made anew whenever they fail.

    Attributes:
        follower: what runs; its `status` may be read from any thread.
        last_error: why the store cannot be opened now; empty if it is open.
    """

    def __init__(self, follower: ConfigFollower, open_store: OpenStore) -> None:
        self.follower, self._open_store, self.last_error = follower, open_store, ""
        self._thread = threading.Thread(target=self._run, name="config", daemon=True)
        self._started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = concurrent.futures.Future()

    def start(self) -> FollowerThread:
        """Begin; also while there is no store."""
        self._thread.start()
        return self

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End it, and withdraw the node's registration; True if it ended in time. May be called again, and if it was never started."""
        if self._thread.ident is None:
            return True
        loop, task = self._started.result(timeout_s)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(task.cancel)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __enter__(self) -> FollowerThread:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            uvloop.run(self._forever())

    async def _forever(self) -> None:
        following = asyncio.create_task(self._follow(), name="follower")
        self._started.set_result((asyncio.get_running_loop(), following))
        with contextlib.suppress(asyncio.CancelledError):
            await following

    async def _follow(self) -> None:
        backoff = Backoff(first_s=0.1, last_s=5.0)
        while True:
            began_s = now_s()
            try:
                async with self._open_store() as store:
                    self.last_error = ""
                    await self.follower.run(store)
            except Exception as error:  # the node outlives its store
                self.last_error = str(error) or type(error).__name__
                _log.warning("the store cannot be used; the last good configuration holds", error=self.last_error)
            if now_s() - began_s > 10.0:
                backoff.reset()
            await backoff.wait()
