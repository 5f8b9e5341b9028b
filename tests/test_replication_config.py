"""The [replication] table: what is refused, and what links and gates are made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from replicas import new_journal

from tickmesh.control.config import ConfigError, parse_config
from tickmesh.node.replication import ReplicationError, link_options, release_gate


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("acks = 2", "acks", 'must be 0, 1 or "all"'),
        ("acks = true", "acks", 'must be 0, 1 or "all"'),
        ('listen = "4230"', "listen", "must be HOST:PORT"),
        ('listen = "0.0.0.0:4230"', "listen", "is open to other hosts, and nothing keeps strangers out"),
        ('advertise = "a b:1"', "advertise", "must be HOST:PORT"),
        ("timeout_ms = 100", "timeout_ms", "is less than three heartbeats"),
        ('tls_key_file = "k"\ntls_ca_file = "c"', "tls_certificate_file", "is missing"),
        ('token = "x"', "token", "is not a known key"),
    ],
)
def test_what_is_refused(text: str, key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(f"[replication]\n{text}")
    [problem] = caught.value.errors
    assert (problem.path, problem.reason) == (f"replication.{key}", reason)


def test_links_and_gates_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(
        '[cluster]\nname = "c"\nnode = "n7"\n[replication]\nlisten = "0.0.0.0:4230"\nacks = "all"\nsolo = false\nheartbeat_ms = 10\n'
        'token_env = "REPLICATION_TOKEN"\ntls_certificate_file = "n.pem"\ntls_key_file = "n.key"\ntls_ca_file = "ca.pem"',
        file=tmp_path / "node.toml",
    )
    monkeypatch.delenv("REPLICATION_TOKEN", raising=False)
    with pytest.raises(ReplicationError, match="REPLICATION_TOKEN"):
        link_options(config)
    monkeypatch.setenv("REPLICATION_TOKEN", "hush")
    made = link_options(config)
    assert (made.cluster, made.node, made.token, made.heartbeat_s, made.timeout_s) == ("c", "n7", "hush", 0.01, 0.5)
    assert made.tls is not None
    assert made.tls.certificate == tmp_path / "n.pem"
    with new_journal(tmp_path / "journal") as journal:
        gate = release_gate(config, journal)
        assert (gate.acks, gate.solo, gate.standing) == ("all", False, "held")
