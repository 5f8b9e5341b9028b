"""Looks into the machine code that numba has cached: which symbols each compiled function refers to."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from numba.core.codegen import JITCodeLibrary

_SYMBOL_TABLE, _RELOCATIONS = 2, 4
_FUNCTION = 2


@contextmanager
def kept_machine_code() -> Iterator[None]:
    """What is loaded from the cache meanwhile keeps its object code, as ``library.machine_code``; numba itself forgets it."""
    original = JITCodeLibrary.__dict__.get("_unserialize")
    load = JITCodeLibrary._unserialize.__func__

    def unserialize(cls: Any, codegen: Any, state: Any) -> Any:
        library = load(cls, codegen, state)
        _, kind, (library.machine_code, _) = state
        assert kind == "object"
        return library

    JITCodeLibrary._unserialize = classmethod(unserialize)
    try:
        yield
    finally:
        if original is None:
            del JITCodeLibrary._unserialize
        else:
            JITCodeLibrary._unserialize = original


def references_of(loop: Any) -> dict[str, set[str]]:
    """Symbols that each function behind a loaded entry point refers to (the loop and what stays out of line), by the function's name.

    The wrappers through which Python calls the loop are no part of it.
    """
    found: dict[str, set[str]] = {}
    for overload in loop.overloads.values():
        found |= references(overload.library.machine_code)
    return {name: symbols for name, symbols in found.items() if not name.startswith(("_ZN7cpython", "cfunc."))}


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    at: int
    size: int
    link: int
    info: int
    align: int
    entry: int


class _Symbol(NamedTuple):
    name: str
    kind: int
    section: int
    start: int
    size: int


def references(elf: bytes) -> dict[str, set[str]]:
    """Symbols that each function of a relocatable x86-64 ELF file refers to: calls and addresses, defined in the file or not."""
    assert elf[:6] == b"\x7fELF\x02\x01"
    (at,), (size, count) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 58)
    sections = [_Section(*struct.unpack_from("<IIQQQQIIQQ", elf, at + k * size)) for k in range(count)]
    tables = {k: list(_symbols(elf, s, sections[s.link].at)) for k, s in enumerate(sections) if s.kind == _SYMBOL_TABLE}
    found: dict[str, set[str]] = {s.name: set() for symbols in tables.values() for s in symbols if s.kind == _FUNCTION}
    for section in sections:
        if section.kind != _RELOCATIONS:
            continue
        symbols = tables[section.link]
        functions = [s for s in symbols if s.kind == _FUNCTION and s.section == section.info]
        for at in range(section.at, section.at + section.size, 24):
            offset, info = struct.unpack_from("<QQ", elf, at)
            for function in functions:
                if function.start <= offset < function.start + function.size:
                    found[function.name].add(symbols[info >> 32].name)
    return found


def _symbols(elf: bytes, table: _Section, names_at: int) -> Iterator[_Symbol]:
    for at in range(table.at, table.at + table.size, 24):
        name, info, _, section, start, size = struct.unpack_from("<IBBHQQ", elf, at)
        yield _Symbol(elf[names_at + name : elf.index(b"\0", names_at + name)].decode(), info & 15, section, start, size)
