"""A cluster's configuration in its store, from the command line: ``tickmesh config apply``, ``get``, ``set``, ``diff``, ``history``,
``rollback``, ``status`` and ``watch``.

Nothing is sent before it is valid here. A change is one transaction; then every member is waited for.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import signal
import tempfile
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError

from tickmesh.control.config import SECTIONS, Cluster, Config, ConfigError, StoreSettings, dotted, load_config
from tickmesh.control.config_store import (
    ConfigStore,
    Documents,
    NoConfiguration,
    Stored,
    documents_of,
    node_keys_in,
    own_of,
    stored_of,
)
from tickmesh.control.rollout import Outcome, Rollout, statuses
from tickmesh.control.toml_text import parse_key, remove_value, set_value
from tickmesh.node.config_checks import config_checks
from tickmesh.node.store_link import open_store
from tickmesh.ops.config_cmd import changes, effective, plain, value_text

EXIT_OK, EXIT_REFUSED, EXIT_UNANSWERED = 0, 4, 5
STORE_VARIABLE, CLUSTER_VARIABLE = "TICKMESH_STORE", "TICKMESH_CLUSTER"
Say = Callable[[str], None]
_Made = TypeVar("_Made")


class WrongPlace(Exception):
    """It is not clear which store or cluster is meant. The message says what to give."""


class NoSuchKey(Exception):
    """The configuration has no such key.

    Attributes:
        key: as given.
    """

    def __init__(self, key: str, hint: str = "see `tickmesh config schema`") -> None:
        super().__init__(f"there is no key {key} in the configuration: {hint}")
        self.key = key


# ---------------------------------------------------------------- where


@dataclass(frozen=True)
class Place:
    """A cluster's configuration: which store, which cluster."""

    settings: StoreSettings
    cluster: str
    resolve: Callable[[str], Path] = Path

    @property
    def own(self) -> Config:
        """What the configuration is checked with in place of a node's own file."""
        return own_of(self.cluster)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[ConfigStore]:
        """The configuration there, on connections of its own."""
        async with open_store(self.settings, self.resolve, name="tickmesh config") as store:
            yield ConfigStore(store, self.cluster)


def place_of(store: str | None, cluster: str | None, file: Path | None, applied: Config | None = None) -> Place:
    """The store and the cluster that a command is about.

    Args:
        store: URL; None: of `file`, of the environment, of `applied`.
        cluster: name; None: likewise.
        file: a node's own file, with ``[store]``.
        applied: the configuration that is to be applied.

    Raises:
        WrongPlace: none is named.
        ConfigError: the file is refused.
    """
    given = load_config(file) if file is not None else None
    url = store or (None if given is not None else os.environ.get(STORE_VARIABLE))
    found = [config for config in (given, applied) if config is not None]
    name = cluster or (given.cluster.name if given else None) or os.environ.get(CLUSTER_VARIABLE)
    name = name or (applied.cluster.name if applied else None)
    if not name:
        raise WrongPlace(f"which cluster? give --cluster NAME, {CLUSTER_VARIABLE}, or --config with a node's file")
    try:
        Cluster(name=name)
    except ValidationError:
        raise WrongPlace(f"{name!r} is no name of a cluster: letters, digits, _ and -, at most 32") from None
    if url:
        return Place(settings_of(url), name)
    for config in found:
        if config.store.kind != "none":
            return Place(config.store, name, config.resolve)
    raise WrongPlace(f"which store? give --store URL (consul://HOST:PORT or nats://HOST:PORT), {STORE_VARIABLE}, or --config with [store]")


