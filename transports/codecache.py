"""On-disk cache of compiled loops, keyed by the source of everything that is inlined into them.

numba's own cache looks at the file of the entry point only; an edited helper in another module is not seen and the old machine
code keeps running. Here the key of an entry point is the hash of its module's source and, recursively, of every tickmesh module
that it imports. A generated loop is a readable module in ``<cache>/generated``; machine code lies in ``<cache>/compiled/<key>``.

Compiling takes seconds and disturbs running loops, so it is done in a helper process (:func:`load_generated`, :func:`load_compiled`); the
caller then loads the result in a fraction of a second. :func:`watched_compiles` lets a bigger thing that starts go on living meanwhile.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import llvmlite
import numba
import numpy
from llvmlite import binding
from numba.core.caching import CacheImpl, _CacheLocator

_PACKAGE = "tickmesh"
_GENERATED = "tickmesh_generated"
"""Generated modules import each other under this package: ``from tickmesh_generated.decoder_itch50_0123 import decode_stream``."""
_THIS = "tickmesh.transports.codecache"
_WATCH_S = 0.1
_WAIT = "--wait"
_PREPARING_NICE = 10
_UNFIT = 75
"""A helper ends with it that has imported what is not on the disk any more."""

Progress = Callable[[str], None] | None


class CompileError(Exception):
    """A generated loop did not compile.

    Attributes:
        path: the generated module.
        output: what the compiler said.
    """

    def __init__(self, path: Path, output: str) -> None:
        super().__init__(f"{path} does not compile:\n{output}")
        self.path, self.output = path, output


class CompileStopped(Exception):
    """A compile was ended on request, see :func:`watched_compiles`; nothing of it is left running."""


def cache_dir() -> Path:
    """``$TICKMESH_CACHE_DIR``, else ``$XDG_CACHE_HOME/tickmesh``, else ``~/.cache/tickmesh``."""
    chosen = os.environ.get("TICKMESH_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _PACKAGE


# ---------------------------------------------------------------- the key


@functools.cache
def _package_folder(top: str) -> Path | None:
    spec = importlib.util.find_spec(f"{_PACKAGE}.{top}")
    return Path(spec.origin).parent if spec and spec.origin else None


def _module_path(name: str) -> Path | None:
    """File of one of our modules, a package's ``__init__.py``; looks at files only, nothing is imported."""
    package, _, rest = name.partition(".")
    top, *parts = rest.split(".")
    if package == _GENERATED:
        folder: Path | None = generated_dir()
        parts = [top]
    else:
        folder = _package_folder(top) if package == _PACKAGE and top else None
    if folder is None or parts == [""]:
        return None
    place = folder.joinpath(*parts)
    candidates = [place / "__init__.py", *([place.parent / f"{place.name}.py"] if parts else [])]
    return next((path for path in candidates if path.is_file()), None)


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Every statement, however deep; expressions, the most of a tree, hold no imports."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, name, ()):
            if isinstance(child, ast.stmt):
                yield child
            yield from _statements(child)


@functools.cache
def _imports(source: bytes) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """What a source imports from us: (module, names taken from it); absolute imports only (the house rule)."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.module, tuple(alias.name for alias in node.names)))
    return tuple(pair for pair in found if pair[0].split(".")[0] in (_PACKAGE, _GENERATED))


@functools.cache
def _own_names(source: bytes) -> frozenset[str]:
    """Names that a package's ``__init__`` may give a meaning of its own: whatever it mentions, also as text (for ``__getattr__``)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return frozenset(names)


def _sources_of(module: str, names: tuple[str, ...]) -> set[Path]:
    """Files that an import reads names from.

    A package's ``__init__`` counts where a name comes from it, and not where it is only the way to a module inside: otherwise a decoder
    that imports ``tickmesh.node.event`` would be compiled again after any edit of what ``tickmesh.node`` offers to users.
    """
    home = _module_path(module)
    if home is not None and home.name != "__init__.py":
        return {home}
    own = _own_names(home.read_bytes()) if home else frozenset()
    found: set[Path] = set() if names or home is None else {home}
    for name in names:
        inner = _module_path(f"{module}.{name}")
        if inner is not None:
            found.add(inner)
        if home is not None and (inner is None or name in own or "*" in own):
            found.add(home)
        if name == "*" and home is not None:
            found.update(home.parent.glob("*.py"))
    return found


def source_closure(path: Path) -> dict[Path, bytes]:
    """A source file and every file of ours that it is compiled with, reached through imports, with their contents.

    This module is left out although the toolbox imports it: nothing of it becomes part of a loop, it only says where machine code lies, and
    when it makes keys in another way they are other keys. An edit to it would otherwise compile everything again.
    """
    contents: dict[Path, bytes] = {}
    left_out = _module_path(_THIS)
    todo = [path]
    while todo:
        current = todo.pop()
        if current not in contents and current != left_out:
            contents[current] = current.read_bytes()
            for module, names in _imports(contents[current]):
                todo.extend(_sources_of(module, names))
    return contents


