"""The error of a node as a whole."""

from __future__ import annotations


class NodeError(Exception):
    """The node cannot start, or had to stop; the message says what to do."""
