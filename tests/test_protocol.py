"""Spec files: what is shipped is valid; every fault of a bad file is reported at once, with its line."""

from __future__ import annotations

import ast
import copy
import functools
import json
import re
import tomllib
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tickmesh.node.decoder import decoder_source
from tickmesh.node.protocol import SHIPPED, SpecError, key_lines, load_framing, load_spec, mapped_names, raw_value, shipped_names

GOOD = """\
[protocol]
name = "small"
byte_order = "little"
type_field = { offset = 0, type = "u8" }
tick_size = "0.05"
[timestamp]
field = "time"
[instrument]
code = "id"
symbol = "text"
[maps.side]
B = "BID"
S = 1
[fields]
time = { offset = 8, type = "u64" }
[messages.add]
type = 1
length = 48
[messages.add.fields]
id = { offset = 4, type = "u32" }
order = { offset = 16, type = "u64" }
side = { offset = 24, type = "char", map = "side" }
qty = { offset = 28, type = "u32" }
price = { offset = 32, type = "i64", decimals = 4 }
text = { offset = 40, type = "alpha:8" }
[messages.add.event]
kind = "add"
id = "order"
side = "side"
price = "price"
qty = "qty"
"""


def load(tmp_path: Path, text: str) -> list[tuple[int, str, str]]:
    """Problems of a spec: (line, key, reason)."""
    path = tmp_path / "small.toml"
    path.write_text(text)
    try:
        load_spec(path)
    except SpecError as error:
        problems = error.problems
    else:
        return []
    assert all(str(p).startswith(f"{path}:{p.line}: ") for p in problems)
    return [(p.line, p.key, p.reason) for p in problems]


def test_shipped_specs_are_valid() -> None:
    assert {"cboe_pitch", "dbn_mbo", "iex_deep", "iex_deep_plus", "iex_tops", "itch50", "memx_memoir_depth"} <= set(shipped_names())
    assert {"binaryfile", "cboe_unit", "dbn", "iex_tp", "memx_udp", "moldudp64"} <= set(shipped_names("framing_"))
    assert mapped_names() == ["b3_umdf", "binance_fix_sbe", "binance_spot", "cme_mdp3", "cme_mdp3_mbo"]
    for name in set(shipped_names()) - set(mapped_names()):
        spec = load_spec(name)
        assert spec.name == name
        assert len(set(spec.counters)) == len(spec.counters)
    for name in shipped_names("framing_"):
        assert load_framing(name).name == name


def test_a_mapping_without_its_schema_is_refused_with_what_to_do() -> None:
    with pytest.raises(SpecError, match='data_format = "cme_mdp3:FILE'):
        load_spec("cme_mdp3")


def test_good(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD) == []
    spec = load_spec(tmp_path / "small.toml")
    assert (spec.tick_size, spec.order_ids, spec.counters) == (50_000_000, "random", ["add"])
    assert spec.messages[0].fields["side"].map == {66: 0, 83: 1}
    assert spec.messages[0].fields["time"].offset == 8


