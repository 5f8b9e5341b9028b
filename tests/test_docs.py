"""The documentation tells the truth: links lead somewhere, examples run, configurations are valid, generated pages are the code's.

A block of a page is run if the comment above it says so::

    <!-- test -->                       bash: run by the shell; python: run as a program
    <!-- test: may find something -->   bash: exit code 3 is fine too
    <!-- test: file NAME -->            written to a file; ``append NAME`` adds to it
    <!-- test: background until "X" --> bash: started, and left running once it has said X
    <!-- test: stop -->                 bash: what runs in the background gets Ctrl-C first, the newest first, and must end well

All blocks of a page share one empty folder and one empty home. TOML blocks are parsed unless ``<!-- fragment -->`` stands above them.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import events_page
import pytest

from tickmesh.control.config import Checks, parse_config
from tickmesh.node.book import Refusal
from tickmesh.node.fields import check_source
from tickmesh.node.telemetry import find_nodes
from tickmesh.ops import cli
from tickmesh.ops.bench import BENCHES
from tickmesh.transports.codecache import cache_dir
from tickmesh.transports.ring import SHM_FOLDER

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>(?:test|fragment)[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
_COMMAND_S = 1200
"""A page's command may have to compile a loop first."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, its language and the comment above it."""

    page: Path
    language: str
    text: str
    mark: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, match["language"], match["text"], match["mark"] or "") for match in found]


def name(page: Path) -> str:
    """How a page is called in test ids."""
    return str(page.relative_to(ROOT))


# ---------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as the usual renderers make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{name(page)} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(goal), f"{name(page)} links to {target}; headings there: {sorted(anchors(goal))}"


def test_index_lists_every_page() -> None:
    index = ROOT / "docs/index.md"
    listed = {(index.parent / target).resolve() for target in LINK.findall(index.read_text(encoding="utf-8"))}
    missing = [name(page) for page in PAGES if page not in listed and page != index and page.name != "README.md"]
    assert not missing, f"docs/index.md does not list {missing}"


