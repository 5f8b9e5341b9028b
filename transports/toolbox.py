"""The compiled toolbox: the only file with LLVM code. Decorators for hot functions, atomics, unaligned loads, bit tricks, clocks.

Everything compiled in tickmesh uses one of three decorators:

* ``inlined``: a small helper, always inlined into the loop that calls it;
* ``outlined``: a rare or batch-sized step, kept out of line;
* ``loop``: an entry point called from Python; runs without the GIL and is cached on disk (see :mod:`tickmesh.transports.codecache`).

``_nrt=False`` removes reference counting and turns any allocation into a compile error, so the hot path cannot allocate.
It is a private option of numba, which is why the version is pinned and a test looks for NRT calls in the assembly.
Set ``TICKMESH_BOUNDSCHECK=1`` to compile with array bounds checks (used by the fuzz tests).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic

from tickmesh.transports.parts import LoopCompiler, PartCache, PartCompiler

BOUNDSCHECK = os.environ.get("TICKMESH_BOUNDSCHECK") == "1"
_FLAGS: dict[str, Any] = {"_nrt": False, "error_model": "numpy", "nogil": True, "boundscheck": BOUNDSCHECK}

CACHE_LINE_BYTES = 64
_I64, _I32, _I8 = ir.IntType(64), ir.IntType(32), ir.IntType(8)


def _part(function: Any, attribute: str | None = None, **options: Any) -> Any:
    """A dispatcher for use inside loops; called from Python (tests do) it compiles a complete twin. `attribute` is one of LLVM's."""
    part = njit(function, pipeline_class=PartCompiler, **options)
    part._cache = PartCache(function, options["forceinline"])
    complete: list[Any] = []

    def add_overload(result: Any) -> None:
        result.library.close(result.fndesc.llvm_func_name)
        if attribute:
            result.library.get_function(result.fndesc.llvm_func_name).add_function_attribute(attribute)
        identity = object()  # callers find the code by it; a complete function has its address here
        part.overloads[tuple(result.signature.args)] = result._replace(entry_point=identity)
        part.targetctx.insert_user_function(identity, result.fndesc, [result.library])

    def compile_for_python(*args: Any, **kwargs: Any) -> Any:
        if not complete:
            complete.append(njit(function, pipeline_class=LoopCompiler, **options))
        return complete[0]

    part.add_overload = add_overload
    part._compile_for_args = compile_for_python
    return part


def inlined(function: Any) -> Any:
    """Compile a small helper that LLVM always inlines into its caller."""
    return _part(function, forceinline=True, **_FLAGS)


def outlined(function: Any) -> Any:
    """Compile a step that stays out of line: rare paths, and work done once per batch."""
    # forceinline must be said: numba lets a function inherit the flag from the caller that happens to compile it first
    return _part(function, "noinline", forceinline=False, **_FLAGS)


def loop(function: Any) -> Any:
    """Compile an entry point: runs without the GIL, never allocates, cached on disk."""
    return njit(function, cache=True, pipeline_class=LoopCompiler, forceinline=False, **_FLAGS)


def quick(function: Any) -> Any:
    """As :func:`loop`, for what takes microseconds: it keeps the GIL, since getting it back would take longer than the work."""
    return njit(function, cache=True, pipeline_class=LoopCompiler, forceinline=False, **{**_FLAGS, "nogil": False})


