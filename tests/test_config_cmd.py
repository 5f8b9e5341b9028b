"""What `tickmesh config show` and `config schema` say, and that the reference page says the same."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from tickmesh.control.config import default_config, load_config, parse_config
from tickmesh.ops.config_cmd import (
    SECTIONS,
    changes,
    effective,
    json_schema,
    schema_markdown,
    schema_rows,
    schema_table,
    show_json,
    show_table,
)

ROOT = Path(__file__).parents[1]
WRITTEN = [sys.executable, "-m", "tickmesh.ops.config_cmd"]
TEXT = """[cluster]
shards = 2
[data_sources.sim]
type = "simulator"
symbols = ["A"]
[processing.calculations.fast]
use = "ema"
window = 10
[delivery.ring]
method = "shm"
[risk]
max_notional = 1.50
"""


def printed(table: object) -> str:
    console = Console(file=io.StringIO(), width=250)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_reference_page_is_up_to_date() -> None:
    written = (ROOT / "docs/reference/configuration.md").read_text()
    assert written == schema_markdown(), "run: python -m tickmesh.ops.config_cmd"


def test_every_key_of_every_table_is_shown() -> None:
    """Held against pydantic's own schema, whatever tables are in it and however deep."""
    tables = json_schema()["$defs"]
    places = {model.__name__: section for section, model in SECTIONS}
    assert set(places) == set(tables)
    shown = {(row.section, row.key) for row in schema_rows()}
    for name, table in tables.items():
        for key, about in table["properties"].items():
            inner = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(about)))
            assert (places[name], key) in shown or inner, f"{places[name]} does not say what {key} is"
    assert ("[data_sources.NAME.fix]", "heartbeat_s") in shown
    assert ("[leadership]", "lease_ttl_s") in shown


def test_every_key_says_what_it_is() -> None:
    rows = schema_rows()
    assert len(rows) > 80
    for row in rows:
        assert row.meaning.endswith("."), row
        assert row.change in ("live", "restart")
        assert row.type
        if row.key.endswith(("_ms", "_mb", "_s", "_kb", "_bps")):
            assert row.unit, row


def test_schema_table_shows_every_key() -> None:
    text = printed(schema_table())
    assert all(row.key in text for row in schema_rows())
    assert "[data_sources.NAME]" in text


def test_json_schema_is_one() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["additionalProperties"] is False
    sections = {"cluster", "data_sources", "processing", "risk", "journal", "leadership", "replication", "delivery", "logging", "store"}
    assert set(schema["properties"]) == sections


def test_show_tells_the_origin_of_every_value(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(TEXT)
    config = load_config(file)
    rows = {row.path: row for row in effective(config)}
    assert (rows["cluster.shards"].value, rows["cluster.shards"].origin) == (2, "mesh.toml:2")
    assert rows["cluster.idle"].origin == "default"
    assert rows["processing.calculations.fast.window"].origin == "mesh.toml:8"
    assert rows["data_sources.sim.seed"].value == 1
    assert "data_sources.sim.endpoint" not in rows  # a simulator has none
    assert "delivery.ring.target" not in rows
    text = printed(show_table(config))
    assert "mesh.toml:12" in text
    assert '["A"]' in text
    shown = {row["path"]: row["value"] for row in json.loads(json.dumps(show_json(config)))}
    assert shown["risk.max_notional"] == "1.5"


def test_changes_say_whether_a_restart_is_needed() -> None:
    old = parse_config(TEXT)
    text = TEXT.replace("window = 10", "window = 20").replace("shards = 2", "shards = 3")
    new = parse_config(text.replace("1.50", "2").replace("ring]", "r]"))
    found = {change.path: (change.old, change.new, change.change) for change in changes(old, new)}
    assert found["cluster.shards"] == (2, 3, "restart")
    assert found["processing.calculations.fast.window"] == (10, 20, "live")
    assert found["risk.max_notional"][2] == "live"
    assert found["delivery.ring.method"][1:] == (None, "restart")
    assert found["delivery.r.method"][0] is None
    assert changes(old, old) == []
    assert changes(default_config(), parse_config("")) == []


def test_the_page_is_written_where_it_is_asked_for_and_help_writes_nothing(tmp_path: Path) -> None:
    done = subprocess.run([*WRITTEN, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert "reference page" in done.stdout
    assert list(tmp_path.iterdir()) == []
    subprocess.run([*WRITTEN, "page.md"], cwd=tmp_path, timeout=60, check=True)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == schema_markdown()
