"""`tickmesh simulate`: outputs of one seed agree, the summary is true, errors say what to do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import typer
from itch_reader import read_image
from typer.testing import CliRunner

from tickmesh.ops.simulate_cmd import Outputs, run_simulation, simulate
from tickmesh.ops.simulator import SimulatorConfig, SimulatorConfigError
from tickmesh.transports.capture import read_capture

app = typer.Typer()
app.command()(simulate)
SHORT = ["--symbols", "3", "--messages", "2000", "--seed", "8"]


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*SHORT, *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_file_and_pcap_of_one_seed(tmp_path: Path) -> None:
    code, stdout, _ = invoke("--file", str(tmp_path / "a.itch"), "--pcap", str(tmp_path / "a.pcap"), "--loss-a", "0.05", "--json")
    summary, content = json.loads(stdout), (tmp_path / "a.itch").read_bytes()
    reader = read_image(content)
    assert code == 0
    assert summary["messages"] == 2000
    assert summary["complete"]
    assert summary["sha256"] == hashlib.sha256(content).hexdigest()
    assert summary["by_type"] == dict(sorted(reader.types.items()))
    assert summary["symbols"] == reader.truth()
    assert summary["file"]["bytes"] == len(content)
    packets = read_capture(tmp_path / "a.pcap").packets()[1]
    a, b = summary["pcap"]["lines"]
    assert len(packets) == summary["pcap"]["datagrams"] == a["sent"] + b["sent"]
    assert a["lost"] > 0 == b["lost"]


def test_multicast_summary() -> None:
    code, stdout, _ = invoke("--multicast", "udp://239.77.1.9:26409", "--speed", "max", "--json")
    summary = json.loads(stdout)
    assert code == 0
    assert summary["multicast"]["datagrams"] == summary["multicast"]["lines"][0]["sent"] > 100
    assert summary["complete"]


def test_table_for_people(tmp_path: Path) -> None:
    code, stdout, _ = invoke("--file", str(tmp_path / "a"))
    assert code == 0
    assert "2,000 messages" in stdout
    assert [line.split()[0] for line in stdout.splitlines()[-3:]] == ["ALFA", "BRVO", "CHRL"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "--multicast"),
        (["--messages", "5", "--file", "x"], 2, "at least"),
        (["--multicast-b", "udp://239.1.1.1:5"], 2, "--multicast"),
        (["--multicast", "239.1.1.1"], 1, "udp://"),
        (["--multicast", "udp://239.1.1.1:26400", "--interface", "nic9"], 1, "no interface 'nic9'"),
        (["--multicast", "udp://239.1.1.1:26400", "--speed", "quick"], 2, "realtime"),
        (["--file", "/proc/none/x"], 1, "/proc/none/x"),
        (["--pcap", "/proc/none/x"], 1, "/proc/none/x"),
        (["--file", "x", "--loss-a", "2"], 2, "probability"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], code: int, says: str) -> None:
    exit_code, stdout, stderr = invoke(*arguments)
    assert (exit_code, stdout) == (code, "")
    assert says in stderr
    assert "Traceback" not in stderr


def test_nothing_to_write_to_is_refused() -> None:
    with pytest.raises(SimulatorConfigError, match="--pcap"):
        run_simulation(SimulatorConfig(), Outputs())