@pytest.mark.parametrize(
    ("old", "new", "key", "reason"),
    [
        ('type_field = { offset = 0, type = "u8" }', "", "protocol.type_field", "is missing"),
        ('byte_order = "little"', 'byte_order = "middle"', "protocol.byte_order", "not one of big, little"),
        ('tick_size = "0.05"', "tick_size = 0.05", "protocol.tick_size", "decimal text"),
        ('tick_size = "0.05"', 'tick_size = "0"', "protocol.tick_size", "decimal text"),
        ('name = "small"', 'name = "small"\ncolour = 1', "protocol.colour", "is not known here"),
        ("[fields]", "[filds]", "filds", "is not known here"),
        ('field = "time"', 'field = "when"', "timestamp.field", "no message has a field 'when'"),
        ('code = "id"', 'code = "text"', "instrument.code", "must be a number"),
        ("S = 1", 'S = "SELL"', "maps.side.S", "neither a whole number nor one of"),
        ("length = 48", "length = 47", "messages.add.fields.text", "beyond the message's length 47"),
        ("length = 48", 'length = "48"', "messages.add.length", "must be a whole number"),
        ("offset = 28", "offset = 22", "messages.add.fields.qty", "overlaps order"),
        ("offset = 28", "offset = -1", "messages.add.fields.qty.offset", "not within"),
        ('qty = { offset = 28, type = "u32" }', 'qty = { offset = 28, type = "u7" }', "messages.add.fields.qty.type", "is not a type"),
        ("decimals = 4", "decimals = 12", "messages.add.fields.price.decimals", "12 is not within 0 to 9"),
        (", decimals = 4", "", "messages.add.event.price", "needs `decimals`"),
        ('map = "side"', 'map = "sides"', "messages.add.fields.side.map", "there is no [maps.sides]"),
        (', map = "side"', "", "messages.add.event.side", "needs a map"),
        ('side = "side"\nprice', "side = 7\nprice", "messages.add.event.side", "7 is not a side: allowed are BID (0), ASK (1)"),
        ('side = "side"\nprice', 'side = { constant = "B" }\nprice', "messages.add.event.side", "66 is not a side"),
        ('side = "side"\nprice', 'side = { constant = "CLOSED" }\nprice', "messages.add.event.side", "6 is not a side"),
        ('kind = "add"\n', 'kind = "add"\ntick_size = "price"\n', "messages.add.event.tick_size", "goes with kind 'reference' only"),
        ("S = 1", "S = 9", "messages.add.event.side", "the map of field 'side': 9 is not a side: allowed are BID"),
        ("S = 1", 'S = 1\n"*" = -1', "messages.add.event.side", "the map of field 'side': -1 is not a side"),
        ('kind = "add"\nid', 'kind = "status"\naux = 8\nid', "messages.add.event.aux", "8 is not a status: allowed are UNKNOWN (0)"),
        ('kind = "add"', 'kind = "addition"', "messages.add.event.kind", "is not one of"),
        ('id = "order"', "", "messages.add.event.id", "is missing: an event of kind 'add' needs"),
        ('qty = "qty"', 'qty = "size"', "messages.add.event.qty", "no field 'size'"),
        ("type = 1\n", 'type = "xx"\n', "messages.add.type", "is not a value of the type field"),
        ("type = 1\n", "type = 300\n", "messages.add.type", "is not a value of the type field"),
        ('kind = "add"', 'kind = "add"\nflags = ["LOUD"]', "messages.add.event.flags", "is not one of MORE"),
        (
            'kind = "add"',
            'kind = "add"\nflag_if = [{ flag = "MORE", field = "qty" }]',
            "messages.add.event.flag_if",
            "either `equals` or `bits`",
        ),
        ('kind = "add"', 'kind = "add"\nwhen = { qty = "long" }', "messages.add.event.when.qty", "is not a value of qty"),
        ('kind = "add"', 'kind = "add"\ninstrument = "all"', "messages.add.event", "needs an instrument"),
        ('field = "time"', 'field = "time"\nsince = "time_message"', "timestamp.since", "kind 'time'"),
        ('field = "time"', "field = 7", "timestamp.field", "must be the name of a field"),
        ('code = "id"\nsymbol = "text"\n', "", "instrument", "is missing: say in `code`, `symbol` or both"),
        ('code = "id"', "code = { a = 1 }", "instrument.code", "must be the name of a field"),
        ('kind = "add"', 'kind = "nothing"', "messages", "no message makes an event of an instrument"),
        ('kind = "add"', 'kind = "clear"\ninstrument = "all"', "messages", "no message makes an event of an instrument"),
        ('id = { offset = 4, type = "u32" }\n', "", "messages.add.event", "needs an instrument"),
        ('kind = "add"', 'kind = "add"\nname = "a b"', "messages.add.event.name", "is no name"),
        ('name = "small"', 'name = "../small"', "protocol.name", "is no name"),
        ('name = "small"', 'name = "small"\ntitle = """a\nb"""', "protocol.title", "on one line"),
        ("[messages.add]", '[messages."add\\nimport os"]', "messages.add\nimport os", "is no name of a message"),
        ('kind = "add"', 'kind = "add"\nflag_if = 1', "messages.add.event.flag_if", "must be a list of tables"),
        ('side = "side"', "side = { constant = [1] }", "messages.add.event.side", "must be a field's name"),
        ('tick_size = "0.05"', 'tick_size = "1e999999"', "protocol.tick_size", "decimal text"),
        ('type = "alpha:8"', 'type = "alpha:²"', "messages.add.fields.text.type", "is not a type"),
    ],
)
def test_each_fault(tmp_path: Path, old: str, new: str, key: str, reason: str) -> None:
    assert GOOD.count(old) >= 1
    text = GOOD.replace(old, new, 1)
    problems = load(tmp_path, text)
    found = [(line, r) for line, k, r in problems if k == key]
    assert found, problems
    assert reason in found[0][1]
    last = key.rsplit(".", 1)[-1]
    if new and "missing" not in reason and found[0][0] > 1:
        line = text.splitlines()[found[0][0] - 1]
        assert last in line or key.split(".")[-2] in line or "event" in line, (line, key)