@functools.cache
def _toolchain() -> bytes:
    """What else machine code depends on: versions, options and the processor."""
    versions = (numba.__version__, llvmlite.__version__, numpy.__version__, sys.version_info[:3])
    name, features = numba.config.CPU_NAME, numba.config.CPU_FEATURES  # NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, where they are set
    processor = (name or binding.get_host_cpu_name(), features if name else binding.get_host_cpu_features().flatten())
    return repr((versions, os.environ.get("TICKMESH_BOUNDSCHECK"), processor)).encode()


@functools.cache
def source_key(path: Path) -> str:
    """Hash of a source file, of every tickmesh module reachable through its imports, of the compiler's version and the processor."""
    digest = hashlib.sha256(_toolchain())
    for content in sorted(hashlib.sha256(source).digest() for source in source_closure(path).values()):
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


_loaded: dict[tuple[Path, str, str], ModuleType] = {}
"""Modules that are ready to run: whoever takes a shard over has no time to look at files."""


def load_generated(prefix: str, source: str, progress: Progress = None, check: Callable[[], None] | None = None) -> ModuleType:
    """Import a generated module whose loops are compiled, compiling them first in a helper process if needed.

    The module must define ``warm()``, which calls each of its entry points once with arguments of the final types.

    Args:
        prefix: start of the module's name, says what it is (``"shard"``, ``"decoder_itch50"``).
        source: the module's Python source.
        progress: told when a compile starts, e.g. ``"compiling shard loop, first run only"``.
        check: called before this process has it compiled; what it raises ends it. Where the code is there, nothing needs to be checked.

    Raises:
        CompileError: with the compiler's message.
        CompileStopped: see :func:`watched_compiles`.
    """
    known = _loaded.get((generated_dir(), prefix, source))
    if known is not None:
        return known
    path = write_generated(prefix, source)
    _compile_once(path, str(path), f"{prefix.replace('_', ' ')} loop", progress, check)
    module = import_generated(path)
    module.warm()
    _loaded[generated_dir(), prefix, source] = module
    return module


def load_compiled(name: str, what: str, progress: Progress = None) -> ModuleType:
    """Import a module of ours that defines ``warm()``, like :func:`load_generated`.

    Args:
        name: of the module, e.g. ``"tickmesh.ops.simulator"``.
        what: what it is called in the line of progress, ``"simulator"``.
        progress: told when a compile starts.

    Raises:
        CompileError: with the compiler's message.
        CompileStopped: see :func:`watched_compiles`.
    """
    module = importlib.import_module(name)
    assert module.__file__
    _compile_once(Path(module.__file__), name, what, progress)
    module.warm()
    return module


# ---------------------------------------------------------------- the helper process

_watch: ContextVar[Callable[[], bool] | None] = ContextVar("watch", default=None)
_ready: ContextVar[ReadyHelper | None] = ContextVar("ready", default=None)


@contextlib.contextmanager
def watched_compiles(watch: Callable[[], bool], ready: ReadyHelper | None = None) -> Iterator[None]:
    """Have a function called while a compile is waited for, some ten times a second; by returning true it ends it (CompileStopped).

    Holds for compiles that are asked for inside the ``with`` block, by this thread. They use the helper that is `ready`.
    """
    tokens = _watch.set(watch), _ready.set(ready)
    try:
        yield
    finally:
        _watch.reset(tokens[0])
        _ready.reset(tokens[1])


def _compile_once(path: Path, argument: str, what: str, progress: Progress, check: Callable[[], None] | None = None) -> None:
    if is_compiled(path):
        return
    if progress:
        progress(f"compiling {what}, first run only")
    with _one_of_the_host(path):
        if not is_compiled(path):
            if check:
                check()
            compile_in_helper(path, argument)


@contextlib.contextmanager
def _one_of_the_host(path: Path) -> Iterator[None]:
    """Let no two processes compile the same at a time: nodes of one host get the same code at once, and the second finds it in the cache.

    Raises:
        CompileStopped: see :func:`watched_compiles`.
    """
    folder, watch = _done_marker(path).parent, _watch.get()
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if watch and watch():
                    raise CompileStopped("the compile was stopped") from None
                time.sleep(_WATCH_S)
        yield
    finally:
        os.close(fd)  # which lets go of it, as the end of the process does


def compile_in_helper(path: Path, argument: str | None = None) -> None:
    """Compile a module in another process, so that running loops here are not disturbed.

    The helper is in a session of its own: Ctrl-C on the terminal reaches this process only, which ends it. It ends by itself when this
    process is gone.

    Args:
        path: the module's source.
        argument: `path`, or the module's name if it is not a generated one.

    Raises:
        CompileError: with the compiler's message.
        CompileStopped: see :func:`watched_compiles`.
    """
    ready = _ready.get()
    if ready is not None and ready.compile(path, argument or str(path)):
        return
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        with _ended_with_us(_started(log, argument or str(path))) as helper:
            _wait_for(helper)
        if helper.returncode:
            log.seek(0)
            raise CompileError(path, log.read()[-4000:])


