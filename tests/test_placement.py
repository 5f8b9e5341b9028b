"""Shards on nodes: everybody computes the same, and a node that comes or goes moves no more than it has to."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tickmesh.control.placement import lighter, replicas_of

NODES = st.sets(st.text("abcdefghij0123456789-", min_size=1, max_size=12), min_size=1, max_size=8)


def place(nodes: set[str], shards: int = 64, count: int = 2) -> dict[int, tuple[str, ...]]:
    """The replicas of all shards."""
    return {shard: replicas_of(shard, nodes, count) for shard in range(shards)}


@given(NODES, st.integers(1, 4))
def test_replicas_are_on_different_nodes_and_as_many_as_there_can_be(nodes: set[str], count: int) -> None:
    for chosen in place(nodes, 8, count).values():
        assert len(chosen) == len(set(chosen)) == min(count, len(nodes))
        assert set(chosen) <= nodes


@given(NODES)
def test_the_order_of_the_list_does_not_matter(nodes: set[str]) -> None:
    assert replicas_of(3, sorted(nodes), 2) == replicas_of(3, sorted(nodes, reverse=True), 2)


@given(NODES, st.data())
def test_a_node_that_leaves_moves_only_what_it_held(nodes: set[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(sorted(nodes)))
    before, after = place(nodes), place(nodes - {gone}) if nodes - {gone} else {}
    for shard, chosen in after.items():
        stayed = [node for node in before[shard] if node != gone]
        assert list(chosen[: len(stayed)]) == stayed
        if gone not in before[shard]:
            assert chosen == before[shard]


@given(NODES)
def test_a_node_that_joins_takes_only_what_it_wins(nodes: set[str]) -> None:
    before, after = place(nodes), place(nodes | {"NEW"})
    for shard, chosen in after.items():
        assert [node for node in chosen if node != "NEW"] == list(before[shard][: len(chosen) - ("NEW" in chosen)])


def test_leaders_are_spread_and_weights_count() -> None:
    leaders = Counter(chosen[0] for chosen in place({"a", "b", "c"}, 3000).values())
    assert all(850 < leaders[node] < 1150 for node in "abc")
    weighted = Counter(replicas_of(shard, {"a": 1.0, "b": 2.0, "c": 0.0}, 1)[0] for shard in range(3000))
    assert weighted["c"] == 0
    assert 1850 < weighted["b"] < 2150


def test_a_node_of_weight_zero_is_taken_only_when_no_other_is_left() -> None:
    assert replicas_of(1, {"a": 0.0, "b": 1.0}, 2) == ("b", "a")


def test_a_pinned_member_leads_and_an_absent_one_does_not() -> None:
    nodes = ["a", "b", "c"]
    last = replicas_of(5, nodes, 3)[-1]
    assert replicas_of(5, nodes, 2, pinned=last)[0] == last
    assert replicas_of(5, nodes, 2, pinned="gone") == replicas_of(5, nodes, 2)


def test_placement_is_fixed_to_the_bit() -> None:
    """Nodes of two releases must agree: these values may never change."""
    chosen = [replicas_of(shard, ["n1", "n2", "n3"], 3) for shard in range(4)]
    assert chosen == [("n2", "n3", "n1"), ("n3", "n2", "n1"), ("n3", "n2", "n1"), ("n1", "n3", "n2")]


@pytest.mark.parametrize(("count", "weights"), [(0, {"a": 1.0}), (1, {"a": -1.0})])
def test_nonsense_is_refused(count: int, weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least"):
        replicas_of(0, weights, count)


@given(st.integers(1, 12), st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=2, max_size=6), st.integers(0, 99), st.integers(1, 3))
def test_passing_shards_to_who_leads_less_comes_to_an_end(shards: int, weights: list[float], seed: int, count: int) -> None:
    """Whoever led at first, and in whatever order shards are looked at: nobody could then be better off, and no move was undone."""
    rng = random.Random(seed)
    nodes = {f"n{i}": weight for i, weight in enumerate(weights)} | {"last": 1.0}
    placed = {shard: replicas_of(shard, nodes, count) for shard in range(shards)}
    leader = {shard: rng.choice(chosen) for shard, chosen in placed.items()}

    def led() -> Counter[str]:
        return Counter(leader.values())

    def shares() -> list[float]:
        return sorted((led()[node] / (weight or 1e-6) for node, weight in nodes.items()), reverse=True)

    moves = 0
    while True:
        able = [shard for shard in placed if lighter(leader[shard], placed[shard], led(), nodes)]
        if not able:
            break
        shard, before = rng.choice(able), shares()
        leader[shard] = lighter(leader[shard], placed[shard], led(), nodes) or ""
        assert shares() < before
        moves += 1
        assert moves <= shards * len(nodes)
    for shard, chosen in placed.items():
        for node in chosen:
            if nodes[node] and nodes[leader[shard]]:
                assert (led()[node] + (node != leader[shard])) / nodes[node] >= led()[leader[shard]] / nodes[leader[shard]]
