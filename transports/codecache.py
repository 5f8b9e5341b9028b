"""On-disk cache of compiled loops, keyed by the source of everything that is inlined into them.

numba's own cache looks at the file of the entry point only; an edited helper in another module is not seen and the old machine
code keeps running. Here the key of an entry point is the hash of its module's source and, recursively, of every tickmesh module
that it imports. A generated loop is a readable module in ``<cache>/generated``; machine code lies in ``<cache>/compiled/<key>``.

Compiling takes seconds and disturbs running loops, so it is done in a helper process (:func:`load_generated`); the caller then
loads the result in a fraction of a second.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite
import numba
import numpy
from numba.core.caching import CacheImpl, _CacheLocator

_PACKAGE = "tickmesh"
_GENERATED = "tickmesh_generated"
"""Generated modules import each other under this package: ``from tickmesh_generated.decoder_itch50_0123 import decode_stream``."""


class CompileError(Exception):
    """A generated loop did not compile.

    Attributes:
        path: the generated module.
        output: what the compiler said.
    """

    def __init__(self, path: Path, output: str) -> None:
        super().__init__(f"{path} does not compile:\n{output}")
        self.path, self.output = path, output


def cache_dir() -> Path:
    """``$TICKMESH_CACHE_DIR``, else ``$XDG_CACHE_HOME/tickmesh``, else ``~/.cache/tickmesh``."""
    chosen = os.environ.get("TICKMESH_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _PACKAGE


# ---------------------------------------------------------------- the key


def _module_path(name: str) -> Path | None:
    if name.startswith(_GENERATED + "."):
        path = generated_dir() / (name.removeprefix(_GENERATED + ".") + ".py")
        return path if path.exists() else None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _imports(path: Path) -> set[str]:
    """Names of the tickmesh modules that a source file imports (absolute imports only: the house rule)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in found if name.startswith((_PACKAGE + ".", _GENERATED + "."))}


@functools.cache
def source_key(path: Path) -> str:
    """Hash of a source file, of every tickmesh module reachable through its imports, and of the compiler's version."""
    seen: set[Path] = set()
    todo = [path]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        todo.extend(found for name in _imports(current) if (found := _module_path(name)))
    digest = hashlib.sha256()
    toolchain = (numba.__version__, llvmlite.__version__, numpy.__version__, sys.version_info[:3], os.environ.get("TICKMESH_BOUNDSCHECK"))
    digest.update(repr(toolchain).encode())
    for content in sorted(hashlib.sha256(p.read_bytes()).digest() for p in seen):
        digest.update(content)
    return digest.hexdigest()[:24]


class _SourceClosureLocator(_CacheLocator):  # type: ignore[misc]
    """Tells numba where a tickmesh function's machine code is cached, and what makes it stale."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        self._path = Path(py_file)
        self._line = py_func.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return str(cache_dir() / "compiled" / f"{self._path.stem[:40]}-{source_key(self._path)}")

    def get_source_stamp(self) -> str:
        return source_key(self._path)

    def get_disambiguator(self) -> str:
        return str(self._line)

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _SourceClosureLocator | None:
        ours = py_func.__module__.split(".")[0] in (_PACKAGE, _GENERATED)
        return cls(py_func, py_file) if ours else None


if _SourceClosureLocator not in CacheImpl._locator_classes:
    CacheImpl._locator_classes.insert(0, _SourceClosureLocator)


# ---------------------------------------------------------------- generated modules


def generated_dir() -> Path:
    """Folder of the generated modules."""
    return cache_dir() / "generated"


def write_generated(prefix: str, source: str) -> Path:
    """Write a generated module under a name made of `prefix` and the hash of its source; returns its path."""
    folder = generated_dir()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prefix}_{hashlib.sha256(source.encode()).hexdigest()[:16]}.py"
    if not path.exists() or path.read_text() != source:
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            file.write(source)
        os.replace(file.name, path)
        source_key.cache_clear()
    return path


def import_generated(path: Path) -> ModuleType:
    """Import a generated module (once per process)."""
    package = sys.modules.setdefault(_GENERATED, ModuleType(_GENERATED))
    package.__path__ = [str(generated_dir())]
    importlib.invalidate_caches()
    return importlib.import_module(f"{_GENERATED}.{path.stem}")


def is_compiled(path: Path) -> bool:
    """Whether the machine code of this generated module, with everything inlined into it, is in the cache."""
    return _done_marker(path).exists()


def _done_marker(path: Path) -> Path:
    return cache_dir() / "compiled" / f"{path.stem[:40]}-{source_key(path)}" / "complete"


def load_generated(prefix: str, source: str, progress: Callable[[str], None] | None = None) -> ModuleType:
    """Import a generated module whose loops are compiled, compiling them first in a helper process if needed.

    The module must define ``warm()``, which calls each of its entry points once with arguments of the final types.

    Args:
        prefix: start of the module's name, says what it is (``"shard"``, ``"decoder_itch50"``).
        source: the module's Python source.
        progress: told when a compile starts, e.g. ``"compiling shard loop, first run only"``.

    Raises:
        CompileError: with the compiler's message.
    """
    path = write_generated(prefix, source)
    if not is_compiled(path):
        if progress:
            progress(f"compiling {prefix.replace('_', ' ')} loop, first run only")
        compile_in_helper(path)
    module = import_generated(path)
    module.warm()
    return module


def compile_in_helper(path: Path) -> None:
    """Compile a generated module in another process, so that running loops here are not disturbed.

    Raises:
        CompileError: with the compiler's message.
    """
    command = [sys.executable, "-m", "tickmesh.transports.codecache", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise CompileError(path, (done.stderr or done.stdout)[-4000:])


def _main(argument: str) -> None:
    path = Path(argument)
    from tickmesh.transports import codecache  # the canonical module, not __main__: its locator is the registered one

    codecache.import_generated(path).warm()
    marker = codecache._done_marker(path)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()


if __name__ == "__main__":
    _main(sys.argv[1])
