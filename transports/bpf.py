"""eBPF without a compiler or library: maps, an assembler for short programs, loading and attaching them by bpf(2).

A program is attached by a **link**: the kernel takes it off the interface when the last descriptor of the link is closed, so also when the
process is killed. Instructions: Linux ``Documentation/bpf/standardization/instruction-set.rst``; commands: ``linux/bpf.h``.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

_NR_BPF = {"x86_64": 321, "aarch64": 280}
_ATTR_BYTES = 128
_LOG_BYTES = 1 << 16
_MAP_CREATE, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD, _LINK_CREATE, _LINK_UPDATE = 0, 2, 3, 5, 28, 29
HASH, ARRAY, XSKMAP = 1, 2, 17
"""Kinds of maps."""
_MMAPABLE = 1 << 10
XDP_PROGRAM, TRAFFIC_PROGRAM = 6, 3
"""Kinds of programs: BPF_PROG_TYPE_XDP, BPF_PROG_TYPE_SCHED_CLS."""
AT_XDP, AT_EGRESS = 37, 47
"""Where programs are attached: BPF_XDP, BPF_TCX_EGRESS (Linux 6.6)."""
MAP_LOOKUP, KTIME_NS, RANDOM_U32, STORE_BYTES, REDIRECT_MAP, ADJUST_META = 1, 5, 7, 9, 51, 54
"""Numbers of the kernel's helper functions."""


class BpfError(Exception):
    """The kernel refused a step. `step` and `errno` say which and how, `log` is what its verifier said of a program."""

    def __init__(self, step: str, number: int, log: str = "") -> None:
        super().__init__(f"{step}: {os.strerror(number)}" + (f"\n{log}" if log else ""))
        self.step, self.errno, self.log = step, number, log


