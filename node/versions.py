"""The documents of configuration versions: what a journal needs beside it, so that a replay runs the configuration that ran.

A document is a configuration as it was given, the text of the user's calculation files that it names, and the numbers of its sources.
Each version that a journal names lies beside it, ``configs/<version>.json``, on the disk before the CONFIG event that names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from tickmesh.control.config import Config
from tickmesh.node.journal import JournalReader
from tickmesh.node.pipeline import make_plan
from tickmesh.node.shard import ShardPlan
from tickmesh.transports.codecache import cache_dir
from tickmesh.transports.durable import sync_folder, write_durably

_FOLDER = "configs"


class DocumentError(Exception):
    """A version's document cannot be made, read or written; the message says what to do."""


@dataclass(frozen=True)
class Document:
    """One version of the configuration, complete.

    Attributes:
        version: its number.
        config: the configuration as it was given.
        code: text of the user's calculation files, by their names in it.
        sources: number of every source that the node has had, by name; one that is gone keeps its number.
        order_ids: how the books number orders (:func:`tickmesh.node.book.make_books`); empty: not known yet.
        outputs: of the version that a journal begins under: outputs that its shard had made before.
    """

    version: int
    config: Config
    code: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, int] = field(default_factory=dict)
    order_ids: str = ""
    outputs: int = 0

    @classmethod
    def of(cls, config: Config, version: int, known_sources: Mapping[str, int], order_ids: str = "") -> Document:
        """The document of a configuration as its files are now.

        Args:
            known_sources: numbers given before; new sources get the next ones.

        Raises:
            DocumentError: a calculation's file cannot be read.
        """
        code = {}
        for name in sorted(set(_code_files(config))):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise DocumentError(f"{name} is not inside the folder of the configuration: name it relative to that")
            try:
                code[name] = (config.code_folder / name).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DocumentError(f"{name} cannot be read: {error}") from error
        sources = dict(known_sources)
        for name in config.data_sources:
            sources.setdefault(name, max(sources.values(), default=-1) + 1)
        return cls(version, config, code, sources, order_ids)

    @property
    def folder(self) -> Path:
        """A folder of ours that holds :attr:`code`, made if it is not there; the files it came from may change meanwhile."""
        if not self.code:
            return Path()
        text = json.dumps(dict(self.code), sort_keys=True)
        place = cache_dir() / "code" / hashlib.sha256(text.encode()).hexdigest()[:24]
        for name, content in self.code.items():
            _write_once(place / name, content)
        return place

    def plan(self) -> ShardPlan:
        """What its shards' loop is made of.

        Raises:
            PlanError: a calculation, alert or bar is wrong.
        """
        return make_plan(self.config, self.folder)

    def settings(self) -> dict[str, Any]:
        """The keys that were given, as plain data."""
        return self.config.model_dump(mode="json", exclude_unset=True)

    def same_market(self, other: Document) -> bool:
        """Whether both compute the same from the same sources."""
        sections = ("data_sources", "processing", "risk")
        mine, its = ({name: d.settings().get(name) or {} for name in sections} for d in (self, other))
        return mine == its and dict(self.code) == dict(other.code)

    def text(self) -> str:
        """As JSON."""
        parts = {"version": self.version, "config": self.settings(), "code": dict(self.code), "sources": dict(self.sources)}
        parts |= {"order_ids": self.order_ids, "outputs": self.outputs}
        return json.dumps(parts, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, text: str) -> Document:
        """From :meth:`text`.

        Raises:
            DocumentError: it is something else.
        """
        try:
            parts = json.loads(text)
            code = {str(name): str(content) for name, content in parts["code"].items()}
            if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in code):
                raise ValueError("a file lies outside its folder")
            sources = {str(name): int(number) for name, number in parts["sources"].items()}
            config, numbering = Config.model_validate(parts["config"]), str(parts["order_ids"])
            return cls(int(parts["version"]), config, code, sources, numbering, int(parts["outputs"]))
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise DocumentError(f"is no document of a configuration: {error}") from error


def _code_files(config: Config) -> Iterator[str]:
    processing = config.processing
    for tables in (processing.calculations, processing.alerts, processing.bars):
        for table in tables.values():
            if ".py:" in table.use:
                yield table.use.rpartition(":")[0]
    for source in config.data_sources.values():
        if source.use and ".py:" in source.use:
            yield source.use.rpartition(":")[0]


def _write_once(path: Path, content: str) -> None:
    if path.is_file() and path.read_text(encoding="utf-8") == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(content)
    os.replace(file.name, path)


class Documents:
    """The documents beside one journal."""

    def __init__(self, journal_folder: str | Path) -> None:
        self.folder = Path(journal_folder) / _FOLDER

    def write(self, document: Document) -> None:
        """Keep a document; it is on the disk when this returns.

        Raises:
            DocumentError: the disk does not take it.
        """
        path = self._path(document.version)
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(exist_ok=True)
                sync_folder(self.folder.parent)
            write_durably(path, document.text().encode())
        except OSError as error:
            raise DocumentError(f"{path} cannot be written ({error.strerror}): free space, or look at its permissions") from error

    def read(self, version: int) -> Document:
        """The document of a version.

        Raises:
            DocumentError: it is not there, or damaged.
        """
        path = self._path(version)
        try:
            return Document.read(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DocumentError(f"{path}: the journal needs configuration {version}, which cannot be read: {error}") from error
        except DocumentError as error:
            raise DocumentError(f"{path} {error}") from error

    def remove(self, version: int) -> None:
        """Forget a version that nothing names."""
        self._path(version).unlink(missing_ok=True)

    def versions(self) -> list[int]:
        """The versions that are here, sorted."""
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdigit())

    def prune(self) -> int:
        """Delete the documents that the journal, some of which has gone, does not name any more; returns how many.

        The oldest that it names is in the header of its first segment: perhaps an older one than was in force when its first event came,
        since segments are made ahead. A replay begins by reading it.

        Raises:
            JournalError: the journal cannot be read now.
        """
        oldest = JournalReader(self.folder.parent).config_version
        old = [version for version in self.versions() if version < oldest]
        for version in old:
            self.remove(version)
        return len(old)

    def _path(self, version: int) -> Path:
        return self.folder / f"{version}.json"
