"""Giving up what a thread needs no more: capabilities(7) belong to threads, and one that reads from the network can do without."""

from __future__ import annotations

import ctypes
import os

_VERSION_3 = 0x20080522


class PrivilegeError(Exception):
    """Capabilities cannot be given up; `errno` says why."""

    def __init__(self, number: int) -> None:
        super().__init__(f"capabilities cannot be given up: {os.strerror(number)}")
        self.errno = number


def drop_capabilities() -> None:
    """Give up all capabilities of the calling thread, for good; other threads keep theirs.

    Raises:
        PrivilegeError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header, nothing = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(ctypes.byref(header), ctypes.byref(nothing)) != 0:
        raise PrivilegeError(ctypes.get_errno())
