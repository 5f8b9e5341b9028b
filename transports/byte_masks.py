"""Many bytes at a time, for text protocols: where a byte occurs in 64, the sum of a run of bytes.

Plain vector code of LLVM: AVX-512 or AVX2 on x86, NEON on ARM. What is read may reach 63 bytes past the run (:data:`SLACK_BYTES`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from tickmesh.transports.toolbox import count_trailing_zeros, inlined

SLACK_BYTES = 64
"""Readable bytes that must lie behind a buffer."""
_PER_ROUND = 12
PLACES_SLACK = 64 + _PER_ROUND

_I64, _I32, _I8, _I1 = ir.IntType(64), ir.IntType(32), ir.IntType(8), ir.IntType(1)
_LANES = 64
_V64 = ir.VectorType(_I8, _LANES)
_ZEROS = ir.Constant(_V64, [0] * _LANES)


def _bytes_at(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    pointer = builder.gep(context.make_array(array_type)(context, builder, array).data, [index])
    return builder.load(builder.bitcast(pointer, _V64.as_pointer()), align=1)


@intrinsic  # type: ignore[untyped-decorator]
def equal_mask64(typingctx: Any, buffer: Any, offset: Any, byte: Any) -> Any:
    """u64 whose bit i is set where ``buffer[offset + i] == byte``, for 64 bytes of a u8 array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        found = _bytes_at(context, builder, sig.args[0], args[0], args[1])
        first = builder.insert_element(ir.Constant(_V64, ir.Undefined), args[2], _I32(0))
        wanted = builder.shuffle_vector(first, ir.Constant(_V64, ir.Undefined), ir.Constant(ir.VectorType(_I32, _LANES), [0] * _LANES))
        return builder.bitcast(builder.icmp_unsigned("==", found, wanted), _I64)

    return types.uint64(buffer, types.intp, types.uint8), codegen


@intrinsic  # type: ignore[untyped-decorator]
def byte_sum(typingctx: Any, buffer: Any, offset: Any, count: Any) -> Any:
    """Sum, modulo 256, of ``buffer[offset:offset + count]`` of a u8 array, as u64; `count` at least 0."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = context.make_array(sig.args[0])(context, builder, args[0]).data
        total = cgutils.alloca_once_value(builder, _ZEROS)
        whole = builder.and_(args[2], _I64(-_LANES))
        with cgutils.for_range_slice(builder, _I64(0), whole, _I64(_LANES), _I64) as (at, _):
            pointer = builder.gep(array, [builder.add(args[1], at)])
            piece = builder.load(builder.bitcast(pointer, _V64.as_pointer()), align=1)
            builder.store(builder.add(builder.load(total), piece), total)
        rest = builder.and_(args[2], _I64(_LANES - 1))
        pointer = builder.gep(array, [builder.add(args[1], whole)])
        piece = builder.load(builder.bitcast(pointer, _V64.as_pointer()), align=1)
        chosen = builder.sub(builder.shl(_I64(1), rest), _I64(1))
        kept = builder.select(builder.bitcast(chosen, ir.VectorType(_I1, _LANES)), piece, _ZEROS)
        kind = ir.FunctionType(_I8, [_V64])
        reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.add.v64i8")
        return builder.zext(builder.call(reduce, [builder.add(builder.load(total), kept)]), _I64)

    return types.uint64(buffer, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def count_bits(typingctx: Any, word: Any) -> Any:
    """Number of set bits of a u64, as i64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


@inlined
def _put_places_by_bits(found: Any, shift: Any, places: Any, count: Any) -> Any:
    """Twelve are written per round whether they are there or not: no branch depends on how many a block has, within the usual."""
    while True:
        for k in range(_PER_ROUND):
            places[np.uint64(count + k)] = np.int32(shift) + np.int32(count_trailing_zeros(found))
            found &= found - np.uint64(1)
        if found == np.uint64(0):
            break
        count += _PER_ROUND


@intrinsic  # type: ignore[untyped-decorator]
def _put_places_at_once(typingctx: Any, found: Any, shift: Any, places: Any, count: Any) -> Any:
    """The same by one compression of the offsets (AVX-512 VBMI2): sixteen are written, or all 64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir.VectorType(_I1, _LANES))
        offsets = ir.Constant(_V64, list(range(_LANES)))
        kind = ir.FunctionType(_V64, [_V64, ir.VectorType(_I1, _LANES), _V64])
        compress = cgutils.get_or_insert_function(builder.module, kind, "llvm.experimental.vector.compress.v64i8")
        packed = builder.call(compress, [offsets, bits, ir.Constant(_V64, ir.Undefined)])
        sixteen = ir.VectorType(_I32, 16)
        first = builder.insert_element(ir.Constant(sixteen, ir.Undefined), builder.trunc(args[1], _I32), _I32(0))
        shifts = builder.shuffle_vector(first, ir.Constant(sixteen, ir.Undefined), ir.Constant(sixteen, [0] * 16))
        target = builder.gep(context.make_array(sig.args[2])(context, builder, args[2]).data, [args[3]])

        def put(part: int) -> None:
            lanes = ir.Constant(sixteen, list(range(16 * part, 16 * part + 16)))
            taken = builder.shuffle_vector(packed, ir.Constant(_V64, ir.Undefined), lanes)
            place = builder.bitcast(builder.gep(target, [_I64(16 * part)]), sixteen.as_pointer())
            builder.store(builder.add(builder.zext(taken, sixteen), shifts), place, align=4)

        put(0)
        with builder.if_then(builder.icmp_unsigned(">", builder.ctpop(args[0]), _I64(16)), likely=False):
            for part in (1, 2, 3):
                put(part)
        return context.get_dummy_value()

    return types.void(types.uint64, types.int64, places, types.intp), codegen


COMPRESSES = bool(binding.get_host_cpu_features().get("avx512vbmi2"))
_put_places = _put_places_at_once if COMPRESSES else _put_places_by_bits


@inlined
def find_all(buffer: Any, first: Any, end: Any, byte: Any, places: Any, origin: Any) -> Any:
    """Write where every `byte` of ``buffer[first:end]`` is, counted from `origin`, to `places`, i32, with room for PLACES_SLACK more.

    Returns:
        How many there are, i64.
    """
    count, base = np.int64(0), np.int64(first)
    while base < end:
        found = equal_mask64(buffer, base, byte)
        if end - base < 64:
            found &= (np.uint64(1) << np.uint64(end - base)) - np.uint64(1)
        _put_places(found, base - origin, places, count)
        count += count_bits(found)
        base += 64
    return count
