"""Recorded files: every compression, cut short, damaged, too large; lines with their times."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.transports import recording
from tickmesh.transports.recording import (
    SLACK,
    Note,
    Problem,
    RecordingDamaged,
    RecordingError,
    RecordingTooLarge,
    compression_of,
    read_bytes,
    read_lines,
)

DATA = Path(os.environ.get("TICKMESH_DATA", Path(__file__).parents[2] / "shared" / "data"))
CONTENT = b"".join(b'%d {"price":"%d.5","n":[%d]}\n' % (1_700_000_000_000_000_000 + i, i % 977, i * 7919) for i in range(5000))


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", b"")
        archive.writestr("data.json", content)
    return file.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
    "zip": zipped,
}


def written(folder: Path, kind: str, content: bytes) -> Path:
    path = folder / (f"recording.{kind}")
    path.write_bytes(content)
    return path


def text(data: np.ndarray) -> bytes:
    assert data.dtype == np.uint8
    assert data.flags.c_contiguous
    assert data.flags.writeable
    assert not data[-SLACK:].any()
    return data[:-SLACK].tobytes()


@pytest.mark.parametrize("kind", PACK)
def test_every_compression_gives_the_bytes(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind, PACK[kind](CONTENT))
    assert compression_of(path) == kind
    assert text(read_bytes(path)) == CONTENT
    assert text(read_bytes(written(tmp_path, kind, PACK[kind](b"")))) == b""


@pytest.mark.parametrize("kind", ["gzip", "zstd", "bzip2", "xz"])
def test_archives_in_a_row_are_one_recording(tmp_path: Path, kind: str) -> None:
    half = len(CONTENT) // 2
    path = written(tmp_path, kind, PACK[kind](CONTENT[:half]) + PACK[kind](CONTENT[half:]))
    assert text(read_bytes(path)) == CONTENT


@pytest.mark.parametrize("size", [0, 1, 4031, 4032, 4033, 4095, 4096, 4097, 8192])
def test_a_mapped_file_has_slack_at_any_size_and_is_not_changed(tmp_path: Path, size: int) -> None:
    path = written(tmp_path, "plain", b"x" * size)
    data = read_bytes(path)
    assert text(data) == b"x" * size
    data[:] = 7
    assert path.read_bytes() == b"x" * size


@pytest.mark.parametrize("kind", [kind for kind in PACK if kind != "plain"])
def test_more_than_the_limit_is_refused(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind, PACK[kind](bytes(50_000_000)))
    with pytest.raises(RecordingTooLarge, match="raise limit_bytes") as caught:
        read_bytes(path, limit_bytes=1_000_000)
    assert (caught.value.path, caught.value.limit_bytes) == (path, 1_000_000)


@pytest.mark.parametrize("kind", [kind for kind in PACK if kind != "plain"])
def test_an_archive_cut_short_gives_its_beginning_and_says_so(tmp_path: Path, kind: str) -> None:
    packed = PACK[kind](CONTENT)
    path = written(tmp_path, kind, packed[: len(packed) * 2 // 3])
    with pytest.raises(RecordingDamaged, match="problems=") as caught:
        read_bytes(path)
    problems: list[Problem] = []
    data = text(read_bytes(path, problems=problems))
    assert CONTENT.startswith(data)
    assert data or kind in ("bzip2", "zstd")  # one block of these holds it all
    assert [p.kind for p in problems] == ["truncated"]
    assert problems[0].decoded_bytes == len(data)
    assert caught.value.problem.kind == "truncated"


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zip"])
def test_a_flipped_byte_is_noticed(tmp_path: Path, kind: str) -> None:
    packed = bytearray(PACK[kind](CONTENT))
    packed[len(packed) // 2] ^= 0x55
    problems: list[Problem] = []
    read_bytes(written(tmp_path, kind, bytes(packed)), problems=problems)
    assert [p.kind for p in problems] == ["damaged"]
    assert str(problems[0].path) in str(problems[0])


def test_bytes_after_the_end_are_reported_and_padding_is_not(tmp_path: Path) -> None:
    problems: list[Problem] = []
    assert text(read_bytes(written(tmp_path, "gzip", gzip.compress(CONTENT) + bytes(500)), problems=problems)) == CONTENT
    assert problems == []
    assert text(read_bytes(written(tmp_path, "gzip", gzip.compress(CONTENT) + b"rubbish"), problems=problems)) == CONTENT
    assert [p.kind for p in problems] == ["trailing"]


def test_a_zip_of_several_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("b", b"2")
    with pytest.raises(RecordingError, match="2 files"):
        read_bytes(path)


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    packed = bytearray(zipped(CONTENT))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := packed.find(mark, at + 1)) >= 0:
            packed[at + place] |= 1
    with pytest.raises(RecordingError, match="encrypted"):
        read_bytes(written(tmp_path, "zip", bytes(packed)))


def test_a_stored_zip_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "stored.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a", CONTENT)
    path.write_bytes(path.read_bytes()[:1000])
    problems: list[Problem] = []
    data = text(read_bytes(path, problems=problems))
    assert data
    assert CONTENT.startswith(data)
    assert [p.kind for p in problems] == ["truncated"]
    path.write_bytes(b"PK\x03\x04" + struct.pack("<HHH", 20, 0, 99))
    read_bytes(path, problems=problems)
    assert len(problems) == 2


def test_a_missing_file_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        list(read_lines(tmp_path / "none"))


# ---------------------------------------------------------------- lines

S = 1_633_998_512
TIMES = [
    ("1633998512.0633569", S * 10**9 + 63_356_900),
    ("1633998512", S * 10**9),
    ("1633998512063", S * 10**9 + 63_000_000),
    ("1633998512063356", S * 10**9 + 63_356_000),
    ("1633998512063356789", S * 10**9 + 63_356_789),
    ("1633998512.123456789123", S * 10**9 + 123_456_789),
]


@pytest.mark.parametrize("separator", [" ", ": ", "  ", "\t", ","])
@pytest.mark.parametrize(("time_text", "ns"), TIMES)
def test_times_become_exact_nanoseconds(tmp_path: Path, time_text: str, ns: int, separator: str) -> None:
    path = written(tmp_path, "plain", f'{time_text}{separator}{{"a": 1}}\r\n\n'.encode())
    assert list(read_lines(path)) == [(ns, b'{"a": 1}')]


@settings(deadline=None, max_examples=50)
@given(st.integers(10**18, 9 * 10**18 - 1))
def test_decimal_seconds_of_any_time(ns: int) -> None:
    shown = f"{Decimal(ns).scaleb(-9):f}".rstrip("0").rstrip(".")
    whole, _, fraction = shown.partition(".")
    assert recording._time_ns(whole.encode(), fraction.encode()) == ns


def test_connections_and_comments_are_kept_apart(tmp_path: Path) -> None:
    lines = [
        b"# made by hand",
        b"wss://host/path <-> 1633998512.5",
        b'wss://host/path <- 1633998512.6: {"op":"subscribe"}',
        b'1633998513.0: {"x":1}',
        b"https://host/snapshot?limit=10 -> 1633998514.0: {}",
        b"configuration: {}",
        b"neither this nor that",
        b"12345: too short for a time",
        b"1633998513.0:",
        b'[{"no":"time"}]',
    ]
    recorded = read_lines(written(tmp_path, "plain", b"\n".join(lines)))
    assert list(recorded) == [(1633998513 * 10**9, b'{"x":1}'), (0, b'[{"no":"time"}]')]
    assert recorded.notes == [
        Note("comment", "", 0, b"made by hand"),
        Note("connected", "wss://host/path", 1633998512_500_000_000, b""),
        Note("sent", "wss://host/path", 1633998512_600_000_000, b'{"op":"subscribe"}'),
        Note("response", "https://host/snapshot?limit=10", 1633998514 * 10**9, b"{}"),
        Note("comment", "", 0, b"configuration: {}"),
    ]
    assert (recorded.lines, recorded.notes_count, recorded.malformed) == (10, 5, 3)
    assert list(recorded)[1:] == [(0, b'[{"no":"time"}]')]  # iterating again starts again
    assert recorded.malformed == 3


def test_endless_lines_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "LINE_BYTES_MAX", 1 << 20)
    path = written(tmp_path, "plain", b"{1}\n" + b"[" * (5 << 20) + b"\n{2}\n" + b"[" * (3 << 20))
    recorded = read_lines(path)
    assert [payload for _, payload in recorded] == [b"{1}", b"{2}"]
    assert recorded.too_long == 2


def test_lines_across_chunks_of_a_compressed_file_cut_short(tmp_path: Path) -> None:
    packed = gzip.compress(CONTENT)
    problems: list[Problem] = []
    found = list(read_lines(written(tmp_path, "gzip", packed[: len(packed) // 2]), problems=problems))
    whole = [line.split(b" ", 1)[1] for line in CONTENT.splitlines()]
    assert 100 < len(found) < 5000
    assert [payload for _, payload in found[:-1]] == whole[: len(found) - 1]  # the last line may be half
    assert [p.kind for p in problems] == ["truncated"]


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real recordings in {DATA}; set TICKMESH_DATA")


@needs_data
def test_every_real_recording_is_json_with_times() -> None:
    paths = [p for p in sorted((DATA / "cryptofeed_ws").iterdir()) if p.name != "LICENSE"]
    paths += [DATA / "binance_spot_btcusdt" / "btcusdt_20240808.gz", DATA / "bybit_ob500" / "xrpusdt-ob500.data.zip"]
    assert len(paths) > 12
    for path in paths:
        recorded = read_lines(path)
        count = 0
        for recv_ns, payload in recorded:
            assert recv_ns == 0 or 1_600_000_000 * 10**9 < recv_ns < 1_800_000_000 * 10**9
            if count % 50 == 0:
                json.loads(payload)
            count += 1
        assert recorded.malformed == 0, path
        assert count + recorded.notes_count == recorded.lines
        assert count or any(note.kind == "response" for note in recorded.notes), path
