"""Runs tests or a program once more, compiled with array bounds checks: an index outside its array becomes an IndexError."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def with_bounds_checks(*arguments: str, stdin: str = "", folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments`; what it wrote, and how it ended."""
    environment = {**os.environ, "TICKMESH_BOUNDSCHECK": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, input=stdin, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def check_again(file: str, chosen: str) -> None:
    """Run the tests of a file that ``-k chosen`` selects; all of them must pass, and there must be some."""
    done = with_bounds_checks("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", chosen)
    assert done.returncode == 0, done.stdout[-3000:]
