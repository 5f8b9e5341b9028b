"""Bringing a configuration to the nodes of a cluster: applied everywhere and waited for, on one node first, or only tried.

Nodes answer in ``status/<node>`` (:mod:`tickmesh.control.follower`). Whoever is registered is a member and is waited for.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import structlog

from tickmesh.control.config_store import ConfigStore, Documents, HistoryEntry, Stored, check_documents_size, now_text, who_text
from tickmesh.control.store import Entry, StoreError, VersionMismatch, Watch, surely

_log = structlog.get_logger("config")
AnswerState = Literal["applied", "passed", "refused", "superseded", "unanswered"]
Told = Callable[["Answer"], None]


@dataclass(frozen=True)
class Answer:
    """What a node made of a configuration.

    Attributes:
        node: its name.
        state: `applied`; `passed` a dry run; `refused`; `superseded` by a newer version; `unanswered` in time.
        reasons: why it was refused, or what is known of a node that did not answer.
        after_s: how long it took.
    """

    node: str
    state: AnswerState
    reasons: tuple[str, ...] = ()
    after_s: float = 0.0

    @property
    def good(self) -> bool:
        """Whether the node does what was asked, or something newer."""
        return self.state in ("applied", "passed", "superseded")


@dataclass(frozen=True)
class Outcome:
    """How a change went.

    Attributes:
        version: the config version that it made; 0: none was made.
        answers: of every node that was waited for.
        withdrawn: nodes whose canary was taken back.
        left: keys of orders to nodes that could not be taken back, and why.
    """

    version: int
    answers: Sequence[Answer] = ()
    withdrawn: Sequence[str] = field(default_factory=tuple)
    left: Mapping[str, str] = field(default_factory=dict)


_Judge = Callable[[str, Mapping[str, Any]], Answer | None]


class Rollout:
    """Changes of one cluster's configuration.

    Args:
        config: where it lies.
        timeout_s: how long to wait for each node's answer.
        told: called with every answer as it comes.
    """

    def __init__(self, config: ConfigStore, timeout_s: float = 30.0, told: Told | None = None) -> None:
        self.config, self.store, self.keys = config, config.store, config.keys
        self.timeout_s, self._told = timeout_s, told

    async def members(self) -> list[str]:
        """Nodes that are registered now. Raises StoreError."""
        return sorted(service.instance for service in await self.store.services(self.keys.service))

    async def apply(
        self, documents: Documents, based_on: Stored, comment: str = "", nodes: Iterable[str] | None = None, keep_canary: str = ""
    ) -> Outcome:
        """Make documents the configuration, end what canaries there are, and wait for the nodes.

        Args:
            documents, based_on, comment: see :meth:`ConfigStore.apply`; the history gets the version when the nodes have answered.
            nodes: whom to wait for; None: every member.
            keep_canary: a node whose canary is the caller's to end.

        Raises:
            ConfigChanged: somebody else was faster; nothing was changed.
            StoreError: see there.
        """
        return await surely(self._apply(documents, based_on, comment, nodes, keep_canary))

    async def _apply(
        self, documents: Documents, based_on: Stored, comment: str, nodes: Iterable[str] | None, keep_canary: str
    ) -> Outcome:
        canaries = await self.store.list(self.keys.canary())
        asked = sorted(set(nodes)) if nodes is not None else await self.members()
        async with self.store.watch(self.keys.status()) as watch:
            began_s = asyncio.get_running_loop().time()
            made = await self.config.write(documents, based_on, comment)
            try:
                # only now: in between a node would fall back to what was before
                withdrawn = [key.rpartition("/")[2] for key in canaries if key != self.keys.canary(keep_canary)]
                for node in withdrawn:
                    await self._end_order(self.keys.canary(node), canaries[self.keys.canary(node)].version)
                answers = await self._answers(asked, _judge_of(made.version, documents.digest), watch, began_s)
            finally:
                await self._remember(made)
        return Outcome(made.version, answers, withdrawn)

    async def _remember(self, made: HistoryEntry) -> None:
        with suppress(StoreError):  # every node that accepts it does the same
            await self.config.remember(made)

    async def answers(self, version: int, digest: str, nodes: Iterable[str] | None = None) -> list[Answer]:
        """What nodes (None: every member) make of a version that is there. Raises StoreError."""
        asked = sorted(set(nodes)) if nodes is not None else await self.members()
        return await self._answers(asked, _judge_of(version, digest))

    async def canary(
        self, node: str, documents: Documents, based_on: Stored, comment: str = "", hold_s: float = 0.0, nodes: Iterable[str] | None = None
    ) -> Outcome:
        """The same, on one node first: if that refuses it, does not answer, or ends within `hold_s`, it is withdrawn, and no other sees it.

        The version of the outcome is 0 if it was withdrawn. Raises as :meth:`apply` does.
        """
        check_documents_size(self.keys, documents)
        name, promoted, left = secrets.token_hex(8), False, dict[str, str]()
        try:
            async with self._placed([self.keys.canary(node)], _order(name, documents), left):
                answers = await surely(self._answers([node], lambda asked, status: _of_order(asked, status.get("canary"), name)))
                if answers[0].state == "applied" and hold_s > 0:
                    wrong = await surely(self._held(node, name, hold_s))
                    answers = [wrong or answers[0]]
                outcome = Outcome(0, answers, (node,))
                if answers[0].state == "applied":
                    outcome = await self.apply(documents, based_on, comment, nodes, keep_canary=node)
                    promoted = True
            return replace(outcome, withdrawn=tuple(one for one in outcome.withdrawn if promoted or not left), left=left)
        finally:
            if not promoted:
                await asyncio.shield(self._settled(node))

    async def dry_run(self, documents: Documents, nodes: Iterable[str] | None = None) -> list[Answer]:
        """Have nodes check and compile documents, and apply nothing. Raises StoreError."""
        check_documents_size(self.keys, documents)
        asked, name = (sorted(set(nodes)) if nodes is not None else await self.members()), secrets.token_hex(8)
        async with self._placed([self.keys.dry_run(node) for node in asked], _order(name, documents), {}):
            return await surely(self._answers(asked, lambda node, status: _of_order(node, status.get("dry_run"), name)))

    # -- how

    @asynccontextmanager
    async def _placed(self, keys: Sequence[str], order: bytes, left: dict[str, str]) -> AsyncIterator[None]:
        """An order to nodes, withdrawn in the end: also if we are cancelled while it is written.

        A key that cannot be withdrawn is put into `left` with the reason, and told of: what the nodes said counts nevertheless.
        """
        placing = [asyncio.create_task(self.store.put(key, order)) for key in keys]
        try:
            if placing:
                await asyncio.wait(placing)
            for placed in placing:
                placed.result()
            yield
        finally:
            left |= await asyncio.shield(self._withdraw(keys, order, placing))

    async def _withdraw(self, keys: Sequence[str], order: bytes, placing: Sequence[asyncio.Task[int]]) -> dict[str, str]:
        await asyncio.gather(*placing, return_exceptions=True)
        left = {}
        for key in keys:
            try:
                entry = await self.store.get(key)
                if entry is not None and entry.value == order:
                    await self._end_order(key, entry.version)
            except StoreError as error:
                left[key] = str(error)
                _log.warning("an order stays in the store until the next change, or until its key is removed", key=key, reason=str(error))
        return left

    async def _held(self, node: str, name: str, hold_s: float) -> Answer | None:
        """Watch a canary for a time: what went wrong with it, or None."""

        def gone(asked: str, status: Mapping[str, Any]) -> Answer | None:
            found = _of_order(asked, status.get("canary"), name)
            if found is not None and found.state == "applied":
                return None
            return found or Answer(asked, "unanswered", ("somebody else withdrew it",))

        async with self.store.watch(self.keys.status()) as watch:
            found, _ = await self._wait([node], gone, hold_s, watch)
        if node in found:
            return found[node]
        return None if node in await self.members() else Answer(node, "unanswered", (f"the node ended within {hold_s:g} s",), hold_s)

    async def _settled(self, node: str) -> None:
        """Wait until a node has left its canary, if it lives; a second at most."""

        def left(asked: str, status: Mapping[str, Any]) -> Answer | None:
            return Answer(asked, "applied") if status.get("source") != "canary" else None

        async with self.store.watch(self.keys.status()) as watch:
            await self._wait([node], left, 1.0, watch)

    async def _end_order(self, key: str, version: int) -> None:
        with suppress(VersionMismatch):  # it is somebody else's by now, or gone
            await self.store.delete(key, expected=version)

    async def _answers(
        self, nodes: Sequence[str], judge: _Judge, watch: Watch | None = None, began_s: float | None = None
    ) -> list[Answer]:
        """What each node says, and what is known of those that say nothing in time; `watch`: of the statuses, where there is one."""
        if watch is None:
            async with self.store.watch(self.keys.status()) as own:
                return await self._answers(nodes, judge, own)
        found, last = await self._wait(nodes, judge, self.timeout_s, watch, self._told, began_s)
        for node in nodes:
            if node not in found:
                found[node] = Answer(node, "unanswered", (_silence(last.get(node)),), self.timeout_s)
                if self._told is not None:
                    self._told(found[node])
        return [found[node] for node in nodes]

    async def _wait(
        self, nodes: Sequence[str], judge: _Judge, timeout_s: float, watch: Watch, told: Told | None = None, began_s: float | None = None
    ) -> tuple[dict[str, Answer], Mapping[str, Mapping[str, Any]]]:
        """Wait until each node has answered, or the time is over: answers, and the last statuses."""
        clock, found, last = asyncio.get_running_loop().time, dict[str, Answer](), dict[str, Mapping[str, Any]]()
        began_s = clock() if began_s is None else began_s
        if not nodes:
            return found, last
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                async for snapshot in watch:
                    last = statuses(snapshot.entries)
                    for node in nodes:
                        answer = judge(node, last[node]) if node in last and node not in found else None
                        if answer is not None:
                            found[node] = replace(answer, after_s=round(clock() - began_s, 3))
                            if told is not None:
                                told(found[node])
                    if len(found) == len(nodes):
                        break
        return found, last


def statuses(entries: Mapping[str, Entry]) -> dict[str, Mapping[str, Any]]:
    """What nodes say of themselves, by name; what cannot be read is left out."""
    found: dict[str, Mapping[str, Any]] = {}
    for key, entry in entries.items():
        with suppress(ValueError):
            status = json.loads(entry.value)
            if isinstance(status, dict):
                found[key.rpartition("/")[2]] = status
    return found


def _order(name: str, documents: Documents) -> bytes:
    about = {"id": name, "who": who_text(), "when": now_text()}
    return json.dumps(about | documents.as_json(), ensure_ascii=False, indent=1).encode()


def _judge_of(version: int, digest: str) -> _Judge:
    return lambda node, status: _of_version(node, status, version, digest)


def _of_version(node: str, status: Mapping[str, Any], version: int, digest: str) -> Answer | None:
    refused = status.get("refused") or {}
    if status.get("version") == version and status.get("digest") == digest:
        return Answer(node, "applied")
    if refused.get("version") == version:
        return Answer(node, "refused", tuple(map(str, refused.get("reasons") or ())))
    newest = max(int(refused.get("version") or 0), int(status.get("version") or 0) if status.get("source") == "config" else 0)
    return Answer(node, "superseded", (f"by version {newest}",)) if newest > version else None


def _of_order(node: str, answer: Any, name: str) -> Answer | None:
    if not isinstance(answer, dict) or answer.get("id") != name or answer.get("state") not in ("applied", "passed", "refused"):
        return None
    return Answer(node, answer["state"], tuple(map(str, answer.get("reasons") or ())))


def _silence(status: Mapping[str, Any] | None) -> str:
    if status is None:
        return "it has no status: it does not follow the store"
    doing = "it is still applying something" if status.get("state") == "applying" else f"it last ran version {status.get('version')}"
    return f"{doing}, as it said at {status.get('at')}"
