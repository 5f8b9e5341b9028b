"""What the node tells about itself: the least important message that is written, which may change while it runs."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from typing import TextIO, cast

import structlog


class _StandardError(io.TextIOBase):
    """Standard error as it is at each message; what cannot be written, since nobody reads any more, is let go: no thread ends for it."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()


_STANDARD_ERROR = cast(TextIO, _StandardError())


def set_log_level(level: str) -> None:
    """Write messages of this level and above only (debug, info, warning or error), to standard error: results go to standard output.

    Tracebacks come without the values of variables, which may be secrets.
    """
    least = logging.getLevelNamesMapping()[level.upper()]
    bound = structlog.make_filtering_bound_logger(least)
    structlog.configure(wrapper_class=bound, logger_factory=structlog.PrintLoggerFactory(_STANDARD_ERROR))
    processors = structlog.get_config()["processors"]
    if processors and isinstance(processors[-1], structlog.dev.ConsoleRenderer):  # others choose for themselves what they show
        colors = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        plain = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
        structlog.configure(processors=[*processors[:-1], plain])
    logging.getLogger("tickmesh").setLevel(least)
