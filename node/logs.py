"""What the node tells about itself: the least important message that is written, which may change while it runs."""

from __future__ import annotations

import logging
import sys

import structlog


def set_log_level(level: str) -> None:
    """Write messages of this level and above only (debug, info, warning or error), to standard error: results go to standard output."""
    least = logging.getLevelNamesMapping()[level.upper()]
    bound = structlog.make_filtering_bound_logger(least)
    structlog.configure(wrapper_class=bound, logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    logging.getLogger("tickmesh").setLevel(least)
