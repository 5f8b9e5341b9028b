"""A cluster's configuration in the store: what lies under which key, how it is read, changed and kept.

Below ``tickmesh/<cluster>/``:

* ``config/<section>``: TOML of a section's inside; ``config/code/<file>``: a calculation's source that the configuration names;
  ``config/changed``: who changed it, when and why. The highest version among them is the **config version**. If ``changed`` does not have
  it, the newest change was made by hand.
* ``history/<version>``: the documents of a version, at least the newest :data:`HISTORY_MAX`.
* ``canary/<node>``, ``dry_run/<node>``: documents that one node runs, or only tries (:mod:`tickmesh.control.follower`).
* ``status/<node>``: what a node runs and what it refused.

A change is one transaction that writes the sections that differ, if all of them still have the versions they were read at: it is made as a
whole, or not at all because somebody else was faster.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import functools
import getpass
import hashlib
import json
import os
import secrets
import shutil
import socket
import tomllib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from tickmesh.control.config import (
    PER_NODE_KEYS,
    SECTIONS,
    Checks,
    Cluster,
    Config,
    ConfigError,
    Part,
    Problem,
    default_config,
    parse_parts,
)
from tickmesh.control.store import (
    VALUE_BYTES_MAX,
    BadKey,
    Delete,
    Entry,
    Put,
    Store,
    StoreError,
    StoreUnavailable,
    Unchanged,
    ValueTooLarge,
    VersionMismatch,
    check_key,
    now_s,
)
from tickmesh.control.toml_text import join_sections, remove_value, split_sections, toml_of

HISTORY_MAX = 100
CODE_FOLDERS_MAX = 64
_DELETES = 50  # of one transaction that prunes
_SURE_TRIES = 20
_FRESH_S = 30.0
_SPARE = 16  # versions beyond HISTORY_MAX that stay on average: only every so many changes one looks for old ones
ChecksOf = Callable[[Path], Checks]
"""The hooks that check a configuration whose code lies in a folder."""


class ConfigChanged(Exception):
    """Somebody else has changed the configuration since it was read; nothing was changed.

    Attributes:
        expected: the config version that was read.
        found: the one that is there now.
        change: who made that, when and why; None: it was made by hand.
    """

    def __init__(self, expected: int, found: int, change: Change | None) -> None:
        by = f"by {change.who} at {change.when}" if change else "by hand"
        super().__init__(
            f"the configuration was changed meanwhile, from version {expected} to {found}, {by}; nothing was done: "
            "look at it with `tickmesh config diff`, and give the command again"
        )
        self.expected, self.found, self.change = expected, found, change


class NoSuchVersion(Exception):
    """The history does not have a version.

    Attributes:
        version: the one asked for.
        known: those it has.
    """

    def __init__(self, version: int, known: Sequence[int]) -> None:
        span = (
            f"it has {', '.join(map(str, sorted(known)[-5:]))}" + (" and older ones" if len(known) > 5 else "") if known else "it is empty"
        )
        super().__init__(f"there is no version {version} in the history ({span}): see `tickmesh config history`")
        self.version, self.known = version, list(known)


class NoConfiguration(Exception):
    """The store has no configuration for this cluster.

    Attributes:
        cluster: its name.
    """

    def __init__(self, cluster: str) -> None:
        super().__init__(f"the store has no configuration of cluster {cluster}: put one there with `tickmesh config apply FILE`")
        self.cluster = cluster


# ---------------------------------------------------------------- keys


@dataclass(frozen=True)
class Keys:
    """Names of a cluster's keys. `cluster`: its name."""

    cluster: str

    @property
    def root(self) -> str:
        """Prefix of everything."""
        return f"tickmesh/{self.cluster}/"

    @property
    def config(self) -> str:
        """Prefix of the configuration."""
        return f"{self.root}config/"

    @property
    def changed(self) -> str:
        """Who changed the configuration last by command."""
        return f"{self.config}changed"

    @property
    def service(self) -> str:
        """Name under which its nodes are registered."""
        return f"tickmesh-{self.cluster}"

    def section(self, name: str) -> str:
        """Of a section."""
        return f"{self.config}{name}"

    def code(self, file: str) -> str:
        """Of a calculation's source."""
        return f"{self.config}code/{file}"

    def history(self, version: int | None = None) -> str:
        """Of a version in the history; None: the prefix of all."""
        return f"{self.root}history/" + ("" if version is None else f"{version:020d}")

    def status(self, node: str = "") -> str:
        """Of a node's status; empty: the prefix of all."""
        return f"{self.root}status/{node}"

    def canary(self, node: str = "") -> str:
        """Of what a node runs in place of the configuration; empty: the prefix of all."""
        return f"{self.root}canary/{node}"

    def dry_run(self, node: str = "") -> str:
        """Of what a node is asked to try; empty: the prefix of all."""
        return f"{self.root}dry_run/{node}"


