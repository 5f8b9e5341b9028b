"""What the node tells about itself: the least important message that is written, which may change while it runs."""

from __future__ import annotations

import logging

import structlog


def set_log_level(level: str) -> None:
    """Write messages of this level and above only: debug, info, warning or error."""
    least = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(least))
    logging.getLogger("tickmesh").setLevel(least)