def test_every_fault_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("decimals = 4", "decimals = 12").replace("S = 1", 'S = "SELL"').replace('qty = "qty"', 'qty = "size"')
    assert len(load(tmp_path, text)) == 3


def test_a_state_without_an_instrument_is_not_taken_for_one_of_the_whole_venue(tmp_path: Path) -> None:
    """A clear whose instrument field is misspelt would else empty every book."""
    clear = "[messages.clear]\ntype = 2\nlength = 16\n[messages.clear.event]\nkind = 'clear'\n"
    assert ("messages.clear.event", "names no instrument") in {(key, reason[:19]) for _, key, reason in load(tmp_path, GOOD + clear)}
    assert load(tmp_path, GOOD + clear + "instrument = 'all'\n") == []


def test_cases_that_never_come_are_refused(tmp_path: Path) -> None:
    case = "[[messages.add.event]]\nname = '{}'\nkind = 'system'\naux = 1\n"
    text = GOOD[: GOOD.index("[messages.add.event]")] + case.format("all") + case.format("one") + "when = { qty = 1 }\n"
    assert [(key, "never come" in reason) for _, key, reason in load(tmp_path, text)] == [("messages.add.event.0", True)]


def test_a_signed_field_is_compared_with_what_it_says(tmp_path: Path) -> None:
    for written in ("255", "-1", "'0xFF'"):
        text = GOOD.replace('kind = "add"', f'kind = "add"\nwhen = {{ action = {written} }}').replace(
            "[messages.add.event]", 'action = { offset = 25, type = "i8" }\n[messages.add.event]'
        )
        assert load(tmp_path, text) == []
        spec = load_spec(tmp_path / "small.toml")
        assert spec.messages[0].cases[0].when == {"action": (-1,)}
        assert "(np.int8(buf[np.uint64(m + 25)]) == -1)" in decoder_source(spec, load_framing("moldudp64"))


SPECS = ("iex_tops", "nasdaq_bbo", "jnx_itch", "memx_memoir_depth", "dbn_mbo")
VALUES: tuple[Any, ...] = (
    0, -1, 255, 65536, 1 << 40, True, 1.5, "", "A", "#65", "#²", "class", "u64", "i8", "alpha:3", "time", "nothing", "system", "reference",
    "clear", "all", "time_message", {}, [], ["A"], {"constant": []}, {"offset": 0, "type": "u8"},
)  # fmt: skip


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items()) + "}"
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list) else json.dumps(value)


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [at] * bool(at) + [place for key, one in inner for place in _places(one, (*at, key))]


def _damaged(document: dict[str, Any], random: Random) -> dict[str, Any]:
    """One to three of its values are left out, replaced, or stand under another key."""
    for _ in range(random.randint(1, 3)):
        *outer, key = random.choice(_places(document))
        table = functools.reduce(lambda found, one: found[one], outer, document)
        what = random.randint(0, 2)
        if what == 0:
            del table[key]
        elif what == 1 or isinstance(table, list):
            table[key] = copy.deepcopy(random.choice(VALUES))
        else:
            table[random.choice(["x y", "code", "symbol", "event", "name", "1"])] = table.pop(key)
        if not document:
            break
    return document


