"""C++ peers of the benchmarks: compiled on the host that measures, kept in the cache by the hash of source and compiler."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from tickmesh.transports.codecache import cache_dir

_OPTIONS = ("-O3", "-march=native", "-DNDEBUG", "-std=c++20")


def build_peer(source_name: str, compiler: str, *, shared: bool = True) -> Path:
    """Compile a source file of this folder, once per source and compiler.

    Args:
        source_name: e.g. ``"book_peer.cpp"``.
        compiler: e.g. ``"g++"``.
        shared: make a shared library, otherwise a program.

    Raises:
        subprocess.CalledProcessError: it does not compile.
        FileNotFoundError: there is no such compiler.
    """
    source = Path(__file__).with_name(source_name)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(source.read_bytes() + version.encode() + repr(_OPTIONS).encode()).hexdigest()[:16]
    target = cache_dir() / "bench" / f"{source.stem}-{Path(compiler).name}-{digest}{'.so' if shared else ''}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}")
        options = [*_OPTIONS, *(("-shared", "-fPIC") if shared else ())]
        subprocess.run([compiler, *options, "-o", temporary, source], check=True, capture_output=True, text=True)
        temporary.replace(target)
    return target


def built_peers(source_name: str, *, shared: bool = True) -> tuple[dict[str, Path], dict[str, str]]:
    """A source file built by each compiler of this host.

    Args:
        source_name, shared: see :func:`build_peer`.

    Returns:
        What was built, by compiler; why the others could not, by compiler.
    """
    built: dict[str, Path] = {}
    skipped: dict[str, str] = {}
    for compiler in ("g++", "clang++"):
        if shutil.which(compiler) is None:
            skipped[compiler] = "not installed"
            continue
        try:
            built[compiler] = build_peer(source_name, compiler, shared=shared)
        except subprocess.CalledProcessError as error:
            skipped[compiler] = f"does not build: {(error.stderr or '')[-400:]}"
    return built, skipped