def zeros_aligned(count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A zeroed array that begins a cache line, so that 64-byte records never lie across two (numpy aligns to 16 bytes)."""
    size = count * np.dtype(dtype).itemsize
    memory = np.zeros(size + CACHE_LINE_BYTES, np.uint8)
    first = -memory.ctypes.data % CACHE_LINE_BYTES
    return memory[first : first + size].view(dtype)


def _element(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Pointer to ``array[index]``, unchecked."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


# ---------------------------------------------------------------- atomics


@intrinsic  # type: ignore[untyped-decorator]
def load_acquire(typingctx: Any, array: Any, index: Any) -> Any:
    """``array[index]`` with acquire ordering. 32- and 64-bit integer arrays."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _element(context, builder, sig.args[0], args[0], args[1])
        return builder.load_atomic(pointer, "acquire", sig.args[0].dtype.bitwidth // 8)

    return array.dtype(array, types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def store_release(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index] = value`` with release ordering."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _element(context, builder, sig.args[0], args[0], args[1])
        builder.store_atomic(args[2], pointer, "release", sig.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), codegen


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Atomically add to ``array[index]``; returns the value before."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _element(context, builder, sig.args[0], args[0], args[1])
        return builder.atomic_rmw("add", pointer, args[2], "acq_rel")

    return array.dtype(array, types.intp, array.dtype), codegen


@intrinsic  # type: ignore[untyped-decorator]
def compare_and_swap(typingctx: Any, array: Any, index: Any, expected: Any, value: Any) -> Any:
    """Atomically replace ``array[index]`` if it equals `expected`; returns whether it did."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _element(context, builder, sig.args[0], args[0], args[1])
        result = builder.cmpxchg(pointer, args[2], args[3], "acq_rel", "acquire")
        return builder.extract_value(result, 1)

    return types.boolean(array, types.intp, array.dtype, array.dtype), codegen


@intrinsic  # type: ignore[untyped-decorator]
def full_fence(typingctx: Any) -> Any:
    """A sequentially consistent memory fence."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


# ---------------------------------------------------------------- the processor


@intrinsic  # type: ignore[untyped-decorator]
def cpu_pause(typingctx: Any) -> Any:
    """The spin-wait hint (x86 ``pause``). Inline assembly would abort: numba never initialises LLVM's parser for it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def cycle_counter(typingctx: Any) -> Any:
    """The processor's time-stamp counter (``rdtsc``), i64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I64, [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), [])

    return types.int64(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of ``array[index]``, to be read and written soon."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.bitcast(_element(context, builder, sig.args[0], args[0], args[1]), _I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


# ---------------------------------------------------------------- bytes


def _make_load(bits: int, swapped: bool) -> Any:
    kind = ir.IntType(bits)
    result = {16: types.uint16, 32: types.uint32, 64: types.uint64}[bits]

    @intrinsic  # type: ignore[untyped-decorator]
    def load(typingctx: Any, buffer: Any, offset: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = _element(context, builder, sig.args[0], args[0], args[1])
            value = builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)
            return builder.bswap(value) if swapped else value

        return result(buffer, types.intp), codegen

    return load


le16, le32, le64 = (_make_load(bits, False) for bits in (16, 32, 64))
"""Unaligned little-endian loads: ``le32(buffer_u8, byte_offset)`` -> uint32."""
be16, be32, be64 = (_make_load(bits, True) for bits in (16, 32, 64))
"""Unaligned big-endian loads: ``be32(buffer_u8, byte_offset)`` -> uint32."""


def _make_store(bits: int, swapped: bool) -> Any:
    kind = ir.IntType(bits)
    value_type = {16: types.uint16, 32: types.uint32, 64: types.uint64}[bits]

    @intrinsic  # type: ignore[untyped-decorator]
    def store(typingctx: Any, buffer: Any, offset: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = _element(context, builder, sig.args[0], args[0], args[1])
            word = builder.bswap(args[2]) if swapped else args[2]
            builder.store(word, builder.bitcast(pointer, kind.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(buffer, types.intp, value_type), codegen

    return store


put_le16, put_le32, put_le64 = (_make_store(bits, False) for bits in (16, 32, 64))
"""Unaligned little-endian stores: ``put_le32(buffer_u8, byte_offset, value)``."""
put_be16, put_be32, put_be64 = (_make_store(bits, True) for bits in (16, 32, 64))
"""Unaligned big-endian stores: ``put_be32(buffer_u8, byte_offset, value)``."""


@intrinsic  # type: ignore[untyped-decorator]
def count_trailing_zeros(typingctx: Any, word: Any) -> Any:
    """Index of the lowest set bit of a u64 (64 for zero)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(0))

    return types.uint64(types.uint64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def count_leading_zeros(typingctx: Any, word: Any) -> Any:
    """Number of zero bits above the highest set bit of a u64 (64 for zero)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ctlz(args[0], ir.IntType(1)(0))

    return types.uint64(types.uint64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def f64_bits(typingctx: Any, value: Any) -> Any:
    """The bits of a float64 as i64 (how an event's ``aux`` carries a signal)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _I64)

    return types.int64(types.float64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def bits_f64(typingctx: Any, bits: Any) -> Any:
    """The float64 whose bits are the i64 `bits`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def copy_record(typingctx: Any, target: Any, target_index: Any, source: Any, source_index: Any) -> Any:
    """``target[target_index] = source[source_index]`` for record arrays of one dtype, as one block copy."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        to = _element(context, builder, sig.args[0], args[0], args[1])
        fro = _element(context, builder, sig.args[2], args[2], args[3])
        size = context.get_constant(types.intp, sig.args[0].dtype.size)
        cgutils.raw_memcpy(builder, to, fro, size, 1, align=8)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def address_of(typingctx: Any, array: Any, index: Any) -> Any:
    """Address of ``array[index]`` as u64, for passing to libc."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(_element(context, builder, sig.args[0], args[0], args[1]), _I64)

    return types.uint64(array, types.intp), codegen


# ---------------------------------------------------------------- libc: clocks and yielding

_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uint64))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


@intrinsic  # type: ignore[untyped-decorator]
def _clock_ns(typingctx: Any, clock: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        spec = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        pointer = builder.bitcast(spec, _I8.as_pointer())
        kind = ir.FunctionType(_I32, [_I32, _I8.as_pointer()])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "clock_gettime"), [args[0], pointer])
        seconds = builder.load(builder.gep(spec, [_I32(0), _I32(0)]))
        nanos = builder.load(builder.gep(spec, [_I32(0), _I32(1)]))
        return builder.add(builder.mul(seconds, _I64(1_000_000_000)), nanos)

    return types.int64(types.int32), codegen


@inlined
def now_ns() -> Any:
    """Wall clock (``CLOCK_REALTIME``), nanoseconds since the epoch, i64. Never used for a decision inside a shard."""
    return _clock_ns(0)


@inlined
def monotonic_ns() -> Any:
    """Monotonic clock in nanoseconds, i64."""
    return _clock_ns(1)


IDLE_SPIN, IDLE_YIELD, IDLE_SLEEP = 0, 1, 2
IDLE_MODES = {"spin": IDLE_SPIN, "yield": IDLE_YIELD, "sleep": IDLE_SLEEP}
_SPINS_BEFORE_YIELD = 64
_YIELDS_BEFORE_SLEEP = 256
_SLEEP_US_MAX = 1000


@inlined
def idle(mode: Any, rounds: Any) -> Any:
    """Wait a moment in a polling loop; returns the next `rounds` (start at 0, reset to 0 after work).

    ``spin`` burns the core for the lowest latency; ``yield`` gives it to others; ``sleep`` backs off to 1 ms (a laptop's choice).
    """
    if mode == IDLE_SPIN or rounds < _SPINS_BEFORE_YIELD:
        cpu_pause()
    elif mode == IDLE_YIELD or rounds < _YIELDS_BEFORE_SLEEP:
        _sched_yield()
    else:
        _usleep(types.uint32(min(_SLEEP_US_MAX, 20 + (rounds - _YIELDS_BEFORE_SLEEP) * 4)))
    return rounds + 1


# ---------------------------------------------------------------- bells

# linux/futex.h
_FUTEX_WAIT, _FUTEX_WAKE, _PRIVATE = 0, 1, 128
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
_SYS_FUTEX_WAITV, _SIZE_U32, _CLOCK_MONOTONIC = 449, 2, 1
_EVERYBODY, _BELLS_MAX = (1 << 31) - 1, 128
SLEEPER = np.dtype([("value", "<u8"), ("address", "<u8"), ("flags", "<u4"), ("reserved", "<u4")])
"""The kernel's ``struct futex_waitv``: one of several bells that somebody sleeps at."""


def _timespec(builder: Any, nanos: Any) -> Any:
    """Address of a ``struct timespec`` of so many nanoseconds, as i64."""
    spec, second = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2)), _I64(1_000_000_000)
    builder.store(builder.sdiv(nanos, second), builder.gep(spec, [_I32(0), _I32(0)]))
    builder.store(builder.srem(nanos, second), builder.gep(spec, [_I32(0), _I32(1)]))
    return builder.ptrtoint(spec, _I64)


def _system_call(builder: Any, numbers: list[Any]) -> Any:
    """syscall(2) with these i64, the call's number first; its result, i64."""
    kind = ir.FunctionType(_I64, [_I64], var_arg=True)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "syscall"), numbers)


@intrinsic  # type: ignore[untyped-decorator]
def _futex(typingctx: Any, address: Any, operation: Any, value: Any, timeout_ns: Any) -> Any:
    """futex(2) on the 32 bits at an address, with a relative timeout; what it returns is of no interest."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _system_call(builder, [_I64(_SYS_FUTEX), args[0], args[1], args[2], _timespec(builder, args[3])])
        return context.get_dummy_value()

    return types.none(types.uint64, types.int64, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _futex_waitv(typingctx: Any, address: Any, count: Any, until_ns: Any) -> Any:
    """futex_waitv(2) on an array of :data:`SLEEPER`, until a time of the monotonic clock; -1: nobody was woken."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        until = _timespec(builder, args[2])
        return _system_call(builder, [_I64(_SYS_FUTEX_WAITV), args[0], args[1], _I64(0), until, _I64(_CLOCK_MONOTONIC)])

    return types.int64(types.uint64, types.int64, types.int64), codegen


@inlined
def ring_bell(words: Any, bell: Any) -> Any:
    """Wake whoever sleeps at ``words[bell]`` (u64, of this process alone), after what it waits for was stored. Cheap if nobody does."""
    full_fence()  # what was stored before is seen by whoever is about to sleep, or we see that it is
    if load_acquire(words, bell) != 0:
        _wake_all(words, bell, np.int64(_FUTEX_WAKE | _PRIVATE))


@inlined
def ring_shared_bell(words: Any, bell: Any) -> Any:
    """As :func:`ring_bell`, for memory that processes share, and without its fence: rarely, somebody sleeps on until its limit."""
    if load_acquire(words, bell) != 0:
        _wake_all(words, bell, np.int64(_FUTEX_WAKE))


@outlined
def _wake_all(words: Any, bell: Any, operation: Any) -> Any:
    store_release(words, bell, np.uint64(0))
    _futex(address_of(words, bell), operation, np.int64(_EVERYBODY), np.int64(0))


@inlined
def announce_sleep(words: Any, bell: Any) -> Any:
    """Say that we are about to sleep at a bell. Look once more, before :func:`sleep_at_bell`, whether that is needed."""
    store_release(words, bell, np.uint64(1))
    full_fence()


@outlined
def sleep_at_bell(words: Any, bell: Any, limit_ns: Any) -> Any:
    """Sleep until the bell at ``words[bell]`` is rung, if it was not since :func:`announce_sleep`, or for `limit_ns`; may wake early."""
    _futex(address_of(words, bell), np.int64(_FUTEX_WAIT | _PRIVATE), np.int64(1), np.int64(limit_ns))


@inlined
def choose_bell(sleepers: Any, index: Any, words: Any, bell: Any) -> Any:
    """Make ``words[bell]``, which others may share, the bell number `index` (of SLEEPER) that :func:`sleep_at_bells` sleeps at."""
    sleepers[index].value, sleepers[index].address = np.uint64(1), address_of(words, bell)
    sleepers[index].flags = np.uint32(_SIZE_U32)


@outlined
def sleep_at_bells(sleepers: Any, count: Any, limit_ns: Any) -> Any:
    """Sleep until one of the first `count` bells is rung, or for `limit_ns`; may wake early. See :func:`announce_sleep`."""
    _futex_waitv(address_of(sleepers, 0), np.int64(count), monotonic_ns() + limit_ns)


@cache
def _sleeps_at_several() -> bool:
    """Whether the kernel has futex_waitv(2): a sleep at a bell that nobody rings ends when its time is over."""
    bell, until = np.ones(1, np.uint64), np.zeros(2, np.int64)
    sleeper = np.array([(1, bell.ctypes.data, _SIZE_U32, 0)], SLEEPER)
    call = ctypes.CDLL(None, use_errno=True).syscall
    numbers = (_SYS_FUTEX_WAITV, sleeper.ctypes.data, 1, 0, until.ctypes.data, _CLOCK_MONOTONIC)
    while call(*map(ctypes.c_long, numbers)) == -1 and ctypes.get_errno() == errno.EINTR:
        pass
    return ctypes.get_errno() == errno.ETIMEDOUT


def make_sleepers(count: int) -> npt.NDArray[np.void]:
    """SLEEPER array for so many bells; empty if this kernel cannot sleep at so many (Linux before 5.16 at none, later ones at 128)."""
    return zeros_aligned(count if count <= _BELLS_MAX and _sleeps_at_several() else 0, SLEEPER)
