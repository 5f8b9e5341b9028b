"""The configuration together with the planner of calculations and the field mappings: one list of problems, with lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tickmesh.control.config import ConfigError, load_config
from tickmesh.node.config_checks import config_checks


def test_problems_of_all_parts_in_one_list(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("""[cluster]
shrads = 1
[data_sources.a]
type = "file"
path = "x"
data_format = "json"
event = "trade"
fields = { symbol = "s", price = "a..b", qty = "q" }
[processing.calculations.fast]
use = "ema"
widnow = 3
[processing.calculations.slow]
use = "emma"
[processing.alerts.jump]
of = "fats"
above = 3.0
""")
    with pytest.raises(ConfigError) as caught:
        load_config(file, config_checks(tmp_path))
    found = {problem.path: problem for problem in caught.value.errors}
    lines = {path: problem.line for path, problem in found.items()}
    assert lines == {
        "cluster.shrads": 2,
        "data_sources.a.fields.price": 8,
        "processing.calculations.fast.widnow": 11,
        "processing.calculations.slow.use": 13,
        "processing.alerts.jump.of": 15,
    }
    assert "window" in found["processing.calculations.fast.widnow"].hint


def test_what_fits_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("""[processing.calculations.fast]
use = "ema"
window = 3
[processing.alerts.jump]
of = "fast"
above = 3.0
[processing.bars.minute]
interval_ms = 60000
""")
    config = load_config(file, config_checks(tmp_path))
    assert config.processing.alerts["jump"].use == "threshold"
    assert config.processing.bars["minute"].parameters == {"interval_ms": 60000}


@pytest.mark.parametrize(
    ("data_format", "scale", "reason"),
    [
        ("itch50", "0.5", "no power of ten"),
        ("itch50", "0.01", "level_1 10 decimals"),
        ("itch50", "1e-9", "13 decimals"),
        ("memx_memoir_depth", "1e7", "-1 decimals"),
        ("coinbase", "10", "has no meaning for coinbase"),
        ("fix44", "10", "has no meaning for FIX"),
        ("itch50", "0.1", None),
        ("itch50", "1", None),
        ("json", "0.5", None),
        ("no_such_protocol", "10", None),
    ],
)
def test_a_price_scale_works_or_is_refused_with_its_line(tmp_path: Path, data_format: str, scale: str, reason: str | None) -> None:
    file = tmp_path / "mesh.toml"
    mapped = '\nevent = "trade"\nfields = { symbol = "s", price = "p", qty = "q" }' if data_format == "json" else ""
    file.write_text(f'[data_sources.a]\ntype = "file"\npath = "x"\ndata_format = "{data_format}"\nprice_scale = "{scale}"{mapped}\n')
    if reason is None:
        load_config(file, config_checks(tmp_path))
        return
    with pytest.raises(ConfigError) as caught:
        load_config(file, config_checks(tmp_path))
    (problem,) = caught.value.errors
    assert (problem.path, problem.line) == ("data_sources.a.price_scale", 5)
    assert reason in problem.reason
