"""What a restarted node takes from its journals before it goes on: the instruments' ids and codes, and how far each source had come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tickmesh.node.continuation import POSITION, follow_positions, make_positions
from tickmesh.node.event import DERIVED, EVENT, PEERS, EventArray, Kind
from tickmesh.node.instruments import InstrumentTable, InstrumentTableFull, SymbolFiltered
from tickmesh.node.journal import JournalReader
from tickmesh.node.shard_state import SOURCES

_DEFINES = np.zeros(256, np.bool_)
_DEFINES[[Kind.REFERENCE, Kind.CODE, Kind.PEER_REFERENCE]] = True


class RestoreError(Exception):
    """The journal does not fit the configuration; the message says what to do."""


@dataclass
class RestoredShard:
    """What one shard's journal says.

    Attributes:
        references: the last REFERENCE event of each instrument, by the shard's id; of another shard's: PEER_REFERENCE.
        codes: the venue's numeric code, by the same.
        positions: where the journal stands in each source (:mod:`tickmesh.node.continuation`).
    """

    references: dict[int, Any] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    positions: Any = field(default_factory=lambda: make_positions(SOURCES))
    _owners: Any = field(default_factory=lambda: np.zeros(0, np.int32))

    def take(self, batch: EventArray) -> None:
        """Take note of events of the journal."""
        definitions = batch[_DEFINES[batch["kind"]]]
        for event in definitions:
            if event["kind"] != Kind.CODE:
                self.references[int(event["instrument"])] = event.copy()
            else:
                self.codes[int(event["instrument"])] = int(event["id"])
        if len(definitions):
            self._own(int(definitions["instrument"].max()))
        follow_positions(self.positions, self._owners, batch if batch.flags.writeable else batch.copy())

    def _own(self, last: int) -> None:
        """Make room in the table of owners for instruments up to `last`."""
        if last >= len(self._owners):
            owners = np.full(1 << (last + 1).bit_length(), -1, np.int32)
            owners[: len(self._owners)] = self._owners
            self._owners = owners

    @property
    def sequences(self) -> dict[int, int]:
        """Per source, the last sequence that was processed; a source without one is left out."""
        return {int(source): int(self.positions["sequence"][source]) for source in np.flatnonzero(self.positions["sequence"])}

    def as_json(self) -> dict[str, Any]:
        """For the facts of a snapshot."""
        references = {str(number): event.tobytes().hex() for number, event in self.references.items()}
        used = np.flatnonzero(self.positions != np.zeros(1, POSITION))
        positions = {str(source): self.positions[source].tobytes().hex() for source in used}
        return {"references": references, "codes": {str(k): v for k, v in self.codes.items()}, "positions": positions}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> RestoredShard:
        """From :meth:`as_json`."""
        references = {int(number): np.frombuffer(bytes.fromhex(text), EVENT)[0] for number, text in facts["references"].items()}
        made = cls(references, {int(k): int(v) for k, v in facts["codes"].items()})
        for source, text in facts["positions"].items():
            made.positions[int(source)] = np.frombuffer(bytes.fromhex(text), POSITION)[0]
        made._own(max(references, default=-1))
        for number, event in references.items():
            made._owners[number] = int(event["flags"])
        return made

    def symbol(self, number: int) -> tuple[int, str]:
        """Source and symbol of an instrument."""
        event = self.references[number]
        return int(event["flags"]), event.tobytes()[40:64].rstrip(b"\0").decode("ascii")

    def intern(
        self, table: InstrumentTable, shard: int, *, skip_filtered: bool = False
    ) -> tuple[dict[int, int], dict[int, dict[int, int]]]:
        """Make the instruments known to the node, as those of shard number `shard`.

        Args:
            skip_filtered: leave out those that the source's filter now leaves out, in place of an error.

        Returns:
            The shard's ids by the node's; and for each source, the venue's numeric codes by the node's ids.

        Raises:
            RestoreError: the configuration leaves an instrument out, or places it on another shard.
        """
        ids: dict[int, int] = {}
        codes: dict[int, dict[int, int]] = {}
        for number in sorted(self.references):
            source, symbol = self.symbol(number)
            if skip_filtered and not table.lets_through(symbol, source):
                continue
            node = _intern(table, shard, self.references[number], source, symbol)
            ids[node] = number
            if number in self.codes:
                codes.setdefault(source, {})[node] = self.codes[number]
        return ids, codes


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
        for number, shard in enumerate(self.shards):
            mine, found = shard.intern(table, number)
            ids.append(mine)
            for source, by_id in found.items():
                codes.setdefault(source, {}).update(by_id)
        return ids, codes


def _intern(table: InstrumentTable, shard: int, event: Any, source: int, symbol: str) -> int:
    try:
        at = shard if source == DERIVED else None
        node = int(table.intern(symbol, source, int(event["price"]), int(np.int8(event["side"])), at))
    except (SymbolFiltered, InstrumentTableFull) as error:
        raise RestoreError(f"instrument {symbol} is in the journal, but: {error}; or move the journal away") from error
    if source >= PEERS:
        return node
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
