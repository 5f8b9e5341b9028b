"""The configuration model: defaults, short forms, and every problem of a document at once."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from tickmesh.control.config import (
    Checks,
    Config,
    ConfigError,
    Problem,
    RawTables,
    Refusal,
    Source,
    default_config,
    load_config,
    parse_config,
)

EXAMPLE = """
[cluster]
name = "mesh"
shards = 2
shard_overrides = { AAPL = 1 }

[data_sources.nasdaq]
type = "multicast"
endpoint = "udp://239.1.1.1:26400"
endpoint_b = "udp://239.1.1.2:26400"
data_format = "itch50"
framing = "moldudp64"
fields = ["symbol", "price", "volume"]
date = 2012-06-21
timezone = "America/New_York"

[processing.calculations.fast]
use = "ema"
window = 10

[processing.calculations.slow]
use = "calculations.py:slow_mean"
of = "fast"
alpha = 0.5

[processing.alerts.jump]
of = "fast"
above = 100

[processing.bars.minute]
interval_ms = 60000

[risk]
enabled = true
max_qty = 1000
max_notional = "1000000.50"

[delivery.events]
method = "nats"
embedded = true
per_event = true
"""


def problems(text: str, checks: Checks | None = None) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "test.toml", checks)
    return caught.value.errors


def source(body: str, kind: str = 'type = "file"\npath = "x"\ndata_format = "itch50"\n') -> str:
    return f"[data_sources.s]\n{kind}{body}\n"


def test_example_is_read_exactly() -> None:
    config = parse_config(EXAMPLE)
    nasdaq = config.data_sources["nasdaq"]
    assert list(nasdaq.fields) == ["symbol", "price", "qty"]
    assert nasdaq.fields["qty"].path == "volume"
    assert nasdaq.midnight_ns() == 1340251200 * 10**9  # 2012-06-21 00:00 in New York is 04:00 UTC
    assert config.processing.calculations["fast"].parameters == {"window": 10}
    assert config.processing.calculations["slow"].parameters == {"alpha": 0.5}
    assert config.processing.calculations["slow"].table() == {"use": "calculations.py:slow_mean", "of": "fast", "alpha": 0.5}
    assert config.processing.alerts["jump"].table() == {"use": "threshold", "of": "fast", "above": 100}
    assert config.processing.bars["minute"].table() == {"use": "bars", "interval_ms": 60000}
    assert config.risk.max_notional == Decimal("1000000.50")
    assert "order" in config.delivery["events"].per_event
    assert config.cluster.shard_overrides == {"AAPL": 1}


def test_an_empty_document_is_the_default() -> None:
    assert parse_config("") == default_config()
    assert default_config().cluster.idle == "sleep"
    assert default_config().risk.enabled is False


def test_all_problems_at_once_with_lines() -> None:
    found = problems(
        """[cluster]
