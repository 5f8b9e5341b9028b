"""Which folder may import which: docs/architecture.md states the rule, this holds it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "transports": {"transports"},
    "control": {"control"},
    "node": {"node", "transports", "control"},
    "ops": {"ops", "node", "transports", "control"},
    "chaos": {"chaos", "node", "transports", "control", "ops"},
}
FILES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def imported_folders(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import; the cache of compiled code follows absolute ones only"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found.update(name.split(".")[1] for name in names if name.startswith("tickmesh."))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_layering(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert imported_folders(path) <= MAY_IMPORT[folder]


def test_top_level_is_exactly_the_agreed_folders() -> None:
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert folders - {"build", "data", "tickmesh.egg-info"} == {*MAY_IMPORT, "tests", "docs"}
