"""``tickmesh servers install``: leaves alone what is there, and says what is wrong when it cannot get what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tickmesh.ops.servers import ServerBinaryMissing, consul_binary, installed_folder, toxiproxy_binary
from tickmesh.ops.servers_install import InstallFailed, install


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with an empty cache and nothing on its search path."""
    for name in ("TICKMESH_CONSUL", "TICKMESH_TOXIPROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TICKMESH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)
    return path


def test_a_missing_program_says_how_to_get_it(bare: Path) -> None:
    for find, name in ((consul_binary, "consul"), (toxiproxy_binary, "toxiproxy-server")):
        with pytest.raises(ServerBinaryMissing, match="tickmesh servers install") as caught:
            find()
        assert caught.value.program == name


def test_named_first_then_the_search_path_then_the_cache(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = program(installed_folder() / "consul")
    assert consul_binary() == installed
    on_path = program(bare / "bin/consul")
    assert consul_binary() == on_path
    named = program(bare / "else/consul")
    monkeypatch.setenv("TICKMESH_CONSUL", str(named))
    assert consul_binary() == named
    monkeypatch.setenv("TICKMESH_CONSUL", str(bare / "absent"))
    with pytest.raises(ServerBinaryMissing):
        consul_binary()


def test_what_cannot_be_installed_leaves_nothing_behind(bare: Path) -> None:
    with pytest.raises(InstallFailed, match="this host has no go") as caught:
        install(["toxiproxy"])
    assert caught.value.program == "toxiproxy-server"
    go = program(bare / "bin/go")
    go.write_text("#!/bin/sh\necho no network today >&2\nexit 7\n")
    with pytest.raises(InstallFailed, match="ended with 7: no network today"):
        install(["toxiproxy"])
    assert list(installed_folder().iterdir()) == []


def test_command_leaves_alone_what_is_there(bare: Path) -> None:
    paths = [program(bare / "bin/consul"), program(installed_folder() / "toxiproxy-server")]
    command = [sys.executable, "-m", "tickmesh.ops.cli", "servers", "install"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True, env=dict(os.environ))
    assert [(one["path"], one["installed"]) for one in json.loads(done.stdout)] == [(str(path), False) for path in paths]
    wrong = subprocess.run([*command, "postgres"], capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ))
    assert wrong.returncode == 2
    assert "consul, toxiproxy" in wrong.stderr
