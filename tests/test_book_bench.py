"""The benchmark of the books: it compares equal books, and says so when they are not."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tickmesh.ops import bench_book as bench


def test_the_image_is_the_same_for_the_same_seed() -> None:
    first, end = bench.write_image(2_000, 20, seed=3)
    again, _ = bench.write_image(2_000, 20, seed=3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, bench.write_image(2_000, 20, seed=4)[0])
    assert end == first.size - 64


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_every_contestant_makes_the_same_books() -> None:
    result = bench.measure(60_000, 50, 1)
    assert {"tickmesh", "conventional, g++", "same, g++"} <= result["ns_per_message"].keys()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_books_that_differ_are_an_error() -> None:
    image, end = bench.write_image(5_000, 10)
    ours = bench.Tickmesh(10)
    peers, _ = bench._peers(10, 5_000)
    with pytest.raises(bench.BooksDiffer) as raised:
        bench._check_equal(ours, {"short": Shortened(peers["conventional, g++"], end // 2)}, image, end)
    assert raised.value.sides > 0


class Shortened:
    """A contestant that stops half-way."""

    def __init__(self, peer: bench.Peer, end: int) -> None:
        self.peer, self.end = peer, end

    def rebuild(self, image: bench.Image, end: int, compare: bool = False) -> tuple[float, np.ndarray]:
        return self.peer.rebuild(image, min(end, self.end), compare)