def settings_of(url: str) -> StoreSettings:
    """``consul://host:port`` or ``nats://host:port/bucket`` as a ``[store]`` table. Raises WrongPlace."""
    example = "write consul://127.0.0.1:8500, nats://127.0.0.1:4222 or nats://HOST:PORT/BUCKET"
    first = url.split(",")[0]
    try:
        parts = urlsplit(first)
        if parts.username or parts.password:
            raise WrongPlace("a store's URL holds no secret: put the token into TICKMESH_CONSUL_TOKEN or TICKMESH_NATS_TOKEN")
        bucket = re.sub(r"^/", "", urlsplit(url.rpartition(",")[2]).path)
        table: dict[str, Any] = {"kind": "consul" if parts.scheme == "consul" else "nats"}
        if parts.scheme == "consul":
            table["address"] = f"{parts.hostname or '127.0.0.1'}:{parts.port or 8500}"
        elif parts.scheme in ("nats", "tls"):
            table["address"] = url.removesuffix(f"/{bucket}") if bucket else url.rstrip("/")
            table |= {"bucket": bucket} if bucket else {}
        else:
            raise WrongPlace(f"{url!r} is no store: {example}")
        return StoreSettings.model_validate(table)
    except (ValueError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise WrongPlace(f"{url!r} is no store ({reason}): {example}") from None


# ---------------------------------------------------------------- checking and comparing


def checked(documents: Documents, place: Place) -> Config:
    """The configuration, checked to the last calculation. Raises ConfigError."""
    with tempfile.TemporaryDirectory(prefix="tickmesh-config-") as folder:
        return documents.parse(place.own, config_checks, Path(folder))


def read_file(file: Path, place: Place) -> Documents:
    """A file's documents, checked. Raises ConfigError."""
    config = load_config(file, config_checks(file.parent))
    documents = documents_of(file.read_text(encoding="utf-8"), config)
    checked(documents, place)
    return documents


@dataclass(frozen=True)
class Difference:
    """One key, or file of code, that differs; `before` or `after` is None where it is absent."""

    path: str
    before: Any
    after: Any
    change: str

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"path": self.path, "before": plain(self.before), "after": plain(self.after), "change": self.change}


def difference(before: Documents, after: Documents, place: Place) -> list[Difference]:
    """What differs, by dotted key. Raises ConfigError: one of them is not valid."""
    old, new = before.parse(place.own), after.parse(place.own)
    found = [Difference(one.path, one.old, one.new, one.change) for one in changes(old, new)]
    for file in sorted({*before.code, *after.code}):
        ours, theirs = (_mark(documents.code.get(file)) for documents in (before, after))
        if ours != theirs:
            found.append(Difference(f"code/{file}", ours, theirs, "live"))
    return found


def _mark(source: str | None) -> str | None:
    return None if source is None else f"sha256 {hashlib.sha256(source.encode()).hexdigest()[:12]}"


async def _before(config: ConfigStore, stored: Stored, place: Place, say: Say) -> Documents:
    """What a change is compared with: what is there, or the newest that can be read."""
    try:
        stored.documents.parse(place.own)
        if not stored.problems:
            return stored.documents
        reason = str(stored.problems[0])
    except ConfigError as error:
        reason = str(error).splitlines()[0]
    for entry in reversed(await config.history()):
        try:
            entry.documents.parse(place.own)
        except ConfigError:
            continue
        say(f"version {stored.version} in the store cannot be read ({reason}): compared with version {entry.version}")
        return entry.documents
    return Documents({})


def difference_lines(found: Iterable[Difference]) -> list[str]:
    """One line per key."""
    rows = [(one.path, f"{_shown(one.before)} -> {_shown(one.after)}", one.change) for one in found]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return [f"  {path:<{widths[0]}}  {values:<{widths[1]}}  {change}" for path, values, change in rows]


