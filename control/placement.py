"""Placement of shards on nodes: which nodes hold a replica of a shard, by rendezvous weights.

Every node computes the same from the list of members. For each shard, every node gets a score; the nodes with the highest scores hold its
replicas, in that order. When a node leaves, only the replicas that it held move; when one joins, only those that it wins.

    u(shard, node) = (first 8 bytes of SHA-256("shard/node"), big-endian, + 1) / (2**64 + 1)          in (0, 1)
    score = weight / -ln(u)

A node of weight 2 gets twice as many replicas. Sources: Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996; weights
by the logarithmic method of Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", SPAA 2005.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

WEIGHT_DEFAULT = 1.0


def score(shard: int, node: str, weight: float = WEIGHT_DEFAULT) -> float:
    """A node's score for a shard; 0 for a weight of 0, which takes nothing."""
    number = int.from_bytes(hashlib.sha256(f"{shard}/{node}".encode()).digest()[:8], "big")
    return weight / -math.log((number + 1) / (2**64 + 1)) if weight > 0 else 0.0


def replicas_of(shard: int, nodes: Mapping[str, float] | Iterable[str], count: int, pinned: str | None = None) -> tuple[str, ...]:
    """The nodes that hold a shard's replicas, the one that should lead first.

    Args:
        shard: number of the shard.
        nodes: members, with their weights if they differ; one of weight 0 takes replicas only when no other is left.
        count: how many replicas are wanted, at least 1; fewer if there are fewer nodes.
        pinned: a member that an operator wants as leader: it comes first.

    Raises:
        ValueError: `count` < 1, or a weight below 0.
    """
    if count < 1:
        raise ValueError(f"a shard needs a replica: count is {count}, at least 1")
    weights = dict(nodes) if isinstance(nodes, Mapping) else dict.fromkeys(nodes, WEIGHT_DEFAULT)
    wrong = [node for node, weight in weights.items() if not weight >= 0]
    if wrong:
        raise ValueError(f"the weight of {wrong[0]} is {weights[wrong[0]]}, at least 0")
    ranked = sorted(weights, key=lambda node: (-score(shard, node, weights[node]), node))
    if pinned in weights:
        ranked.remove(pinned)
        ranked.insert(0, pinned)
    return tuple(ranked[:count])


def lighter(leader: str, standbys: Iterable[str], led: Mapping[str, int], weights: Mapping[str, float]) -> str | None:
    """The standby that should lead a shard in its leader's place, since even then it leads less for its weight; None: there is none.

    Moves by this rule come to an end: each brings the numbers closer together.

    Args:
        leader: who leads the shard.
        standbys: who could.
        led: how many shards each node leads.
        weights: of the nodes; who has none, or 0, takes nothing.
    """

    def share(node: str, more: int = 0) -> float:
        weight = weights.get(node, 0.0)
        return (led.get(node, 0) + more) / weight if weight > 0 else math.inf

    return min((node for node in standbys if node != leader and share(node, 1) < share(leader)), key=share, default=None)
