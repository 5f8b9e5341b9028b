"""A running node refuses whatever is wrong in its store, of every kind, and runs on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from programs import require

from tickmesh.chaos.bad_configurations import bad_edits, run


def test_the_same_seed_makes_the_same_edits_of_every_kind() -> None:
    edits = list(bad_edits(40, 7))
    assert edits == list(bad_edits(40, 7))
    assert len({edit.kind for edit in edits}) == 10


@pytest.mark.slow
@pytest.mark.parametrize("store", ["nats", "consul"])
def test_every_bad_configuration_is_refused_and_the_node_runs_on(store: str, tmp_path: Path) -> None:
    if store == "consul":
        require("consul")
    result = asyncio.run(run(store, 30, 3, tmp_path))
    assert result["tried"] == 30
    assert result["wrong"] == []
    assert result["good"], result
