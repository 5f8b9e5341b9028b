"""Runs a calculation twice: compiled as in the shard loop, and by the Python interpreter on numpy records, bit for bit comparable."""

from __future__ import annotations

import functools
import struct
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic

from tickmesh.node.calculation import Calculation, PlainRecord, new_event
from tickmesh.node.event import ANY_VIEW, NO_PRICE, Kind
from tickmesh.transports.toolbox import outlined


def _f64_bits(value: float) -> np.int64:
    return np.int64(struct.unpack("<q", struct.pack("<d", value))[0])


def _bits_f64(bits: int) -> np.float64:
    return np.float64(struct.unpack("<d", struct.pack("<q", int(bits)))[0])


_INTRINSICS = {"f64_bits": _f64_bits, "bits_f64": _bits_f64}


def interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, and every kernel that it calls, without any compiled code."""
    names = set(function.__code__.co_names)
    changed = dict(function.__globals__)
    for name in names & changed.keys():
        if isinstance(changed[name], Dispatcher):
            changed[name] = interpreted(changed[name].py_func)
        elif isinstance(changed[name], _Intrinsic):
            changed[name] = _INTRINSICS[name]
    twin = types.FunctionType(function.__code__, changed, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def trades(prices: Sequence[float], qtys: Sequence[int] | None = None, step_ns: int = 1_000_000_000) -> np.ndarray[Any, Any]:
    """TRADE events at `prices` (currency), `step_ns` apart, starting at one step."""
    events = np.zeros(len(prices), ANY_VIEW)
    events["kind"] = Kind.TRADE
    events["price"] = [round(p * 10**9) for p in prices]
    events["qty"] = 1 if qtys is None else qtys
    events["ts_event"] = (np.arange(len(prices)) + 1) * step_ns
    return events


def records(events: Any) -> list[PlainRecord]:
    """Rows of a record array with fields as attributes."""
    return [PlainRecord(row) for row in events]


def quote(bid: int = NO_PRICE, bid_qty: int = 0, ask: int = NO_PRICE, ask_qty: int = 0) -> PlainRecord:
    """One BBO event."""
    return new_event(kind=Kind.BBO, bid=bid, bid_qty=bid_qty, ask=ask, ask_qty=ask_qty)


@functools.cache
def _entry(made: Calculation) -> Any:
    """The kernel behind a function of arrays: records with overlapping fields cannot be passed from Python."""
    given = {"x": "x", "y": "y", "event": "events[0]", "leg": "leg", "state": "states[0]", "out": "outs[0]"}
    call = ", ".join([*(given[a] for a in made.arguments), *made.parameter_names])
    source = f"def entry({', '.join(['events, x, y, leg, states, outs', *made.parameter_names])}):\n    return kernel({call})\n"
    names: dict[str, Any] = {"kernel": made.kernel}
    exec(source, names)
    return outlined(names["entry"])


class Run:
    """A calculation under way: `compiled` or interpreted, with its own state.

    Attributes:
        state: array of one state record, big enough for the parameters given to the constructor.
    """

    def __init__(self, made: Calculation, compiled: bool, **params: Any) -> None:
        self.made, self.compiled = made, compiled
        self.defaults = {p.name: p.default for p in made.parameters} | {"tick": 10**7, "exponent": 0} | params
        self.state = np.zeros(1, made.state_dtype(params))
        self.function = _entry(made) if compiled else interpreted(made.function)

    def __call__(
        self, event: PlainRecord | None, x: float = 0.0, y: float = 0.0, leg: int = 0, **params: Any
    ) -> tuple[Any, PlainRecord]:
        """Returns what the calculation returned, and the event that it filled."""
        outs, events = np.zeros(1, ANY_VIEW), np.zeros(1, ANY_VIEW)
        out = PlainRecord(outs[0])
        if event is not None:
            events[0] = object.__getattribute__(event, "_row")
        values = self.defaults | params
        if self.compiled:
            parameters = [values[name] for name in self.made.parameter_names]
            return self.function(events, float(x), float(y), leg, self.state, outs, *parameters), out
        given = {"x": np.float64(x), "y": np.float64(y), "event": PlainRecord(events[0]), "state": PlainRecord(self.state[0]), "out": out}
        given["leg"] = np.int64(leg)
        arguments = [given[name] for name in self.made.arguments]
        with np.errstate(all="ignore"):
            return self.function(*arguments, **{name: values[name] for name in self.made.parameter_names}), out


def raw(record: PlainRecord) -> bytes:
    """The bytes of a record."""
    row: np.void = object.__getattribute__(record, "_row")
    return row.tobytes()


def series(made: Calculation, xs: Sequence[float], **params: Any) -> list[Any]:
    """What a compiled calculation over a float series returns for each value."""
    run = Run(made, True, **params)
    return [run(None, float(x))[0] for x in xs]


def over_events(made: Calculation, events: Any, **params: Any) -> list[Any]:
    """What a compiled calculation over events returns for each."""
    run = Run(made, True, **params)
    return [run(event)[0] for event in records(events)]


def bits(value: Any) -> Any:
    """A returned value in a form that compares bit for bit; NaNs are all one."""
    if isinstance(value, tuple):
        return tuple(bits(v) for v in value)
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    return "nan" if value != value else struct.pack("<d", value)
