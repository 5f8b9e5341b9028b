"""Handing a shard over from one compiled loop to the next at a change of the configuration: the baton, and what is copied.

The next loop waits inside compiled code (:func:`begin`), asleep until it is told that its turn is near. The loop before steps over the
CONFIG event, passes the baton on (:func:`pass_on`) and returns; no Python, and no lock, lies between the two. A replay does the same
with :func:`carry_now`.

Books, instruments, statistics, risk counters and the state of unchanged calculations are the same arrays before and after. A calculation
is unchanged if its name, code, inputs and the layout of its state are; new parameter values or symbols leave its state alone.
What lies in tables by place in the plan (which instruments a calculation listens to, last values of series) is copied at the hand-over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tickmesh.node.book import renumber_orders
from tickmesh.node.symbol_filter import symbol_passes, symbol_word
from tickmesh.transports.toolbox import IDLE_SLEEP, IDLE_YIELD, idle, inlined, load_acquire, loop, monotonic_ns, outlined, store_release

TURN, NEAR, CANCELLED, PARKED, AWAKE, PASSED_NS, TAKEN_NS, _WORDS = 0, 1, 2, 3, 4, 5, 6, 8
"""Words of a baton: hand-overs so far; the turn that is near; the last one called off; the last loop that waits, and the last that waits
awake; when the loop before ended and the next had begun, on the monotonic clock."""
ALL, MATCHING = -1, -2
"""In ``mask_rows``, in place of a row to copy: every instrument; those whose symbol passes."""
NOTHING = -1
"""In ``last_rows``: there is no value yet."""


class Carry(NamedTuple):
    """What is copied at a hand-over.

    Attributes:
        masks: u8 ``(calculations, instruments)`` of the loop before.
        last: f8 ``(series, instruments)`` of the loop before.
        mask_rows: for each calculation its row in `masks`, or :data:`ALL`, or :data:`MATCHING`.
        last_rows: for each series its row in `last`, or :data:`NOTHING`.
        books: of the loop before.
        renumber: i64[1]; not 0: orders are numbered otherwise from here on, since sources have come whose numbers may be the same.
    """

    masks: Any
    last: Any
    mask_rows: Any
    last_rows: Any
    books: Any
    renumber: Any


def make_baton() -> Any:
    """The words that the loops of one shard pass along, i64[8]."""
    return np.zeros(_WORDS, np.int64)


def no_carry(books: Any) -> Carry:
    """For a first loop, which takes nothing over; `books` are its own."""
    return Carry(np.zeros((1, 1), np.uint8), np.zeros((1, 1)), np.zeros(0, np.int64), np.zeros(0, np.int64), books, np.zeros(1, np.int64))


# ---------------------------------------------------------------- kernels


@inlined
def begin(baton: Any, turn: Any, stop: Any) -> Any:
    """Wait for one's turn; false if it is called off or ``stop[0]`` is set."""
    store_release(baton, PARKED, np.int64(turn))
    rounds = 0
    while load_acquire(baton, TURN) < turn:
        if load_acquire(stop, 0) != 0 or load_acquire(baton, CANCELLED) >= turn:
            return False
        if load_acquire(baton, NEAR) < turn:
            rounds = idle(IDLE_SLEEP, rounds)
        elif load_acquire(baton, AWAKE) < turn:
            store_release(baton, AWAKE, np.int64(turn))
            rounds = 0
        else:
            rounds = idle(IDLE_YIELD, rounds)
    return True


@inlined
def pass_on(baton: Any) -> None:
    """End of a loop: the next one goes on."""
    baton[PASSED_NS] = monotonic_ns()
    store_release(baton, TURN, baton[TURN] + 1)


@outlined
def carry_over(carry: Any, books: Any, core: Any, info: Any, patterns: Any, masks: Any, last: Any) -> None:
    """Fill `masks` and `last` of a loop that takes over, for all instruments that the shard has been told of by now; number orders anew."""
    if carry.renumber[0] != 0:
        renumber_orders(carry.books, books)
    count = np.int64(core[0].instruments)
    for k in range(carry.mask_rows.size):
        row = carry.mask_rows[k]
        for i in range(count):
            if row >= 0:
                masks[k, i] = carry.masks[row, i]
            elif info[i].tick_size == 0:
                masks[k, i] = np.uint8(0)
            elif row == ALL:
                masks[k, i] = np.uint8(1)
            else:
                symbol = info[i].symbol
                masks[k, i] = np.uint8(symbol_passes(patterns, k, symbol_word(symbol, 0), symbol_word(symbol, 8), symbol_word(symbol, 16)))
    for k in range(carry.last_rows.size):
        row = carry.last_rows[k]
        if row >= 0:
            for i in range(count):
                last[k, i] = carry.last[row, i]


@loop
def carry_now(carry: Any, books: Any, core: Any, info: Any, patterns: Any, masks: Any, last: Any) -> None:
    """:func:`carry_over`, called from Python: a replay."""
    carry_over(carry, books, core, info, patterns, masks, last)
