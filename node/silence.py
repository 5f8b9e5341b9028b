"""A silent source's timers, asked for from Python: sources that are not compiled end to end."""

from __future__ import annotations

from typing import Any

from tickmesh.node.router import route_silence
from tickmesh.transports.toolbox import loop


@loop
def route_silence_now(router: Any) -> Any:
    """:func:`tickmesh.node.router.route_silence`."""
    return route_silence(router)
