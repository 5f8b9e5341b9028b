"""Market data inside a node: events, protocols, books, calculations, the shard loop, the journal and delivery.

``from tickmesh.node import subscribe`` is all that a consumer of a node's outputs needs; it does not load the compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tickmesh.node.subscription import subscribe

__all__ = ["subscribe"]


def __getattr__(name: str) -> Any:
    if name == "subscribe":
        from tickmesh.node.subscription import subscribe

        return subscribe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
