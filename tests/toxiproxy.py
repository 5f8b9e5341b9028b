"""A real Toxiproxy between two ends of a test, by its HTTP interface."""

from __future__ import annotations

import itertools
import json
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nodes import until
from programs import require

from tickmesh.ops.servers import free_ports, toxiproxy_binary


class Proxy:
    """One proxied port. `address` is where to connect."""

    def __init__(self, url: str, name: str, address: str) -> None:
        self._url, self.name, self.address = url, name, address
        self._numbers = itertools.count()

    @contextmanager
    def toxic(self, about: dict[str, Any]) -> Iterator[None]:
        """Do harm to what goes to the one who connected, for a while."""
        name = f"t{next(self._numbers)}"
        _ask(f"{self._url}/proxies/{self.name}/toxics", "POST", {"name": name, "stream": "downstream", **about})
        try:
            yield
        finally:
            _ask(f"{self._url}/proxies/{self.name}/toxics/{name}", "DELETE")


class Toxiproxy:
    """A running server."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._numbers = itertools.count()

    def proxy(self, port: int) -> Proxy:
        """A proxy in front of a port of this host."""
        name = f"p{next(self._numbers)}"
        made = _ask(f"{self._url}/proxies", "POST", {"name": name, "listen": "127.0.0.1:0", "upstream": f"127.0.0.1:{port}"})
        return Proxy(self._url, name, made["listen"])

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            return bool(_ask(f"{self._url}/proxies", "GET") is not None)
        except OSError:
            return False


def _ask(url: str, method: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body else None
    with urllib.request.urlopen(urllib.request.Request(url, data, method=method), timeout=5) as answer:
        text = answer.read()
    return json.loads(text) if text else None


@pytest.fixture
def toxiproxy(tmp_path: Path) -> Iterator[Toxiproxy]:
    """A Toxiproxy of the test's own."""
    require("toxiproxy")
    program = toxiproxy_binary()
    [port] = free_ports("127.0.0.1", 1)
    with (tmp_path / "toxiproxy.log").open("w") as log:
        process = subprocess.Popen([program, "-host", "127.0.0.1", "-port", str(port)], stdout=log, stderr=log)
    try:
        server = Toxiproxy(f"http://127.0.0.1:{port}")
        until(server.ready, "toxiproxy")
        yield server
    finally:
        process.kill()
        process.wait()
