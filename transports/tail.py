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
    """A file that somebody appends to. :meth:`next` gives what is new; :meth:`close` in the end.

    Attributes:
        path: the file; it may be absent at times.
        rotations, truncations: how often it has begun anew.
    """

    def __init__(self, path: Path, look_s: float = 0.05) -> None:
        self.path, self._look_s = path, look_s
        self.rotations = self.truncations = 0
        self._file: BinaryIO | None = None
        self._at = 0

    async def next(self) -> Piece:
        """The next piece; waits for one."""
        while True:
            found = self._read()
            if found is not None:
                return found
            await asyncio.sleep(self._look_s)

    def _read(self) -> Piece | None:
        if self._file is None:
            return None if not self._open() else self._read()
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
        self._file.close()
        self._file = None
        self.rotations += 1
        return Piece(b"", fresh=True)

    def _open(self) -> bool:
        try:
            self._file, self._at = self.path.open("rb", buffering=0), 0
        except FileNotFoundError:
            return False
        return True

    def _rotated(self) -> bool:
        """Whether there is another file under the name, and the one that is open has nothing more."""
        assert self._file is not None
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False  # between the two halves of a rotation
        here = os.fstat(self._file.fileno())
        if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
            return False
        return here.st_size <= self._at

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
