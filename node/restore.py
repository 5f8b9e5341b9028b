"""What a restarted node takes from its journals before it goes on: the instruments' ids and codes, and how far each source had come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, EventArray, Kind
from tickmesh.node.instruments import InstrumentTable, InstrumentTableFull, SymbolFiltered
from tickmesh.node.journal import JournalReader

_SESSION_KINDS = (int(Kind.CLEAR), int(Kind.GAP))


class RestoreError(Exception):
    """The journal does not fit the configuration; the message says what to do."""


@dataclass
class RestoredShard:
    """What one shard's journal says.

    Attributes:
        references: the last REFERENCE event of each instrument, by the shard's id.
        codes: the venue's numeric code, by the same.
        sequences: per source, the last sequence that was processed; 0 if there is none.
    """

    references: dict[int, Any] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)

    sequences: dict[int, int] = field(default_factory=dict)

    def take(self, batch: EventArray) -> None:
        """Take note of events of the journal."""
        _take_definitions(self, batch)
        _take_sequences(self.sequences, {number: int(event["flags"]) for number, event in self.references.items()}, batch)

    def as_json(self) -> dict[str, Any]:
        """For the facts of a snapshot."""
        references = {str(number): event.tobytes().hex() for number, event in self.references.items()}
        codes, sequences = ({str(k): v for k, v in table.items()} for table in (self.codes, self.sequences))
        return {"references": references, "codes": codes, "sequences": sequences}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> RestoredShard:
        """From :meth:`as_json`."""
        references = {int(number): np.frombuffer(bytes.fromhex(text), EVENT)[0] for number, text in facts["references"].items()}
        codes, sequences = ({int(k): int(v) for k, v in facts[name].items()} for name in ("codes", "sequences"))
        return cls(references, codes, sequences)

    def symbol(self, number: int) -> tuple[int, str]:
        """Source and symbol of an instrument."""
        event = self.references[number]
        return int(event["flags"]), event.tobytes()[40:64].rstrip(b"\0").decode("ascii")


@dataclass
class Restored:
    """What the journals of a node's shards say.

    Attributes:
        shards: one for each journal.
        sequences: per source, the last sequence that was processed; 0 if there is none.
    """

    shards: list[RestoredShard] = field(default_factory=list)
    sequences: dict[int, int] = field(default_factory=dict)

    def intern(self, table: InstrumentTable) -> tuple[list[dict[int, int]], dict[int, dict[int, int]]]:
        """Make the instruments known to the node.

        Returns:
            For each shard, its ids by the node's; and for each source, the venue's numeric codes by the node's ids.

        Raises:
            RestoreError: the configuration leaves an instrument out, or places it on another shard.
        """
        ids: list[dict[int, int]] = []
        codes: dict[int, dict[int, int]] = {}
        for shard, journal in enumerate(self.shards):
            ids.append({})
            for number in sorted(journal.references):
                source, symbol = journal.symbol(number)
                node = _intern(table, shard, journal.references[number], source, symbol)
                ids[shard][node] = number
                if number in journal.codes:
                    codes.setdefault(source, {})[node] = journal.codes[number]
        return ids, codes


def _intern(table: InstrumentTable, shard: int, event: Any, source: int, symbol: str) -> int:
    try:
        node = int(table.intern(symbol, source, int(event["price"]), int(np.int8(event["side"]))))
    except (SymbolFiltered, InstrumentTableFull) as error:
        raise RestoreError(f"instrument {symbol} is in the journal, but: {error}; or move the journal away") from error
    placed = int(table.arrays.records["shard"][node])
    if placed != shard:
        advice = "undo the change of shards or placements, or move the journals away"
        raise RestoreError(f"instrument {symbol} is in the journal of shard {shard}, and on shard {placed} in this configuration: {advice}")
    table.arrays.records["announced"][node] = 1
    return node


def read_restored(folders: Iterable[Path], begun: Sequence[tuple[int, RestoredShard]] = ()) -> Restored:
    """Read the journals of a node's shards, in order.

    Args:
        folders: of the journals.
        begun: for each, the sequence from which on to read, and what is known of the events before it; default: from the oldest.
    """
    restored = Restored()
    for place, folder in enumerate(folders):
        start, shard = begun[place] if begun else (None, RestoredShard())
        for batch in JournalReader(folder).batches(start):
            shard.take(batch)
        restored.shards.append(shard)
        for source, sequence in shard.sequences.items():
            restored.sequences[source] = max(restored.sequences.get(source, 0), sequence)
    return restored


def _take_definitions(shard: RestoredShard, batch: EventArray) -> None:
    for event in batch[np.isin(batch["kind"], (int(Kind.REFERENCE), int(Kind.CODE)))]:
        if event["kind"] == Kind.REFERENCE:
            shard.references[int(event["instrument"])] = event.copy()
        else:
            shard.codes[int(event["instrument"])] = int(event["id"])


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
