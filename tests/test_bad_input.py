"""Bad input, all the way through: every refusal is a typed error that says what to do, or a count that the summary shows."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bounds import with_bounds_checks
from replays import BINANCE, BYBIT, DATA, ES, LOBSTER, LOBSTER_BOOKS, OKX, config_of, config_text, recording
from test_decoder import ADD, directory, framed, head

from tickmesh.control.config import ConfigError, parse_config
from tickmesh.node.config_checks import config_checks
from tickmesh.node.journal import Journal, JournalNoSpace, JournalReadOnly
from tickmesh.node.reader import SourceError
from tickmesh.node.replay import replay
from tickmesh.ops.servers import NatsServer, NatsServerOptions, PortBusy
from tickmesh.transports.capture import CaptureError, write_pcap
from tickmesh.transports.recording import RecordingError

SEED = int(os.environ.get("TICKMESH_SEED", random.SystemRandom().randrange(1 << 32)))


def order(id: int, side: bytes = b"B", qty: int = 100, price: int = 500_000, locate: int = 5) -> bytes:
    return head(b"A", locate) + struct.pack(">QcI8sI", id, side, qty, b"QQ      ", price)


def delete(id: int) -> bytes:
    return head(b"D", 5) + struct.pack(">Q", id)


def execute(id: int, qty: int) -> bytes:
    return head(b"E", 5) + struct.pack(">QIQ", id, qty, 1)


GOOD = framed(directory(5, "QQ"), order(1), order(2, b"S", price=600_000))


def run(tmp_path: Path, raw: bytes, data_format: str = "itch50", type: str = "file", **texts: str) -> dict[str, Any]:
    """Summary of a file with these bytes."""
    path = tmp_path / "feed.bin"
    path.write_bytes(raw)
    return replay(config_of(data_format, type, **texts), [path])


def counts(summary: dict[str, Any]) -> tuple[dict[str, int], dict[str, int], int]:
    return summary["malformed"], summary["refused"], summary["source"]["messages_total"]


# ---------------------------------------------------------------- bytes of a compiled protocol


def test_good_bytes_are_the_measure(tmp_path: Path) -> None:
    summary = run(tmp_path, GOOD)
    assert counts(summary) == ({}, {}, 3)
    assert summary["instruments"]["QQ"]["last_bbo"] == ["50", "100", "60", "100"]


@pytest.mark.parametrize(
    ("raw", "reason", "good"),
    [
        (GOOD[:-5], "truncated", 2),
        (GOOD + b"\0\x24", "truncated", 3),
        (GOOD + b"\0", "truncated", 3),
        (GOOD + b"\xff\xff" + ADD, "truncated", 3),
        (framed(b"~" + ADD[1:]) + GOOD, "unknown_message", 3),
        (framed(ADD[:-1]) + GOOD, "bad_length", 3),
        (framed(order(9, b"?")) + GOOD, "bad_field", 3),
    ],
)
def test_bad_messages_are_counted_and_the_rest_is_read(tmp_path: Path, raw: bytes, reason: str, good: int) -> None:
    summary = run(tmp_path, raw)
    assert summary["malformed"] == {reason: 1}
    assert summary["source"]["messages_total"] == good
    assert summary["instruments"]["QQ"]["bids"] == [["50", "100", 1]]


def test_zero_length_ends_a_session_in_a_file_and_is_malformed_in_a_packet(tmp_path: Path) -> None:
    assert counts(run(tmp_path, GOOD + framed(b"") + framed(delete(1)))) == ({}, {}, 4)
    packet = b"SESSION001" + struct.pack(">QH", 1, 5) + GOOD + framed(b"", delete(1))
    write_pcap(tmp_path / "feed.pcap", [(10**18, "239.1.1.1", 5000, packet)])
    summary = replay(config_of("itch50", "pcap"), [tmp_path / "feed.pcap"])
    assert counts(summary) == ({"zero_length": 1}, {}, 4)
    assert summary["instruments"]["QQ"]["bids"] == []


def test_packets_that_are_missing_or_come_twice(tmp_path: Path) -> None:
    def packet(sequence: int, *messages: bytes) -> tuple[int, str, int, bytes]:
        body = b"SESSION001" + struct.pack(">QH", sequence, len(messages)) + framed(*messages)
        return (10**18 + sequence, "239.1.1.1", 5000, body)

    first, last = packet(1, directory(5, "QQ"), order(1)), packet(7, order(2))
    write_pcap(tmp_path / "feed.pcap", [first, first, last, last])
    summary = replay(config_of("itch50", "pcap"), [tmp_path / "feed.pcap"])
    assert summary["gaps"] == [{"first": 3, "last": 6}]
    assert summary["duplicates"] == 2
    assert counts(summary) == ({}, {}, 3)


@pytest.mark.parametrize(
    ("messages", "refused"),
    [
        ([delete(77)], {"unknown_order": 1}),
        ([delete(1), delete(1)], {"unknown_order": 1}),
        ([execute(77, 1)], {"unknown_order": 1}),
        ([execute(1, 101)], {"qty_exceeds_order": 1}),
        ([order(1)], {"duplicate_order": 1}),
        ([order(3, qty=0)], {"bad_qty": 1}),
        ([execute(1, 0)], {"bad_qty": 1}),
    ],
)
def test_events_that_no_book_takes_are_refused_and_counted(tmp_path: Path, messages: list[bytes], refused: dict[str, int]) -> None:
    summary = run(tmp_path, GOOD + framed(*messages))
    assert (summary["malformed"], summary["refused"]) == ({}, refused)
    assert summary["instruments"]["QQ"]["asks"] == [["60", "100", 1]]
    assert summary["instruments"]["QQ"]["trades"] == 0


def test_more_symbols_than_the_table_holds(tmp_path: Path) -> None:
    raw = GOOD + framed(*(directory(10 + k, f"S{k}") + b"" for k in range(3)), order(50, locate=12))
    summary = run(tmp_path, raw, more="[cluster]\ninstruments_max = 2\n")
    assert summary["malformed"]["symbol_table_full"] >= 2
    assert set(summary["instruments"]) == {"QQ", "S0"}


def test_garbage(tmp_path: Path) -> None:
    rng = random.Random(3)
    summary = run(tmp_path, rng.randbytes(20_000))
    assert sum(summary["malformed"].values()) > 0
    json.dumps(summary)


def test_empty_file(tmp_path: Path) -> None:
    assert counts(run(tmp_path, b"")) == ({}, {}, 0)
    assert counts(run(tmp_path, b"", "binance")) == ({}, {}, 0)


def test_wrong_protocol_and_wrong_framing_show(tmp_path: Path) -> None:
    assert run(tmp_path, GOOD, "dbn_mbo")["malformed"]["bad_preamble"] == 1
    capture = next(iter(sorted((DATA / "omi_pcaps").glob("Iex/DeepPlus*/all_message_types.pcap"))), None)
    if capture is None:
        pytest.skip(f"no captures in {DATA}; set TICKMESH_DATA")
    for transport in ("pcap", "file"):
        summary = replay(config_of("itch50", transport), [capture])
        assert sum(summary["malformed"].values()) + len(summary["gaps"]) > 0
    assert counts(replay(config_of("iex_deep_plus", "pcap"), [capture]))[0] == {}


def test_file_that_is_no_capture(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"feed\.bin"):
        run(tmp_path, GOOD, type="pcap")


# ---------------------------------------------------------------- damaged recordings


def cut_short(path: Path, tmp_path: Path, share: float = 0.6) -> Path:
    raw = path.read_bytes()
    cut = tmp_path / path.name
    cut.write_bytes(raw[: int(len(raw) * share)])
    return cut


@pytest.mark.parametrize(("data_format", "path"), [("dbn_mbo", ES), ("binance", BINANCE), ("bybit", BYBIT)])
def test_compressed_recording_cut_short(tmp_path: Path, data_format: str, path: str) -> None:
    summary = replay(config_of(data_format), [cut_short(recording(path), tmp_path)])
    assert any(reason.startswith("recording_") for reason in summary["malformed"]), summary["malformed"]
    assert summary["source"]["messages_total"] > 10
    assert summary["instruments"]


def test_compressed_garbage(tmp_path: Path) -> None:
    raw = bytearray(gzip.compress(GOOD * 50))
    raw[len(raw) // 2] ^= 0xFF
    summary = run(tmp_path, bytes(raw))
    assert sum(n for reason, n in summary["malformed"].items() if reason.startswith("recording_")) == 1


# ---------------------------------------------------------------- text feeds

TRADES = 'event = "trade"\nfields = { symbol = "s", price = "p", qty = "q" }\n'


@pytest.mark.parametrize(
    ("line", "reasons"),
    [
        ('{"s": "A", "p": "1e40", "q": "1"}', 1),
        ('{"s": "A", "p": "99999999999999.1", "q": "1"}', 1),
        ('{"s": "A", "p": "NaN", "q": "1"}', 1),
        ('{"s": "A", "p": "1", "q": "-1"}', 1),
        ('{"s": "A", "p": "1"}', 1),
        ('{"s": 5, "p": "1", "q": "1"', 1),
        ("not json", 1),
        ("\x00\xff", 1),
        ('{"s": "' + "A" * 99 + '", "p": "1", "q": "1"}', 1),
        ("[" * 100_000, 1),
    ],
)
def test_bad_records_of_a_text_feed(tmp_path: Path, line: str, reasons: int) -> None:
    good = '{"s": "A", "p": "1.5", "q": "2"}'
    lines = "".join(f"{k}: {text}\n" for k, text in enumerate((good, line, good), 1_700_000_000))
    summary = run(tmp_path, lines.encode("latin-1"), "json", source=TRADES)
    assert sum(summary["malformed"].values()) == reasons, summary["malformed"]
    assert summary["instruments"]["A"]["trades"] == 2
    assert summary["instruments"]["A"]["volume"] == "4"


def test_negative_prices_are_prices(tmp_path: Path) -> None:
    lines = '1700000000: {"s": "CL", "p": "-37.63", "q": "2"}\n'
    summary = run(tmp_path, lines.encode(), "json", source=TRADES)
    assert (summary["malformed"], summary["instruments"]["CL"]["vwap"]) == ({}, -37.63)


# ---------------------------------------------------------------- configuration, files, host

TEN_MISTAKES = """
[cluster]
shards = 0
nodes = 2
ring_capacity = 1000
[data_sources.a]
type = "carrier pigeon"
[data_sources.b]
type = "multicast"
endpoint = "udp://10.0.0.1:5"
data_format = "itch50"
[data_sources.c]
type = "file"
data_format = "itch50"
tick_size = -1
[processing.calculations.x]
use = "emma"
[processing.calculations.y]
use = "ema"
window = 0
[processing.alerts.z]
of = "nothing"
above = 1.0
[risk]
max_qty = "much"
[delivery.d]
method = "nats"
target = "http://somewhere"
"""


def test_a_configuration_with_ten_mistakes_tells_all_of_them() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(TEN_MISTAKES, "node.toml", config_checks(Path()))
    errors = refused.value.errors
    assert len(errors) >= 10
    assert {e.path for e in errors} >= {
        "cluster.shards", "cluster.nodes", "cluster.ring_capacity", "data_sources.a.type", "data_sources.b.endpoint",
        "data_sources.c.tick_size", "processing.calculations.x.use", "processing.calculations.y.window", "processing.alerts.z.of",
        "risk.max_qty", "delivery.d.target",
    }  # fmt: skip
    lines = TEN_MISTAKES.splitlines()
    for error in errors:
        assert error.line
        assert error.reason
        assert lines[error.line - 1].split(" =")[0].strip("[]").rpartition(".")[2] in error.path


def test_missing_file_and_wrong_source(tmp_path: Path) -> None:
    config = config_of("itch50")
    with pytest.raises(SourceError, match=r"data_sources\.feed: there is no file .*nowhere") as missing:
        replay(config, [tmp_path / "nowhere"])
    assert missing.value.source == "feed"
    with pytest.raises(SourceError, match="is not configured; there are: feed"):
        replay(config, [], "other")
    with pytest.raises(SourceError, match="there is no file"):
        replay(config, [tmp_path])
    with pytest.raises(SourceError, match="no source"):
        replay(parse_config(""), [])
    two = config_text("itch50") + config_text("itch50").replace("feed", "other")
    with pytest.raises(SourceError, match=r"--source: feed, other"):
        replay(parse_config(two), [])


@pytest.mark.parametrize(
    "raw",
    [b"PK\3\4", b"PK\3\4" + bytes(40), b"\x1f\x8b", b"\x1f\x8b\x08" + bytes(30), b"\x28\xb5\x2f\xfd" + bytes(9)],
    ids=["zip-start", "zip-zeros", "gzip-start", "gzip-zeros", "zstd-start"],
)
def test_compressed_file_that_is_none(tmp_path: Path, raw: bytes) -> None:
    for data_format in ("bybit", "itch50", "lobster"):
        name = "AAPL_2012-06-21_0_1_message_10.csv" if data_format == "lobster" else "feed.bin"
        (tmp_path / name).write_bytes(raw)
        summary = replay(config_of(data_format), [tmp_path / name])
        assert sum(summary["malformed"].values()) > 0, data_format


def test_busy_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortBusy, match=str(port)):
            NatsServer(NatsServerOptions(tmp_path / "nats", port=port)).start()


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(JournalReadOnly, match="/proc"):
        Journal.create("/proc/tickmesh/journal", 0)
    (tmp_path / "file").touch()
    with pytest.raises(JournalReadOnly, match="file"):
        Journal.create(tmp_path / "file" / "journal", 0)


def test_full_disk(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(JournalNoSpace) as error:
            Journal.create(tmp_path / "journal", 0, segment_records=1 << 14)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.needed_bytes > 1 << 20


def test_the_command_tells_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "feed.bin").write_bytes(GOOD)
    (tmp_path / "node.toml").write_text(config_text("itch50"))
    arguments = ["replay", "feed.bin", "--config", "node.toml", "--summary", "/dev/full", "--quiet"]
    command = [sys.executable, "-m", "tickmesh.ops.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- damaged real recordings, with bounds checks

FUZZED = {ES: "dbn_mbo", OKX: "okx", BYBIT: "bybit", LOBSTER: "lobster"}
_FUZZ = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_bad_input import fuzz_all
fuzz_all({seed}, Path({folder!r}))
print("fine")
"""


