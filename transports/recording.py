"""Recorded files: bytes of a plain, gzip, zstd, xz, bzip2 or one-file zip archive, and recordings of one message per line.

The format is told by the first bytes, not by the name. Plain files are mapped, not read. Every array given out has
:data:`SLACK` readable bytes after its data, so that compiled decoders may load a word at the last byte.

A line recording holds ``<time> <payload>`` or ``<time>: <payload>`` per line, time being integer s, ms, us or ns or decimal seconds
since the epoch; a line starting with ``{`` or ``[`` has no time (0). Lines of the cryptofeed recorder about connections
(``wss://… <-> time``, ``… <- time: sent``, ``https://… -> time: response``) and comments (``#``, its ``configuration:``) are kept
apart as :class:`Note`.
"""

from __future__ import annotations

import bz2
import ctypes
import lzma
import mmap
import os
import re
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import zstandard

SLACK = 64
"""Readable bytes after the data of every array given out."""
LIMIT_BYTES = 16 << 30
"""Default limit of decompressed bytes."""
LINE_BYTES_MAX = 64 << 20
NOTES_MAX = 10_000
_PIECE_BYTES = 4096
"""Compressed bytes decoded at once: bounds the memory that hostile input can claim in one step (bzip2, the worst, to ~80 MB)."""
_CHUNK_BYTES = 1 << 20
_FOLDERS_MAX = 64
"""Folder entries before the one file of a zip archive without directory."""

Bytes = npt.NDArray[np.uint8]
ProblemKind = Literal["truncated", "damaged", "trailing"]


@dataclass(frozen=True)
class Problem:
    """What was wrong with an archive whose beginning could be read.

    Attributes:
        kind: ``truncated`` (the end is missing), ``damaged`` (does not decode) or ``trailing`` (unknown bytes after the end, ignored).
        offset: where in the archive's own bytes it was noticed.
        decoded_bytes: how many bytes had been decoded before.
        detail: what the decoder said.
    """

    path: Path
    kind: ProblemKind
    offset: int
    decoded_bytes: int
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.kind} at byte {self.offset} after {self.decoded_bytes} decoded bytes ({self.detail})"


class RecordingError(Exception):
    """A recorded file cannot be used. `path` says which, the message what to do."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class RecordingTooLarge(RecordingError):
    """The archive holds more than `limit_bytes`."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        super().__init__(path, f"holds more than {limit_bytes} bytes; raise limit_bytes if the file can be trusted")
        self.limit_bytes = limit_bytes


class RecordingDamaged(RecordingError):
    """The archive is truncated or damaged; pass ``problems=[]`` to get what can be read of it. `problem` says where."""

    def __init__(self, problem: Problem) -> None:
        text = str(problem).removeprefix(f"{problem.path}: ")
        super().__init__(problem.path, f"{text}; fetch it again, or pass problems=[] to use what can be read")
        self.problem = problem


# ---------------------------------------------------------------- bytes


def read_bytes(path: str | os.PathLike[str], *, limit_bytes: int = LIMIT_BYTES, problems: list[Problem] | None = None) -> Bytes:
    """All bytes of a recorded file, decompressed; u8 array of ``size + SLACK`` (the slack is zero).

    A plain file is mapped copy-on-write: pages are read when touched, and writing to the array does not change the file.
    The file must not be shortened while it is in use.

    Args:
        path: the file.
        limit_bytes: most bytes to decompress.
        problems: told what is wrong with a truncated or damaged archive, of which the readable part is then returned.

    Raises:
        RecordingTooLarge: more than `limit_bytes`.
        RecordingDamaged: truncated or damaged, and `problems` is not given.
        RecordingError: an archive of another kind (several files, encrypted).
        OSError: the file cannot be opened.
    """
    path = Path(path)
    if compression_of(path) == "plain":
        return _map(path)
    data = bytearray()
    for chunk in _chunks(path, limit_bytes, problems):
        data += chunk
    data += bytes(SLACK)
    return np.frombuffer(data, np.uint8)