def _shown(value: Any) -> str:
    text = "absent" if value is None else value_text(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- changing


@dataclass(frozen=True)
class Wish:
    """How a change is to be made.

    Attributes:
        comment: why.
        canary: a node that runs it first.
        hold_s: how long that must go well.
        dry_run: only checked, by the nodes too.
        nodes: whom to wait for; empty: every member.
        timeout_s: how long to wait for an answer.
    """

    comment: str = ""
    canary: str | None = None
    hold_s: float = 0.0
    dry_run: bool = False
    nodes: Sequence[str] = ()
    timeout_s: float = 30.0


@dataclass(frozen=True)
class Report:
    """What a command did.

    Attributes:
        cluster: of which cluster.
        before, version: config versions before and after; the same if nothing was changed.
        changes: what differs.
        outcome: answers of the nodes.
        left_out: keys of the file that are each node's own.
        did: ``applied``, ``unchanged``, ``withdrawn`` or ``tried``.
    """

    cluster: str
    before: int
    version: int
    changes: Sequence[Difference]
    outcome: Outcome
    left_out: Sequence[str]
    did: str

    @property
    def exit_code(self) -> int:
        """What the answers come to."""
        states = {answer.state for answer in self.outcome.answers}
        return EXIT_REFUSED if "refused" in states else EXIT_UNANSWERED if "unanswered" in states or self.outcome.left else EXIT_OK

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "cluster": self.cluster,
            "did": self.did,
            "before": self.before,
            "version": self.version,
            "changes": [one.as_json() for one in self.changes],
            "answers": [asdict(answer) for answer in self.outcome.answers],
            "withdrawn": list(self.outcome.withdrawn),
            "left": dict(self.outcome.left),
            "left_out": list(self.left_out),
        }

    def text(self) -> str:
        """For people."""
        lines = [f"changes to version {self.before} of cluster {self.cluster}:", *difference_lines(self.changes)] if self.changes else []
        lines.append(
            {
                "applied": f"version {self.version} is in the store",
                "unchanged": f"nothing to change: version {self.version} says the same",
                "withdrawn": f"withdrawn: version {self.before} holds" + (", on every node" if not self.outcome.left else ""),
                "tried": "tried, nothing was applied",
            }[self.did]
        )
        if not self.outcome.answers:
            lines.append("  no node follows this store now" if self.did != "withdrawn" else "")
        width = max((len(answer.node) for answer in self.outcome.answers), default=0)
        for answer in self.outcome.answers:
            took = f"  after {answer.after_s:.3f} s" if answer.state in ("applied", "passed") else ""
            lines.append(f"  {answer.node:<{width}}  {answer.state}{took}")
            lines += [f"  {'':<{width}}    {reason}" for reason in answer.reasons]
        others = [node for node in self.outcome.withdrawn if self.did != "withdrawn"]
        lines += [f"  the canary on {node} was ended" for node in others]
        lines += [f"  {key} is still there, remove it: {reason}" for key, reason in self.outcome.left.items()]
        return "\n".join(line for line in lines if line)


async def change(config: ConfigStore, place: Place, documents: Documents, stored: Stored, wish: Wish, say: Say) -> Report:
    """Bring checked documents to the cluster. Raises ConfigChanged, StoreError."""
    before = await _before(config, stored, place, say)
    found = difference(before, documents, place)
    rollout, nodes = Rollout(config, wish.timeout_s), wish.nodes or None

    def report(did: str, outcome: Outcome, version: int) -> Report:
        return Report(place.cluster, stored.version, version, found, outcome, (), did)

    if wish.dry_run:
        return report("tried", Outcome(0, await rollout.dry_run(documents, nodes)), stored.version)
    if documents.digest == stored.documents.digest and not stored.problems:
        answers = await rollout.answers(stored.version, documents.digest, nodes)
        if not any(answer.state == "refused" for answer in answers):
            return report("unchanged", Outcome(stored.version, answers), stored.version)
        # who refused it gets it once more, as a new version
    if wish.canary is None:
        outcome = await rollout.apply(documents, stored, wish.comment, nodes)
    else:
        outcome = await rollout.canary(wish.canary, documents, stored, wish.comment, wish.hold_s, nodes)
    did = "applied" if outcome.version else "withdrawn"
    return report(did, outcome, outcome.version or stored.version)


def run_to_its_end(work: Coroutine[Any, Any, _Made], say: Say) -> _Made:
    """``asyncio.run`` for what takes back what it has begun: Ctrl-C cancels it, and a second one does not keep it from that.

    Raises:
        KeyboardInterrupt: it was cancelled, and has ended.
    """

    async def watched() -> _Made:
        loop, task = asyncio.get_running_loop(), asyncio.create_task(work)

        def interrupted() -> None:
            if not task.cancelling():
                task.cancel()
            else:
                say("what was begun is being taken back; that takes seconds")

        loop.add_signal_handler(signal.SIGINT, interrupted)
        try:
            return await task
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    try:
        return asyncio.run(watched())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def apply_file(file: Path, place: Place, wish: Wish, say: Say) -> Report:
    """Make a file the configuration. Raises ConfigError, ConfigChanged, StoreError."""
    documents = read_file(file, place)
    async with place.open() as config:
        made = await change(config, place, documents, await config.read(), wish, say)
    left_out = node_keys_in(load_config(file))
    return Report(made.cluster, made.before, made.version, made.changes, made.outcome, left_out, made.did)


