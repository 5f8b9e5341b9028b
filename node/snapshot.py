"""Snapshots: a shard's arrays as they are at one sequence of its journal, in one file.

All state of a shard is plain arrays, so a snapshot is a copy of them and nothing else. Books reserve far more memory than they use: what is
zero is left out, in chunks of 64 KiB. A file is written under another name, synced and then renamed, so that one that has its name is
complete; every chunk and the table of chunks have a checksum nevertheless.

    "tmsnapsh" version u32 0 u32 | chunks … | table (JSON) | table's offset u64, length u64, CRC-32 u32, 0 u32, "tmsnapsh"

A snapshot fits a shard whose arrays have the same names, types and shapes: the configuration of its version gives such a shard. If it does
not fit (another tickmesh has written it), the journal is replayed from its beginning.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tickmesh.transports.durable import sync_folder
from tickmesh.transports.ring import RingArrays

_MAGIC, _VERSION = b"tmsnapsh", 2
_HEAD, _TAIL = struct.Struct("<8sII"), struct.Struct("<QQII8s")
_CHUNK_BYTES = 64 << 10
_SUFFIX = ".snapshot"
_NOT_KEPT = frozenset({"scratch", "books.plans"})
"""Arrays whose content means nothing between two events."""
Bytes = npt.NDArray[np.uint8]


class SnapshotError(Exception):
    """A snapshot cannot be used or written.

    Attributes:
        path: its file.
        reason: why.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"snapshot {path}: {reason}")
        self.path, self.reason = path, reason


class SnapshotDamaged(SnapshotError):
    """It is cut short or altered; an older one, or the journal, has to do."""


class SnapshotUnfit(SnapshotError):
    """It is of a shard with other arrays."""


@dataclass(frozen=True)
class SnapshotFacts:
    """What a snapshot says about itself.

    Attributes:
        shard: number of the shard.
        sequence: journal sequence of the first event that it does not contain.
        chain: the journal's checksum before that event.
        journal_id: of the journal.
        config_version: in force.
        outputs: output sequence reached.
        created_ns: when.
        sources: per source, what a receiver needs to go on; see :class:`tickmesh.node.restore.Restored`.
    """

    shard: int
    sequence: int
    chain: int
    journal_id: int
    config_version: int
    outputs: int
    created_ns: int
    sources: dict[str, Any] = field(default_factory=dict)


