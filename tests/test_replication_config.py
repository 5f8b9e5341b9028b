"""The [replication] table: what is refused, and what links and gates are made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from replicas import new_journal

from tickmesh.control.config import ConfigError, Part, parse_config, parse_parts
from tickmesh.node.replication import ReplicationError, link_options, release_gate


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("acks = 2", "acks", 'must be 0, 1 or "all"'),
        ("acks = true", "acks", 'must be 0, 1 or "all"'),
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


SHARED = '[leadership]\nenabled = true\n[delivery.events]\nmethod = "nats"\ntarget = "nats://10.0.0.9:4222"\n'


@pytest.mark.parametrize("guard", ['token_env = "X"', 'tls_certificate_file = "c"\ntls_key_file = "k"\ntls_ca_file = "a"', ""])
@pytest.mark.parametrize("own", ['address = "10.0.0.1"', 'address = "10.0.0.1"\nlisten = "[::]"', ""])
def test_journals_are_open_to_other_hosts_only_if_strangers_are_kept_out(own: str, guard: str) -> None:
    text = f"[cluster]\n{own}\n{SHARED}[replication]\n{guard}"
    if guard or not own:
        assert parse_config(text).cluster.listens_at == ("[::]" if "listen" in own else "10.0.0.1" if own else "127.0.0.1")
        return
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    [problem] = caught.value.errors
    key = "listen" if "listen" in own else "address"
    assert (problem.path, problem.line) == (f"cluster.{key}", 3 if key == "listen" else 2)
    assert problem.reason == "is open to other hosts, and nothing keeps strangers away from the journals"


def test_what_a_node_is_alone_in_knowing_is_held_against_what_all_share() -> None:
    own = parse_config('[cluster]\nname = "c"\nnode = "n7"\naddress = "10.0.0.1"')
    delivery = '[events]\nmethod = "nats"\ntarget = "nats://10.0.0.9:4222"'
    parts = {"leadership": Part("enabled = true", "leadership"), "delivery": Part(delivery, "delivery")}
    with pytest.raises(ConfigError, match=r"cluster\.address = .10\.0\.0\.1.: is open to other hosts"):
        parse_parts(parts, own)
    guarded = parse_parts({**parts, "replication": Part('token_env = "X"\nport = 4230', "replication")}, own)
    assert (guarded.cluster.address, guarded.replication.port) == ("10.0.0.1", 4230)


def test_links_and_gates_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(
        '[cluster]\nname = "c"\nnode = "n7"\n[replication]\nport = 4230\nacks = "all"\nsolo = false\nheartbeat_ms = 10\n'
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
