"""`tickmesh config apply`, `get`, `set`, `diff`, `history`, `rollback`, `status` and `watch` on real stores, with nodes that follow."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from following import CODE, TEXT, Node
from store_servers import KvServer, StoreServer, server
from typer.testing import CliRunner

from tickmesh.control.config_store import ConfigChanged
from tickmesh.control.follower import FollowerThread
from tickmesh.node.store_link import open_store
from tickmesh.ops import cli
from tickmesh.ops.config_store_cmd import Report, Wish, place_of, set_key, settings_of, value_of

__all__ = ["server"]
LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def nodes_do_not_print() -> Iterator[None]:
    """They run in the test's own process, where the commands print."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.__stderr__))
    yield
    structlog.reset_defaults()


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> str:
    return "".join(c for c in request.node.name if c.isalnum())[-32:]


@pytest.fixture
def url(server: StoreServer) -> str:
    return str(server.process.url) if isinstance(server, KvServer) else f"consul://127.0.0.1:{server.process.port}"


@pytest.fixture
def start(url: str, cluster: str, tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts a node that follows, in a thread of its own, until the test ends."""
    threads: list[FollowerThread] = []

    def started(name: str) -> Node:
        node = Node(cluster, name, tmp_path / "nodes")
        threads.append(FollowerThread(node.follower, lambda: open_store(settings_of(url))).start())
        until(lambda: name in [row["node"] for row in tell("status", url, cluster) if row["registered"] and "state" in row])
        return node

    yield started
    for thread in threads:
        assert thread.stop()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def run(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["config", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def tell(command: str, url: str, cluster: str, *arguments: str | Path, code: int = 0) -> Any:
    """What a command prints for programs."""
    ended, out, err = run(command, *arguments, "--store", url, "--cluster", cluster, "--json")
    assert ended == code, out + err
    return json.loads(out)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "mesh.toml"
    made.write_text(TEXT)
    return made


def process(*arguments: str | Path, cluster: str, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tickmesh.ops.cli", "config", *map(str, arguments)]
    environment = {**os.environ, "TICKMESH_STORE": url, "TICKMESH_CLUSTER": cluster}
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment)


def test_apply_set_and_rollback_from_a_shell(start: Callable[..., Node], url: str, cluster: str, file: Path) -> None:
    nodes = [start("a"), start("b")]
    done = process("apply", file, "-m", "the first", cluster=cluster, url=url)
    assert done.returncode == 0, done.stderr
    assert "a  applied" in done.stdout
    assert "risk.max_qty" in done.stdout
    first = nodes[0].status["version"]
    done = process("set", "risk.max_qty", "6", cluster=cluster, url=url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "risk.max_qty  5 -> 6  live" in done.stdout
    assert nodes[1].applied[-1][1].risk.max_qty == 6
    done = process("get", cluster=cluster, url=url)
    assert "max_qty = 6   # for now" in done.stdout
    assert "[processing.calculations.fast]" in done.stdout
    done = process("rollback", str(first), cluster=cluster, url=url)
    assert done.returncode == 0
    assert nodes[0].applied[-1][1].risk.max_qty == 5
    done = process("history", cluster=cluster, url=url)
    assert [line.split()[-1] for line in done.stdout.splitlines()][::-1] == ["first", "risk.max_qty", str(first)]
    assert done.stdout.startswith("*")


def test_a_refusal_has_its_exit_code_and_the_way_back(start: Callable[..., Node], url: str, cluster: str, file: Path) -> None:
    node = start("a")
    first = tell("apply", url, cluster, file)["version"]
    node.refuses = lambda config: ["cluster.shards needs a restart"] if config.cluster.shards == 3 else []
    code, out, err = run("set", "cluster.shards", "3", "--store", url, "--cluster", cluster)
    assert code == 4
    assert "refused" in out
    assert "cluster.shards needs a restart" in out
    assert f"tickmesh config rollback {first}" in err
    (row,) = tell("status", url, cluster)
    assert row["refused"]["reasons"] == ["cluster.shards needs a restart"]
    assert "refuses version" in run("status", "--store", url, "--cluster", cluster)[1]
    node.refuses = lambda config: []
    again = tell("set", url, cluster, "cluster.shards", "3")
    assert (again["changes"], again["answers"][0]["state"], node.status["refused"]) == ([], "applied", None)
    assert tell("rollback", url, cluster, str(first))["answers"][0]["state"] == "applied"


def test_one_that_does_not_answer_has_its_exit_code(url: str, cluster: str, file: Path) -> None:
    said = tell("apply", url, cluster, file, "--node", "absent", "--timeout-s", "0.3", code=5)
    assert (said["did"], said["answers"][0]["state"]) == ("applied", "unanswered")
    alone = tell("set", url, cluster, "risk.max_qty", "7")
    assert alone["answers"] == []


def test_canary_and_dry_run(start: Callable[..., Node], url: str, cluster: str, file: Path) -> None:
    bird, other = start("bird"), start("other")
    first = tell("apply", url, cluster, file)["version"]
    bird.refuses = lambda config: ["too large"] if config.risk.max_qty == 9 else []
    said = tell("set", url, cluster, "risk.max_qty", "9", "--dry-run", "--node", "bird", code=4)
    assert (said["did"], said["version"], said["answers"][0]["reasons"]) == ("tried", first, ["too large"])
    said = tell("set", url, cluster, "risk.max_qty", "9", "--canary", "bird", code=4)
    assert (said["did"], said["version"]) == ("withdrawn", first)
    assert other.status["version"] == first
    said = tell("set", url, cluster, "risk.max_qty", "8", "--canary", "bird", "--hold-s", "0.2")
    assert [answer["node"] for answer in said["answers"]] == ["bird", "other"]
    assert (bird.applied[-1][1].risk.max_qty, other.applied[-1][1].risk.max_qty) == (8, 8)
    assert run("set", "risk.max_qty", "1", "--canary", "a", "--dry-run")[0] == 2


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_withdraws_a_canary(again: bool, start: Callable[..., Node], url: str, cluster: str, file: Path) -> None:
    bird, over = start("bird"), threading.Event()
    first = tell("apply", url, cluster, file)["version"]
    command = [sys.executable, "-m", "tickmesh.ops.cli", "config", "set", "risk.max_qty", "8", "--canary", "bird", "--hold-s", "600"]
    with file.with_name("err").open("w") as err, subprocess.Popen([*command, "--store", url, "--cluster", cluster], stderr=err) as running:
        try:
            until(lambda: bird.status["source"] == "canary")
            bird.refuses = lambda config: () if not again or over.wait(LIMIT_S) else ["it never ended"]  # time for an impatient person
            running.send_signal(signal.SIGINT)
            until(lambda: not again or interrupted_again(running, file.with_name("err")))
            assert running.wait(60) == 130
        finally:
            over.set()
            running.kill()
    until(lambda: (bird.status["source"], bird.status["version"], bird.status["canary"]) == ("config", first, None))
    assert tell("get", url, cluster)["version"] == first


def interrupted_again(running: subprocess.Popen[bytes], err: Path) -> bool:
    """An impatient person, until they are told that it is under way."""
    if "is being taken back" in err.read_text():
        return True
    running.send_signal(signal.SIGINT)
    return False


def test_code_is_uploaded_with_what_names_it(start: Callable[..., Node], url: str, cluster: str, file: Path) -> None:
    node = start("a")
    file.with_name("mine.py").write_text(CODE)
    file.write_text(TEXT + '[processing.calculations.mine]\nuse = "mine.py:flow"\n')
    said = tell("apply", url, cluster, file)
    assert "code/mine.py" in [one["path"] for one in said["changes"]]
    assert (node.applied[-1][1].code_folder / "mine.py").read_text() == CODE
    file.with_name("mine.py").write_text(CODE + "# better\n")
    said = tell("apply", url, cluster, file)
    assert [one["path"] for one in said["changes"]] == ["code/mine.py"]
    assert tell("apply", url, cluster, file)["did"] == "unchanged"


def test_what_is_a_nodes_own_stays_out(url: str, cluster: str, file: Path) -> None:
    store = settings_of(url)
    own = f'[store]\nkind = "{store.kind}"\naddress = "{store.address}"\n'
    file.write_text(TEXT.replace("[cluster]\n", f'[cluster]\nname = "{cluster}"\nnode = "fra1"\ncpus = [2]   # ours\n') + own)
    code, out, err = run("apply", file)
    assert code == 0, err
    assert "cluster.node, cluster.cpus, store" in err
    assert "no node follows" in out
    document = tell("get", url, cluster)
    assert "fra1" not in document["sections"]["cluster"]
    assert "cpus" not in document["sections"]["cluster"]
    code, out, _ = run("get", "risk.max_qty", "-c", file)
    assert (code, out) == (0, "5\n")


def test_commands_at_the_same_time_lose_nothing(url: str, cluster: str, file: Path) -> None:
    tell("apply", url, cluster, file)
    place = place_of(url, cluster, None)
    keys = ["risk.max_qty", "risk.max_rate", "logging.level", "journal.segment_mb", "processing.calculations.fast.window"]
    values = ["77", "7", "debug", "7", "7"]

    async def all_at_once() -> list[Report | BaseException]:
        sets = (set_key(key, value, place, Wish(), print) for key, value in zip(keys, values, strict=True))
        return await asyncio.gather(*sets, return_exceptions=True)

    done = asyncio.run(all_at_once())
    made = [key for key, result in zip(keys, done, strict=True) if isinstance(result, Report)]
    assert made
    assert all(isinstance(result, Report | ConfigChanged) for result in done)
    assert len(tell("history", url, cluster)) == 1 + len(made)
    for key, value in zip(keys, values, strict=True):
        (now,) = tell("get", url, cluster, key)["values"].values()
        assert (str(now) == value) == (key in made)


def test_get_and_diff(url: str, cluster: str, file: Path) -> None:
    first = tell("apply", url, cluster, file)["version"]
    tell("set", url, cluster, "processing.calculations.fast.window", "20")
    assert tell("get", url, cluster, "processing.calculations.fast")["values"]["processing.calculations.fast.window"] == 20
    assert tell("get", url, cluster, "journal.segment_mb")["values"] == {"journal.segment_mb": 64}
    window = {"path": "processing.calculations.fast.window", "change": "live"}
    assert tell("diff", url, cluster, str(first)) == [window | {"before": 10, "after": 20}]
    assert tell("diff", url, cluster, file) == [window | {"before": 20, "after": 10}]
    assert tell("diff", url, cluster, str(first), file) == []
    tell("set", url, cluster, "processing.calculations.fast", "--remove")
    assert "absent" in run("diff", file, "--store", url, "--cluster", cluster)[1]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["set", "risk.max_qty", "0"], 2, "config/risk:1: risk.max_qty = 0: must be greater than 0"),
        (["set", "risk.max_qyt", "1"], 2, "did you mean 'max_qty'?"),
        (["set", "max_qty", "1"], 2, "a key begins with one of"),
        (["set", "risk..x", "1"], 2, "is no key"),
        (["set", "risk.max_qty.x", "1"], 2, "cannot be set"),
        (["set", "cluster.node", "x"], 2, "put it into the file of that node"),
        (["set", "risk.max_rate", "--remove"], 2, "it has its default already"),
        (["set", "risk.max_qty"], 2, "give VALUE, or --remove"),
        (["set", "processing.calculations.fast.use", "none.py:x"], 2, "there is no file"),
        (["get", "risk.nothing"], 2, "there is no key risk.nothing"),
        (["rollback", "999999999"], 2, "there is no version 999999999"),
        (["diff", "999999999"], 2, "see `tickmesh config history`"),
        (["apply", "absent.toml"], 2, "cannot be read"),
        (["get", "--cluster", "nobody"], 2, "tickmesh config apply FILE"),
        (["get", "--cluster", "no body"], 2, "is no name of a cluster"),
        (["get", "--store", "redis://x"], 2, "is no store"),
        (["get", "--store", "consul://u:secret@h"], 2, "holds no secret"),
        (["get", "--store", "consul://127.0.0.1:1"], 1, "127.0.0.1:1"),
        (["get", "--store", "nats://127.0.0.1:1"], 1, "127.0.0.1:1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_say_what_to_do(url: str, file: Path, arguments: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKMESH_STORE", url)
    monkeypatch.setenv("TICKMESH_CLUSTER", "errors")
    assert run("apply", file)[0] == 0
    ended, out, err = run(*arguments)
    assert (ended, out) == (code, ""), err
    assert said in " ".join(err.replace("│", " ").split())


def test_without_a_store_it_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.delenv("TICKMESH_STORE", raising=False)
    monkeypatch.delenv("TICKMESH_CLUSTER", raising=False)
    assert "give --cluster NAME" in run("get")[2]
    assert "give --store URL" in run("get", "--cluster", "x")[2]
    assert "give --store URL" in run("apply", file)[2]


def test_watch_tells_what_happens(start: Callable[..., Node], url: str, cluster: str, file: Path) -> None:
    start("a")
    tell("apply", url, cluster, file)
    command = [sys.executable, "-m", "tickmesh.ops.cli", "config", "watch", "--store", url, "--cluster", cluster, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        try:
            assert watching.stdout is not None
            first = [json.loads(watching.stdout.readline()) for _ in range(2)]
            assert sorted(one["event"] for one in first) == ["node", "version"]
            version = tell("set", url, cluster, "risk.max_qty", "66")["version"]
            seen = [json.loads(watching.stdout.readline()) for _ in range(2)]
            (change,) = [one for one in seen if one["event"] == "version"]
            assert change["version"] == version
            assert change["changes"] == [{"path": "risk.max_qty", "before": "5", "after": "66", "change": "live"}]
            assert [one["version"] for one in seen if one["event"] == "node"] == [version]
            watching.send_signal(signal.SIGINT)
            assert watching.wait(20) == 130
        finally:
            watching.kill()


def test_the_reference_page_can_be_printed() -> None:
    code, out, _ = run("schema", "--markdown")
    assert (code, out) == (0, (Path(__file__).parents[1] / "docs/reference/configuration.md").read_text())
    assert run("schema", "--markdown", "--json")[0] == 2


def test_values_are_toml_or_texts() -> None:
    assert [value_of(text) for text in ("5", "true", "1.5", '"x"', '["A", "B"]', "debug", "a b", "1\nx = 2", "")] == [
        5, True, 1.5, "x", ["A", "B"], "debug", "a b", "1\nx = 2", "",
    ]  # fmt: skip
