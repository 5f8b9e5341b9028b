"""Files that are on the disk, under their name, before anything goes on.

One compiled call does all of it. From Python each of the seven system calls lets go of the interpreter's lock, and in a node whose threads
are all busy it is waited for: 10 to 20 ms in all, where the disk takes two.
"""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from tickmesh.transports.toolbox import address_of, inlined, loop

_open = types.ExternalFunction("open", types.int32(types.uint64, types.int32, types.uint32))
_write = types.ExternalFunction("write", types.int64(types.int32, types.uint64, types.uint64))
_fsync = types.ExternalFunction("fsync", types.int32(types.int32))
_close = types.ExternalFunction("close", types.int32(types.int32))
_rename = types.ExternalFunction("rename", types.int32(types.uint64, types.uint64))
_errno_location = types.ExternalFunction("__errno_location", types.uint64())
_mempcpy = types.ExternalFunction("mempcpy", types.uint64(types.uint64, types.uint64, types.uint64))

_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MODE = 0o644
_EINTR = errno.EINTR
_numbers = itertools.count()
"""Of temporary files: two threads may write one file at a time."""


def write_durably(path: Path, content: bytes) -> None:
    """Give a file its content, whole or not at all; it is on the disk, with its name, when this returns. Other threads run meanwhile.

    Raises:
        OSError: the file is as it was; or, where only its folder could not be synced, it is there and may be lost with the power.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(_numbers)}.new")
    data = np.frombuffer(content + b"\0", np.uint8)
    failed = int(_put(_text(temporary), _text(path), _text(path.parent), data, np.int64(len(content)), np.zeros(1, np.int32)))
    if failed:
        temporary.unlink(missing_ok=True)
        raise OSError(failed, os.strerror(failed), str(path))


def warm() -> None:
    """Compile it, if it is not in the cache: who writes first may have somebody waiting."""
    root = _text(Path("/"))
    _put(root, root, root, np.zeros(1, np.uint8), np.int64(0), np.zeros(1, np.int32))  # a folder cannot be written: nothing happens


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk. Raises OSError."""
    fd = os.open(folder, _FOLDER)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _text(path: Path) -> npt.NDArray[np.uint8]:
    return np.frombuffer(os.fsencode(path) + b"\0", np.uint8)


@inlined
def _last_error(cell: Any) -> Any:
    _mempcpy(address_of(cell, 0), _errno_location(), np.uint64(4))
    return np.int64(cell[0])


@inlined
def _opened(path: Any, flags: Any, cell: Any) -> Any:
    """A file's descriptor, or -1."""
    while True:
        fd = _open(address_of(path, 0), flags, _MODE)
        if fd >= 0 or _last_error(cell) != _EINTR:
            return fd


@inlined
def _synced(fd: Any, cell: Any) -> Any:
    """Sync and close a file: 0, or the error of it."""
    failed = np.int64(_EINTR)
    while failed == _EINTR:
        failed = _last_error(cell) if _fsync(fd) < 0 else np.int64(0)
    _close(fd)
    return failed


@loop
def _put(temporary: Any, path: Any, folder: Any, content: Any, size: Any, cell: Any) -> Any:
    """Write, sync, rename, sync the folder; 0, or the error of the first that failed."""
    fd = _opened(temporary, _NEW, cell)
    if fd < 0:
        return np.int64(cell[0])
    done = np.int64(0)
    while done < size:
        count = _write(fd, address_of(content, done), np.uint64(size - done))
        if count < 0:
            failed = _last_error(cell)
            if failed == _EINTR:
                continue
            _close(fd)
            return failed
        done += count
    failed = _synced(fd, cell)
    if failed != 0:
        return failed
    if _rename(address_of(temporary, 0), address_of(path, 0)) < 0:
        return _last_error(cell)
    fd = _opened(folder, _FOLDER, cell)
    return np.int64(cell[0]) if fd < 0 else _synced(fd, cell)
