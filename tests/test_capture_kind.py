"""What a recording is, found by looking into it."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from replays import BINANCE, BYBIT, ES, LOBSTER, OKX, recording

from tickmesh.ops.capture_kind import UnknownCapture, capture_settings
from tickmesh.ops.simulated_lines import LineConfig, SimulatedLines, write_lines
from tickmesh.ops.simulator import Simulator, SimulatorConfig


@pytest.mark.parametrize(
    ("path", "data_format"), [(ES, "dbn_mbo"), (BINANCE, "binance"), (OKX, "okx"), (BYBIT, "bybit"), (LOBSTER, "lobster")]
)
def test_real_recordings(path: str, data_format: str) -> None:
    assert capture_settings(recording(path)) == {"type": "file", "data_format": data_format}


@pytest.mark.parametrize(
    ("path", "data_format"),
    [
        ("omi_pcaps/Iex/Tops.IexTp.v1.6/QuoteUpdateMessage.pcap", "iex_tops"),
        ("omi_pcaps/Iex/Deep.IexTp.v1.0/PriceLevelBuyUpdateMessage.pcap", "iex_deep"),
        ("omi_pcaps/Iex/DeepPlus.IexTp.1.0.2/a_AddOrder.pcap", "iex_deep_plus"),
    ],
)
def test_packets_of_iex(path: str, data_format: str) -> None:
    assert capture_settings(recording(path)) == {"type": "pcap", "data_format": data_format, "framing": "iex_tp"}


def simulator() -> Simulator:
    return Simulator(SimulatorConfig(seed=1, symbols=2, messages=300, names=("ALFA", "BRVO")))


def itch_image() -> bytes:
    image, end = simulator().next_block(300)
    return bytes(image[:end])


@pytest.mark.parametrize("name", ["day.itch", "day.itch.gz"])
def test_itch(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(itch_image()) if name.endswith("gz") else itch_image())
    assert capture_settings(path) == {"type": "file", "data_format": "itch50", "framing": "binaryfile"}


def test_itch_in_packets(tmp_path: Path) -> None:
    path = tmp_path / "day.pcap"
    write_lines(path, SimulatedLines(simulator(), LineConfig()), ["udp://239.1.1.1:26400"])
    assert capture_settings(path) == {"type": "pcap", "data_format": "itch50", "framing": "moldudp64"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0", b"hello\n", b"\0\x0cS" + b"\0" * 11 + b"\0\x01R", bytes(range(256)) * 8, b'{"a": 1}\n', b"\x1f\x8b\x08broken", b"DB",
        b"PK\x03\x04",
    ],
)  # fmt: skip
def test_what_is_not_known(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "capture.bin"
    path.write_bytes(content)
    with pytest.raises(UnknownCapture, match=r"capture\.bin") as caught:
        capture_settings(path)
    assert caught.value.path == path
    assert "--config" in str(caught.value)


@pytest.mark.parametrize("cut", [4, 24, 30, 60])
def test_packets_cut_short(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "day.pcap"
    write_lines(path, SimulatedLines(simulator(), LineConfig()), ["udp://239.1.1.1:26400"])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UnknownCapture):
        capture_settings(path)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UnknownCapture, match="no such file"):
            capture_settings(path)
