"""Which files `make check` leaves out: those that start servers and nodes, or compile a good part of the system."""

from __future__ import annotations

import pytest

SLOW_FILES = (
    "bad_configurations", "bad_input", "book_bench", "bypass_node", "calculation_twins", "codecache", "config_commands",
    "config_rollout", "consul_store", "determinism", "docs", "exchange", "failover", "fix_acceptance", "fix_decoder", "fix_session",
    "fix_source", "fix_tcp", "following", "http_source", "journal", "kv_store", "leadership", "live_config", "local_cluster",
    "more_sources", "nats_cluster", "no_allocation", "process", "protocol_files", "receive_paths", "receivers", "recovery",
    "replay_real_data", "replication", "rerequest", "roles", "sbe", "server_clusters", "servers_install", "shared_sources", "shard_twin",
    "shards_cmd", "simulator", "simulator_pipeline", "snapshotter", "soupbintcp", "source_faults", "standby", "store", "subscribe", "up",
    "websocket_source", "wheel",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark their tests as slow."""
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