async def set_key(key: str, value: str | None, place: Place, wish: Wish, say: Say) -> Report:
    """Give a key a value, None: remove it. Raises NoSuchKey, ConfigError, ConfigChanged, StoreError."""
    path = _path_of(key)
    async with place.open() as config:
        stored = await _there(config)
        section = str(path[0])
        text = stored.documents.sections.get(section, "")
        try:
            text = remove_value(text, path[1:]) if value is None else set_value(text, path[1:], value_of(value))
        except KeyError:
            raise NoSuchKey(key, "it has its default already; see `tickmesh config get`") from None
        except tomllib.TOMLDecodeError as error:
            raise NoSuchKey(key, f"config/{section} is no TOML ({error}); apply a file, or roll back") from None
        documents = _complete(stored.documents.with_section(section, text))
        checked(documents, place)
        comment = wish.comment or (f"set {key}" if value is not None else f"remove {key}")
        return await change(config, place, documents, stored, Wish(**{**wish.__dict__, "comment": comment}), say)


async def roll_back(version: int, place: Place, wish: Wish, say: Say) -> Report:
    """Apply the documents of an earlier version. Raises NoSuchVersion, ConfigError, ConfigChanged, StoreError."""
    async with place.open() as config:
        documents = _complete((await config.version(version)).documents)
        checked(documents, place)
        comment = wish.comment or f"rollback to version {version}"
        return await change(config, place, documents, await config.read(), Wish(**{**wish.__dict__, "comment": comment}), say)


def value_of(text: str) -> Any:
    """A value as TOML writes it; anything else is a text: ``5``, ``true``, ``["A"]``, ``debug``."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return found["value"] if len(found) == 1 else text


def _path_of(key: str) -> tuple[str | int, ...]:
    path = parse_key(key)
    if path[0] not in SECTIONS or len(path) < 2:
        raise NoSuchKey(key, f"a key begins with one of {', '.join(SECTIONS)}, as in risk.max_qty")
    return path


def _complete(documents: Documents) -> Documents:
    """With every section, empty where it is absent."""
    return Documents({name: documents.sections.get(name, "") for name in SECTIONS}, documents.code)


async def _there(config: ConfigStore) -> Stored:
    stored = await config.read()
    if not stored.version:
        raise NoConfiguration(config.keys.cluster)
    return stored


# ---------------------------------------------------------------- looking


async def get(key: str | None, place: Place) -> tuple[dict[str, Any], str]:
    """A key's value, or every one below it, for programs and for people; None: the whole document.

    Raises:
        NoSuchKey, NoConfiguration, ConfigError, StoreError: see there.
    """
    async with place.open() as config:
        stored = await _there(config)
    about: dict[str, Any] = {"cluster": place.cluster, "version": stored.version}
    if key is None:
        about |= {"who": stored.change.who if stored.change else "by hand", **stored.documents.as_json()}
        try:
            return about, stored.documents.text()
        except tomllib.TOMLDecodeError:  # as it is, for repair
            return about, "\n".join(f"# config/{name}\n{text}" for name, text in stored.documents.sections.items())
    wanted = dotted(parse_key(key))
    rows = effective(stored.documents.parse(place.own))
    found = [row for row in rows if row.path == wanted or row.path.startswith((f"{wanted}.", f"{wanted}["))]
    if not found:
        raise NoSuchKey(key)
    about["values"] = {row.path: plain(row.value) for row in found}
    if found[0].path == wanted:
        return about, value_text(found[0].value)
    return about, "\n".join(f"{row.path} = {value_text(row.value)}" + ("   # default" if row.origin == "default" else "") for row in found)


async def compare(first: str, second: str | None, place: Place, say: Say) -> list[Difference]:
    """From the first to the second; of one alone: what applying a file would change, or what was changed since a version."""
    async with place.open() as config:
        if second is not None:
            return difference(await _named(first, config, place), await _named(second, config, place), place)
        current = await _before(config, await config.read(), place, say)
        named = await _named(first, config, place)
        return difference(current, named, place) if not first.isdigit() else difference(named, current, place)


async def _named(what: str, config: ConfigStore, place: Place) -> Documents:
    return (await config.version(int(what))).documents if what.isdigit() else read_file(Path(what), place)


async def history(place: Place, limit: int) -> list[dict[str, Any]]:
    """The newest versions, the newest first: version, who, when, comment, and whether it is the one in the store."""
    async with place.open() as config:
        now, entries = (await config.read()).version, await config.history()
    rows = [{"version": entry.version, **asdict(entry.change), "current": entry.version == now} for entry in reversed(entries)]
    for row in rows:
        del row["id"]
    return rows[:limit]


def history_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per version."""
    wide = max((len(row["who"]) for row in rows), default=0)
    return "\n".join(
        f"{'*' if row['current'] else ' '} {row['version']:>8}  {row['when']:<24}  {row['who']:<{wide}}  {row['comment']}".rstrip()
        for row in rows
    )


