"""How numba compiles the parts of loops and the loops themselves, and how parts are kept on disk between compiles.

A part stops at LLVM's input: it is optimised once, inside the loop that contains it. It holds its own code only and names the parts that it
calls, so that a loop links each of them once, and so that one can be kept and taken again without those around it.

To lower Python to LLVM's input is the most of a compile, and an edit of a user's calculation leaves nearly all parts as they are. A helper
process therefore keeps the parts of our own modules (:func:`keep_parts`), under a key of everything that they come of: the sources of
their module and of all it imports, the compiler and the processor (:func:`tickmesh.transports.codecache.source_key`), and the types of
their arguments. The same key is their name in LLVM, so that a kept part finds the parts it calls, kept or made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llvmlite import binding
from llvmlite.binding import Linkage
from numba import types
from numba.core import itanium_mangler, typing
from numba.core.caching import NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, compile_result
from numba.core.funcdesc import PythonFunctionDescriptor

from tickmesh.transports.codecache import source_key
from tickmesh.transports.references import Reference

_OWN = ("tickmesh", "tickmesh_generated")
_KEPT_PACKAGE = "tickmesh"
"""Parts of generated modules and of users' code change with the configuration: they are compiled each time, and kept in their loop only."""
_KEPT_MAX = 8192
"""Parts on disk; the demonstration's node is made of some 180."""
_DESCRIBED = ("native", "modname", "qualname", "unique_name", "doc", "args", "kws", "inline", "noalias", "abi_tags", "uid")
_NAMED = (types.Number, types.Boolean, types.NoneType, types.Array, types.Record, types.NestedArray, types.Literal, types.Omitted)
"""Types whose name says everything about them; tuples are looked into."""


# ---------------------------------------------------------------- what a part is known by


def _type_text(kind: Any) -> str | None:
    """A type in words that are the same in every process; None if there are none, as for a function."""
    if isinstance(kind, Reference):
        target = _type_text(kind.target)
        return target and f"Reference({target})"
    if isinstance(kind, types.BaseTuple):
        inner = [_type_text(one) for one in kind.types]
        made = getattr(kind, "instance_class", None)
        name = f"{made.__module__}.{made.__qualname__}{made._fields}" if made else type(kind).__name__
        return None if None in inner else f"{name}({inner})"
    return f"{type(kind).__name__}:{kind}" if isinstance(kind, _NAMED) else None


def part_key(function: Any, inline: bool, arguments: tuple[Any, ...]) -> str | None:
    """Hash of everything that a part's code comes of; None for one that cannot be known by that: not ours, a closure, unusual types."""
    if (function.__module__ or "").split(".")[0] not in _OWN or function.__closure__:
        return None
    code, kinds = function.__code__, [_type_text(kind) for kind in arguments]
    if None in kinds:
        return None
    place = (source_key(Path(code.co_filename)), function.__module__, function.__qualname__, code.co_firstlineno, inline)
    return hashlib.sha256(repr((place, kinds)).encode()).hexdigest()[:32]


def _short_names(name: str, argtypes: Any, *, abi_tags: Any = (), uid: Any = None) -> str:
    """Names in LLVM without the types of arguments, which the key in `uid` stands for: a shard's would fill pages, at every call."""
    return str(itanium_mangler.mangle(name, (), abi_tags=abi_tags, uid=uid))


# ---------------------------------------------------------------- libraries and compilers


class PartLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code that only ever becomes a part of a loop: kept as it was lowered, optimised once, inside the loop.

    numba would optimise every helper, and every helper that calls it, by itself: minutes instead of seconds for a whole shard loop.

    Attributes:
        key: see :func:`part_key`.
        parts: those it calls, which are linked by the loop.
    """

    def __init__(self, codegen: Any, name: str) -> None:
        super().__init__(codegen, name)
        self.key: str | None = None
        self.parts: list[PartLibrary] = []

    def add_linking_library(self, library: Any) -> None:
        if not isinstance(library, PartLibrary):
            super().add_linking_library(library)
        elif library is not self and library not in self.parts:
            library._ensure_finalized()
            self.parts.append(library)

    def close(self, own: str) -> None:
        """Finish it; what numba has put beside its `own` function (its ``min``, say) becomes internal, since numba's names are numbered."""
        self._ensure_finalized()
        for function in self._final_module.functions:
            if not function.is_declaration:
                function.linkage = Linkage.weak_odr if function.name == own else Linkage.internal  # linkonce: lost before its callers come

    def take(self, bitcode: bytes) -> None:
        """Be a part that was closed and kept."""
        self._final_module = binding.parse_bitcode(bitcode)
        self._finalize_final_module()

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