shrads = 3
shards = 2
shard_overrides = { "BRK.B" = 7 }
[data_sources.a]
type = "multicast"
endpoint = "udp://10.0.0.1:1"
data_format = "itch50"
pace = "fast"
[data_sources.b]
type = "rmda"
[processing]
outputs = [
  "bbo",
  "trades",
]
[processing.alerts.x]
of = "emma"
above = 1.0
[processing.calculations.ema1]
use = "ema"
[journal]
segment_mb = 0
sync = 3
"""
    )
    by_path = {p.path: p for p in found}
    assert [(p.path, p.line) for p in found] == [
        ("cluster.shrads", 2),
        ("cluster.shard_overrides.BRK.B", 4),
        ("data_sources.a.endpoint", 7),
        ("data_sources.a.pace", 9),
        ("data_sources.b.type", 11),
        ("processing.outputs[1]", 15),
        ("journal.segment_mb", 23),
        ("journal.sync", 24),
    ]
    assert by_path["cluster.shrads"].hint == "did you mean 'shards'?"
    assert by_path["cluster.shard_overrides.BRK.B"].value == 7
    assert by_path["data_sources.b.type"].hint == "did you mean 'rdma'?"
    assert by_path["processing.outputs[1]"].hint == "did you mean 'trade'?"


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ('[data_sources.s]\ntype = "rdma"\n', "data_sources.s.endpoint", "is missing"),
        ('[data_sources.s]\ntype = "rdma"\nendpoint = "tcp://h:1"\n', "data_sources.s.endpoint", "rdma://HOST:PORT"),
        ('[data_sources.s]\ntype = "rdma"\nendpoint = "rdma://h:1"\ndata_format = "itch50"\n', "data_sources.s.data_format", "no meaning"),
        ('[processing]\noutputs = ["bbo"]\n[delivery.d]\nmethod = "rdma"\n', "processing.outputs", "reference"),
        ('[cluster]\naddress = "10.0.0.1"\n[delivery.d]\nmethod = "rdma"\n', "cluster.address", "delivery.d"),
        (
            '[replication]\nlink = "rdma"\ntls_certificate_file = "c"\ntls_key_file = "k"\ntls_ca_file = "a"\n',
            "replication.link",
            "TLS does not cover",
        ),
    ],
)
def test_what_rdma_needs_is_told(text: str, path: str, words: str) -> None:
    (found,) = problems(text)
    assert found.path == path
    assert words in f"{found.reason} {found.hint}"


@pytest.mark.parametrize("method", ["websocket", "redis"])
def test_deliveries_to_come_are_refused_with_the_reason(method: str) -> None:
    (found,) = problems(f'[delivery.d]\nmethod = "{method}"\n')
    assert "not built yet" in found.reason


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        (source("path = []", 'type = "file"\ndata_format = "itch50"\n'), "data_sources.s.path", "is missing"),
        (source("", 'type = "file"\npath = "x"\n'), "data_sources.s.data_format", "is missing"),
        (source("", 'path = "x"\n'), "data_sources.s.type", "is missing"),
        (source("", 'type = "multicast"\ndata_format = "x"\n'), "data_sources.s.endpoint", "is missing"),
        (source("", 'type = "simulator"\n'), "data_sources.s.symbols", "is missing"),
        (source("rate = 5.0"), "data_sources.s.rate", "only for simulator"),
        (source("pace = true"), "data_sources.s.pace", "'max', 'realtime'"),
        (source("pace = -1"), "data_sources.s.pace", "'max', 'realtime'"),
        (source("pace = nan"), "data_sources.s.pace", "'max', 'realtime'"),
        (source('tick_size = "abc"'), "data_sources.s.tick_size", "must be a number"),
        (source("tick_size = inf"), "data_sources.s.tick_size", "finite"),
        (source('tick_size = "0.0000000001"'), "data_sources.s.tick_size", "finer"),
        (source("[data_sources.s.instruments.X]\ntick_size = 1e-10"), "data_sources.s.instruments.X.tick_size", "finer"),
        (source("quantity_exponent = 19"), "data_sources.s.quantity_exponent", "less than or equal to 18"),
        (source("quantity_exponent = 2.0"), "data_sources.s.quantity_exponent", "valid integer"),
        (source('date = "2024-13-01"'), "data_sources.s.date", "must be a date"),
        (source('timezone = "Mars/Olympus"'), "data_sources.s.timezone", "not a known time zone"),
        (source('symbols = ["A"]\nexclude = ["A"]'), "data_sources.s.exclude", "in symbols too"),
        (source('symbols = ["A_NAME_OF_MORE_THAN_24_BYTES"]'), "data_sources.s.symbols[0]", "at most 24"),
        (source("columns = ['a']"), "data_sources.s.columns", "no meaning"),
        (source("", 'type = "file"\npath = "x"\ndata_format = "json"\n'), "data_sources.s.fields", "is missing"),
        (source("fields = ['price']", 'type = "file"\npath = "x"\ndata_format = "csv"\n'), "data_sources.s.event", "is missing"),
        (source("fields = [1]"), "data_sources.s.fields", "list of field names"),
        (source("fields = { prize = 'p' }"), "data_sources.s.fields.prize", "must be"),
        (source("fields = { price = { path = 'p', scale = 0 } }"), "data_sources.s.fields.price.scale", "greater than 0"),
        ("[cluster]\nring_capacity = 1000\n", "cluster.ring_capacity", "power of two"),
        ("[cluster]\ncpus = [1, 1]\n", "cluster.cpus", "twice"),
        ("[cluster]\nname = 'a.b'\n", "cluster.name", "must match"),
        ("[cluster]\nshards = '2'\n", "cluster.shards", "valid integer"),
        ("[processing.calculations.x]\nwindow = 3\n", "processing.calculations.x.use", "is missing"),
        ("[processing.alerts.x]\nof = 3\n", "processing.alerts.x.of", "valid string"),
        ("[risk]\nmax_qty = true\n", "risk.max_qty", "must be a number"),
        ("[risk]\nmax_rate = 0\n", "risk.max_rate", "greater than or equal to 1"),
        ("[delivery.d]\nmethod = 'nats'\nring = 'x'\n", "delivery.d.ring", "only for shm"),
        ("[delivery.d]\nmethod = 'nats'\nport = 1\n", "delivery.d.port", "embedded"),
        ("[delivery.d]\nmethod = 'nats'\ntarget = 'http://x'\n", "delivery.d.target", "nats://HOST:PORT"),
        ("[delivery.d]\nmethod = 'nats'\ntarget = 'nats://x:99999'\n", "delivery.d.target", "impossible port"),
        ("[delivery.d]\nmethod = 'nats'\ntarget = 'nats://x:1,y:2'\n", "delivery.d.target", "nats://HOST:PORT"),
        ("[delivery.d]\nmethod = 'nats'\nembedded = true\nreplicas = 3\n", "delivery.d.replicas", "more than the one embedded server"),
        ("[delivery.a]\nmethod = 'shm'\nring = 'r'\n[delivery.b]\nmethod = 'shm'\nring = 'r'\n", "delivery.b.ring", "is the ring of"),
        ("[data_sources]\nx = 3\n", "data_sources.x", "must be a valid dictionary or instance"),
        ("[data_sources.'bad name']\ntype = 'file'\npath='x'\ndata_format='y'\n", "data_sources.bad name", "must match"),
        ("cluster = 3\n", "cluster", "must be"),
        ("[logging]\nlevel = 'warn'\n", "logging.level", "must be"),
    ],
)  # fmt: skip
def test_each_problem_names_its_key_and_its_reason(text: str, path: str, words: str) -> None:
    (found,) = problems(text)
    assert found.path == path
    assert words in found.reason
    assert found.line is not None


def test_one_wrong_key_hides_no_other_check_and_invents_none() -> None:
    assert [p.path for p in problems("[cluster]\nshards = '9'\nshard_overrides = { A = 5 }\n")] == ["cluster.shards"]
    assert [p.path for p in problems("[delivery.d]\nmethod = 'nats'\nembedded = 1\nport = 5\n")] == ["delivery.d.embedded"]
    two = problems(source("rate = 5.0\nquantity_exponent = -1\nsymbols = ['']"))
    assert [p.path for p in two] == ["data_sources.s.rate", "data_sources.s.quantity_exponent", "data_sources.s.symbols[0]"]


def test_secrets_are_refused_and_not_repeated() -> None:
    for text in (
        "[delivery.d]\nmethod = 'nats'\ntarget = 'nats://me:hunter2@host:4222'\n",
        "[delivery.d]\nmethod = 'nats'\ntarget = 'nats://host:4222,nats://me:hunter2@host:4223'\n",
        "[delivery.d]\nmethod = 'nats'\npassword = 'hunter2'\n",
        "[delivery.d]\nmethod = 'nats'\ntoken = 'hunter2'\n",
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config(text)
        assert "hunter2" not in str(caught.value)
        assert "token_env" in caught.value.errors[0].hint


def test_not_toml_and_unreadable(tmp_path: Path) -> None:
    (found,) = problems("[cluster]\nname = \n")
    assert found.line == 2
    assert "is not TOML" in found.reason
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAY", "monday")
    file = tmp_path / "mesh.toml"
    file.write_text(source("").replace('"x"', '["$DAY.bin", "/abs/b.bin"]'))
    config = load_config(file)
    paths = [config.resolve(p) for p in config.data_sources["s"].path]
    assert paths == [tmp_path / "monday.bin", Path("/abs/b.bin")]
    assert config.line("data_sources", "s", "path") == 3
    assert config.line("data_sources", "s", "framing") == 1


def test_hooks_see_every_valid_table_and_their_problems_are_placed() -> None:
    def processing(calculations: RawTables, alerts: RawTables, bars: RawTables) -> list[Refusal]:
        assert (list(calculations), alerts, bars) == (["a"], {}, {})
        return [Refusal(f"processing.calculations.a.{key}", "must be positive") for key in ("use", "window")]

    def feed(name: str, table: Source) -> list[Refusal]:
        return [Refusal("fields.price", "the protocol has no such field", "it has: px")]

    text = source("quantity_exponent = 99") + source("fields = { price = 'p' }").replace(".s]", ".t]")
    text += "[processing.calculations.a]\nuse = 'emma'\nwindow = -1\n"
    found = problems(text, Checks(processing, feed))
    assert [(p.path, p.line) for p in found] == [
        ("data_sources.s.quantity_exponent", 5),
        ("data_sources.t.fields.price", 10),
        ("processing.calculations.a.use", 12),
        ("processing.calculations.a.window", 13),
    ]
    assert found[3].value == -1


def test_instrument_options_win_over_the_source() -> None:
    text = source("tick_size = 0.05\n[data_sources.s.instruments.X]\ntick_size = '0.000000001'\nquantity_exponent = 3")
    chosen = parse_config(text).data_sources["s"]
    assert (chosen.tick_size_of("X"), chosen.tick_size_of("Y")) == (1, 50_000_000)
    assert (chosen.quantity_exponent_of("X"), chosen.quantity_exponent_of("Y")) == (3, None)


def test_a_configuration_does_not_change() -> None:
    config = default_config()
    with pytest.raises(ValueError, match="frozen"):
        config.cluster.shards = 2
    assert isinstance(config, Config)
