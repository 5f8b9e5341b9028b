"""What a restarted node takes from its journals before it goes on: the instruments' ids and codes, and how far each source had come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tickmesh.node.event import ALL_INSTRUMENTS, EventArray, Kind
from tickmesh.node.instruments import InstrumentTable, InstrumentTableFull, SymbolFiltered
from tickmesh.node.journal import JournalReader

_NO_SOURCE = 0xFFFF
_SESSION_KINDS = (int(Kind.CLEAR), int(Kind.GAP))


class RestoreError(Exception):
    """The journal does not fit the configuration; the message says what to do."""


@dataclass
class Restored:
    """What the journals of a node's shards say.

    Attributes:
        references: the last REFERENCE event of each instrument, by id.
        codes: per source, the venue's numeric code by instrument.
        sequences: per source, the last sequence that was processed; 0 if there is none.
    """

    references: dict[int, Any] = field(default_factory=dict)
    codes: dict[int, dict[int, int]] = field(default_factory=dict)
    sequences: dict[int, int] = field(default_factory=dict)

    def intern(self, table: InstrumentTable) -> None:
        """Give the instruments the ids that they had.

        An id between them that no journal names (its REFERENCE was not yet journalled when the node died) goes to a placeholder.

        Raises:
            RestoreError: the configuration gives an id to another instrument.
        """
        for number in range(max(self.references, default=-1) + 1):
            event = self.references.get(number)
            if event is None:
                if number >= len(table):
                    table.intern(f"~{number}", _NO_SOURCE)
                continue
            symbol = event.tobytes()[40:64].rstrip(b"\0").decode("ascii")
            try:
                given = table.intern(symbol, int(event["flags"]), int(event["price"]), int(np.int8(event["side"])))
            except (SymbolFiltered, InstrumentTableFull) as error:
                raise RestoreError(f"instrument {symbol} is in the journal, but: {error}; or move the journal away") from error
            if given != number:
                advice = "undo the change of sources or placements, or move the journal away"
                raise RestoreError(f"instrument {symbol} has number {number} in the journal and {given} in this configuration: {advice}")
            table.arrays.records["announced"][number] = 1


def read_restored(folders: Iterable[Path]) -> Restored:
    """Read the journals of a node's shards."""
    restored = Restored()
    for folder in folders:
        sequences: dict[int, int] = {}
        sources: dict[int, int] = {}
        for batch in JournalReader(folder).batches():
            _take_definitions(restored, sources, batch)
            _take_sequences(sequences, sources, batch)
        for source, sequence in sequences.items():
            restored.sequences[source] = max(restored.sequences.get(source, 0), sequence)
    return restored


def _take_definitions(restored: Restored, sources: dict[int, int], batch: EventArray) -> None:
    for event in batch[np.isin(batch["kind"], (int(Kind.REFERENCE), int(Kind.CODE)))]:
        number, source = int(event["instrument"]), int(event["flags"])
        if event["kind"] == Kind.REFERENCE:
            restored.references[number] = event.copy()
            sources[number] = source
        else:
            restored.codes.setdefault(source, {})[number] = int(event["id"])


def _take_sequences(sequences: dict[int, int], sources: dict[int, int], batch: EventArray) -> None:
    """Take over the last sequence of each source; after a new session, the last one of that."""
    everywhere = batch["instrument"] == ALL_INSTRUMENTS
    owners = np.full(max(sources, default=0) + 1, -1)
    owners[list(sources)] = list(sources.values())
    owner = np.where(everywhere, batch["price"], owners[np.where(everywhere, 0, np.minimum(batch["instrument"], len(owners) - 1))])
    last = np.where(batch["kind"] == Kind.GAP, batch["aux"], batch["seq"].astype(np.int64))
    for source in np.unique(owner[owner >= 0]):
        mine = owner == source
        fresh = np.flatnonzero(mine & everywhere & (batch["kind"] == Kind.CLEAR))
        if len(fresh):
            mine[: fresh[-1] + 1] = False
            sequences[int(source)] = 0
        if mine.any():
            sequences[int(source)] = max(sequences.get(int(source), 0), int(last[mine].max()))