def _started(log: IO[str], *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", _THIS, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)


class ReadyHelper:
    """A helper process that has imported the compiler and the kernels, and waits for a module to compile: for running nodes, which take
    new code while others wait for it. It costs memory, some 150 MiB, and prepares at low priority. When it has compiled a module, or could
    not, another one is started in its place.

    Args:
        like: a generated module whose imports are those of the modules to come.
    """

    def __init__(self, like: Path) -> None:
        self._like, self._cache = like, cache_dir()
        self._lock = threading.Lock()
        self._closed = False
        self._helper: subprocess.Popen[bytes] | None = None
        self._log: IO[str] | None = None
        self._start()

    def _start(self) -> None:
        with self._lock:
            if not self._closed:
                self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by who takes it
                self._helper = _started(self._log, _WAIT, str(self._like))

    @property
    def ready(self) -> bool:
        """Whether it waits for a module."""
        helper, log = self._helper, self._log
        return helper is not None and helper.poll() is None and log is not None and os.fstat(log.fileno()).st_size > 0

    def compile(self, path: Path, argument: str) -> bool:
        """As :func:`compile_in_helper`; false if it is not ready now, or was made of other sources than those on the disk."""
        if not self.ready or self._cache != cache_dir():
            return False
        helper, log = self._take()
        if helper is None or log is None:
            return False
        try:
            with log, _ended_with_us(helper), contextlib.suppress(BrokenPipeError):
                assert helper.stdin
                helper.stdin.write(argument.encode() + b"\n")
                helper.stdin.flush()
                _wait_for(helper)
                if helper.returncode not in (0, _UNFIT):
                    log.seek(0)
                    raise CompileError(path, log.read()[-4000:])
        finally:
            self._start()
        return helper.returncode == 0

    def _take(self) -> tuple[subprocess.Popen[bytes] | None, IO[str] | None]:
        with self._lock:
            taken, self._helper, self._log = (self._helper, self._log), None, None
        return taken

    def close(self) -> None:
        """End it. A compile under way is ended by whoever waits for it."""
        with self._lock:
            self._closed = True
        helper, log = self._take()
        if helper is not None and log is not None:
            with log, _ended_with_us(helper):
                pass


@contextlib.contextmanager
def _ended_with_us(helper: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The helper; it and whatever it started are killed if it still runs in the end."""
    try:
        yield helper
    finally:
        if helper.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(helper.pid, signal.SIGKILL)
            helper.wait()
        if helper.stdin:
            helper.stdin.close()


def _wait_for(helper: subprocess.Popen[bytes]) -> None:
    watch = _watch.get()
    while True:
        if watch and watch():
            raise CompileStopped("the compile was stopped")
        try:
            helper.wait(_WATCH_S)
            return
        except subprocess.TimeoutExpired:
            continue


def _end_with_parent() -> None:
    """In the helper: our standard input is a pipe that nobody writes to, and ends when the process at its other end does."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _prepare(like: Path) -> dict[Path, bytes]:
    """Import what a module's compile needs, at low priority; the sources that were imported.

    It is done in a thread: a process that has lowered its own priority may not raise it again.
    """
    from tickmesh.transports import codecache

    imported: dict[Path, bytes] = {}

    def work() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, _PREPARING_NICE)  # of this thread
        before = codecache.source_closure(like)
        codecache.import_generated(like)
        numba.njit(_anything)(1.0)  # what numba makes ready at its first compile
        imported.update((path, source) for path, source in codecache.source_closure(like).items() if before.get(path) == source)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return imported


def _anything(number: Any) -> Any:
    return number + 1


def _wait_for_order(like: Path) -> str:
    """As a :class:`ReadyHelper`: what to compile. Ends the process if nothing comes, or if it is made of other sources than those here."""
    from tickmesh.transports import codecache

    imported = _prepare(like)
    print("ready", flush=True)
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            os._exit(1)
        line += byte
    argument = line.decode().strip()
    loaded = {getattr(module, "__file__", None) for module in sys.modules.values()}
    for path, source in codecache.source_closure(Path(argument)).items():
        if str(path) in loaded and imported.get(path) != source:
            os._exit(_UNFIT)
    return argument


def _main(argument: str, *more: str) -> None:
    from tickmesh.transports import codecache  # the canonical module, not __main__: its locator is the registered one
    from tickmesh.transports.parts import keep_parts

    if argument == _WAIT:
        argument = _wait_for_order(Path(more[0]))
    _end_with_parent()
    gc.disable()  # numba makes millions of small objects, and we end soon: collecting them is an eighth of the time
    generated = argument.endswith(".py")
    module = codecache.import_generated(Path(argument)) if generated else importlib.import_module(argument)
    for source in codecache.source_closure(Path(str(module.__file__))):
        codecache.source_key(source)  # now: a file that is edited while this compiles is not what was imported
    with keep_parts(cache_dir() / "parts"):
        module.warm()
    marker = codecache._done_marker(Path(str(module.__file__)))
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()


if __name__ == "__main__":
    _main(*sys.argv[1:])