def _map(path: Path) -> Bytes:
    """Map a file with at least SLACK zero bytes after it (anonymous pages hold what lies behind its last page)."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        access = mmap.PROT_READ | mmap.PROT_WRITE
        total = -(-(size + SLACK) // mmap.PAGESIZE) * mmap.PAGESIZE
        address = libc.mmap(None, total, access, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        failed = ctypes.c_void_p(-1).value
        if address == failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        map_fixed = 0x10
        if size and libc.mmap(address, size, access, mmap.MAP_PRIVATE | map_fixed, file.fileno(), 0) == failed:
            error = ctypes.get_errno()
            libc.munmap(address, total)
            raise OSError(error, os.strerror(error), str(path))
    memory: Any = (ctypes.c_uint8 * (size + SLACK)).from_address(address)
    weakref.finalize(memory, libc.munmap, address, total)
    mapped: Bytes = np.frombuffer(memory, np.uint8)
    return mapped


# ---------------------------------------------------------------- archives

Compression = Literal["plain", "gzip", "zstd", "zip", "bzip2", "xz", "lzma"]
_MAGIC: list[tuple[bytes, Compression]] = [
    (b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"),
    (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"),
]  # fmt: skip
_MAKE: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(31),
    "deflate": lambda: zlib.decompressobj(-15),
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "lzma": lzma.LZMADecompressor,
}
_DECODE_ERRORS = (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, OSError, ValueError)


def compression_of(path: str | os.PathLike[str]) -> Compression:
    """How a file is compressed, by its first bytes (the old ``.lzma`` format, which has no mark, by its suffix)."""
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, name in _MAGIC:
        if start.startswith(magic):
            return name
    return "lzma" if Path(path).suffix == ".lzma" else "plain"


class _Report:
    """Counts decoded bytes against the limit and takes problems: kept if the caller asked for them, raised if not."""

    def __init__(self, path: Path, limit_bytes: int, problems: list[Problem] | None) -> None:
        self.path, self.limit_bytes, self.problems, self.decoded_bytes = path, limit_bytes, problems, 0

    def decoded(self, chunk: bytes) -> bytes:
        self.decoded_bytes += len(chunk)
        if self.decoded_bytes > self.limit_bytes:
            raise RecordingTooLarge(self.path, self.limit_bytes)
        return chunk

    def problem(self, kind: ProblemKind, offset: int, detail: str) -> None:
        problem = Problem(self.path, kind, offset, self.decoded_bytes, detail)
        if self.problems is None:
            raise RecordingDamaged(problem)
        self.problems.append(problem)


def _chunks(path: Path, limit_bytes: int, problems: list[Problem] | None) -> Iterator[bytes]:
    """Decoded pieces of a file of any of the known compressions."""
    compression = compression_of(path)
    report = _Report(path, limit_bytes, problems)
    with path.open("rb") as file:
        if compression == "zip":
            yield from _unzip(file, report)
        elif compression == "plain":
            while chunk := file.read(_CHUNK_BYTES):
                yield report.decoded(chunk)
        else:
            yield from _inflate(file, _MAKE[compression], report)


def _inflate(file: BinaryIO, make: Callable[[], Any], report: _Report, *, members: bool = True) -> Iterator[bytes]:
    """Decode concatenated members (gzip, zstd and xz files may be several in a row); with ``members=False`` stop after the first."""
    decoder, finished = make(), 0
    fed = False
    while piece := file.read(_PIECE_BYTES):
        while piece:
            if not fed and finished:
                piece = piece.lstrip(b"\0")  # padding between members
                if not piece:
                    break
            before = report.decoded_bytes
            try:
                chunk = decoder.decompress(piece)
            except _DECODE_ERRORS as error:
                trailing = finished and not fed
                report.problem("trailing" if trailing else "damaged", file.tell() - len(piece), str(error))
                return
            fed = True
            if chunk:
                yield report.decoded(chunk)
            assert report.decoded_bytes >= before
            piece = b""
            if decoder.eof:
                if not members:
                    return
                piece, decoder, fed, finished = decoder.unused_data, make(), False, finished + 1
    if fed or not finished:
        report.problem("truncated", file.tell(), "the end of the compressed data is missing")


def _unzip(file: BinaryIO, report: _Report) -> Iterator[bytes]:
    """The one file of a zip archive; of an archive cut short, what its beginning gives."""
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        yield from _unzip_start(file, report)
        return
    names = [info for info in archive.infolist() if not info.is_dir()]
    if len(names) != 1:
        raise RecordingError(report.path, f"holds {len(names)} files, not one; extract the one to be read")
    if names[0].flag_bits & 1:
        raise RecordingError(report.path, "is encrypted; extract it first")
    try:
        with archive.open(names[0]) as member:
            while chunk := member.read(_CHUNK_BYTES):
                yield report.decoded(chunk)
    except NotImplementedError as error:
        raise RecordingError(report.path, f"{error}; extract it first") from error
    except (*_DECODE_ERRORS, zipfile.BadZipFile) as error:
        report.problem("damaged", file.tell(), str(error))


def _unzip_start(file: BinaryIO, report: _Report) -> Iterator[bytes]:
    """Decode the first member by its local header (APPNOTE 4.3.7): the directory at the archive's end is missing."""
    file.seek(0)
    for _ in range(_FOLDERS_MAX):
        header = file.read(30)
        method, name_bytes = int.from_bytes(header[8:10], "little"), int.from_bytes(header[26:28], "little")
        name = file.read(name_bytes)
        if len(header) < 30 or len(name) < name_bytes or header[6] & 1 or method not in (0, 8):
            report.problem("truncated", file.tell(), "no directory, and the first file's header cannot be used")
            return
        file.seek(int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
        if not name.endswith(b"/"):
            break
        file.seek(int.from_bytes(header[18:22], "little"), os.SEEK_CUR)
    if method == 8:
        quiet = _Report(report.path, report.limit_bytes, [])
        for chunk in _inflate(file, _MAKE["deflate"], quiet, members=False):
            yield report.decoded(chunk)
    else:
        left = int.from_bytes(header[18:22], "little")
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            left -= len(chunk)
            yield report.decoded(chunk)
    report.problem("truncated", file.tell(), "the archive's directory is missing")


# ---------------------------------------------------------------- lines

NoteKind = Literal["connected", "sent", "response", "comment"]
_NOTE = re.compile(rb"(\w+://\S+) (<->|<-|->) (\d[\d.]*):? ?")
_NOTE_KINDS: dict[bytes, NoteKind] = {b"<->": "connected", b"<-": "sent", b"->": "response"}
_TIMED = re.compile(rb"(\d{1,19})(?:\.(\d{1,12}))?:?[ \t,]")
_DIGITS_TO_NS = {10: 10**9, 13: 10**6, 16: 10**3, 19: 1}


@dataclass(frozen=True)
class Note:
    """A line of a recording that is not a received message: `kind`, whose connection (`url`), when, and what was sent or answered."""

    kind: NoteKind
    url: str
    recv_ns: int
    payload: bytes


@dataclass
class LineRecording:
    """Iterate for ``(recv_ns, payload)``; the other fields fill up meanwhile.

    Attributes:
        notes: connections, sent messages, answers of HTTP requests, comments; the first :data:`NOTES_MAX`.
        notes_count: all of them.
        lines: lines seen, empty ones not counted.
        malformed: lines without a time or payload, skipped.
        too_long: lines over :data:`LINE_BYTES_MAX`, skipped.
    """

    path: Path
    limit_bytes: int = LIMIT_BYTES
    problems: list[Problem] | None = None
    notes: list[Note] = field(default_factory=list)
    notes_count: int = 0
    lines: int = 0
    malformed: int = 0
    too_long: int = 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        self.notes, self.notes_count, self.lines, self.malformed, self.too_long = [], 0, 0, 0, 0
        for line in self._lines():
            self.lines += 1
            found = split_time(line)
            if found is not None:
                yield found
            elif not self._note(line):
                self.malformed += 1

    def _note(self, line: bytes) -> bool:
        note = Note("comment", "", 0, line.lstrip(b"# ")) if line.startswith((b"#", b"configuration:")) else None
        if match := _NOTE.match(line):
            whole, _, fraction = match[3].partition(b".")
            recv_ns = _time_ns(whole, fraction)
            note = Note(_NOTE_KINDS[match[2]], match[1].decode("utf-8", "replace"), recv_ns or 0, line[match.end() :])
        if note is None:
            return False
        self.notes_count += 1
        if len(self.notes) < NOTES_MAX:
            self.notes.append(note)
        return True

    def _lines(self) -> Iterator[bytes]:
        """Non-empty lines without their end; a line over the limit is skipped and counted."""
        rest = b""
        skipping = False
        for chunk in _chunks(self.path, self.limit_bytes, self.problems):
            head, *lines = chunk.split(b"\n")
            rest += head
            for line in lines:
                if not skipping and (stripped := rest.strip()):
                    yield stripped
                rest, skipping = line, False
            if len(rest) > LINE_BYTES_MAX:
                self.too_long += not skipping
                rest, skipping = b"", True
        if not skipping and (stripped := rest.strip()):
            yield stripped


def split_time(line: bytes) -> tuple[int, bytes] | None:
    """Time (ns since the epoch, 0 if there is none) and payload of a recorded line; None if it is no message."""
    if line[:1] in b"{[":
        return 0, line
    timed = _TIMED.match(line)
    recv_ns = _time_ns(timed[1], timed[2]) if timed else None
    if timed is None or recv_ns is None or timed.end() >= len(line):
        return None
    return recv_ns, line[timed.end() :].lstrip()


def _time_ns(whole: bytes, fraction: bytes | None) -> int | None:
    """Nanoseconds since the epoch, exactly: decimal seconds, or an integer whose unit (s, ms, us, ns) its number of digits tells."""
    if fraction:
        return int(whole) * 10**9 + int(fraction[:9].ljust(9, b"0")) if fraction.isdigit() and len(whole) <= 10 else None
    scale = _DIGITS_TO_NS.get(len(whole))
    return int(whole) * scale if scale else None


def read_lines(path: str | os.PathLike[str], *, limit_bytes: int = LIMIT_BYTES, problems: list[Problem] | None = None) -> LineRecording:
    """A line recording; iterate for ``(recv_ns, payload)``. Arguments and errors as :func:`read_bytes`, raised while iterating."""
    return LineRecording(Path(path), limit_bytes, problems)
