"""``tickmesh servers install``: programs of servers that come with no Python package, put into the user's cache folder.

Consul is the package of Debian bullseye (1.8.7, MPL-2.0), checked by apt against Debian's own keys; with a private apt state, so that the
system's sources, lists and packages stay as they are. Toxiproxy is built by Go from its module.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tickmesh.ops.servers import ServerBinaryMissing, ServerError, consul_binary, installed_folder, toxiproxy_binary

_TOXIPROXY = "github.com/Shopify/toxiproxy/v2/cmd/server@v2.12.0"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SOURCES = Path("/etc/apt")
_MIRROR = "http://deb.debian.org/debian"
_STEP_S = 900


class InstallFailed(ServerError):
    """A program could not be installed; nothing was changed.

    Attributes:
        program: its name.
        reason: what went wrong.
    """

    def __init__(self, program: str, reason: str, variable: str) -> None:
        super().__init__(f"cannot install {program}: {reason}; or put it on the search path, or name it in {variable}")
        self.program, self.reason = program, reason


@dataclass(frozen=True)
class Program:
    """A server's program that can be installed.

    Attributes:
        name: of the file.
        variable: the environment variable that names another one.
        find: where it is now; raises ServerBinaryMissing.
        fetch: makes it in an empty folder, and returns the file; raises InstallFailed.
    """

    name: str
    variable: str
    find: Callable[[], Path]
    fetch: Callable[[Path], Path]


@dataclass(frozen=True)
class Installed:
    """What became of a program: its path, and whether it was there before."""

    name: str
    path: Path
    before: bool


def install(names: list[str], progress: Callable[[str], None] | None = None) -> list[Installed]:
    """Install programs that this host does not have yet.

    Args:
        names: of :data:`PROGRAMS`; none: all.
        progress: told what happens.

    Raises:
        InstallFailed: one could not be installed; those before it are.
        KeyError: an unknown name.
    """
    return [_installed(PROGRAMS[name], progress) for name in names or PROGRAMS]


def _installed(program: Program, progress: Callable[[str], None] | None) -> Installed:
    try:
        return Installed(program.name, program.find(), before=True)
    except ServerBinaryMissing:
        pass
    if progress:
        progress(f"installing {program.name}")
    folder = installed_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".install-", dir=folder) as work:
        made = program.fetch(Path(work))
        made.chmod(0o755)
        made.replace(folder / program.name)  # whole or not at all, also while another process looks for it
    return Installed(program.name, program.find(), before=False)


def _run(program: str, variable: str, command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    try:
        subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=_STEP_S,
        )
    except FileNotFoundError as error:
        raise InstallFailed(program, f"this host has no {command[0]}", variable) from error
    except subprocess.TimeoutExpired as error:
        raise InstallFailed(program, f"{command[0]} took more than {_STEP_S} s", variable) from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout).strip().splitlines()[-1:] or ["no word"]
        raise InstallFailed(program, f"{command[0]} ended with {error.returncode}: {last[0]}", variable) from error


# ---------------------------------------------------------------- consul


def _fetch_consul(work: Path) -> Path:
    name, variable = "consul", "TICKMESH_CONSUL"
    if not _KEYRING.exists():
        raise InstallFailed(name, f"there is no {_KEYRING}, which Debian's package debian-archive-keyring brings", variable)
    for folder in ("lists/partial", "cache/archives/partial", "unpacked"):
        (work / folder).mkdir(parents=True)
    sources = work / "bullseye.list"
    sources.write_text(f"deb [signed-by={_KEYRING}] {_debian_mirror()} bullseye main\n")
    settings = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work / "cache",
        "Acquire::Languages": "none",
        "Acquire::Check-Valid-Until": "false",  # bullseye gets no new index any more; its signature is still checked
        "APT::Update::Post-Invoke-Success": "",
        "APT::Sandbox::User": "",
    }
    options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    _run(name, variable, ["apt-get", *options, "-qq", "update"], work)
    _run(name, variable, ["apt-get", *options, "-qq", "download", "consul"], work)
    packages = list(work.glob("consul_*.deb"))
    if len(packages) != 1:
        raise InstallFailed(name, "apt-get brought no package", variable)
    _run(name, variable, ["dpkg-deb", "-x", str(packages[0]), str(work / "unpacked")], work)
    return work / "unpacked/usr/bin/consul"


def _debian_mirror() -> str:
    """The mirror that this host uses, else Debian's own."""
    files = [_SOURCES / "sources.list", *sorted((_SOURCES / "sources.list.d").glob("*"))]
    for path in files:
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        found = re.search(r"^(?:URIs: *|deb (?:\[[^\]]*\] )?)(\w+://\S+/debian)/?(?:\s|$)", text, re.MULTILINE)
        if found:
            return found[1]
    return _MIRROR


# ---------------------------------------------------------------- toxiproxy


def _fetch_toxiproxy(work: Path) -> Path:
    # an own GOPATH, thrown away afterwards; -modcacherw because Go's module cache is read-only otherwise
    environment = {"GOBIN": str(work / "bin"), "GOPATH": str(work / "go"), "GOCACHE": str(work / "cache"), "GOFLAGS": "-modcacherw"}
    _run("toxiproxy-server", "TICKMESH_TOXIPROXY", ["go", "install", _TOXIPROXY], work, environment)
    return work / "bin/server"


PROGRAMS = {
    "consul": Program("consul", "TICKMESH_CONSUL", consul_binary, _fetch_consul),
    "toxiproxy": Program("toxiproxy-server", "TICKMESH_TOXIPROXY", toxiproxy_binary, _fetch_toxiproxy),
}
"""By the name that the command takes."""
