"""The wheel: everything that an installed tickmesh needs is in it, and works away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("node", "control", "transports", "ops", "chaos")
_USE = """
import json, sys
from pathlib import Path
import tickmesh.node.protocol as protocol
import tickmesh.ops.cli
from tickmesh.node.decoder import decoder_source
spec, framing = protocol.load_spec("itch50"), protocol.load_framing("moldudp64")
print(json.dumps([protocol.__file__, tickmesh.ops.cli.__file__, spec.name, "def decode_packets" in decoder_source(spec, framing)]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources: building leaves folders behind."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77 or later")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-w", ".."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_files_of_the_wheel(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        f"tickmesh/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for suffix in ("*.py", "*.toml", "*.cpp", "py.typed")
        for path in (ROOT / folder).rglob(suffix)
    }
    assert inside == wanted
    assert {f"tickmesh/{folder}/py.typed" for folder in FOLDERS} <= inside
    assert "tickmesh/node/protocols/itch50.toml" in inside


@pytest.mark.slow
def test_installed_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check", "--target", str(target), str(wheel)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}  # comes before site-packages, where the checkout is
    done = subprocess.run([sys.executable, "-P", "-c", _USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spec_module, cli_module, name, generated = json.loads(done.stdout)
    assert Path(spec_module).is_relative_to(target)
    assert Path(cli_module).is_relative_to(target)
    assert (name, generated) == ("itch50", True)
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "tickmesh.ops.cli", "--version"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith("tickmesh ")
