"""Files written durably: the content is there under the name, or the file is as it was and the error says why."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.transports import durable
from tickmesh.transports.durable import write_durably


@settings(max_examples=50, deadline=None)
@given(contents=st.lists(st.binary(max_size=10_000), min_size=1, max_size=3))
def test_the_last_content_is_there(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("durable") / "ä file.json"
    for content in contents:
        write_durably(path, content)
        assert path.read_bytes() == content
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_no_open_files_are_left(tmp_path: Path) -> None:
    write_durably(tmp_path / "a", b"1")
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        write_durably(tmp_path / "a", b"2")
    assert os.listdir("/proc/self/fd") == before


def test_what_the_system_says_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_durably(tmp_path / "not there" / "a", b"1")
    assert caught.value.filename == str(tmp_path / "not there" / "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_durably(tmp_path / "folder", b"1")
    with pytest.raises(OSError, match="too long") as long:
        write_durably(tmp_path / ("a" * 300), b"1")
    assert long.value.errno == errno.ENAMETOOLONG


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    path = tmp_path / "a"
    write_durably(path, b"before")
    monkeypatch.setattr(durable, "_numbers", iter([7]))
    (tmp_path / f"a.{os.getpid()}-7.new").symlink_to(full)
    with pytest.raises(OSError, match="space") as caught:
        write_durably(path, b"after")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"before"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_threads_that_write_one_file_leave_it_whole(tmp_path: Path) -> None:
    contents = [bytes([65 + number]) * 50_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            list(pool.map(lambda content: write_durably(tmp_path / "a", content), contents))
            assert (tmp_path / "a").read_bytes() in contents
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
