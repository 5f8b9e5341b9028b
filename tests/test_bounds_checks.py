"""The bounds checks themselves: silence of the tests that run with them means that no index left its array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bounds import with_bounds_checks

from tickmesh.transports.toolbox import inlined, loop, outlined


@inlined
def put(array: Any, index: Any) -> None:
    array[index] = 7


@outlined
def put_there(array: Any, index: Any) -> None:
    put(array, index)


@loop
def run(array: Any, index: Any) -> Any:
    put_there(array, index)
    return array[0]


_PROGRAM = """
import numpy as np
import test_bounds_checks as t
for index in (np.int64(3), np.int64(4), np.int64(-5), np.uint64(1 << 40)):
    try:
        t.run(np.zeros(8, np.int64)[:4], index)
        print("inside")
    except IndexError:
        print("outside")
"""


def test_an_index_outside_its_array_is_found_in_a_part_of_a_loop() -> None:
    done = with_bounds_checks("-c", _PROGRAM, folder=Path(__file__).parent)
    assert done.stdout.split() == ["inside", "outside", "outside", "outside"], done.stderr[-2000:]
