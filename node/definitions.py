"""Instruments' definitions from a channel of their own: a loop of packets with every instrument in turn, beside the sequenced feed.

Venues such as CME send names, tick sizes and how many levels a book shows there, so that who joins late need not wait for a day. The
packets have a sequence of their own, which begins with 1 at every turn and means nothing to the feed: they are not arbitrated, what is
lost comes with the next turn, and none of it is a gap. Of their messages only definitions and depths are used.

What is new becomes events as where it comes on the lines: REFERENCE, CODE, and of a book that gets its name late CLEAR and GAP
(:func:`tickmesh.node.sbe_kernels.define`). They have the sequence of the feed's last packet that is done, and no `ts_event`: a definition
may be of weeks ago, and a turn of the loop is not when anything happens, so no timer may come of it. A definition that is heard again
makes no event.

The decoder contains these kernels where a mapping defines instruments (:mod:`tickmesh.node.sbe_decoder`). Source: CME Globex MDP 3.0,
Instrument Replay; B3 UMDF, Instrument Definition.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tickmesh.node.event import Kind
from tickmesh.transports.toolbox import outlined

LINE, POSITION, TURNS, NEW, _WORDS = range(5)
"""Indices of ``Feed.definitions``. LINE is that of the definitions' packets, -1: there is none. POSITION: how much of the packet at hand is
decoded, bytes; 0: none of it. Those from TURNS on are counters."""
_REFERENCE = np.uint8(Kind.REFERENCE)
_FIRST = 1
_ZERO = np.uint64(0)


def make_definitions(line: int) -> Any:
    """The state of a source's definition channel, i64; `line` -1: it has none."""
    words = np.zeros(_WORDS, np.int64)
    words[LINE] = line
    return words


@outlined
def begin_definitions(words: Any, seq: Any) -> None:
    """A packet of the channel: with the first sequence a turn begins."""
    words[TURNS] += seq == _FIRST


@outlined
def take_definitions(words: Any, records: Any, out: Any, first: Any, n: Any, implied: Any) -> None:
    """Count the instruments that ``out[first:n]`` makes known, and take the time off the events.

    `implied` is the bit of a code that says "the implied book of", which is no instrument that a definition is about.
    """
    for i in range(first, n):
        event = out[i]
        event.ts_event = np.int64(0)
        if event.kind == _REFERENCE and records[event.instrument].code & implied == _ZERO:
            words[NEW] += 1