def named_arrays(arrays: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Arrays and integers of a shard's namedtuples with their names (``books.orders``), without what is not kept."""
    for name, value in arrays._asdict().items():
        path = prefix + name
        if path in _NOT_KEPT or isinstance(value, RingArrays):
            continue
        if hasattr(value, "_asdict"):
            yield from named_arrays(value, f"{path}.")
        else:
            yield path, value


# ---------------------------------------------------------------- writing


def write_snapshot(folder: Path, arrays: Any, facts: SnapshotFacts) -> Path:
    """Write a shard's arrays to ``<folder>/<sequence>.snapshot``; nothing may change them meanwhile. Older snapshots stay.

    Raises:
        SnapshotError: the folder cannot be written to.
    """
    path = folder / f"{facts.sequence:020d}{_SUFFIX}"
    temporary = path.with_suffix(".new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(_HEAD.pack(_MAGIC, _VERSION, 0))
            table = {"facts": asdict(facts), "values": [_write_value(file, name, value) for name, value in named_arrays(arrays)]}
            encoded = json.dumps(table).encode()
            at = file.tell()
            file.write(encoded)
            file.write(_TAIL.pack(at, len(encoded), zlib.crc32(encoded), 0, _MAGIC))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise SnapshotError(path, f"cannot be written ({error.strerror}): free some space, or set cluster.data_dir") from error
    return path


def _write_value(file: BinaryIO, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, np.ndarray):
        return {"name": name, "value": int(value)}
    chunks = []
    for number, chunk in _chunks(value):
        if chunk.any():
            chunks.append((number, zlib.crc32(chunk.data)))
            file.write(chunk.data)
    return {"name": name, "dtype": _described(value.dtype), "shape": value.shape, "chunks": chunks}


def _chunks(array: npt.NDArray[Any]) -> Iterator[tuple[int, Bytes]]:
    flat: Bytes = array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
    for at in range(0, flat.size, _CHUNK_BYTES):
        yield at // _CHUNK_BYTES, flat[at : at + _CHUNK_BYTES]


def _described(dtype: np.dtype[Any]) -> Any:
    return json.loads(json.dumps(np.lib.format.dtype_to_descr(dtype)))


# ---------------------------------------------------------------- reading


def snapshots(folder: Path) -> list[Path]:
    """The snapshots in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"*{_SUFFIX}") if path.stem.isdigit())


def read_facts(path: Path) -> SnapshotFacts:
    """What a snapshot says about itself.

    Raises:
        SnapshotDamaged, SnapshotUnfit: it is cut short or altered, or of another version.
    """
    with _opened(path) as file:
        return _facts(path, _read_table(path, file))


def _facts(path: Path, table: Mapping[str, Any]) -> SnapshotFacts:
    try:
        return SnapshotFacts(**table["facts"])
    except (KeyError, TypeError) as error:
        raise SnapshotUnfit(path, "it says other things of itself than this program expects") from error


def fits(path: Path, arrays: Any) -> bool:
    """Whether a snapshot is whole, as far as its table goes, and of a shard with such arrays."""
    try:
        with _opened(path) as file:
            table = _read_table(path, file)
            _facts(path, table)
            _check_fit(path, {row["name"]: row for row in table["values"]}, dict(named_arrays(arrays)))
    except (SnapshotError, KeyError):
        return False
    return True


def load_into(path: Path, arrays: Any) -> SnapshotFacts:
    """Make a shard's arrays what they were.

    Raises:
        SnapshotDamaged: it is cut short or altered; the arrays are then in no state to be used.
        SnapshotUnfit: it is of a shard with other arrays; nothing was changed.
    """
    with _opened(path) as file:
        table = _read_table(path, file)
        kept, present = {row["name"]: row for row in table["values"]}, dict(named_arrays(arrays))
        _check_fit(path, kept, present)
        file.seek(_HEAD.size)
        for row in table["values"]:  # in the order of the file
            if "chunks" in row:
                _read_array(path, file, row, present[row["name"]])
        return _facts(path, table)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise SnapshotDamaged(path, f"cannot be read ({error.strerror})") from error


def _read_table(path: Path, file: BinaryIO) -> dict[str, Any]:
    size = file.seek(0, os.SEEK_END)
    if size < _HEAD.size + _TAIL.size:
        raise SnapshotDamaged(path, "it is cut short")
    file.seek(0)
    magic, version, _ = _HEAD.unpack(file.read(_HEAD.size))
    file.seek(size - _TAIL.size)
    at, length, crc, _, end = _TAIL.unpack(file.read(_TAIL.size))
    if magic != _MAGIC or end != _MAGIC or at + length + _TAIL.size != size:
        raise SnapshotDamaged(path, "it is cut short, or no snapshot")
    if version != _VERSION:
        raise SnapshotUnfit(path, f"it has version {version}, this program reads {_VERSION}")
    file.seek(at)
    encoded = file.read(length)
    if zlib.crc32(encoded) != crc:
        raise SnapshotDamaged(path, "its table is altered")
    table: dict[str, Any] = json.loads(encoded)
    return table


def _check_fit(path: Path, kept: dict[str, Any], present: dict[str, Any]) -> None:
    if kept.keys() != present.keys():
        names = ", ".join(sorted(kept.keys() ^ present.keys()))
        raise SnapshotUnfit(path, f"it is of a shard with other arrays ({names})")
    for name, row in kept.items():
        value = present[name]
        if isinstance(value, np.ndarray):
            same = "chunks" in row and row["dtype"] == _described(value.dtype) and tuple(row["shape"]) == value.shape
        else:
            same = row.get("value") == int(value)
        if not same:
            raise SnapshotUnfit(path, f"{name} has another type or size")


def _read_array(path: Path, file: BinaryIO, row: dict[str, Any], array: npt.NDArray[Any]) -> None:
    wanted = {int(number): int(crc) for number, crc in row["chunks"]}
    for number, chunk in _chunks(array):
        crc = wanted.pop(number, None)
        if crc is None:
            if chunk.any():
                chunk[:] = 0
            continue
        data = file.read(len(chunk))
        if len(data) < len(chunk) or zlib.crc32(data) != crc:
            raise SnapshotDamaged(path, f"chunk {number} of {row['name']} is altered")
        chunk[:] = np.frombuffer(data, np.uint8)
    if wanted:
        raise SnapshotDamaged(path, f"{row['name']} has chunks that it has no place for")
