"""What the node tells about itself: the least important message that is written, which may change while it runs."""

from __future__ import annotations

import logging
import os
import sys

import structlog


def set_log_level(level: str) -> None:
    """Write messages of this level and above only (debug, info, warning or error), to standard error: results go to standard output.

    Tracebacks come without the values of variables, which may be secrets.
    """
    least = logging.getLevelNamesMapping()[level.upper()]
    bound = structlog.make_filtering_bound_logger(least)
    structlog.configure(wrapper_class=bound, logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    processors = structlog.get_config()["processors"]
    if processors and isinstance(processors[-1], structlog.dev.ConsoleRenderer):  # others choose for themselves what they show
        colors = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        plain = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
        structlog.configure(processors=[*processors[:-1], plain])
    logging.getLogger("tickmesh").setLevel(least)
