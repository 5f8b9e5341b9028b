"""Calculations: user logic compiled into the shard loop. How one is written, found, checked and put in order.

A calculation is a plain Python function under :func:`calculation`. It stays callable as it is (tests call it with plain records) and
gets ``.kernel``, the same function as an inlined kernel for the generated loop::

    @calculation(inputs="trade", state=[("value", "f8"), ("n", "i8")])
    def ema(event, state, *, window: int = 10):
        ...

:func:`resolve` finds one by the name used in the configuration, :func:`plan` turns whole configuration tables into ordered
:class:`Instance` objects, :func:`check_compiles` refuses one that cannot run in the loop.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numba import from_dtype
from numba import types as nb
from numba.core.errors import NumbaError

from tickmesh.node.event import ANY_VIEW
from tickmesh.node.joining import BY_KIND, LEGS_MAX
from tickmesh.node.symbol_filter import SYMBOL_BYTES
from tickmesh.transports.codecache import import_generated, write_generated
from tickmesh.transports.toolbox import inlined

INPUTS = ("trade", "bbo", "order", "bar", "legs")
"""What a calculation can listen to. `order` is any event that changes a book; `legs`: it is one calculation over several instruments, and
its key `inputs` says which of them, and which of their events."""
SERIES = {"trade.price": "trade", "trade.qty": "trade", "bbo.mid": "bbo", "bbo.spread": "bbo", "bbo.microprice": "bbo"}
"""Float series a calculation can read, and the event that feeds each."""
INSTRUMENT_FACTS = ("tick", "exponent", "legs")
"""Keyword parameters that the shard fills in: the instrument's tick size (i64, 1e-9) and quantity exponent (i64), how many legs the
calculation has (i64). Not configurable."""
CONFIG_KEYS = frozenset({"use", "of", "against", "symbols", "silent", "inputs"})
"""Keys of a calculation's table that are not its parameters."""
ENTRY_POINTS = "tickmesh.calculations"
"""Entry point group under which an installed package offers calculations."""
_BUILT_IN_MODULES = ("tickmesh.node.indicators", "tickmesh.node.alerts", "tickmesh.node.bars")

Emits = Literal["signal", "alert", "bar", "intent"]
StateFields = Sequence[tuple[Any, ...]]


# ---------------------------------------------------------------- errors


class CalculationError(Exception):
    """A calculation cannot be used.

    Attributes:
        use: how the configuration or the source names it.
        reason: what is wrong.
        hint: what to do; may be empty.
        line: line in its source file, if one is to blame.
    """

    def __init__(self, use: str, reason: str, hint: str = "", line: int | None = None) -> None:
        where = f"{use}, line {line}" if line else use
        super().__init__(f"{where}: {reason}" + (f" ({hint})" if hint else ""))
        self.use, self.reason, self.hint, self.line = use, reason, hint, line


class DefinitionError(CalculationError):
    """A function under ``@calculation`` does not have the right shape."""


class NotFoundError(CalculationError):
    """No calculation has this name."""


class SourceError(CalculationError):
    """A user's file cannot be read, parsed or imported, or lies outside the configured folder."""


class NotCompilableError(CalculationError):
    """A calculation that the compiler cannot turn into code without allocation and Python objects."""


@dataclass(frozen=True)
class PlanProblem:
    """One thing wrong in the configured calculations: dotted `path` of the key, `reason`, `hint` (may be empty)."""

    path: str
    reason: str
    hint: str = ""


class PlanError(Exception):
    """The configured calculations cannot run; `problems` holds every reason."""

    def __init__(self, problems: Sequence[PlanProblem]) -> None:
        super().__init__("\n".join(f"{p.path}: {p.reason}" + (f" ({p.hint})" if p.hint else "") for p in problems))
        self.problems = tuple(problems)


# ---------------------------------------------------------------- definition


