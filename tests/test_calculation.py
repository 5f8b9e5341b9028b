"""How calculations are defined, found, planned and refused."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tickmesh.node import calculation as module
from tickmesh.node.calculation import (
    Calculation,
    CalculationError,
    DefinitionError,
    Instance,
    NotCompilableError,
    NotFoundError,
    PlanError,
    SourceError,
    built_in,
    calculation,
    check_compiles,
    compile_problems,
    new_event,
    plan,
    resolve,
)
from tickmesh.node.event import ANY_VIEW, VIEWS

DOCS = Path(__file__).parents[1] / "docs"
HEADER = "import math\nimport numpy as np\nfrom tickmesh.node.calculation import calculation\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TICKMESH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    yield
    for name in [name for name in sys.modules if name.startswith("tickmesh_generated")]:
        del sys.modules[name]


def user_file(folder: Path, body: str, name: str = "mine.py") -> str:
    (folder / name).write_text(HEADER + body)
    return f"{name}:mine"


# ---------------------------------------------------------------- definition


def test_a_definition_keeps_the_function_and_describes_it() -> None:
    ema = built_in()["ema"]
    state = ema.new_state()
    assert ema(4.0, state, window=3) == 4.0
    assert ema(8.0, state, window=3) == 6.0
    assert state.n == 2
    assert ema.arguments == ("x", "state")
    assert ema.parameter_names == ("window", "sma_seed")
    assert ema.params_dtype.names == ("window", "sma_seed")
    assert ema.takes_series


def test_facts_of_the_instrument_are_no_parameters() -> None:
    obv = built_in()["obv"]
    assert obv.parameter_names == ("tick", "exponent")
    assert obv.parameters == ()
    assert obv.params_dtype.itemsize == 1


def test_state_may_depend_on_a_parameter() -> None:
    sma = built_in()["sma"]
    assert sma.state_dtype({"window": 100})["ring"].shape == (128,)
    assert sma.state_dtype({"window": 128}) == sma.state_dtype({"window": 65})


def test_an_event_has_every_name_and_no_method_hides_one() -> None:
    event = new_event(bid=7, flags=3, ask_qty=5)
    assert (event.price, event.flags, event.id) == (7, 3, 5)
    event.qty = 9
    assert event.bid_qty == 9
    with pytest.raises(AttributeError):
        _ = event.nothing
    with pytest.raises(ValueError, match="nothing"):
        new_event(nothing=1)


def test_the_view_with_every_name_agrees_with_each_view() -> None:
    for kind, view in VIEWS.items():
        for name in set(view.names or ()) & set(ANY_VIEW.names or ()):
            assert view.fields is not None
            assert ANY_VIEW.fields is not None
            assert ANY_VIEW.fields[name][1] == view.fields[name][1], (kind, name)


def _no_state(event: Any) -> float:
    return 0.0


def _positional_default(event: Any, state: Any, window: int = 3) -> float:
    return 0.0


def _no_default(event: Any, state: Any, *, window: int) -> float:
    return 0.0


def _text(event: Any, state: Any, *, name: str = "x") -> float:
    return 0.0


def _reserved(event: Any, state: Any, *, of: int = 1) -> float:
    return 0.0


def _series(x: Any, state: Any) -> float:
    return 0.0


def _y_only(y: Any, state: Any) -> float:
    return 0.0


def _fine(event: Any, state: Any, *, window: int = 3) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (_no_state, {"inputs": "trade"}, r"make it \(event, state\)"),
        (_positional_default, {"inputs": "trade"}, r"'window' is not allowed .*after a `\*`"),
        (_no_default, {"inputs": "trade"}, "needs a default"),
        (_text, {"inputs": "trade"}, "needs a default"),
        (_reserved, {"inputs": "trade"}, "configuration key"),
        (_series, {"inputs": "trade"}, "leave them out"),
        (_y_only, {}, r"takes \(y, state\)"),
        (_fine, {}, "inputs are missing"),
        (_fine, {"inputs": "trades"}, "inputs trades"),
        (_fine, {"inputs": "trade", "emits": "signals"}, "emits 'signals'"),
        (_fine, {"inputs": "trade", "emits": "alert"}, r"make it \(event, state, out\)"),
        (_fine, {"inputs": "trade", "scope": "node"}, "scope 'node'"),
        (_fine, {"inputs": "trade", "outputs": ("a", "a")}, "outputs"),
        (_fine, {"inputs": "trade", "bounds": {"windw": (1, 2)}}, "bounds for windw"),
        (_fine, {"inputs": "trade", "bounds": {"window": (5, 9)}}, "default of 'window' is 3, outside 5 … 9"),
        (_fine, {"inputs": "trade", "state": [("a", "object")]}, "Python objects"),
        (_fine, {"inputs": "trade", "state": [("a", "nonsense")]}, "not a list of numpy fields"),
    ],
)
def test_a_wrong_shape_is_refused(function: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        calculation(**options)(function)


# ---------------------------------------------------------------- finding one


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="did you mean 'ema'"):
        resolve("emaa", tmp_path)
    with pytest.raises(NotFoundError, match="built in: adx, atr"):
        resolve("????", tmp_path)


def test_a_user_file_is_found_and_follows_its_changes(tmp_path: Path) -> None:
    body = '@calculation(inputs="trade", state=[("n", "i8")])\ndef mine(event, state):\n    return {}\n'
    first = resolve(user_file(tmp_path, body.format("1.0")), tmp_path)
    second = resolve(user_file(tmp_path, body.format("2.0")), tmp_path)
    assert first(None, None) == 1.0
    assert second(None, None) == 2.0
    assert first.module != second.module
    assert first.module.startswith("tickmesh_generated.user_mine_")


def test_only_files_under_the_folder_are_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    user_file(tmp_path, "", "outside.py")
    (folder / "link.py").symlink_to(tmp_path / "outside.py")
    for use in ("../outside.py:mine", f"{tmp_path}/outside.py:mine", "link.py:mine"):
        with pytest.raises(SourceError, match="lies outside"):
            resolve(use, folder)
    with pytest.raises(SourceError, match="there is no file"):
        resolve("absent.py:mine", folder)


@pytest.mark.parametrize(
    ("body", "error", "words", "line"),
    [
        ("def mine(:\n", SourceError, "not valid Python", 4),
        ("x = 1 / 0\n", SourceError, "ZeroDivisionError", 4),
        ("import neighbour_file\n", SourceError, "stands alone", 4),
        ("def mine(event, state):\n    return 0.0\n", NotFoundError, "put @calculation", None),
        ('@calculation(inputs="trade")\ndef mein(event, state):\n    return 0.0\n', NotFoundError, "did you mean 'mein'", None),
        ('@calculation(inputs="trade")\ndef mine(event):\n    return 0.0\n', DefinitionError, "make it", None),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, body: str, error: type[CalculationError], words: str, line: int | None) -> None:
    with pytest.raises(error, match=words) as caught:
        resolve(user_file(tmp_path, body), tmp_path)
    assert caught.value.line == line


def test_a_package_offers_calculations_as_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user_file(tmp_path, '@calculation(inputs="trade")\ndef mine(event, state):\n    return 3.0\n', "offered_calculations.py")
    monkeypatch.syspath_prepend(tmp_path)
    offered = {"theirs": "offered_calculations:mine", "gone": "no_such_module:f"}
    points = [EntryPoint(name, value, module.ENTRY_POINTS) for name, value in offered.items()]
    monkeypatch.setattr(module, "entry_points", lambda group: points if group == "tickmesh.calculations" else [])
    assert resolve("theirs", Path())(None, None) == 3.0
    with pytest.raises(SourceError, match="does not exist"):
        resolve("gone", Path())
    with pytest.raises(NotFoundError, match="did you mean 'theirs'"):
        resolve("their", Path())


# ---------------------------------------------------------------- compiling

DECORATOR = '@calculation(inputs="trade", state=[("n", "i8"), ("value", "f8")])\ndef mine(event, state):\n'


@pytest.mark.parametrize(
    ("lines", "words", "line"),
    [
        ("    state.valeu = 1.0\n    return 0.0\n", "no field 'valeu' .did you mean 'value'", 6),
        ("    return event.prise / 1e9\n", "no field 'prise' .did you mean 'price'", 6),
        ("    a = np.zeros(3)\n    return a[0]\n", "allocates memory", 6),
        ("    state.n += 1\n    return open('x')\n", "open", 7),
        ("    return 1\n", "returns int64, not a float", None),
        ("    return 1.0, 2.0\n", "not a float", None),
        ("    if state.n > 3:\n        return 1.0\n", "not a float|Optional|none", None),
    ],
)
def test_what_does_not_compile_is_refused_with_its_line(tmp_path: Path, lines: str, words: str, line: int | None) -> None:
    made = resolve(user_file(tmp_path, DECORATOR + lines), tmp_path)
    with pytest.raises(NotCompilableError, match=words) as caught:
        check_compiles(made, use="mine.py:mine")
    assert line is None or caught.value.line == line
    assert str(caught.value).startswith("mine.py:mine, line ")
    assert len(str(caught.value)) < 400


def test_an_emitter_returns_a_bool(tmp_path: Path) -> None:
    body = '@calculation(inputs="bbo", emits="alert")\ndef mine(event, state, out):\n    return 1.0\n'
    with pytest.raises(NotCompilableError, match="not a bool"):
        check_compiles(resolve(user_file(tmp_path, body), tmp_path))


def test_problems_of_user_files_are_reported_by_path(tmp_path: Path) -> None:
    use = user_file(tmp_path, DECORATOR + "    return 1\n")
    problems = compile_problems(plan({"a": {"use": use}, "b": {"use": "ema"}}, folder=tmp_path))
    assert [p.path for p in problems] == ["processing.calculations.a.use"]


# ---------------------------------------------------------------- the plan


def names(instances: list[Instance]) -> list[str]:
    return [instance.name for instance in instances]


def test_a_source_comes_before_its_readers_whatever_the_order() -> None:
    calculations = {
        "a": {"use": "zscore", "of": "b.r2"},
        "b": {"use": "linear_regression", "of": "z", "window": 5},
        "z": {"use": "ema", "symbols": ["AAPL", "ES*"], "silent": True},
        "range": {"use": "atr"},
    }
    alerts = {"alarm": {"of": "a", "above": 3.0, "below": None}, "crossing": {"use": "cross", "of": "a", "against": "b"}}
    made = plan(calculations, alerts, {"minute": {"interval_ms": 60000}})
    assert names(made) == ["minute", "z", "b", "range", "a", "alarm", "crossing"]
    assert names(plan(dict(reversed(calculations.items())), alerts, {"minute": {"interval_ms": 60000}})) == names(made)
    by_name = {i.name: i for i in made}
    assert [i.index for i in made] == list(range(7))
    assert by_name["a"].of == "b.r2"
    assert by_name["crossing"].against == "b.slope"
    assert by_name["range"].bars == "minute"
    assert by_name["z"].symbols == ("AAPL", "ES*")
    assert by_name["z"].silent
    assert by_name["b"].params["window"] == 5
    assert by_name["b"].state["ring"].shape == (8,)
    assert by_name["alarm"].params["above"] == 3.0
    assert by_name["alarm"].params["below"] == -np.inf


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    calculations = {
        "one": {"use": "emma"},
        "two": {"use": "ema", "windw": 3, "window": 0, "sma_seed": 1},
        "three": {"use": "ema", "of": "trade.prise"},
        "four": {"use": "ema", "of": "four"},
        "five": {"use": "sma", "of": "six", "window": 2.5},
        "six": {"use": "sma", "of": "five"},
        "seven": {},
        "eight": {"use": "vwap", "of": "trade.price"},
        "nine": {"use": "linear_regression", "symbols": "AAPL"},
        "ten": {"use": "ema", "of": "nine.r3"},
        "eleven": {"use": "atr"},
        "twelve": {"use": "cross_intent"},
    }
    alerts = {"one": {"of": "twelve", "above": 1.0}, "thirteen": {"of": "seven"}}
    with pytest.raises(PlanError) as caught:
        plan(calculations, alerts, {}, tmp_path)
    found = {p.path.removeprefix("processing."): p.reason + " / " + p.hint for p in caught.value.problems}
    wanted = {
        "calculations.one.use": "did you mean 'ema'",
        "calculations.two.windw": "did you mean 'window'",
        "calculations.two.window": "is 0, outside 1 … ",
        "calculations.two.sma_seed": "is 1, not true or false",
        "calculations.three.of": "did you mean 'trade.price'",
        "calculations.five.window": "is 2.5, not a whole number",
        "calculations.seven.use": "is missing",
        "calculations.eight.of": "takes events",
        "calculations.nine.symbols": "'AAPL'",
        "calculations.ten.of": "it has: slope, value, r2",
        "calculations.eleven.of": "configure [processing.bars.NAME] first",
        "calculations.twelve.against": "is missing",
        "alerts.one": "has the name of another",
        "alerts.one.of": "twelve emits intent events",
    }
    for path, words in wanted.items():
        assert words in found[path], (path, found.get(path))
    assert any("goes in a circle" in text for text in found.values())
    assert "alerts.thirteen.of" not in found, "a broken source is reported once"


def test_same_code_tells_a_swap_of_parameters_from_new_code() -> None:
    def one(**table: Any) -> Instance:
        return plan({"a": {"use": "sma", "window": 100} | table})[0]

    assert one().same_code(one(window=128))
    assert not one().same_code(one(window=129))
    assert not one().same_code(one(of="bbo.mid"))


# ---------------------------------------------------------------- the documentation


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_how_to_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, trial, legs, intent = blocks(DOCS / "howto" / "add-a-calculation.md", "python")
    (tmp_path / "trade_flow.py").write_text(first)
    (tmp_path / "highest_bid.py").write_text(legs)
    (tmp_path / "join_bid.py").write_text(intent)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trade_flow", raising=False)
    exec(trial, {})
    configured = [tomllib.loads(block)["processing"] for block in blocks(DOCS / "howto" / "add-a-calculation.md", "toml")]
    tables = configured[0]
    tables["calculations"] |= configured[1]["calculations"] | {"join": {"use": "join_bid.py:join_bid"}}
    made = plan(tables["calculations"], tables["alerts"], folder=tmp_path)
    assert names(made) == ["flow", "highest", "join", "smooth_flow", "one_sided"]
    assert compile_problems(made) == []


def test_the_reference_lists_every_calculation_and_its_parameters() -> None:
    text = (DOCS / "reference" / "calculations.md").read_text()
    for made in built_in().values():
        assert isinstance(made, Calculation)
        if made.name == "bars":
            continue
        row = next(line for line in text.splitlines() if line.startswith(f"| `{made.name}`"))
        for parameter in made.parameters:
            assert f"`{parameter.name}`" in row or parameter.name == "cooldown_ms", (made.name, parameter.name)
        if made.emits == "signal":
            assert ", ".join(made.outputs) in row
