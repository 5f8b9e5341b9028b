"""What the node tells about itself, wherever standard error goes."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from tickmesh.node.logs import set_log_level


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The configuration is the process's own."""
    yield
    structlog.reset_defaults()


def test_messages_go_to_standard_error_as_it_is_then(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", first)
    set_log_level("info")
    log = structlog.get_logger("x")
    log.info("one")
    monkeypatch.setattr(sys, "stderr", second)
    first.close()
    log.info("two")
    log.debug("three")
    assert "two" in second.getvalue()
    assert "one" not in second.getvalue()
    assert "three" not in second.getvalue()


def test_a_message_that_nobody_reads_ends_nothing() -> None:
    """Standard error is a pipe whose reader has gone, then closed: the program goes on."""
    program = (
        "import os, sys, structlog\n"
        "from tickmesh.node.logs import set_log_level\n"
        "set_log_level('info')\n"
        "log = structlog.get_logger('x')\n"
        "sys.stdin.readline()\n"
        "log.info('into the void')\n"
        "sys.stderr.close()\n"
        "log.info('once more')\n"
        "print('alive')\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stderr.close()
        process.stdin.close()  # now
        told = process.stdout.read()
    assert told.strip() == b"alive"
