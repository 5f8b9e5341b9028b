"""Every built-in calculation: the compiled kernel and the interpreted function give the same bits, whatever comes in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bounds import check_again
from calculation_twins import Run, bits, raw, records
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.calculation import built_in
from tickmesh.node.event import ANY_VIEW, BID, NO_PRICE, Kind

CAPACITY = {"window": 16}
"""State is made for 16 values; the parameter then changes under way, as in a live reload."""
PRICE = st.integers(-(10**10), 10**14) | st.sampled_from([0, 10**9, 46_377_000_000_000])
EVENTS = st.lists(
    st.tuples(
        st.integers(-(10**9), 10**11),  # time since the one before, ns
        PRICE,
        st.integers(0, 10**9),
        PRICE | st.just(NO_PRICE),
        st.sampled_from([Kind.TRADE, Kind.TRADE, Kind.TRADE, Kind.BBO, Kind.TIMER]),
    ),
    min_size=1,
    max_size=70,
)
VALUES: dict[str, Any] = {
    "window": st.integers(1, 20),
    "sma_seed": st.booleans(), "sample": st.booleans(), "centred": st.booleans(),
    "width": st.floats(0, 4), "scale": st.floats(0, 300), "fast": st.integers(1, 9), "slow": st.integers(1, 9), "signal": st.integers(1, 4),
    "session_ms": st.integers(0, 10**5), "offset_ms": st.integers(0, 10**4), "halflife_ms": st.floats(1e-3, 1e7),
    "qty": st.integers(1, 10**9), "band": st.floats(0, 100), "above": st.floats(0, 10**5), "below": st.floats(0, 10**5),
    "hysteresis": st.floats(0, 3), "cooldown_ms": st.floats(0, 10**5), "limit": st.floats(0, 4), "percent": st.floats(1e-3, 50),
    "window_ms": st.floats(1, 10**5), "interval_ms": st.integers(1, 10**5), "tick": st.integers(0, 10**8), "exponent": st.integers(0, 9),
    "ratio": st.floats(-4, 4), "legs": st.just(2),
}  # fmt: skip


def event_array(rows: list[tuple[int, int, int, int, int]], inputs: tuple[str, ...]) -> Any:
    events = np.zeros(len(rows), ANY_VIEW)
    clock = 10**15
    for event, (wait, price, qty, other, kind) in zip(events, rows):
        clock += wait
        event["ts_event"], event["price"], event["qty"], event["kind"], event["aux"] = clock, price, qty, kind, other
        if kind == Kind.BBO or inputs == ("bbo",):
            event["ask_qty"] = qty // 3
        if inputs == ("bar",):
            event["high_ticks"], event["low_ticks"], event["close_ticks"] = qty % 97, qty % 31, qty % 61 - 30
    return records(events)


@pytest.mark.parametrize("name", sorted(built_in()))
def test_compiled_and_interpreted_agree(name: str) -> None:
    made = built_in()[name]

    @settings(max_examples=25, deadline=None)
    @given(EVENTS, st.lists(st.fixed_dictionaries({n: VALUES[n] for n in made.parameter_names}), min_size=1, max_size=2))
    def check(rows: Any, settings_: Any) -> None:
        capacity = CAPACITY if "window" in made.parameter_names and made.state_dtype({"window": 3}) != made.state_dtype() else {}
        capacity = capacity | ({"legs": 2} if made.inputs == ("legs",) else {})
        fast, slow = Run(made, True, **capacity), Run(made, False, **capacity)
        for k, event in enumerate(event_array(rows, made.inputs)):
            params = settings_[0 if k < len(rows) // 2 else -1]
            x, y = event.price / 1e9, event.qty / 7.0
            (got, got_out), (wanted, wanted_out) = fast(event, x, y, k % 2, **params), slow(event, x, y, k % 2, **params)
            assert bits(got) == bits(wanted)
            assert raw(got_out) == raw(wanted_out)
        assert same_state(fast.state, slow.state)

    check()


def same_state(a: Any, b: Any) -> bool:
    """Equal but for the payload of NaNs."""
    return all(np.array_equal(a[n], b[n], equal_nan=a[n].dtype.kind == "f") for n in a.dtype.names)


@pytest.mark.slow
def test_no_calculation_reaches_outside_its_state() -> None:
    """The same examples once more, compiled with bounds checks."""
    check_again(__file__, "compiled_and_interpreted")


def test_the_table_above_is_complete() -> None:
    assert {n for made in built_in().values() for n in made.parameter_names} <= VALUES.keys()
    assert BID == 0
