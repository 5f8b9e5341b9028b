"""The instruments that a node has met: a node that starts in the middle of a session knows the venue's numeric codes.

It has them from a file of its own, if it ran before, and from the nodes that run, which answer on ``tm.<cluster>.instruments``. A shard's
journal tells of the shard's own instruments only. A node that shares the shards with others reads the whole feed, and would take a code
that it cannot name for an instrument of its own.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import structlog

from tickmesh.node.instruments import PUBLISHED, InstrumentTable, InstrumentTableFull, SymbolFiltered

Rows = list[list[Any]]
"""Source, symbol, tick size, exponent, shard, code of each; then the levels of its book by position, if a definition has told."""
_KEEP_S = 1.0
_log = structlog.get_logger("node")


class KnownInstruments:
    """The file of one node, ``instruments.json`` in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "instruments.json"
        self._kept, self._due_s = 0, 0.0

    def read(self) -> Rows:
        """What the file says; nothing if there is none."""
        try:
            return rows_of(self.path.read_bytes())
        except OSError:
            return []

    @staticmethod
    def learn(table: InstrumentTable, rows: Rows) -> dict[int, dict[int, int]]:
        """Make instruments known to the table; returns the venue's codes by source and instrument."""
        codes: dict[int, dict[int, int]] = {}
        for source, symbol, tick_size, exponent, shard, code, *depth in rows:
            with contextlib.suppress(SymbolFiltered, InstrumentTableFull, ValueError):
                number = table.intern(symbol, source, tick_size, exponent, shard)
                table.arrays.records["announced"][number] = 1
                table.arrays.records["depth"][number] = depth[0] if depth else 0
                if code:
                    codes.setdefault(source, {})[number] = code
        return codes

    def keep(self, table: InstrumentTable) -> None:
        """Write the file, if there are new instruments."""
        count = len(table)
        now = time.monotonic()
        if count == self._kept or now < self._due_s:
            return
        self._due_s = now + _KEEP_S
        rows = rows_in(table)
        temporary = self.path.with_suffix(".new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(rows), encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            _log.warning("the known instruments cannot be kept", reason=str(error))
        if len(rows) == count:
            self._kept = count


def rows_in(table: InstrumentTable) -> Rows:
    """All that were announced."""
    return [row for number in range(len(table)) if (row := _row(table, number)) is not None]


def rows_of(data: bytes) -> Rows:
    """Rows from JSON; none if it is something else."""
    try:
        rows = json.loads(data)
        return [[int(s), str(symbol), *map(int, [tick, e, shard, code, *depth])] for s, symbol, tick, e, shard, code, *depth in rows]
    except (ValueError, TypeError):
        return []


def _row(table: InstrumentTable, number: int) -> list[Any] | None:
    """As :data:`Rows` has it; None: it is being entered this moment, or was never announced."""
    record = table.arrays.records[number]
    if not record["flags"] & PUBLISHED or not record["announced"]:
        return None
    numbers = [int(record[name]) for name in ("tick_size", "qty_exponent", "shard", "code", "depth")]
    return [int(record["source"]), table.symbol(number), *(numbers if record["depth"] else numbers[:-1])]