# ---------------------------------------------------------------- documents


@dataclass(frozen=True)
class Documents:
    """The texts of a configuration.

    Attributes:
        sections: TOML of each section's inside, by name.
        code: sources of the calculations that it names, by file name.
    """

    sections: Mapping[str, str]
    code: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of all of it."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    @property
    def code_digest(self) -> str:
        """SHA-256, hexadecimal, of the code."""
        return hashlib.sha256(json.dumps(dict(self.code), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """As the history, a canary and a dry run keep it: ``sections`` and ``code``."""
        return {"sections": dict(self.sections), "code": dict(self.code)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Documents:
        """What :meth:`as_json` gave.

        Raises:
            ValueError: it is something else.
        """
        parts = [document.get("sections"), document.get("code", {})]
        for part in parts:
            if not isinstance(part, dict) or not all(isinstance(text, str) for text in part.values()):
                raise ValueError("must be JSON with texts under sections and code")
        return cls(*parts)

    def text(self) -> str:
        """One TOML document. Raises tomllib.TOMLDecodeError if a section is none."""
        ordered = {name: self.sections[name] for name in SECTIONS if name in self.sections}
        return join_sections({name: text for name, text in ordered.items() if text.strip()})

    def with_section(self, name: str, text: str) -> Documents:
        """The same with another text of one section."""
        return Documents({**self.sections, name: text}, self.code)

    def parse(self, own: Config, checks_of: ChecksOf | None = None, code_root: Path | None = None) -> Config:
        """The configuration.

        Args:
            own: what is the node's own, see :func:`tickmesh.control.config.parse_parts`; for its cluster's name alone: :func:`own_of`.
            checks_of: hooks that check calculations and sources.
            code_root: folder for the code, which is written below it (:func:`write_code`); None: it is not looked at, nor are the checks.

        Raises:
            ConfigError: with every problem.
        """
        keys = Keys(own.cluster.name)
        parts = {name: Part(self.sections[name], keys.section(name)) for name in SECTIONS if name in self.sections}
        if code_root is None:
            return parse_parts(parts, own)
        folder = write_code(code_root, self)
        return parse_parts(parts, own, checks_of(folder) if checks_of else None, folder)


def own_of(cluster: str, node: str | None = None) -> Config:
    """What is a node's own, as far as it is known from outside."""
    named = Cluster(name=cluster, node=node) if node else Cluster(name=cluster)
    return default_config().model_copy(update={"cluster": named})


def write_code(root: Path, documents: Documents) -> Path:
    """Write the code to a folder below `root` that its content names, and return that; one that is there is left alone.

    Of more than :data:`CODE_FOLDERS_MAX` folders, those that were asked for longest ago go.

    Raises:
        ConfigError: a file's name is none.
        OSError: it cannot be written.
    """
    folder = root / documents.code_digest[:32]
    if folder.is_dir():
        os.utime(folder)
        return folder
    made = root / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        made.mkdir(parents=True)
        for name, source in documents.code.items():
            file = made / _safe_name(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source, encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another thread or process was faster
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    kept = sorted((one for one in root.iterdir() if not one.name.startswith(".")), key=lambda one: one.stat().st_mtime_ns)
    for old in kept[:-CODE_FOLDERS_MAX]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _safe_name(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ConfigError([Problem("", None, None, f"code/{name} is no file name", "name a file below the configuration's folder")], "code")
    return path


def documents_of(text: str, config: Config) -> Documents:
    """The documents of a checked configuration file, with the code that it names and without what is each node's own.

    Args:
        text: the file's.
        config: what it says; its folder is where the code is.

    Raises:
        ConfigError: code cannot be read, or lies outside the folder.
    """
    sections = dict.fromkeys(SECTIONS, "")
    sections |= {name: inside for name, inside in split_sections(text).items() if name in sections}
    for name in PER_NODE_KEYS:
        if name in config.cluster.model_fields_set:
            sections["cluster"] = remove_value(sections["cluster"], (name,))
    return Documents(sections, _code_of(config))


def node_keys_in(config: Config) -> list[str]:
    """The keys of a configuration file that are each node's own, and do not go into the store."""
    found = [f"cluster.{name}" for name in PER_NODE_KEYS if name in config.cluster.model_fields_set]
    return found + (["store"] if "store" in config.model_fields_set else [])


def code_files(config: Config) -> dict[str, tuple[str, ...]]:
    """The files of user code that a configuration names, each with the path of the key that does."""
    found: dict[str, tuple[str, ...]] = {}
    for group in ("calculations", "alerts", "bars"):
        for name, table in getattr(config.processing, group).items():
            if ".py:" in table.use:
                found.setdefault(table.use.rpartition(":")[0], ("processing", group, name, "use"))
    for name, source in config.data_sources.items():
        if source.use and ".py:" in source.use:
            found.setdefault(source.use.rpartition(":")[0], ("data_sources", name, "use"))
    return found


def _code_of(config: Config) -> dict[str, str]:
    code, problems = {}, []
    for file, path in code_files(config).items():
        name = PurePosixPath(os.path.normpath(file)).as_posix()
        try:
            if name != file:
                raise BadKey(file)
            check_key(Keys(config.cluster.name).code(name))
            _safe_name(name)
            code[file] = (config.code_folder / file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            problems.append(_problem(config, path, f"names {file}, which cannot be read: {reason}", "check the file"))
        except (BadKey, ConfigError):
            hint = "put the file below the configuration's folder, named with letters, digits and _ . = - only"
            problems.append(_problem(config, path, f"names {file}, which cannot go into the store", hint))
    if problems:
        raise ConfigError(problems, str(config.file or "configuration"))
    return code


def _problem(config: Config, path: tuple[str, ...], reason: str, hint: str) -> Problem:
    return Problem(".".join(path), config.line(*path), None, reason, hint)


# ---------------------------------------------------------------- what is stored


@dataclass(frozen=True)
class Change:
    """Who made a change. `when`: RFC 3339."""

    who: str
    when: str
    comment: str = ""
    id: str = ""


@dataclass(frozen=True)
class Stored:
    """What lies under ``config/`` at one moment.

    Attributes:
        version: the config version; 0: there is nothing.
        documents: as far as they can be read.
        change: who made the newest change; None: it was made by hand.
        versions: of every key below the prefix.
        problems: keys that are no section, and values that are no text.
        read_s: when it was read, see :func:`tickmesh.control.store.now_s`.
    """

    version: int
    documents: Documents
    change: Change | None
    versions: Mapping[str, int]
    problems: tuple[Problem, ...] = ()
    read_s: float = field(default_factory=now_s, compare=False)

    def missing(self, before: Iterable[str], keys: Keys) -> list[Problem]:
        """Sections that are not there although they were there before."""
        there = {*self.documents.sections, *(problem.part.removeprefix(keys.config) for problem in self.problems)}
        gone = [name for name in before if name in SECTIONS and name not in there]
        return [Problem("", None, None, "is missing", "put the key back, or make it empty", keys.section(name)) for name in gone]


def stored_of(keys: Keys, entries: Mapping[str, Entry]) -> Stored:
    """What entries of the prefix ``config/`` say."""
    sections: dict[str, str] = {}
    code: dict[str, str] = {}
    change: Change | None = None
    problems: list[Problem] = []
    version = max((entry.version for entry in entries.values()), default=0)
    for key, entry in entries.items():
        name = key.removeprefix(keys.config)
        if key == keys.changed:
            change = _change_of(entry.value) if entry.version == version else None
            continue
        problem = _unusable(name, entry.value)
        if problem:
            problems.append(Problem("", None, None, *problem, part=key))
        elif name in SECTIONS:
            sections[name] = entry.value.decode()
        else:
            code[name.removeprefix("code/")] = entry.value.decode()
    ordered = {name: sections[name] for name in SECTIONS if name in sections}
    versions = {key: entry.version for key, entry in entries.items()}
    return Stored(version, Documents(ordered, code), change, versions, tuple(problems))


def _unusable(name: str, value: bytes) -> tuple[str, str] | None:
    """Reason and hint, if a key below ``config/`` cannot be used."""
    if name not in SECTIONS and not name.startswith("code/"):
        near = difflib.get_close_matches(name, SECTIONS, 1)
        known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SECTIONS)}, code/FILE"
        return "is no section", f"{known}; remove the key"
    if ".." in name.split("/"):
        return "is no file name", "remove the key"
    if len(value) > VALUE_BYTES_MAX:
        return f"has {len(value)} bytes, at most {VALUE_BYTES_MAX} can be kept in its history", "shorten it"
    try:
        value.decode()
    except UnicodeDecodeError:
        return "is not UTF-8 text", "write it anew"
    return None


def _change_of(value: bytes) -> Change:
    try:
        found = tomllib.loads(value.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        found = {}
    return Change(*(str(found.get(name, "")) for name in ("who", "when", "comment", "id")))


@dataclass(frozen=True)
class HistoryEntry:
    """A version of the configuration as it was once applied."""

    version: int
    change: Change
    documents: Documents

    def encoded(self) -> bytes:
        """As the store keeps it: JSON."""
        about = {"version": self.version, "who": self.change.who, "when": self.change.when, "comment": self.change.comment}
        return json.dumps(about | self.documents.as_json(), ensure_ascii=False, indent=1).encode()

    @classmethod
    def decoded(cls, value: bytes) -> HistoryEntry:
        """Raises ValueError: it is none."""
        found = json.loads(value)
        change = Change(*(str(found.get(name, "")) for name in ("who", "when", "comment")))
        return cls(int(found["version"]), change, Documents.from_json(found))


def now_text() -> str:
    """This moment, RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def who_text() -> str:
    """Who we are: user and host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


# ---------------------------------------------------------------- the configuration in the store


class ConfigStore:
    """The configuration of one cluster in a store.

    Attributes:
        store: where it lies.
        keys: names of its keys.
    """

    def __init__(self, store: Store, cluster: str) -> None:
        self.store, self.keys = store, Keys(cluster)

    async def read(self) -> Stored:
        """What is there now. Raises StoreError."""
        return stored_of(self.keys, await self.store.list(self.keys.config))

    async def apply(self, documents: Documents, based_on: Stored, comment: str = "", who: str = "") -> int:
        """Make these documents the configuration, and put them into the history; returns the config version.

        Whatever else lies under ``config/`` goes. They are not checked here: see :meth:`Documents.parse`.

        Args:
            documents: all of the configuration.
            based_on: what :meth:`read` gave: the change is made only if that is still there.
            comment: why.
            who: makes it; empty: this user on this host.

        Raises:
            ConfigChanged: something else is there by now; nothing was changed.
            StoreUnavailable: with `maybe_done`, if it could not be found out whether the change was made.
            ValueTooLarge, TransactionRefused, StoreRefused: see there.
        """
        made = await self.write(documents, based_on, comment, who)
        with contextlib.suppress(StoreError):  # every node that accepts it does the same
            await self.remember(made)
        return made.version

    async def write(self, documents: Documents, based_on: Stored, comment: str = "", who: str = "") -> HistoryEntry:
        """:meth:`apply` without the history, which gets what this returns. Raises as that does."""
        change = Change(who or who_text(), now_text(), comment, secrets.token_hex(8))
        check_documents_size(self.keys, documents)
        try:
            unchanged = Unchanged(self.keys.config, based_on.versions)
            if now_s() - based_on.read_s > _FRESH_S:  # a removed key may have been forgotten altogether
                unchanged.check(await self.store.list(self.keys.config))
            versions = await self.store.transaction(self._operations(documents, based_on, change), unchanged=unchanged)
            version = max(versions.values())
        except VersionMismatch:
            found = await self.read()
            raise ConfigChanged(based_on.version, found.version, found.change) from None
        except StoreUnavailable as error:
            if not error.maybe_done:
                raise
            version = await self._found_out(change, based_on, error)
        return HistoryEntry(version, change, documents)

    def _operations(self, documents: Documents, based_on: Stored, change: Change) -> list[Put | Delete]:
        wanted = {self.keys.section(name): documents.sections.get(name, "") for name in SECTIONS}
        wanted |= {self.keys.code(name): source for name, source in documents.code.items()}
        about = {"who": change.who, "when": change.when, "comment": change.comment, "id": change.id}
        wanted[self.keys.changed] = toml_of(about)  # the last one: in a bucket each key has a version of its own, and this is the highest
        gone: list[Put | Delete] = [Delete(key, version) for key, version in based_on.versions.items() if key not in wanted]
        stored = {self.keys.section(name): text for name, text in based_on.documents.sections.items()}
        stored |= {self.keys.code(name): source for name, source in based_on.documents.code.items()}
        other = {key: text for key, text in wanted.items() if stored.get(key) != text}  # each one costs every node something
        return gone + [Put(key, text.encode(), based_on.versions.get(key, 0)) for key, text in other.items()]

    async def _found_out(self, change: Change, based_on: Stored, error: StoreUnavailable) -> int:
        """The version of a change whose answer was lost."""
        for _ in range(_SURE_TRIES):
            try:
                entry = await self.store.get(self.keys.changed)
            except StoreError:
                await asyncio.sleep(0.1)
                continue
            if entry is not None and _change_of(entry.value).id == change.id:
                return entry.version
            found = await self.read()
            if found.versions == based_on.versions:
                raise StoreUnavailable(self.store.address, error.reason) from error
            raise ConfigChanged(based_on.version, found.version, found.change) from error
        raise error

    # -- history

    async def remember(self, entry: HistoryEntry) -> bool:
        """Put a version into the history, and now and then the oldest beyond :data:`HISTORY_MAX` away; False if it is there.

        Raises:
            StoreError: see there.
        """
        key = self.keys.history(entry.version)
        value = entry.encoded()
        try:
            await self.store.put(key, value, expected=0)
        except VersionMismatch:
            return False
        if zlib.crc32(key.encode()) % _SPARE == 0:
            await self.prune()
        return True

    async def prune(self, keep: int = HISTORY_MAX) -> None:
        """Remove the oldest versions beyond the newest `keep`. Raises StoreError."""
        kept = sorted(await self.store.keys(self.keys.history()))
        gone = kept[: max(0, len(kept) - keep)]
        for first in range(0, len(gone), _DELETES):
            await self.store.transaction([Delete(key) for key in gone[first : first + _DELETES]])

    async def history(self) -> list[HistoryEntry]:
        """Every version that is kept, the oldest first. Raises StoreError."""
        found = []
        for entry in (await self.store.list(self.keys.history())).values():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # not written by us
                found.append(HistoryEntry.decoded(entry.value))
        return sorted(found, key=lambda one: one.version)

    async def version(self, version: int) -> HistoryEntry:
        """One version. Raises NoSuchVersion, StoreError."""
        entry = await self.store.get(self.keys.history(version))
        if entry is not None:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return HistoryEntry.decoded(entry.value)
        raise NoSuchVersion(version, [one.version for one in await self.history()])


def check_documents_size(keys: Keys, documents: Documents) -> None:
    """Raises ValueTooLarge: as one value, as the history and a canary keep them, the documents are too large."""
    size = len(HistoryEntry(0, Change("", ""), documents).encoded()) + 4096  # who, when and a comment
    if size > VALUE_BYTES_MAX:
        raise ValueTooLarge(keys.history(0), size)