@pytest.mark.parametrize("prefix", ["", "framing_"])
def test_a_damaged_file_is_refused_or_makes_a_module(tmp_path: Path, prefix: str) -> None:
    """Whatever a file says: problems, or a decoder that Python can read; never another error."""
    random, refused = Random(7), 0
    specs = {"": SPECS, "framing_": tuple(shipped_names("framing_"))}[prefix]
    documents = [tomllib.loads((SHIPPED / f"{prefix}{name}.toml").read_text()) for name in specs]
    reader: Any = load_framing if prefix else load_spec
    for number in range(200):
        document = copy.deepcopy(documents[number % len(documents)])
        if not prefix:  # some messages are enough, and quicker
            document["messages"] = dict(random.sample(list(document["messages"].items()), 4))
        path = tmp_path / "damaged.toml"
        path.write_text("\n".join(f"{json.dumps(key)} = {_toml(value)}" for key, value in _damaged(document, random).items()))
        try:
            found = reader(path)
        except SpecError:
            refused += 1
            continue
        spec, framing = (load_spec("iex_tops"), found) if prefix else (found, load_framing("moldudp64"))
        ast.parse(decoder_source(spec, framing))
    assert 20 < refused < 200


def test_two_messages_of_one_type(tmp_path: Path) -> None:
    assert any("is also the type of add" in reason for _, _, reason in load(tmp_path, GOOD + "[messages.again]\ntype = 1\nlength = 48\n"))


def test_not_toml_and_not_there(tmp_path: Path) -> None:
    assert load(tmp_path, "[protocol\nname = 3")[0][0] == 1
    for reader in (load_spec, load_framing):
        with pytest.raises(SpecError, match=r"cannot be read .*one of"):
            reader("no_such_protocol")


def test_bad_framing(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    good = Path(load_framing("moldudp64").path).read_text()
    path.write_text(good.replace("header_bytes = 20", "header_bytes = 12").replace("offset = 2\n", 'offset = "x"\n'))
    with pytest.raises(SpecError) as error:
        load_framing(path)
    assert sorted(p.key for p in error.value.problems) == ["message.offset", "packet.count", "packet.sequence"]


def test_key_lines() -> None:
    lines = key_lines('a = 1\n[b.c]\nd = { e = 1, f = 2 }\n[[g]]\nh = 1\n[[g]]\nh = 2\n"x.y" = 3\n')
    assert lines[("a",)] == 1
    assert lines[("b", "c", "d", "f")] == 3
    assert (lines[("g", "0", "h")], lines[("g", "1", "h")], lines[("g", "1", "x.y")]) == (5, 7, 8)


def test_raw_values() -> None:
    assert [raw_value(v, 1) for v in ("A", 65, "#65", "0x41", "AB", 256, -1, True, "é")] == [65, 65, 65, 65, None, None, None, None, None]
    signed = (127, 128, 255, -1, "#-1", "0x80", -129, 256)
    assert [raw_value(v, 1, signed=True) for v in signed] == [127, -128, -1, -1, -1, -128, None, None]


HOWTO = Path(__file__).resolve().parent.parent / "docs" / "howto" / "add-a-protocol.md"


def test_howto_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worked example of docs/howto/add-a-protocol.md: its files are written and its program runs as printed."""
    text = HOWTO.read_text()
    for name, body in re.findall(r"<!-- file: (\S+) -->\n```toml\n(.*?)```", text, re.S):
        (tmp_path / name).write_text(body)
    program = re.search(r"<!-- run -->\n```python\n(.*?)```", text, re.S)
    output = re.search(r"<!-- output -->\n```\n(.*?)```", text, re.S)
    assert program
    assert output
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    exec(compile(program[1], "add-a-protocol.md", "exec"), {"print": lambda *a: lines.append(" ".join(map(str, a)))})
    assert "\n".join(lines) == output[1].strip()
