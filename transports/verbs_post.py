"""Posting writes and polling completions from compiled code, through the device's operation table.

``ibv_post_send`` and its like are inline functions of infiniband/verbs.h: they call what the queue pair's context has in its table of
operations. Compiled code does the same, so that a write costs no Python. The layouts are the stable ABI of libibverbs (1.1 and later,
64-bit Linux); ``tests/test_verbs.py`` compares them with the header where there is one. Nothing here needs the library.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from tickmesh.transports.toolbox import address_of, inlined, outlined, quick, zeros_aligned
from tickmesh.transports.verbs import F_IMMEDIATE, F_INLINE, F_SIGNALED, Poster

# ---------------------------------------------------------------- layouts

OPERATIONS_OFFSET, POLL_CQ_OFFSET, POST_SEND_OFFSET, POST_RECV_OFFSET = 8, 88, 200, 208
"""Of ``ops`` in ``struct ibv_context``, and of three of its members in ``struct ibv_context_ops``."""
SEND_WR = np.dtype(
    {
        "names": ["id", "next", "pieces", "pieces_count", "opcode", "flags", "immediate", "remote_address", "remote_key"],
        "formats": ["<u8", "<u8", "<u8", "<i4", "<u4", "<u4", "<u4", "<u8", "<u4"],
        "offsets": [0, 8, 16, 24, 28, 32, 36, 40, 48],
        "itemsize": 128,
    }
)
"""``struct ibv_send_wr`` of a write; `immediate` is in network order."""
SGE = np.dtype([("address", "<u8"), ("length", "<u4"), ("key", "<u4")])
RECV_WR = np.dtype([("id", "<u8"), ("next", "<u8"), ("pieces", "<u8"), ("pieces_count", "<i4"), ("padding", "<i4")])
WC = np.dtype(
    {
        "names": ["id", "status", "opcode", "bytes", "immediate", "flags"],
        "formats": ["<u8", "<u4", "<u4", "<u4", "<u4", "<u4"],
        "offsets": [0, 8, 12, 20, 24, 36],
        "itemsize": 48,
    }
)
"""``struct ibv_wc``; `immediate` is in network order."""
WR_WRITE, WR_WRITE_WITH_IMMEDIATE, SEND_SIGNALED, SEND_INLINE = 0, 1, 2, 8
WC_RECEIVED_WRITE = 129
"""``IBV_WC_RECV_RDMA_WITH_IMM``; the flag for an immediate says less: Soft-RoCE sets it for the sender too."""

# ---------------------------------------------------------------- kernels

C_POST_SEND, C_POST_RECV, C_POLL, C_QUEUE, C_COMPLETIONS, C_BAD = range(6)
"""Words of :class:`tickmesh.transports.verbs.Poster`'s `calls`: addresses of three functions, the queue pair, its completion queue; and
where the library says which request was bad."""
SENDS_AT_ONCE, COMPLETIONS_AT_ONCE = 16, 64
NO_QUEUE = 22
"""EINVAL: the poster has no queue, or it is closed."""


def make_poster() -> Poster:
    """Memory of a poster, whose `calls` its queue has to fill in."""
    sends, pieces = zeros_aligned(SENDS_AT_ONCE + 1, SEND_WR), zeros_aligned(SENDS_AT_ONCE, SGE)
    return Poster(zeros_aligned(8, np.uint64), sends, pieces, zeros_aligned(1, RECV_WR), zeros_aligned(COMPLETIONS_AT_ONCE, WC))


@intrinsic  # type: ignore[untyped-decorator]
def _call_at(typingctx: Any, function: Any, first: Any, second: Any, third: Any) -> Any:
    """Call the C function ``int f(u64, u64, u64)`` at an address; i64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [word, word, word])
        called = builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return builder.sext(called, word)

    return types.int64(types.uint64, types.uint64, types.uint64, types.uint64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _call_poll(typingctx: Any, function: Any, queue: Any, most: Any, entries: Any) -> Any:
    """``int poll_cq(struct ibv_cq *, int, struct ibv_wc *)`` at an address; i64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word, short = ir.IntType(64), ir.IntType(32)
        kind = ir.FunctionType(short, [word, short, word])
        called = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], builder.trunc(args[2], short), args[3]])
        return builder.sext(called, word)

    return types.int64(types.uint64, types.uint64, types.int64, types.uint64), codegen


@inlined
def byte_swapped(word: Any) -> Any:
    """Four bytes in the other order, u32: immediates are in network order."""
    x = np.uint64(word)
    y = (x & np.uint64(0xFF)) << np.uint64(24) | (x & np.uint64(0xFF00)) << np.uint64(8)
    return np.uint32(y | (x >> np.uint64(8)) & np.uint64(0xFF00) | (x >> np.uint64(24)) & np.uint64(0xFF))


@outlined
def post_writes(poster: Any, writes: Any, count: Any) -> Any:
    """Post ``writes[:count]`` (WRITE; at most SENDS_AT_ONCE) with one call; returns 0, or an errno."""
    sends, pieces, calls = poster.sends, poster.pieces, poster.calls
    if calls[C_QUEUE] == np.uint64(0):
        return np.int64(NO_QUEUE)
    for i in range(count):
        write, send, piece = writes[i], sends[i], pieces[i]
        piece.address, piece.length, piece.key = write.local, write.length, write.local_key
        send.id, send.next, send.pieces, send.pieces_count = write.id, address_of(sends, i + 1), address_of(pieces, i), np.int32(1)
        with_immediate = write.flags & np.uint32(F_IMMEDIATE) != np.uint32(0)
        send.opcode = np.uint32(WR_WRITE_WITH_IMMEDIATE) if with_immediate else np.uint32(WR_WRITE)
        send.flags = np.uint32(0)
        if write.flags & np.uint32(F_SIGNALED) != np.uint32(0):
            send.flags |= np.uint32(SEND_SIGNALED)
        if write.flags & np.uint32(F_INLINE) != np.uint32(0):
            send.flags |= np.uint32(SEND_INLINE)
        send.immediate = byte_swapped(write.immediate)
        send.remote_address, send.remote_key = write.remote, write.remote_key
    sends[count - 1].next = np.uint64(0)
    return _call_at(calls[C_POST_SEND], calls[C_QUEUE], address_of(sends, 0), address_of(calls, C_BAD))


@outlined
def post_receives(poster: Any, count: Any) -> Any:
    """Post `count` receives for writes with an immediate; returns 0, or an errno."""
    calls = poster.calls
    if calls[C_QUEUE] == np.uint64(0):
        return np.int64(NO_QUEUE)
    for _ in range(count):
        code = _call_at(calls[C_POST_RECV], calls[C_QUEUE], address_of(poster.receives, 0), address_of(calls, C_BAD))
        if code != 0:
            return code
    return np.int64(0)


@inlined
def poll_completions(poster: Any, most: Any) -> Any:
    """What has completed, into ``poster.completions`` (:data:`WC`); how many (i64), or less than 0."""
    calls = poster.calls
    if calls[C_COMPLETIONS] == np.uint64(0):
        return np.int64(-NO_QUEUE)
    return _call_poll(calls[C_POLL], calls[C_COMPLETIONS], np.int64(most), address_of(poster.completions, 0))


@quick
def post_writes_now(poster: Any, writes: Any, count: Any) -> Any:
    return post_writes(poster, writes, count)


@quick
def post_receives_now(poster: Any, count: Any) -> Any:
    return post_receives(poster, count)


@quick
def poll_now(poster: Any, most: Any) -> Any:
    return poll_completions(poster, most)