def test_named_source_files_exist() -> None:
    """Paths of the repository that pages write in code font are there."""
    for page in PAGES:
        for path in re.findall(r"`((?:node|transports|control|ops|tests|docs)/[\w/.-]+\.\w+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{name(page)} names {path}"


# ---------------------------------------------------------------- generated and counted


def test_events_page_is_the_code() -> None:
    written = (ROOT / "docs/reference/events.md").read_text(encoding="utf-8")
    assert written == events_page.page(), "python tests/events_page.py > docs/reference/events.md"


def test_books_page_names_every_refusal() -> None:
    text = (ROOT / "docs/reference/books.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [refusal.name.lower() for refusal in Refusal]


def test_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [command for command, _ in cli.commands() if f"`{command}`" not in text]
    assert not missing, f"README.md does not name {missing}"


def test_architecture_names_every_module() -> None:
    """The table of what to read where has all files of the layers that it describes."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    files = [path for folder in ("node", "transports") for path in sorted((ROOT / folder).glob("*.py")) if path.name != "__init__.py"]
    missing = [str(path.relative_to(ROOT)) for path in files if f"{path.name}`" not in text]
    assert not missing, f"docs/architecture.md does not name {missing}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/reference/performance.md"], ids=name)
def test_every_number_of_the_benchmarks_has_its_command(page: Path) -> None:
    begin, end = "<!-- bench:begin -->", "<!-- bench:end -->"
    text = page.read_text(encoding="utf-8")
    assert text.count(begin) == text.count(end) == 1
    rows = [line for line in text.partition(begin)[2].partition(end)[0].splitlines() if line.startswith("|")]
    known = {bench.name for bench in BENCHES}
    for row in rows[2:]:
        commands = re.findall(r"`tickmesh bench (\w+)`", row)
        assert commands, f"no command in {row}"
        assert set(commands) <= known, row


def test_performance_page_explains_every_benchmark() -> None:
    text = (ROOT / "docs/reference/performance.md").read_text(encoding="utf-8")
    missing = [bench.name for bench in BENCHES if f"| `tickmesh bench {bench.name}` |" not in text]
    assert not missing, f"docs/reference/performance.md does not say what {missing} compare"


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "toml" for b in blocks(page))], ids=name)
def test_configurations_are_valid(page: Path) -> None:
    for block in blocks(page):
        if block.language != "toml" or block.mark.startswith(("fragment", "test: append")):
            continue
        tables = tomllib.loads(block.text)
        if not set(tables) & {"cluster", "data_sources", "processing", "risk", "journal", "delivery", "logging", "store"}:
            continue  # a protocol's or a framing's spec: its page has a test of its own
        parse_config(block.text, name(page), Checks(source=check_source))


# ---------------------------------------------------------------- examples


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Terminal:
    """A page's folder, home and background programs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder / "page", folder / "home"
        self.folder.mkdir()
        self.home.mkdir()
        self.cluster = f"lab{uuid.uuid4().hex[:8]}"
        self._ports = {written: _free_port() for written in ("4222", "9880")}
        self._programs: list[tuple[subprocess.Popen[str], Path]] = []
        bin_folder = Path(sys.executable).parent
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "TICKMESH_NATS_"))} | {
            "PATH": f"{bin_folder}:{os.environ.get('PATH', '/usr/bin:/bin')}",
            "HOME": str(self.home),
            "TICKMESH_CACHE_DIR": str(cache_dir()),
        }

    def _own(self, text: str) -> str:
        """The page's words, with ports and a cluster that nobody else uses."""
        for written, port in self._ports.items():
            text = text.replace(written, port)
        text = re.sub(r"(?<=[\"'. ])lab(?=[\"'. \n])", self.cluster, text)
        return text.replace("tickmesh subscribe ", f"tickmesh subscribe --server nats://127.0.0.1:{self._ports['4222']} ")

    def run(self, block: Block) -> None:
        """Do what the comment above a block says."""
        kind, _, rest = block.mark.removeprefix("test").lstrip(": ").partition(" ")
        text = self._own(block.text)
        if kind in ("file", "append"):
            with (self.folder / rest).open("w" if kind == "file" else "a", encoding="utf-8") as file:
                file.write(text)
        elif kind == "background":
            self._start(text, re.findall(r'"(.*)"', rest)[0])
        else:
            if kind == "stop":
                self.stop()
            self._execute(block.language, text, (0, 3) if kind == "may" else (0,))

    def _execute(self, language: str, text: str, good: tuple[int, ...]) -> None:
        program = ["bash", "-euo", "pipefail"] if language == "bash" else [sys.executable]
        done = subprocess.run(
            [*program, "-c", text], cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=_COMMAND_S, check=False
        )
        said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{self._log()}"
        assert done.returncode in good, f"exit code {done.returncode} of\n{text}\n{said}"

    def _start(self, text: str, until: str) -> None:
        said = self.folder.with_name(f"background-{len(self._programs)}.log")
        with said.open("w") as log:
            program = subprocess.Popen(
                ["bash", "-c", f"exec {text.strip()}"],
                cwd=self.folder, env=self._environment, stdout=log, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        self._programs.append((program, said))
        limit = time.monotonic() + _COMMAND_S
        while until not in said.read_text():
            assert program.poll() is None, f"ended with {program.returncode}:\n{self._log()}"
            assert time.monotonic() < limit, f"never said {until!r}:\n{self._log()}"
            time.sleep(0.1)

    def _log(self) -> str:
        return "\n".join(said.read_text()[-3000:] for _, said in self._programs)

    def stop(self) -> None:
        """Ctrl-C for what runs in the background."""
        while self._programs:
            program, said = self._programs.pop()
            program.send_signal(signal.SIGINT)
            assert program.wait(60) == 0, said.read_text()

    def close(self) -> None:
        """Leave nothing behind."""
        for program, _ in self._programs:
            program.kill()
            program.wait(10)
        for node in find_nodes():
            if node.cluster == self.cluster:
                node.path.unlink(missing_ok=True)
        for ring in SHM_FOLDER.glob(f"tickmesh-{self.cluster}-*"):
            ring.unlink(missing_ok=True)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.mark.startswith("test") for b in blocks(page))], ids=name)
def test_examples_run(page: Path, terminal: Terminal) -> None:
    for block in blocks(page):
        if block.mark.startswith("test"):
            terminal.run(block)


def test_python_examples_compile() -> None:
    """Every Python block of every page is at least Python."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                compile(block.text, name(page), "exec", flags=0x2000)  # top-level await, as a notebook allows it