@dataclass(frozen=True)
class Parameter:
    """A keyword-only parameter: its `type` (int, float or bool), `default` and inclusive bounds."""

    name: str
    type: type
    default: int | float | bool
    low: float = -math.inf
    high: float = math.inf

    def checked(self, value: Any) -> int | float | bool:
        """`value` as this parameter's type.

        Raises:
            ValueError: wrong type or out of bounds; the text says which.
        """
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[self.type]
        fits = isinstance(value, bool) if self.type is bool else isinstance(value, (int, self.type)) and not isinstance(value, bool)
        if not fits:
            raise ValueError(f"is {value!r}, not {wanted}")
        if self.type is bool:
            return bool(value)
        low, high = (max(self.low, -(2**63)), min(self.high, 2**63 - 1)) if self.type is int else (self.low, self.high)
        if not low <= value <= high:
            raise ValueError(f"is {value!r}, outside {low:g} … {high:g}")
        result: int | float = self.type(value)
        return result


class PlainRecord:
    """A record whose fields are attributes, as compiled code sees it, for calling a calculation's Python function.

    (numpy's own ``recarray`` hides fields behind its methods: ``event.flags`` would be something else.) It shares its memory with `row`.
    """

    __slots__ = ("_row",)

    def __init__(self, row: Any) -> None:
        object.__setattr__(self, "_row", row)

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "_row")[name]
        except ValueError as error:
            raise AttributeError(str(error)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        object.__getattribute__(self, "_row")[name] = value


def new_event(**fields: Any) -> PlainRecord:
    """An event with these fields, named as in any view (``price=…``, ``bid=…``, ``kind=Kind.TRADE``), for calling the Python function."""
    row = np.zeros(1, ANY_VIEW)[0]
    for name, value in fields.items():
        row[name] = value
    return PlainRecord(row)


@dataclass(frozen=True, eq=False)
class Calculation:
    """A function compiled into the shard loop. Calling it calls the Python function.

    Attributes:
        function: the Python function.
        kernel: the inlined kernel; its arguments are :attr:`arguments`, then every name of :attr:`parameter_names`, all positional.
        arguments: ``("event" | "x", ["y"], ["event"], "state", ["out"])``.
        inputs: what it listens to, of :data:`INPUTS`; empty for one that takes a series.
        outputs: names of a signal's values, in order.
        emits: ``signal`` (returns floats), or the kind of the event that it fills in `out` and emits by returning true.
        scope: ``instrument`` (one state record each) or ``shard`` (one for all).
        timer: it is called with TIMER events too.
        parameters: the configurable ones.
        parameter_names: the keyword parameters in the kernel's order, :data:`INSTRUMENT_FACTS` included.
    """

    function: Callable[..., Any]
    kernel: Any
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    emits: Emits
    scope: str
    timer: bool
    parameters: tuple[Parameter, ...]
    parameter_names: tuple[str, ...]
    legs: tuple[int, int]
    _state: StateFields | Callable[[dict[str, Any]], StateFields] = field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def module(self) -> str:
        """Module that generated code imports it from."""
        return self.function.__module__

    @property
    def takes_series(self) -> bool:
        """Whether its first argument is a float series `x`."""
        return self.arguments[0] == "x"

    @property
    def params_dtype(self) -> np.dtype[Any]:
        """Record of its parameters (i8, f8, bool); one unused byte if it has none."""
        kinds = {int: "i8", float: "f8", bool: "?"}
        return np.dtype([(p.name, kinds[p.type]) for p in self.parameters] or [("_unused", "u1")], align=True)

    def state_dtype(self, params: Mapping[str, Any] | None = None) -> np.dtype[Any]:
        """Record of its state under these parameters (defaults for those not named); one unused byte if it has none."""
        values = {p.name: p.default for p in self.parameters} | {"legs": self.legs[0]} | dict(params or {})
        fields = self._state(values) if callable(self._state) else self._state
        return np.dtype(list(fields) or [("_unused", "u1")], align=True)

    def new_state(self, **params: Any) -> PlainRecord:
        """A zeroed state record for calling the Python function."""
        return PlainRecord(np.zeros(1, self.state_dtype(params))[0])


def calculation(
    *,
    inputs: str = "",
    state: StateFields | Callable[[dict[str, Any]], StateFields] = (),
    outputs: Sequence[str] = ("value",),
    emits: Emits = "signal",
    scope: Literal["instrument", "shard"] = "instrument",
    timer: bool = False,
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> Callable[[Callable[..., Any]], Calculation]:
    """Make a calculation of a function ``f(event | x, [y], [event], [leg], state, [out], *, parameters)``.

    Args:
        inputs: events it listens to, comma separated (``"trade,bbo"``); leave empty where the first argument is a series `x`.
        state: numpy fields of one state record, zero at the start; or a function of the parameters (and of ``legs``, how many) that
            returns them.
        outputs: names of the values that a signal returns; one float, or a tuple of as many floats. NaN emits nothing.
        emits: `signal`, or `alert`, `bar`, `intent`: then the function fills `out` and returns whether to emit it.
        scope: `instrument` or `shard`: whose state it is.
        timer: call it with TIMER events too.
        bounds: inclusive ``(low, high)`` of parameters; ``legs``: how many it can have.

    Raises:
        DefinitionError: the function does not have that shape.
    """

    def decorate(function: Callable[..., Any]) -> Calculation:
        limits = dict(bounds or {})
        low, high = limits.pop("legs", (1, LEGS_MAX)) if "legs" in inputs else (1, 1)
        legs = int(low), int(min(high, LEGS_MAX))
        arguments, names, parameters = _signature(function, limits)
        listens = tuple(part.strip() for part in inputs.split(",") if part.strip())
        _check_shape(function.__name__, arguments, listens, tuple(outputs), emits, scope, timer)
        kernel, values = inlined(_positional(function)), tuple(outputs)
        made = Calculation(function, kernel, arguments, listens, values, emits, scope, timer, parameters, names, legs, state)
        _check_state(made)
        return made

    return decorate


def _positional(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with its keyword-only parameters positional: numba has no keyword-only arguments."""
    code = function.__code__
    changed = code.replace(co_argcount=code.co_argcount + code.co_kwonlyargcount, co_kwonlyargcount=0)
    twin = types.FunctionType(changed, function.__globals__, function.__name__, None, function.__closure__)
    twin.__module__, twin.__doc__, twin.__qualname__ = function.__module__, function.__doc__, function.__qualname__
    return twin


def _signature(
    function: Callable[..., Any], bounds: dict[str, tuple[float, float]]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Parameter, ...]]:
    name = function.__name__
    arguments, names, parameters = [], [], []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty:
            arguments.append(parameter.name)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            names.append(parameter.name)
            if parameter.name not in INSTRUMENT_FACTS:
                parameters.append(_parameter(name, parameter, bounds.pop(parameter.name, None)))
        else:
            raise DefinitionError(name, f"argument {parameter.name!r} is not allowed", "put parameters with defaults after a `*`")
    if bounds:
        raise DefinitionError(name, f"bounds for {', '.join(sorted(bounds))}, which are no parameters")
    return tuple(arguments), tuple(names), tuple(parameters)


def _parameter(name: str, parameter: inspect.Parameter, bounds: tuple[float, float] | None) -> Parameter:
    if parameter.name in CONFIG_KEYS:
        raise DefinitionError(name, f"parameter {parameter.name!r} has the name of a configuration key", "rename it")
    if parameter.default is parameter.empty or not isinstance(parameter.default, (bool, int, float)):
        raise DefinitionError(name, f"parameter {parameter.name!r} needs a default that is an int, a float or a bool")
    declared = {"int": int, "float": float, "bool": bool, int: int, float: float, bool: bool}
    if parameter.annotation is not parameter.empty and parameter.annotation not in declared:
        raise DefinitionError(name, f"parameter {parameter.name!r} is declared {parameter.annotation}", "use int, float or bool")
    kind: type = declared.get(parameter.annotation, type(parameter.default))
    low, high = bounds or (-math.inf, math.inf)
    made = Parameter(parameter.name, kind, parameter.default, low, high)
    try:
        return Parameter(parameter.name, kind, made.checked(parameter.default), low, high)
    except ValueError as error:
        raise DefinitionError(name, f"default of {parameter.name!r} {error}") from None


def _check_shape(
    name: str, arguments: tuple[str, ...], inputs: tuple[str, ...], outputs: tuple[str, ...], emits: str, scope: str, timer: bool
) -> None:
    first = [a for a in arguments if a in ("x", "y")]
    event = ["event"] if not first or "event" in arguments else []
    leg = ["leg"] if inputs == ("legs",) else []
    wanted = (*first, *event, *leg, "state", *(["out"] if emits != "signal" else []))
    if emits not in ("signal", "alert", "bar", "intent"):
        raise DefinitionError(name, f"emits {emits!r}", "use signal, alert, bar or intent")
    if arguments != wanted or first not in ([], ["x"], ["x", "y"]):
        raise DefinitionError(name, f"takes ({', '.join(arguments)})", f"make it ({', '.join(wanted)}); x is a series, y a second one")
    if scope not in ("instrument", "shard"):
        raise DefinitionError(name, f"scope {scope!r}", "use instrument or shard")
    if "legs" in inputs and (len(inputs) > 1 or timer or emits == "bar"):
        raise DefinitionError(name, "takes legs and something else, or makes bars of them", 'inputs="legs" stands alone')
    if first and (inputs or timer):
        raise DefinitionError(name, "takes a series x and names inputs or a timer", "leave them out: the key `of` chooses the series")
    unknown = [i for i in inputs if i not in INPUTS]
    if unknown or (not first and not inputs):
        raise DefinitionError(name, f"inputs {', '.join(unknown) or 'are missing'}", f"choose from {', '.join(INPUTS)}")
    if not outputs or len(set(outputs)) != len(outputs) or not all(o.isidentifier() for o in outputs):
        raise DefinitionError(name, f"outputs {outputs!r}", "name each output once, with an identifier")


def _check_state(made: Calculation) -> None:
    try:
        dtype = made.state_dtype()
    except (TypeError, ValueError, KeyError) as error:
        raise DefinitionError(made.name, f"state is not a list of numpy fields: {error}", 'like [("value", "f8"), ("n", "i8")]') from None
    if dtype.hasobject:
        raise DefinitionError(made.name, "state holds Python objects", "use numbers and fixed-size arrays of numbers")


# ---------------------------------------------------------------- finding one


@functools.cache
def built_in() -> dict[str, Calculation]:
    """The built-in calculations by name."""
    modules = [importlib.import_module(name) for name in _BUILT_IN_MODULES]
    return {c.name: c for m in modules for c in vars(m).values() if isinstance(c, Calculation) and c.module == m.__name__}


def resolve(use: str, folder: Path) -> Calculation:
    """The calculation that a configuration names.

    Args:
        use: a built-in name, the name of an entry point of group :data:`ENTRY_POINTS`, or ``"file.py:function"``.
        folder: where user files are; none outside it is loaded.

    Raises:
        NotFoundError: nothing has this name; names the nearest.
        SourceError: the file is outside `folder`, missing, not valid Python, or fails when imported.
        DefinitionError: the function has the wrong shape.
    """
    if ".py:" in use:
        file, _, function = use.rpartition(":")
        return _pick(use, load_source(_inside(use, file, folder), use), function)
    known = built_in()
    if use in known:
        return known[use]
    points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if use in points:
        spec = importlib.util.find_spec(points[use].module)
        if spec is None or not spec.origin:
            raise SourceError(use, f"its package offers module {points[use].module}, which does not exist", "reinstall the package")
        return _pick(use, load_source(Path(spec.origin), use), points[use].attr)
    near = difflib.get_close_matches(use, [*known, *points], 1)
    hint = f"did you mean {near[0]!r}?" if near else f"built in: {', '.join(sorted(known))}; your own: file.py:function"
    raise NotFoundError(use, "is no calculation", hint)


def _inside(use: str, file: str, folder: Path) -> Path:
    root = folder.resolve()
    path = (root / file).resolve()
    if not path.is_relative_to(root):
        raise SourceError(use, f"lies outside {root}", "only files under the configured folder are loaded")
    if not path.is_file():
        raise SourceError(use, f"there is no file {path}", "the path is relative to the configured folder")
    return path


def load_source(path: Path, use: str) -> types.ModuleType:
    """Import a self-contained source file as a generated module, so that its text is part of every cache key.

    Raises:
        SourceError: it cannot be read, parsed or imported.
        DefinitionError: a function under ``@calculation`` in it has the wrong shape.
    """
    try:
        text = path.read_text(encoding="utf-8")
        ast.parse(text)
    except SyntaxError as error:
        raise SourceError(use, f"is not valid Python: {error.msg}", (error.text or "").strip(), error.lineno) from None
    except (OSError, ValueError) as error:
        raise SourceError(use, f"cannot be read: {error}") from None
    stem = "".join(c if c.isalnum() else "_" for c in path.stem)
    generated = write_generated(f"user_{stem}", text)
    try:
        return import_generated(generated)
    except CalculationError:
        raise
    except Exception as error:  # the user's module ran: whatever it raised is the user's to see
        line = _line_in(error, str(generated))
        hint = "a calculation file stands alone: import only installed packages" if isinstance(error, ImportError) else ""
        raise SourceError(use, f"{type(error).__name__}: {error}", hint, line) from error


def _line_in(error: BaseException, file: str) -> int | None:
    line, trace = None, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _pick(use: str, module: types.ModuleType, function: str) -> Calculation:
    found = {name: value for name, value in vars(module).items() if isinstance(value, Calculation)}
    if function in found:
        return found[function]
    if hasattr(module, function):
        raise NotFoundError(use, f"{function} is no calculation", "put @calculation(...) above it")
    near = difflib.get_close_matches(function, found, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(sorted(found)) or 'none'}"
    raise NotFoundError(use, f"the file has no calculation {function!r}", hint)


# ---------------------------------------------------------------- does it compile


def check_compiles(made: Calculation, params: Mapping[str, Any] | None = None, use: str | None = None) -> None:
    """Compile a calculation the way the loop does, and check what it returns.

    Raises:
        NotCompilableError: with the useful part of the compiler's message and the line.
    """
    use = use or made.name
    record = from_dtype(ANY_VIEW)
    kinds = {"x": nb.float64, "y": nb.float64, "event": record, "leg": nb.int64, "out": record}
    kinds["state"] = from_dtype(made.state_dtype(params))
    of_type = {int: nb.int64, float: nb.float64, bool: nb.boolean}
    by_name = {p.name: of_type[p.type] for p in made.parameters} | dict.fromkeys(INSTRUMENT_FACTS, nb.int64)
    signature = tuple([kinds[a] for a in made.arguments] + [by_name[n] for n in made.parameter_names])
    try:
        made.kernel.compile(signature)
        returned = nb.unliteral(made.kernel.overloads[signature].signature.return_type)
    except (NumbaError, KeyError, TypeError, NotImplementedError, AttributeError, ValueError, AssertionError) as error:
        raise _explained(error, made, use) from error
    _check_returned(made, returned, use)


def _check_returned(made: Calculation, returned: Any, use: str) -> None:
    line = made.function.__code__.co_firstlineno
    if made.emits != "signal":
        if returned != nb.boolean:
            raise NotCompilableError(use, f"returns {returned}, not a bool", "return whether `out` is to be emitted, on every path", line)
        return
    count = len(made.outputs)
    wanted = nb.float64 if count == 1 else nb.UniTuple(nb.float64, count)
    if returned != wanted:
        shape = "a float" if count == 1 else f"a tuple of {count} floats ({', '.join(made.outputs)})"
        raise NotCompilableError(use, f"returns {returned}, not {shape}", "on every path; math.nan where there is no value yet", line)


def _explained(error: BaseException, made: Calculation, use: str) -> NotCompilableError:
    code = made.function.__code__
    if isinstance(error, KeyError):
        name = str(error.args[0])
        return NotCompilableError(use, f"a record has no field {name!r}", _fields_hint(made, name), _line_of_attribute(made, name))
    text = str(error)
    lines = [int(part.split(",")[0].split(":")[0].split()[0]) for part in text.split(f'{Path(code.co_filename).name}", line ')[1:]]
    short = f"{Path(code.co_filename).name} ("
    lines += [int(part.split(")")[0]) for part in text.split(short)[1:] if part.split(")")[0].isdigit()]
    useful = [part.strip() for part in text.splitlines() if part.strip() and not part.strip().startswith("Failed in nopython")]
    reason = useful[0] if useful else type(error).__name__
    hint = ""
    if "NRT required" in text or "Only accept returning of array" in text or "reference counted" in text.lower():
        reason, hint = "it allocates memory: " + reason, "keep arrays as fixed-size fields of `state`"
    return NotCompilableError(use, reason, hint, lines[-1] if lines else code.co_firstlineno)


def _fields_hint(made: Calculation, name: str) -> str:
    event, state = ANY_VIEW.names or (), made.state_dtype().names or ()
    near = difflib.get_close_matches(name, [*event, *state], 1)
    return f"did you mean {near[0]!r}?" if near else f"event: {', '.join(event)}; state: {', '.join(state)}"


def _line_of_attribute(made: Calculation, name: str) -> int | None:
    first = made.function.__code__.co_firstlineno
    try:
        tree = ast.parse(Path(made.function.__code__.co_filename).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return first
    found = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == name and n.lineno >= first]
    return min(found, default=first)


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True, eq=False)
class Instance:
    """A configured calculation: what the shard's generator writes one call for.

    Attributes:
        name: its name in the configuration.
        use: the `use` key.
        index: its place in the plan; signals and alerts carry it in `calculation`, bars in `side`.
        calculation: what it runs.
        params: record of :attr:`Calculation.params_dtype`.
        of: series or ``calculation[.output]`` that is `x`; None for one that takes events.
        against: the same for `y`.
        bars: name of the bars that feed one with input ``bar``.
        symbols: globs of the symbols it runs for; empty: all.
        state: dtype of one state record.
        silent: its values feed other calculations but do not leave as signals.
        legs: (``bbo`` or ``trade``, symbol) of each, for one over several instruments; else empty.
    """

    name: str
    use: str
    index: int
    calculation: Calculation
    params: Any
    of: str | None
    against: str | None
    bars: str | None
    symbols: tuple[str, ...]
    state: np.dtype[Any]
    silent: bool = False
    legs: tuple[tuple[str, str], ...] = ()

    @property
    def module(self) -> str:
        """Module to import it from."""
        return self.calculation.module

    @property
    def function(self) -> str:
        """Name to import from :attr:`module`."""
        return self.calculation.name

    @property
    def inputs(self) -> tuple[str, ...]:
        """Events it listens to; empty for one that takes a series."""
        return self.calculation.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of its values."""
        return self.calculation.outputs

    @property
    def emits(self) -> Emits:
        """What it emits."""
        return self.calculation.emits

    @property
    def timer(self) -> bool:
        """Whether it is called with TIMER events too."""
        return self.calculation.timer

    @property
    def takes_event(self) -> bool:
        """Whether the event follows the series in the call."""
        return self.calculation.takes_series and "event" in self.calculation.arguments

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the kernel's parameters in order."""
        return self.calculation.parameter_names

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the instances that it reads."""
        series = [text.split(".")[0] for text in (self.of, self.against) if text is not None and text not in SERIES]
        return (*series, *([self.bars] if self.bars else []))

    def same_code(self, other: Instance) -> bool:
        """Whether `other` differs at most in parameter values, so that a live swap of parameters is enough."""
        mine, its = (
            (i.name, i.index, i.module, i.function, i.of, i.against, i.bars, i.symbols, i.silent, i.legs, i.state) for i in (self, other)
        )
        return mine == its


def plan(
    calculations: Mapping[str, Mapping[str, Any]],
    alerts: Mapping[str, Mapping[str, Any]] | None = None,
    bars: Mapping[str, Mapping[str, Any]] | None = None,
    folder: Path = Path(),
) -> list[Instance]:
    """Instances of everything configured, each after the ones that it reads, otherwise by name.

    Args:
        calculations: ``{name: {"use": ..., "of": ..., "symbols": [...], parameter: value}}``.
        alerts: the same; `use` is ``threshold`` if left out.
        bars: the same; `use` is ``bars`` if left out.
        folder: where user files are.

    Raises:
        PlanError: with every problem found.
    """
    planner = _Planner(folder)
    for section, tables, use in (("calculations", calculations, None), ("alerts", alerts, "threshold"), ("bars", bars, "bars")):
        for name, table in (tables or {}).items():
            planner.add(f"processing.{section}.{name}", name, table, use)
    return planner.finish()


@dataclass
class _Entry:
    path: str
    table: dict[str, Any]
    use: str
    calculation: Calculation
    values: dict[str, Any]
    of: str | None = None
    against: str | None = None
    bars: str | None = None
    legs: tuple[tuple[str, str], ...] = ()


class _Planner:
    """Collects entries and problems, then orders the entries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, _Entry] = {}
        self.named: set[str] = set()
        self.problems: list[PlanProblem] = []

    def problem(self, path: str, reason: str, hint: str = "") -> None:
        self.problems.append(PlanProblem(path, reason, hint))

    def add(self, path: str, name: str, table: Mapping[str, Any], default_use: str | None) -> None:
        if name in self.named:
            self.problem(path, "has the name of another calculation, alert or bar", "names are shared between the three")
        self.named.add(name)
        values = {key: value for key, value in table.items() if value is not None}
        use = values.get("use", default_use)
        if not isinstance(use, str):
            return self.problem(f"{path}.use", "is missing", 'name a calculation: use = "ema"')
        try:
            made = resolve(use, self.folder)
        except CalculationError as error:
            return self.problem(f"{path}.use", str(error))
        checked = self._parameters(path, made, values)
        self.entries[name] = _Entry(path, values, use, made, checked)
        return None

    def _parameters(self, path: str, made: Calculation, table: dict[str, Any]) -> dict[str, Any]:
        known = {p.name: p for p in made.parameters}
        checked: dict[str, Any] = {p.name: p.default for p in made.parameters}
        for key, value in table.items():
            if key in CONFIG_KEYS:
                continue
            if key not in known:
                near = difflib.get_close_matches(key, [*known, *CONFIG_KEYS], 1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known) or 'none'}"
                self.problem(f"{path}.{key}", f"is no parameter of {made.name}", hint)
                continue
            try:
                checked[key] = known[key].checked(value)
            except ValueError as error:
                self.problem(f"{path}.{key}", str(error))
        return checked

    def finish(self) -> list[Instance]:
        for name, entry in self.entries.items():
            self._connect(name, entry)
        ordered = self._ordered()
        if self.problems:
            raise PlanError(self.problems)
        return [self._instance(name, index) for index, name in enumerate(ordered)]

    def _connect(self, name: str, entry: _Entry) -> None:
        table, made, path = entry.table, entry.calculation, entry.path
        if made.takes_series:
            entry.of = self._series(f"{path}.of", table.get("of", "trade.price"))
            if "y" in made.arguments:
                entry.against = self._against(entry)
        elif made.inputs == ("bar",) or "bar" in made.inputs:
            entry.bars = self._bars(f"{path}.of", table.get("of"))
        elif "of" in table:
            self.problem(f"{path}.of", f"{made.name} takes events, not a series", "leave `of` out")
        if made.inputs == ("legs",):
            entry.legs = self._legs(name, entry)
        elif "inputs" in table:
            self.problem(f"{path}.inputs", f"{made.name} runs for each instrument by itself", "leave `inputs` out, or use symbols")
        if "against" in table and "y" not in made.arguments:
            self.problem(f"{path}.against", f"{made.name} takes one series", "leave `against` out")
        symbols = table.get("symbols", [])
        if not isinstance(symbols, (list, tuple)) or not all(isinstance(s, str) and s for s in symbols):
            self.problem(f"{path}.symbols", f"is {symbols!r}", 'a list of symbols or globs: ["AAPL", "ES*"]')
        if not isinstance(table.get("silent", False), bool):
            self.problem(f"{path}.silent", f"is {table['silent']!r}, not true or false")

    def _legs(self, name: str, entry: _Entry) -> tuple[tuple[str, str], ...]:
        """The key `inputs`: ``bbo:SYMBOL`` or ``trade:SYMBOL`` for each leg."""
        path, inputs, (low, high) = f"{entry.path}.inputs", entry.table.get("inputs"), entry.calculation.legs
        example = 'like ["bbo:AAPL", "trade:MSFT"]'
        if not isinstance(inputs, (list, tuple)) or not all(isinstance(text, str) for text in inputs):
            self.problem(path, "is missing" if inputs is None else f"is {inputs!r}", f"name what it takes, {example}")
            return ()
        if not low <= len(inputs) <= high:
            count = f"{low}" if low == high else f"{low} to {high}"
            self.problem(path, f"names {len(inputs)}, {entry.calculation.name} takes {count}", example)
        legs = []
        for place, text in enumerate(inputs):
            kind, _, symbol = text.partition(":")
            if kind not in BY_KIND or not _is_symbol(symbol):
                self.problem(f"{path}[{place}]", f"is {text!r}", f"{' or '.join(BY_KIND)}, a colon and a symbol, {example}")
            elif (kind, symbol) in legs:
                self.problem(f"{path}[{place}]", f"{text!r} is there already", "name each once")
            else:
                legs.append((kind, symbol))
        if len(name) > SYMBOL_BYTES:
            self.problem(entry.path, f"has a name of more than {SYMBOL_BYTES} characters", "its signals have the name for a symbol")
        if "symbols" in entry.table:
            self.problem(f"{entry.path}.symbols", "has no meaning with inputs", "leave it out")
        return tuple(legs)

    def _against(self, entry: _Entry) -> str | None:
        if "against" not in entry.table:
            self.problem(f"{entry.path}.against", "is missing", "name the second series")
            return None
        return self._series(f"{entry.path}.against", entry.table["against"])

    def _series(self, path: str, of: Any) -> str | None:
        if of in SERIES:
            return str(of)
        name, _, output = str(of).partition(".")
        source = self.entries.get(name)
        if source is None:
            if name not in self.named:
                known = [*SERIES, *self.entries]
                near = difflib.get_close_matches(str(of), known, 1)
                self.problem(path, f"{of!r} is no series", f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}")
            return None
        if source.calculation.emits != "signal":
            self.problem(path, f"{name} emits {source.calculation.emits} events, not values", "read a calculation that emits signals")
            return None
        if output and output not in source.calculation.outputs:
            self.problem(path, f"{name} has no output {output!r}", f"it has: {', '.join(source.calculation.outputs)}")
            return None
        return f"{name}.{output or source.calculation.outputs[0]}"

    def _bars(self, path: str, of: Any) -> str | None:
        made = [name for name, entry in self.entries.items() if entry.calculation.emits == "bar"]
        if of is None and len(made) == 1:
            return made[0]
        if of not in made:
            reason = "is missing" if of is None else f"{of!r} are no bars"
            self.problem(path, reason, f"name bars: {', '.join(sorted(made))}" if made else "configure [processing.bars.NAME] first")
            return None
        return str(of)

    def _reads(self, name: str) -> set[str]:
        entry = self.entries[name]
        series = {text.split(".")[0] for text in (entry.of, entry.against) if text and text not in SERIES}
        return series | ({entry.bars} if entry.bars else set())

    def _ordered(self) -> list[str]:
        left = {name: self._reads(name) for name in sorted(self.entries)}
        ordered: list[str] = []
        while left:
            ready = [name for name, reads in left.items() if reads <= set(ordered)]
            if not ready:
                stuck = self._circle(left)
                self.problem(f"{self.entries[stuck[0]].path}.of", f"goes in a circle: {' → '.join([*stuck, stuck[0]])}", "break the circle")
                return ordered
            ordered += ready
            left = {name: reads for name, reads in left.items() if name not in ready}
        return ordered

    @staticmethod
    def _circle(left: dict[str, set[str]]) -> list[str]:
        walk = [next(iter(left))]
        while True:
            following = min(name for name in left[walk[-1]] if name in left)
            if following in walk:
                return walk[walk.index(following) :]
            walk.append(following)

    def _instance(self, name: str, index: int) -> Instance:
        entry = self.entries[name]
        made = entry.calculation
        values = tuple(entry.values[p.name] for p in made.parameters) or (0,)
        sizes = entry.values | ({"legs": len(entry.legs)} if entry.legs else {})
        return Instance(
            name=name, use=entry.use, index=index, calculation=made, params=np.array([values], made.params_dtype)[0], of=entry.of,
            against=entry.against, bars=entry.bars, symbols=tuple(entry.table.get("symbols", ())),
            state=made.state_dtype(sizes), silent=bool(entry.table.get("silent", False)), legs=entry.legs,
        )  # fmt: skip


def _is_symbol(text: str) -> bool:
    return 0 < len(text) <= SYMBOL_BYTES and text.isascii() and text.isprintable() and " " not in text


def compile_problems(instances: Iterable[Instance]) -> list[PlanProblem]:
    """Those instances of a plan that the compiler refuses, as problems. Built-in ones are not tried."""
    problems = []
    for instance in instances:
        if instance.module in _BUILT_IN_MODULES:
            continue
        try:
            check_compiles(instance.calculation, _as_dict(instance), instance.use)
        except NotCompilableError as error:
            problems.append(PlanProblem(f"processing.calculations.{instance.name}.use", str(error)))
    return problems


def _as_dict(instance: Instance) -> dict[str, Any]:
    legs = {"legs": len(instance.legs)} if instance.legs else {}
    return {p.name: instance.params[p.name].item() for p in instance.calculation.parameters} | legs
