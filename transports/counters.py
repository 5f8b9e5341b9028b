"""Counters and latency histograms in mapped memory: a store for the compiled loop that writes them, free for it when read from outside.

The file describes itself: a fixed header, then JSON text with every label, kind, unit and offset, then the numbers (little-endian i64).
Counters of one `group` (one writing thread) lie together; groups are 128 bytes apart, so that threads do not disturb each other.

A histogram has 32 buckets per power of two (the layout of HdrHistogram with 5 bits): exact below 32, then no bucket is wider than 3.2 %
of its values, and the middle of a bucket, which is what percentiles report, is within 1.6 %. Values are clamped to 0 .. 2^48 - 1 (in ns
78 hours).

Each counter and each histogram has one writer.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from tickmesh.transports.toolbox import count_leading_zeros, inlined, store_release

MAGIC = b"tmcounts"
VERSION = 1
_HEADER = struct.Struct("<8sQQQ")
"""magic, version, bytes of the description, bytes of the whole file."""
_GROUP_BYTES = 128
_SUB_BITS = 5
_SUB_BUCKETS = 1 << _SUB_BITS
_VALUE_BITS = 48
BUCKETS = (_VALUE_BITS - _SUB_BITS + 1) * _SUB_BUCKETS
_SUM, _MAX, _BUCKETS_AT = 0, 1, 16
HISTOGRAM_WORDS = _BUCKETS_AT + BUCKETS
"""A histogram is an i64 array of so many words; its buckets are the last :data:`BUCKETS` of them."""
_VALUE_MAX = (1 << _VALUE_BITS) - 1

_FOLDER = Path("/dev/shm")
_PREFIX, _SUFFIX = "tickmesh-", ".counters"

Values = npt.NDArray[np.int64]

# ---------------------------------------------------------------- kernels


@inlined
def counter_add(values: Any, index: Any, n: Any) -> Any:
    """Add `n` to the counter at `index` of the file's values. Not atomic: one writer. A store each time, never kept in a register."""
    store_release(values, index, values[index] + np.int64(n))


@inlined
def counter_set(values: Any, index: Any, value: Any) -> Any:
    """Set the gauge at `index` of the file's values."""
    store_release(values, index, np.int64(value))


@inlined
def bucket_of(value: Any) -> Any:
    """Bucket (i64) of a value, clamped to what a histogram covers."""
    clamped = np.uint64(min(max(np.int64(value), np.int64(0)), np.int64(_VALUE_MAX)))
    if clamped < np.uint64(_SUB_BUCKETS):
        return np.int64(clamped)
    shift = np.uint64(63 - _SUB_BITS) - count_leading_zeros(clamped)
    return np.int64((shift << np.uint64(_SUB_BITS)) + (clamped >> shift))


@inlined
def histogram_record_n(histogram: Any, value: Any, n: Any) -> Any:
    """Record `value` (ns, or the histogram's unit) `n` times: one measurement that holds for a whole batch."""
    index = _BUCKETS_AT + bucket_of(value)
    store_release(histogram, index, histogram[index] + np.int64(n))
    store_release(histogram, _SUM, histogram[_SUM] + np.int64(value) * np.int64(n))
    if np.int64(value) > histogram[_MAX]:
        store_release(histogram, _MAX, np.int64(value))


@inlined
def histogram_record(histogram: Any, value: Any) -> Any:
    """Record one `value` (ns, or the histogram's unit) in the i64 array of a histogram, see :meth:`CounterFile.histogram`."""
    histogram_record_n(histogram, value, 1)


# ---------------------------------------------------------------- errors


class CountersError(Exception):
    """Something about a counter file; `path` says which."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class CountersNotFound(CountersError):
    """There is no such file."""


class CountersLayoutMismatch(CountersError):
    """The file is no counter file of this version, or it is damaged; `reason`."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, f"is no counter file of this version ({reason}); remove it or choose another path")
        self.reason = reason


class CountersNoSpace(CountersError):
    """The memory cannot be reserved; `needed_bytes`."""

    def __init__(self, path: Path, needed_bytes: int, reason: str) -> None:
        super().__init__(path, f"cannot reserve {needed_bytes} bytes ({reason}); free memory in {path.parent}")
        self.needed_bytes = needed_bytes


# ---------------------------------------------------------------- descriptions


@dataclass(frozen=True)
class Counter:
    """A number that a loop keeps: ``counter`` only rises, ``gauge`` goes both ways. `group` names the writing thread."""

    name: str
    unit: str = ""
    help: str = ""
    kind: Literal["counter", "gauge"] = "counter"
    group: str = ""


@dataclass(frozen=True)
class Histogram:
    """A distribution that a loop records."""

    name: str
    unit: str = "ns"
    help: str = ""