async def node_statuses(place: Place) -> list[dict[str, Any]]:
    """What every node says of itself, and whether it is registered now."""
    async with place.open() as config:
        members = await Rollout(config).members()
        found = statuses(await config.store.list(config.keys.status()))
    return [{**found.get(node, {"node": node}), "registered": node in members} for node in sorted({*found, *members})]


def node_statuses_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per node, and one per reason."""
    lines = []
    for row in rows:
        state = row.get("state", "unknown") if row["registered"] else "gone"
        where = f"version {row.get('version', 0)}" + (" (canary)" if row.get("source") == "canary" else "")
        lines.append(f"{row['node']}  {state}  {where}  as of {row.get('at', 'never')}")
        refused = row.get("refused") or {}
        lines += [f"  refuses version {refused.get('version')}: {reason}" for reason in refused.get("reasons") or ()]
        if (row.get("store") or {}).get("stale"):
            lines.append(f"  does not hear from the store: {row['store'].get('reason')}")
    return "\n".join(lines)


async def follow(place: Place, tell: Callable[[dict[str, Any], str], None], count: int | None) -> None:
    """Tell of every version as it comes, and of what the nodes make of it, until `count` lines are told."""
    async with place.open() as config, config.store.watch(config.keys.config) as texts, config.store.watch(config.keys.status()) as nodes:
        news: asyncio.Queue[tuple[dict[str, Any], str]] = asyncio.Queue(1)
        tasks = [
            asyncio.create_task(_versions(texts, config, place, news.put)),
            asyncio.create_task(_acknowledgements(nodes, news.put)),
        ]
        try:
            told = 0
            while count is None or told < count:
                waiting = asyncio.create_task(news.get())
                await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task.done():
                        waiting.cancel()
                        task.result()
                tell(*waiting.result())
                told += 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


_Put = Callable[[tuple[dict[str, Any], str]], Awaitable[None]]


async def _versions(watch: Any, config: ConfigStore, place: Place, put: _Put) -> None:
    last: Stored | None = None
    async for snapshot in watch:
        if snapshot.stale:
            await put(({"event": "stale", "reason": snapshot.reason}, f"the store does not answer: {snapshot.reason}"))
            continue
        stored = stored_of(config.keys, snapshot.entries)
        if last is not None and (stored.version, stored.documents.digest) == (last.version, last.documents.digest):
            continue
        who = f"{stored.change.who} {stored.change.comment}".rstrip() if stored.change else "by hand"
        try:
            found = difference(last.documents, stored.documents, place) if last is not None else []
            wrong = [str(problem) for problem in stored.problems]
        except ConfigError as error:
            found, wrong = [], str(error).splitlines()
        about = {"event": "version", "version": stored.version, "who": who, "changes": [one.as_json() for one in found], "problems": wrong}
        lines = [f"version {stored.version}  {who}", *difference_lines(found), *(f"  {line}" for line in wrong)]
        last = stored
        await put((about, "\n".join(lines)))


async def _acknowledgements(watch: Any, put: _Put) -> None:
    last: dict[str, Any] = {}
    async for snapshot in watch:
        for node, status in statuses(snapshot.entries).items():
            refused = status.get("refused") or {}
            said = (status.get("state"), status.get("version"), status.get("source"), refused.get("version"), refused.get("at"))
            if last.get(node) == said or status.get("state") == "applying":
                continue
            last[node] = said
            runs = f"{node}: {status.get('state')}, version {status.get('version')}"
            lines = [runs, *(f"  refuses version {refused.get('version')}: {reason}" for reason in refused.get("reasons") or ())]
            await put(({"event": "node", **status}, "\n".join(lines)))