def damaged(rng: random.Random, raw: bytes) -> bytes:
    """Bytes changed, cut out, doubled, and cut off."""
    found = bytearray(raw)
    for _ in range(rng.choice([1, 5, 200])):
        found[rng.randrange(len(found))] = rng.randrange(256)
    if rng.random() < 0.5:
        at = rng.randrange(len(found))
        del found[at : at + rng.randrange(1, 300)]
    if rng.random() < 0.3 and found:
        at, size = rng.randrange(len(found)), rng.randrange(1, 5000)
        found[at:at] = found[at : at + size]
    return bytes(found[: rng.randrange(len(found) + 1)] if rng.random() < 0.3 else found)


def check_state(summary: dict[str, Any]) -> None:
    """What must hold of any summary, whatever came in."""
    json.dumps(summary)
    assert all(count > 0 for reasons in ("malformed", "refused", "messages", "events") for count in summary[reasons].values())
    assert summary["source"]["messages_total"] == sum(summary["messages"].values())
    for about in summary["instruments"].values():
        for side, sign in (("bids", -1), ("asks", 1)):
            prices = [sign * float(price) for price, *_ in about[side]]
            assert prices == sorted(prices)
            assert all(float(qty) > 0 for _, qty, _ in about[side])


def fuzz_all(seed: int, folder: Path) -> None:
    """Replay damaged copies of every recording; called in a process with bounds checks."""
    import zstandard

    rng = random.Random(seed)
    inputs: list[tuple[str, str, str, bytes]] = []
    for path, data_format in FUZZED.items():
        raw = (DATA / path).read_bytes()
        if path.endswith(".zst"):
            raw = zstandard.ZstdDecompressor().stream_reader(raw).read()
        inputs += [(data_format, "file", Path(path).name.removesuffix(".zst"), raw)] * (10 if data_format == "dbn_mbo" else 4)
    for pattern, data_format in (("Nasdaq/*TotalView*/*.pcap", "itch50"), ("Iex/DeepPlus*/*.pcap", "iex_deep_plus")):
        inputs += [(data_format, "pcap", "feed.pcap", path.read_bytes()) for path in sorted((DATA / "omi_pcaps").glob(pattern))] * 3
    for number, (data_format, transport, name, raw) in enumerate(inputs):
        path = folder / name
        path.write_bytes(damaged(rng, raw))
        if data_format == "lobster":
            (folder / name.replace("_message_", "_orderbook_")).write_bytes(damaged(rng, (DATA / LOBSTER_BOOKS).read_bytes()))
        try:
            check_state(replay(config_of(data_format, transport), [path]))
        except (CaptureError, RecordingError):
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}, input {number}, {data_format} {name}") from error


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_damaged_recordings_with_bounds_checks(tmp_path: Path) -> None:
    recording(ES)
    script = _FUZZ.format(tests=str(Path(__file__).parent), seed=SEED, folder=str(tmp_path))
    done = with_bounds_checks("-c", script)
    assert done.stdout.strip() == "fine", f"TICKMESH_SEED={SEED}\n{done.stderr[-3000:]}"