@dataclass(frozen=True)
class Description:
    """What a counter file says about itself: `index` of a counter counts i64 words from `values_offset`, `offset` of a histogram bytes."""

    name: str
    pid: int
    created_ns: int
    counters: dict[str, Counter]
    histograms: dict[str, Histogram]
    index: dict[str, int] = field(default_factory=dict)
    offset: dict[str, int] = field(default_factory=dict)
    values_offset: int = 0
    values_count: int = 0


def _rounded(size: int, to: int) -> int:
    return -(-size // to) * to


def _arrange(counters: Sequence[Counter]) -> tuple[dict[str, int], int]:
    """Index of each counter, groups apart; and how many words that takes."""
    groups: dict[str, list[Counter]] = {}
    for counter in counters:
        groups.setdefault(counter.group, []).append(counter)
    index: dict[str, int] = {}
    at = 0
    for members in groups.values():
        index.update({counter.name: at + i for i, counter in enumerate(members)})
        at += _rounded(len(members), _GROUP_BYTES // 8)
    return index, at


def _encode(path: Path, counters: Sequence[Counter], histograms: Sequence[Histogram]) -> tuple[bytes, int]:
    """The JSON description and the size of the file. Offsets depend on the length of the text that holds them: room is set aside first."""
    index, words = _arrange(counters)
    names = [h.name for h in histograms]
    if len(index) != len(counters) or len(set(names)) != len(names):
        raise ValueError(f"{path}: two counters or two histograms have the same name")
    label = path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    about: dict[str, Any] = {"name": label, "pid": os.getpid(), "created_ns": time.time_ns()}
    about["counters"] = [asdict(c) | {"index": index[c.name]} for c in counters]
    about["layout"] = {"histogram_words": HISTOGRAM_WORDS, "sum": _SUM, "max": _MAX, "buckets_at": _BUCKETS_AT, "sub_bits": _SUB_BITS}
    room = len(json.dumps(about | {"histograms": [asdict(h) for h in histograms]}, indent=1)) + 40 * (len(names) + 4)
    values_offset = _rounded(_HEADER.size + room, mmap.PAGESIZE)
    first = _rounded(values_offset + words * 8, mmap.PAGESIZE)
    stride = _rounded(HISTOGRAM_WORDS * 8, _GROUP_BYTES)
    about |= {"values_offset": values_offset, "values_count": words}
    about["histograms"] = [asdict(h) | {"offset": first + i * stride} for i, h in enumerate(histograms)]
    text = json.dumps(about, indent=1).encode()
    return text, first + stride * len(names)


def _decode(path: Path, text: bytes, size: int) -> Description:
    try:
        about = json.loads(text)
        counters = {c["name"]: Counter(*(c[k] for k in ("name", "unit", "help", "kind", "group"))) for c in about["counters"]}
        histograms = {h["name"]: Histogram(*(h[k] for k in ("name", "unit", "help"))) for h in about["histograms"]}
        index = {c["name"]: int(c["index"]) for c in about["counters"]}
        offset = {h["name"]: int(h["offset"]) for h in about["histograms"]}
        start, count = int(about["values_offset"]), int(about["values_count"])
        description = Description(about["name"], about["pid"], about["created_ns"], counters, histograms, index, offset, start, count)
    except (ValueError, KeyError, TypeError) as error:
        raise CountersLayoutMismatch(path, f"description: {error}") from error
    ends = [start + count * 8, *(o + HISTOGRAM_WORDS * 8 for o in offset.values())]
    if max(ends) > size or any(not 0 <= i < count for i in index.values()) or min([start, *offset.values()]) < _HEADER.size:
        raise CountersLayoutMismatch(path, "the description points outside the file")
    return description


# ---------------------------------------------------------------- percentiles


def bucket_bounds(bucket: int) -> tuple[int, int]:
    """Lowest value of a bucket and of the one after it."""
    if bucket < _SUB_BUCKETS:
        return bucket, bucket + 1
    shift = (bucket >> _SUB_BITS) - 1
    low = (_SUB_BUCKETS + (bucket & (_SUB_BUCKETS - 1))) << shift
    return low, low + (1 << shift)


def percentile(counts: Values, percent: float) -> float:
    """Value below which `percent` of the recorded values lie, from bucket counts (shape ``(BUCKETS,)``); NaN if there are none.

    Counts may be differences of two readings, for the percentiles of an interval.
    """
    total = int(counts.sum())
    if total <= 0:
        return float("nan")
    rank = max(1, -(-total * percent // 100))
    bucket = int(np.searchsorted(np.cumsum(counts), rank))
    low, above = bucket_bounds(bucket)
    return (low + above - 1) / 2


# ---------------------------------------------------------------- the file


class CounterFile:
    """A mapped file of counters and histograms.

    The owner makes it with :meth:`create` and gives `values` and :meth:`histogram` arrays to its kernels; anybody else reads it
    through :meth:`attach`. A reading is a copy of numbers that move on, each one whole, not one instant of all of them.
    """

    def __init__(self, path: Path, memory: mmap.mmap, about: Description) -> None:
        self.path, self.about = path, about
        self._memory = memory
        self.values: Values = np.frombuffer(memory, np.int64, about.values_count, about.values_offset)
        """All counters, shape ``(values_count,)``; see :meth:`index`."""

    @classmethod
    def create(
        cls, path: str | Path, counters: Sequence[str | Counter] = (), histograms: Sequence[str | Histogram] = (), permissions: int = 0o600
    ) -> CounterFile:
        """Make the file, all zero, replacing an older counter file; readers of the older one keep seeing that one's last numbers.

        Raises:
            CountersLayoutMismatch: the path holds something else, which is left alone.
            CountersNoSpace: the memory cannot be reserved.
        """
        path = Path(path)
        if path.exists() and path.stat().st_size and path.open("rb").read(len(MAGIC)) != MAGIC:
            raise CountersLayoutMismatch(path, "it starts otherwise")
        text, size = _encode(
            path,
            [Counter(c) if isinstance(c, str) else c for c in counters],
            [Histogram(h) if isinstance(h, str) else h for h in histograms],
        )
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, permissions)
        try:
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, _HEADER.pack(MAGIC, VERSION, len(text), size) + text, 0)
            memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink()
            raise CountersNoSpace(path, size, error.strerror or "") from error
        finally:
            os.close(fd)
        return cls(path, memory, _decode(path, text, size))

    @classmethod
    def attach(cls, path: str | Path) -> CounterFile:
        """Map an existing file, to read.

        Raises:
            CountersNotFound: there is none.
            CountersLayoutMismatch: it is no counter file of this version.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(_HEADER.size)
                if len(head) < _HEADER.size or head[: len(MAGIC)] != MAGIC:
                    raise CountersLayoutMismatch(path, "it starts otherwise")
                _, version, text_bytes, file_bytes = _HEADER.unpack(head)
                if version != VERSION or file_bytes != size:
                    raise CountersLayoutMismatch(path, f"version {version}, {size} of {file_bytes} bytes")
                about = _decode(path, file.read(min(text_bytes, size)), size)
                memory = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        except FileNotFoundError:
            raise CountersNotFound(path, "there is no such file; is its node running?") from None
        return cls(path, memory, about)

    def index(self, name: str) -> int:
        """Index into `values` of the counter `name` (KeyError if there is none)."""
        return self.about.index[name]

    def histogram(self, name: str) -> Values:
        """The i64 array of a histogram, for :func:`histogram_record` (KeyError if there is none)."""
        return np.frombuffer(self._memory, np.int64, HISTOGRAM_WORDS, self.about.offset[name])

    def counts(self, name: str) -> Values:
        """A copy of a histogram's bucket counts, shape ``(BUCKETS,)``, for :func:`percentile`."""
        return self.histogram(name)[_BUCKETS_AT:].copy()

    def snapshot(self) -> dict[str, Any]:
        """All numbers now, as plain data: ``{"name", "pid", "created_ns", "counters": {label: int}, "histograms": {label: {...}}}``.

        A histogram gives `unit`, `count`, `mean`, `p50`, `p90`, `p99`, `p999` and `max` (None where nothing was recorded).
        """
        about = self.about
        return {
            "name": about.name,
            "pid": about.pid,
            "created_ns": about.created_ns,
            "counters": {name: int(self.values[i]) for name, i in about.index.items()},
            "histograms": {name: self._summary(name) for name in about.histograms},
        }

    def _summary(self, name: str) -> dict[str, Any]:
        words = self.histogram(name)
        counts = words[_BUCKETS_AT:].copy()
        total, most = int(counts.sum()), int(words[_MAX])
        known = {f"p{label}": percentile(counts, p) for label, p in (("50", 50), ("90", 90), ("99", 99), ("999", 99.9))}
        return {
            "unit": self.about.histograms[name].unit,
            "count": total,
            "mean": int(words[_SUM]) / total if total else None,
            **{label: min(value, most) if total else None for label, value in known.items()},
            "max": most if total else None,
        }

    def close(self) -> None:
        """Let go of the file; arrays taken from it stay usable. The file itself stays, for a look after the end; see :meth:`unlink`."""
        self.values = np.zeros(0, np.int64)

    def unlink(self) -> None:
        """Remove the file; who has it mapped keeps it. Not an error if it is gone."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def counters_path(name: str) -> Path:
    """Where the counters of the node `name` lie: ``/dev/shm/tickmesh-<name>.counters``."""
    return _FOLDER / f"{_PREFIX}{name}{_SUFFIX}"


def list_counters() -> list[str]:
    """Names of the counter files of this host, sorted."""
    return sorted(path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX) for path in _FOLDER.glob(f"{_PREFIX}*{_SUFFIX}"))