def _bpf(step: str, command: int, attributes: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    block = ctypes.create_string_buffer(attributes.ljust(_ATTR_BYTES, b"\0"), _ATTR_BYTES)
    number = _NR_BPF.get(platform.machine())
    if number is None:
        raise BpfError(step, errno.ENOSYS)
    result = int(libc.syscall(ctypes.c_long(number), ctypes.c_long(command), block, ctypes.c_long(_ATTR_BYTES)))
    if result < 0:
        raise BpfError(step, ctypes.get_errno())
    return result


class _Descriptor:
    """Owns a descriptor of the kernel's."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        """The descriptor."""
        return self._number

    def close(self) -> None:
        """Close it; again does nothing."""
        if self._number >= 0:
            os.close(self._number)
        self._number = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---------------------------------------------------------------- maps


class Map(_Descriptor):
    """A map of fixed-size keys to fixed-size values, shared with programs.

    Args:
        kind: :data:`HASH` or :data:`XSKMAP`.
        key_bytes, value_bytes, entries_max: its shape.
        name: at most 15 characters; `bpftool` shows it.

    Raises:
        BpfError: e.g. EPERM without CAP_BPF.
    """

    def __init__(self, kind: int, key_bytes: int, value_bytes: int, entries_max: int, name: str, flags: int = 0) -> None:
        attributes = struct.pack("<7I16s", kind, key_bytes, value_bytes, entries_max, flags, 0, 0, name.encode()[:15])
        super().__init__(_bpf("making a BPF map", _MAP_CREATE, attributes))

    def put(self, key: bytes, value: bytes) -> None:
        """Set an entry. Raises BpfError."""
        self._change("changing a BPF map", _MAP_UPDATE, key, value)

    def remove(self, key: bytes) -> None:
        """Remove an entry; it may be missing. Raises BpfError."""
        try:
            self._change("changing a BPF map", _MAP_DELETE, key, None)
        except BpfError as error:
            if error.errno != errno.ENOENT:
                raise

    def _change(self, step: str, command: int, key: bytes, value: bytes | None) -> None:
        key_at = ctypes.create_string_buffer(key, len(key))
        value_at = ctypes.create_string_buffer(value, len(value)) if value is not None else None
        attributes = struct.pack(
            "<I4xQQQ", self.fileno(), ctypes.addressof(key_at), ctypes.addressof(value_at) if value_at is not None else 0, 0
        )
        _bpf(step, command, attributes)


class Counts(Map):
    """An array of u64 that programs count in and that is read here without a system call, through :attr:`values`."""

    def __init__(self, entries: int, name: str) -> None:
        super().__init__(ARRAY, 4, 8, entries, name, _MMAPABLE)
        self._memory = mmap.mmap(self.fileno(), -(-8 * entries // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        self.values: npt.NDArray[np.uint64] = np.frombuffer(self._memory, np.uint64, entries)

    def close(self) -> None:
        """Close it; :attr:`values` keeps what was counted."""
        if self.fileno() >= 0:
            self.values = self.values.copy()
            self._memory.close()
        super().close()


# ---------------------------------------------------------------- the assembler

LOAD_U8, LOAD_U16, LOAD_U32, LOAD_U64 = 0x71, 0x69, 0x61, 0x79
STORE_U8, STORE_U16, STORE_U32, STORE_U64 = 0x73, 0x6B, 0x63, 0x7B
MOVE, SET, ADD, AND = 0xBF, 0xB7, 0x07, 0x57
SHIFT_LEFT, BIG_ENDIAN, ADD_ATOMIC_U64 = 0x67, 0xDC, 0xDB
CALL, EXIT, JUMP = 0x85, 0x95, 0x05
IF_EQUAL, IF_UNEQUAL, IF_GREATER_REG, IF_LESS_REG = 0x15, 0x55, 0x2D, 0xAD
_LOAD_IMMEDIATE, _PSEUDO_MAP = 0x18, 1
FRAME = 10
"""The register that points behind the program's 512 bytes of stack."""

Step = bytes | str | tuple[int, int, int, str, int]
"""An instruction, a label (``"name:"``), or a jump ``(opcode, register, register, label, immediate)``."""


def op(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """One instruction."""
    return struct.pack("<BBhi", code, source << 4 | target, offset, value)


def jump(code: int, label: str, target: int = 0, *, value: int = 0, register: int = 0) -> Step:
    """A jump to a label, if `target` compares so with `value` or with another register."""
    return code, target, register, label, value


def load_map(register: int, used: Map) -> bytes:
    """Make a register point at a map."""
    return op(_LOAD_IMMEDIATE, register, _PSEUDO_MAP, 0, used.fileno()) + op(0)


def load_u64(register: int, value: int) -> bytes:
    """Set a register to 64 bits."""
    low, high = struct.unpack("<ii", struct.pack("<Q", value))
    return op(_LOAD_IMMEDIATE, register, 0, 0, low) + op(0, value=high)


def assemble(steps: Sequence[Step]) -> bytes:
    """Machine code, jumps resolved."""
    labels, at = {}, 0
    for step in steps:
        if isinstance(step, str):
            labels[step.rstrip(":")] = at
        else:
            at += len(step) // 8 if isinstance(step, bytes) else 1
    code = bytearray()
    for step in steps:
        if isinstance(step, bytes):
            code += step
        elif isinstance(step, tuple):
            operation, target, register, label, value = step
            code += op(operation, target, register, labels[label] - len(code) // 8 - 1, value)
    return bytes(code)


# ---------------------------------------------------------------- programs


class Program(_Descriptor):
    """A loaded program.

    Args:
        code: from :func:`assemble`.
        kind: :data:`XDP_PROGRAM` or :data:`TRAFFIC_PROGRAM`.
        place: where it will be attached.
        name: at most 15 characters; `ip link` and `bpftool` show it.

    Raises:
        BpfError: not allowed, or the verifier refuses it.
    """

    def __init__(self, code: bytes, kind: int, place: int, name: str) -> None:
        log = ctypes.create_string_buffer(_LOG_BYTES)
        instructions, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"Dual BSD/GPL")
        pointers = ctypes.addressof(instructions), ctypes.addressof(licence)
        attributes = struct.pack(
            "<IIQQIIQII16sII", kind, len(code) // 8, *pointers, 1, _LOG_BYTES, ctypes.addressof(log), 0, 0, name.encode()[:15], 0, place
        )
        try:
            super().__init__(_bpf("loading a BPF program", _PROG_LOAD, attributes))
        except BpfError as error:
            raise BpfError(error.step, error.errno, log.value.decode(errors="replace")[-2000:]) from None
        self._place = place

    def attach(self, interface: int, flags: int = 0) -> Link:
        """Attach it to an interface by number, until the link is closed or the process ends.

        Raises:
            BpfError: e.g. EBUSY if another program holds the place.
        """
        attributes = struct.pack("<IIII", self.fileno(), interface, self._place, flags)
        return Link(_bpf("attaching a BPF program", _LINK_CREATE, attributes))


class Link(_Descriptor):
    """An attached program; closing it takes the program off."""

    def replace(self, program: Program) -> None:
        """Put another program of the kind in its place, between two packets. Raises BpfError."""
        _bpf("replacing a BPF program", _LINK_UPDATE, struct.pack("<IIII", self.fileno(), program.fileno(), 0, 0))
