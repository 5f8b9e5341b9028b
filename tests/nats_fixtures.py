"""Fixtures with a real nats-server on a free loopback port. Import them by name into a test module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tickmesh.ops.servers import NatsServer, NatsServerOptions


@pytest.fixture(scope="module")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One server for a module's tests; each test uses its own cluster name."""
    with NatsServer(NatsServerOptions(tmp_path_factory.mktemp("nats"))) as server:
        yield server


@pytest.fixture
def own_nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server of the test's own, to kill and restart."""
    with NatsServer(NatsServerOptions(tmp_path / "nats")) as server:
        yield server


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> str:
    """A cluster name nobody else uses on the module's server."""
    return "".join(c for c in request.node.name if c.isalnum())[-40:]
