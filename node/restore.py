"""What a restarted node takes from its journals before it goes on: the instruments' ids and codes, and how far each source had come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tickmesh.node.continuation import MADE_HERE, POSITION, UNSEEN, Place, begin_resuming, first_lacking, follow_positions, make_positions
from tickmesh.node.event import ALL_INSTRUMENTS, DERIVED, EVENT, PEERS, EventArray, Flag, Kind
from tickmesh.node.instruments import InstrumentTable, InstrumentTableFull, SymbolFiltered
from tickmesh.node.journal import JournalReader
from tickmesh.node.shard_state import SOURCES

_DEFINES = np.zeros(256, np.bool_)
_MEANING = 2
"""In the facts of a snapshot: with `same` 0 a position has all of its sequence. Before, a source's beginning was told by its first
sequence."""
_DEFINES[[Kind.REFERENCE, Kind.CODE, Kind.PEER_REFERENCE]] = True


class RestoreError(Exception):
    """The journal does not fit the configuration; the message says what to do."""


@dataclass
class RestoredShard:
    """What one shard's journal says.

    Attributes:
        references: the last REFERENCE event of each instrument, by the shard's id; of another shard's: PEER_REFERENCE.
        codes: the venue's numeric code, by the same.
        depths: how many levels of its book the venue shows, by the same, where a definition has told.
        positions: where the journal stands in each source (:mod:`tickmesh.node.continuation`).
        defined: per source a sequence, the last that defines instruments, and how many events do so.
        half_told: books of which a snapshot has begun and not ended, by the shard's ids.
        unfinished: the instrument that the journal's very last event defines, whose code may have been cut off; -1: none.
    """

    references: dict[int, Any] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    depths: dict[int, int] = field(default_factory=dict)
    positions: Any = field(default_factory=lambda: make_positions(SOURCES))
    defined: dict[int, tuple[int, int]] = field(default_factory=dict)
    half_told: set[int] = field(default_factory=set)
    unfinished: int = -1
    _owners: Any = field(default_factory=lambda: np.zeros(0, np.int32))

    def take(self, batch: EventArray) -> None:
        """Take note of events of the journal."""
        if len(batch):
            self.unfinished = int(batch["instrument"][-1]) if batch["kind"][-1] == Kind.REFERENCE else -1
        whole = batch["instrument"] == ALL_INSTRUMENTS
        self._see_snapshots(batch)
        definitions = batch[_DEFINES[batch["kind"]] & ~whole]
        for event in definitions:
            if event["kind"] != Kind.CODE:
                self.references[int(event["instrument"])] = event.copy()
            else:
                self._take_code(event)
        if len(definitions):
            self._own(int(definitions["instrument"].max()))
        follow_positions(self.positions, self._owners, batch if batch.flags.writeable else batch.copy())
        sessions = whole & (batch["kind"] == Kind.CLEAR) & (batch["aux"] != MADE_HERE)
        for event in batch[sessions | (_DEFINES[batch["kind"]] & ~whole)] if len(definitions) or sessions.any() else ():
            self._count(event)

    def _see_snapshots(self, batch: EventArray) -> None:
        """Take note of whose books are told: MORE says that the next event of the book goes on."""
        of_book = batch["kind"] <= Kind.LEVEL
        told = np.unique(batch["instrument"][of_book & (batch["flags"] & Flag.SNAPSHOT != 0)])
        if not len(told) and not self.half_told:
            return
        mine = batch[of_book & np.isin(batch["instrument"], [*told.tolist(), *self.half_told])]
        for instrument, flags in dict(zip(mine["instrument"].tolist(), mine["flags"].tolist())).items():
            if not flags & Flag.MORE:
                self.half_told.discard(instrument)
            elif flags & Flag.SNAPSHOT:
                self.half_told.add(instrument)

    def _take_code(self, event: Any) -> None:
        if event["id"]:
            self.codes[int(event["instrument"])] = int(event["id"])
        if event["aux"]:
            self.depths[int(event["instrument"])] = int(event["aux"])

    def _count(self, event: Any) -> None:
        """Take note of a definition, or of a session that begins."""
        if event["kind"] == Kind.CLEAR:
            self.defined.pop(int(event["price"]), None)
            return
        source, sequence = int(self._owners[int(event["instrument"])]), int(event["seq"])
        before, count = self.defined.get(source, (sequence, 0))
        if sequence < before:
            return  # what a new leader's receiver had met earlier than the one before
        self.defined[source] = (sequence, count + 1 if before == sequence else 1)

    def resuming(self, source: int) -> Any:
        """POSITION[1] with which this shard's loop steps over what its journal has, when a restarted receiver begins at or before its end.

        A receiver that knows an instrument does not define it again, so that definitions are not among the events to be skipped.
        """
        position = self.positions[source : source + 1].copy()
        position["own_session"] = position["session"]
        begin_resuming(position)
        sequence, count = self.defined.get(source, (0, 0))
        if sequence == int(position["sequence"][0]):
            position["left"] = np.maximum(position["left"] - count, 0)
        return position

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
        defined = {str(source): found for source, found in self.defined.items()}
        codes, depths = ({str(k): v for k, v in found.items()} for found in (self.codes, self.depths))
        facts = {"references": references, "codes": codes, "positions": positions, "positions_mean": _MEANING, "defined": defined}
        return facts | ({"depths": depths} if depths else {}) | ({"half_told": sorted(self.half_told)} if self.half_told else {})

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> RestoredShard:
        """From :meth:`as_json`."""
        references = {int(number): np.frombuffer(bytes.fromhex(text), EVENT)[0] for number, text in facts["references"].items()}
        codes, depths = ({int(k): int(v) for k, v in facts.get(name, {}).items()} for name in ("codes", "depths"))
        made = cls(references, codes, depths)
        for source, text in facts["positions"].items():
            made.positions[int(source)] = np.frombuffer(bytes.fromhex(text), POSITION)[0]
        if facts.get("positions_mean", 1) < _MEANING:  # nothing of the last sequence might also say that it came next
            made.positions["sequence"] -= (made.positions["same"] == 0) & (made.positions["sequence"] > 0)
        made.half_told = set(map(int, facts.get("half_told", ())))
        made.defined = {int(source): (found[0], found[1]) for source, found in facts.get("defined", {}).items()}
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
            table.arrays.records["depth"][node] = self.depths.get(number, 0)
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

    def place(self, source: int) -> Place | None:
        """Where a source that can be gone on with has to begin, so that no shard lacks anything; None: no journal has any of it."""
        positions = [shard.positions[source] for shard in self.shards]
        sessions = {int(at["session"]) for at in positions if at["session"] or at["sequence"]}
        if not sessions:
            return None
        first = min(map(first_lacking, positions))
        return Place(max(1, first), sessions.pop(), is_one=True) if len(sessions) == 1 else Place(1, 0, is_one=False)

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
            for node in [node for node, known in mine.items() if known == shard.unfinished]:
                table.arrays.records["announced"][node] = 0  # it is defined again, with its code
            ids.append(mine)
            for source, by_id in found.items():
                codes.setdefault(source, {}).update(by_id)
        return ids, codes


def not_by_name(known: RestoredShard, table: InstrumentTable, source: int, ids: Any) -> tuple[Any, Any]:
    """Books of a source that its receiver on this node may call otherwise than a shard's journal: one of both had not heard a definition.

    A definition channel goes round beside the feed: until it has come by, a book stands under its code, ``#123``, and under its name from
    then on, which may be on another shard.

    Args:
        ids: the shard's ids by the node's, those of instruments included that the journal is about to be told of.

    Returns:
        By the shard's ids: books under a code that end, as the receiver knows the name; and books of which nobody knows what rests in them:
        those under a code that the receiver has no name for, names that the journal has not, and names that the receiver has not.
    """
    records = table.arrays.records[: len(table)]
    own, number, code = records["source"] == source, ids[: len(records)], records["code"]
    met, by_code = own & (number != UNSEEN), own & (records["w0"] & np.uint64(255) == ord("#"))
    names = code[own & ~by_code & (code != 0)]
    nameless = np.setdiff1d(code[by_code & (code != 0)], names)
    ended = met & by_code & np.isin(_codes_in(known, number, met & by_code, code), names)
    lost = met & (by_code | (number >= max(known.references, default=-1) + 1))
    if len(nameless):
        lost |= met & np.isin(_codes_in(known, number, met & ~by_code, np.zeros_like(code)), nameless)
    return number[ended], number[lost & ~ended]


def _codes_in(known: RestoredShard, number: Any, where: Any, otherwise: Any) -> Any:
    """The venue's codes of some of the instruments as the journal has them, else `otherwise`, by the node's ids."""
    found = otherwise.copy()
    for node in np.flatnonzero(where):
        found[node] = known.codes.get(int(number[node]), found[node])
    return found


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
