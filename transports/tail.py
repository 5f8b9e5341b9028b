"""Following a file that grows, as ``tail -F`` does: over truncation, and over rotation (another file under the same name)."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_READ_BYTES = 1 << 18


@dataclass(frozen=True)
class Piece:
    """What has been appended: `data`; or (`fresh`) the file has begun anew, by rotation or truncation, before it."""

    data: bytes
    fresh: bool = False
    lost: bool = False
    """It was shortened: what was written between the last look and that is not known."""


class Tail:
    """A file that somebody appends to. :meth:`next` gives what is new; :meth:`close` in the end, or to go on in the same place with the
    next :meth:`next`.

    Attributes:
        path: the file; it may be absent at times.
        rotations, truncations: how often it has begun anew.
    """

    def __init__(self, path: Path, look_s: float = 0.05) -> None:
        self.path, self._look_s = path, look_s
        self.rotations = self.truncations = 0
        self._file: BinaryIO | None = None
        self._at = 0
        self._inode: tuple[int, int] | None = None
        """Of the file that is read, also while it is closed."""

    async def next(self) -> Piece:
        """The next piece; waits for one.

        Raises:
            OSError: the file cannot be opened or read.
        """
        while True:
            found = self._read()
            if found is not None:
                return found
            await asyncio.sleep(self._look_s)

    def _read(self) -> Piece | None:
        if self._file is None and (found := self._open()) is not None:
            return found
        if self._file is None:
            return None
        data = self._file.read(_READ_BYTES)
        if data:
            self._at += len(data)
            return Piece(data)
        if os.fstat(self._file.fileno()).st_size < self._at:
            self._file.seek(0)
            self._at = 0
            self.truncations += 1
            return Piece(b"", fresh=True, lost=True)
        if not self._rotated():
            return None
        self.close()
        self._inode = None
        self.rotations += 1
        return Piece(b"", fresh=True)

    def _open(self) -> Piece | None:
        """Open the file, if it is there, where it was read to. If it is another by now, the rest of the one before is lost."""
        try:
            self._file = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        before, self._inode = self._inode, _inode_of(os.fstat(self._file.fileno()))
        if before == self._inode:
            self._file.seek(self._at)
            return None
        self._at = 0
        if before is None:
            return None
        self.rotations += 1
        return Piece(b"", fresh=True, lost=True)

    def _rotated(self) -> bool:
        """Whether there is another file under the name, in use already, and the one that is open has nothing more.

        Who rotates makes an empty file first, and whoever writes goes on with the old one until he is told. Nothing is missed by staying
        with the old one until something is in the new one. (The size of the new one is looked at first.)
        """
        assert self._file is not None
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False  # between the two halves of a rotation
        here = os.fstat(self._file.fileno())
        if _inode_of(there) == _inode_of(here) or there.st_size == 0:
            return False
        return here.st_size <= self._at

    def close(self) -> None:
        """Let go of the file; the place is kept."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _inode_of(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
