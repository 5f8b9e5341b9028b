"""Turns of threads: short by default, long while something is done that others wait for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from tickmesh.control import turns


@pytest.fixture(autouse=True)
def back_to_usual() -> Iterator[None]:
    before, usual_s = sys.getswitchinterval(), turns._turns.usual_s
    yield
    turns._turns.usual_s = usual_s
    sys.setswitchinterval(before)


def test_turns_are_long_while_anybody_wants_it() -> None:
    turns.short_turns()
    short_s = sys.getswitchinterval()
    inside, over = threading.Event(), threading.Event()

    def other() -> None:
        with turns.undisturbed():
            inside.set()
            over.wait(30)

    thread = threading.Thread(target=other)
    with turns.undisturbed():
        long_s = sys.getswitchinterval()
        thread.start()
        assert inside.wait(30)
    assert sys.getswitchinterval() == long_s > short_s
    over.set()
    thread.join(30)
    assert sys.getswitchinterval() == short_s
    with turns.undisturbed():
        with turns.waiting():
            assert sys.getswitchinterval() == short_s
        assert sys.getswitchinterval() == long_s
    assert sys.getswitchinterval() == short_s
    with pytest.raises(ValueError, match="why"), turns.undisturbed():
        raise ValueError("why")
    assert sys.getswitchinterval() == short_s
