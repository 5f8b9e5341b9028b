"""Editing TOML texts: sections split and joined, values set and removed; what stays must stay, comments included."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.control.toml_text import (
    BadKeyPath,
    NotEditable,
    join_sections,
    key_text,
    parse_key,
    remove_value,
    set_value,
    split_sections,
    toml_of,
    value_at,
)

TEXT = '''# the head of the file
[cluster]
name = "x"   # ours

# where it comes from
[data_sources.n]
type = "multicast"
note = """
[not a header]
"""
fields = { a = 1, b.c = 2 }

[risk] # limits
max_qty = 5

# the fast one
[processing.calculations.fast]
use = "ema"
[processing]
outputs = ["a", # why
  "b"]
[[data_sources.n.messages]]
event = "x"
[[data_sources.n.messages]]
event = "y"
'''

names = st.one_of(st.from_regex(r"[a-z][a-z_-]{0,4}", fullmatch=True), st.text(max_size=3))
plain = st.one_of(st.integers(-9, 1 << 40), st.booleans(), st.floats(allow_nan=False), st.text(max_size=8), st.dates())
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6)
documents = st.dictionaries(names, values, max_size=4)


def test_sections_keep_their_text() -> None:
    sections = split_sections(TEXT)
    assert list(sections) == ["cluster", "data_sources", "risk", "processing"]
    assert sections["risk"] == "# limits\nmax_qty = 5\n"
    assert sections["cluster"] == '# the head of the file\nname = "x"   # ours\n'
    assert sections["data_sources"].startswith('# where it comes from\n[n]\ntype = "multicast"\n')
    assert sections["data_sources"].endswith('[[n.messages]]\nevent = "x"\n[[n.messages]]\nevent = "y"\n')
    assert sections["processing"] == 'outputs = ["a", # why\n  "b"]\n\n# the fast one\n[calculations.fast]\nuse = "ema"\n'


def test_joined_sections_are_the_document_again() -> None:
    joined = join_sections(split_sections(TEXT))
    assert tomllib.loads(joined) == tomllib.loads(TEXT)
    assert split_sections(joined) == split_sections(TEXT)
    for comment in ("# the head", "# ours", "# limits", "# why", "# the fast one", "# where it"):
        assert comment in joined


@pytest.mark.parametrize(
    "text",
    [
        "risk.max_qty = 5\n# c\ncluster.name = 'x'\n[logging]\n",
        "risk = { max_qty = 5 }\nlogging = {}",
        "[delivery]\nx.method = 'shm'\n[delivery.y]\nmethod = 'shm'",
        "[ delivery . 'a b' ]\r\nmethod = 'shm'\r\n",
        "[a]\n[a.b]\nc = 1\n[d]\n[a.b.e]\n",
        "",
        "# nothing",
    ],
)
def test_unusual_documents_survive(text: str) -> None:
    document = tomllib.loads(text)
    sections = split_sections(text)
    assert {name: tomllib.loads(inside) for name, inside in sections.items()} == document
    assert tomllib.loads(join_sections(sections)) == document


@settings(max_examples=60, deadline=None)
@given(document=st.dictionaries(names, documents, max_size=4))
def test_what_is_written_reads_the_same(document: dict[str, Any]) -> None:
    assert tomllib.loads(toml_of(document)) == document
    sections = split_sections(toml_of(document))
    assert {name: tomllib.loads(text) for name, text in sections.items()} == document
    assert tomllib.loads(join_sections(sections)) == document


def test_a_value_is_replaced_where_it_stands() -> None:
    assert set_value("# a\nx = 1 # one\ny = 2\n", ("x",), "two") == '# a\nx = "two" # one\ny = 2\n'
    assert set_value("x = [1, # one\n 2]", ("x", 1), 3) == "x = [1, # one\n 3]"
    assert set_value("f = {a = 1, b.c = 2} # f", ("f", "b", "c"), 3) == "f = {a = 1, b.c = 3} # f"
    assert set_value("[[m]]\ne = 1\n[[m]]\ne = 2\n", ("m", 1, "e"), 3) == "[[m]]\ne = 1\n[[m]]\ne = 3\n"


def test_a_new_key_goes_to_its_table() -> None:
    text = "a = 1\n\n# of b\n[b]\nc = 1\n# end\n[d]\n"
    assert set_value(text, ("x",), 2) == "a = 1\nx = 2\n\n# of b\n[b]\nc = 1\n# end\n[d]\n"
    assert set_value(text, ("b", "x"), 2) == "a = 1\n\n# of b\n[b]\nc = 1\nx = 2\n# end\n[d]\n"
    assert set_value(text, ("d", "x"), 2) == text + "x = 2\n"
    assert set_value(text, ("e", "f", "x"), 2) == text + "\n[e.f]\nx = 2\n"
    assert set_value("", ("x",), 2) == "x = 2\n"
    assert tomllib.loads(set_value("f = {a = 1}", ("f", "b"), 2)) == {"f": {"a": 1, "b": 2}}
    assert tomllib.loads(set_value("f = {}", ("f", "b", "c"), 2)) == {"f": {"b": {"c": 2}}}


def test_a_value_cannot_go_below_another() -> None:
    with pytest.raises(NotEditable):
        set_value("a = 1", ("a", "b"), 2)
    with pytest.raises(NotEditable):
        set_value("a = [1]", ("a", 4), 2)


def others(document: dict[str, Any], name: str) -> dict[str, Any]:
    """All but one table, without empty ones."""

    def full(table: dict[str, Any]) -> dict[str, Any]:
        inner = {n: full(v) if isinstance(v, dict) else v for n, v in table.items()}
        return {n: v for n, v in inner.items() if v != {}}

    return full({n: v for n, v in document.items() if n != name})


@settings(max_examples=60, deadline=None)
@given(document=documents, path=st.lists(names, min_size=1, max_size=3), value=values)
def test_setting_and_removing_change_nothing_else(document: dict[str, Any], path: list[str], value: Any) -> None:
    key = tuple(path)
    try:
        text = set_value(toml_of(document), key, value)
    except NotEditable:
        return
    read = tomllib.loads(text)
    assert value_at(read, key) == value
    removed = tomllib.loads(remove_value(text, key))
    with pytest.raises(KeyError):
        value_at(removed, key)
    assert others(removed, path[0]) == others(read, path[0])


def test_a_table_is_removed_with_its_comments() -> None:
    text = "# keep\nx = 1\n\n# fast\n[c.fast]\nuse = 1\n[c.fast.deep]\n\n# slow\n[c.slow]\nuse = 2\n"
    assert remove_value(text, ("c", "fast")) == "# keep\nx = 1\n\n# slow\n[c.slow]\nuse = 2\n"
    assert remove_value("[a.b]\nc = 1\n", ("a", "b")) == ""
    with pytest.raises(KeyError):
        remove_value(text, ("c", "none"))


def test_keys_are_read_as_they_are_written() -> None:
    assert parse_key('a."b.c".d[3][1].e') == ("a", "b.c", "d", 3, 1, "e")
    assert parse_key(key_text(("a", "b c", 2, "d"))) == ("a", "b c", 2, "d")
    for bad in ("", "a.", ".a", "a b", "a[x]"):
        with pytest.raises(BadKeyPath):
            parse_key(bad)