class _LoopLibrary(JITCodeLibrary):  # type: ignore[misc]
    """A complete loop: what it is made of serves nobody else, which lets LLVM drop unused arguments, and code once it is inlined.

    Nor does it call parts of another loop: the linker would take the first of a name, which goes when its own loop goes.
    """

    def add_linking_library(self, library: Any) -> None:
        todo = [library]
        while todo:
            one = todo.pop()
            if one not in self._linking_libraries:
                super().add_linking_library(one)
                todo += getattr(one, "parts", ())

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage in (Linkage.linkonce_odr, Linkage.weak_odr):
                function.linkage = Linkage.internal
        super()._optimize_final_module()


class _OurCompiler(Compiler):  # type: ignore[misc]
    """numba's pipeline, with names that are the same in every process."""

    def _compile_bytecode(self) -> Any:
        identity = self.state.func_id
        key = part_key(identity.func, bool(self.state.flags.forceinline), tuple(self.state.args))
        if key is not None:
            identity.unique_id, identity.unique_name = key, f"{identity.func_qualname}${key}"
            self.state.targetctx.mangler = _short_names  # the context is this compile's own
        if isinstance(self.state.library, PartLibrary):
            self.state.library.key = key
        return super()._compile_bytecode()


class PartCompiler(_OurCompiler):
    """numba's pipeline without machine code at the end."""

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals: Any) -> None:
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)
        self.state.library = PartLibrary(targetctx.codegen(), "part")


class LoopCompiler(_OurCompiler):
    """numba's pipeline, ending in a :class:`_LoopLibrary`; without the wrapper for callers in C, of which there are none."""

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals: Any) -> None:
        flags.no_cfunc_wrapper = True
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)
        self.state.library = _LoopLibrary(targetctx.codegen(), "loop")
        self.state.library.enable_object_caching()


# ---------------------------------------------------------------- parts on disk


class _Store:
    """Parts in a folder, a file each, and those that this process has taken from it or put there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[str, PartLibrary] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, library: PartLibrary, described: bytes) -> None:
        """Keep a part that is closed."""
        assert library.key
        self._libraries[library.key] = library
        content = pickle.dumps((library._final_module.as_bitcode(), [part.key for part in library.parts], described))
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".tmp", delete=False) as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(file.name, self._folder / library.key)

    def load(self, key: str, codegen: Any) -> tuple[PartLibrary, bytes] | None:
        """A part with those it calls, and what was said about it; None if one of them is missing or damaged."""
        content = self._read(key)
        if content is None:
            return None
        bitcode, keys, described = pickle.loads(content)
        if key not in self._libraries:
            library = PartLibrary(codegen, "part")
            for one in keys:
                found = (self._libraries[one], b"") if one in self._libraries else self.load(one, codegen)
                if found is None:
                    return None
                library.parts.append(found[0])
            library.take(bitcode)
            library.key = key
            self._libraries[key] = library
        return self._libraries[key], described

    def _read(self, key: str) -> bytes | None:
        path = self._folder / key
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None

    def prune(self) -> None:
        """Delete the parts that have not been used for longest, beyond those that may stay."""
        used = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(OSError):
                used.append((entry.stat().st_mtime, entry.path))
        for _, path in sorted(used)[:-_KEPT_MAX]:
            with contextlib.suppress(OSError):
                os.unlink(path)


_store: _Store | None = None


@contextlib.contextmanager
def keep_parts(folder: Path) -> Iterator[None]:
    """While it lasts, parts of our own modules are taken from a folder, and those that are not there are put there."""
    global _store
    _store = _Store(folder)
    try:
        yield
        _store.prune()
    finally:
        _store = None


class PartCache(NullCache):  # type: ignore[misc]
    """Where numba looks for a part before it compiles it, and leaves it then: nowhere, unless inside :func:`keep_parts`."""

    def __init__(self, function: Any, inline: bool) -> None:
        self._function, self._inline = function, inline
        self._kept = (function.__module__ or "").split(".")[0] == _KEPT_PACKAGE

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        if _store is None or not self._kept:
            return None
        key = part_key(self._function, self._inline, tuple(sig))
        found = _store.load(key, target_context.codegen()) if key else None
        if found is None:
            return None
        library, described = found
        return_type, description = pickle.loads(described)
        fndesc = PythonFunctionDescriptor(
            **description, typemap=None, restype=return_type, calltypes=None, mangler=_short_names, argtypes=tuple(sig)
        )
        return compile_result(
            typing_context=target_context.typing_context,
            target_context=target_context,
            signature=typing.signature(return_type, *sig),
            library=library,
            fndesc=fndesc,
            objectmode=False,
            lifted=(),
            reload_init=(),
        )

    def save_overload(self, sig: Any, result: Any) -> None:
        library = result.library
        if _store is None or not self._kept or not library.key or library.has_dynamic_globals or library._reload_init:
            return
        if all(part.key for part in library.parts):
            description = {name: getattr(result.fndesc, name) for name in _DESCRIBED}
            _store.save(library, pickle.dumps((result.signature.return_type, description)))
