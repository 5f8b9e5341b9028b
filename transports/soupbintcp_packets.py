"""SoupBinTCP's packets, compiled: the way between received packets and a plain stream of messages, and back.

:func:`unframe` turns a run of received packets into a run of length-prefixed messages (BinaryFILE), in place, so that the same compiled
decoder reads both, and no message passes through Python. :func:`enframe` is the way back, for servers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tickmesh.transports.toolbox import be16, loop, put_be16

_S, _H, _DEBUG = np.uint8(ord("S")), np.uint8(ord("H")), np.uint8(ord("+"))
SPLIT_AT, SEQUENCED_COUNT, IGNORED_COUNT, EMPTY_COUNT, SKIP, _WORDS = 0, 1, 2, 3, 4, 5
"""Words of the state of :func:`unframe`: where it stopped reading; sequenced messages; heartbeats and debug texts; empty messages; and how
many of the next sequenced messages are to be left out."""


@loop
def unframe(buf: Any, pos: Any, end: Any, state: Any) -> Any:
    """Turn the whole packets in ``buf[pos:end]`` into length-prefixed messages, written over them from `pos` on.

    It stops before a packet that is no data: a login's answer, the end of the session, or an unsequenced message; ``state[SPLIT_AT]`` says
    where, or that the rest is no whole packet. A sequenced packet without a message becomes one of a zero byte, which every protocol
    refuses: it counts as a sequence all the same.

    Returns:
        The end of the messages.
    """
    read, write = np.int64(pos), np.int64(pos)
    last = np.int64(end)
    while read + 3 <= last:
        length = np.int64(be16(buf, read))
        if length == 0 or read + 2 + length > last:
            break
        kind = buf[np.uint64(read + 2)]
        if kind == _S:
            size = length - 1
            source = read + 3
            read += 2 + length
            state[SEQUENCED_COUNT] += 1
            if state[SKIP] > 0:
                state[SKIP] -= 1
                continue
            if size == 0:
                state[EMPTY_COUNT] += 1
                put_be16(buf, write, np.uint16(1))
                buf[np.uint64(write + 2)] = np.uint8(0)
                write += 3
                continue
            put_be16(buf, write, np.uint16(size))
            for k in range(size):
                buf[np.uint64(write + 2 + k)] = buf[np.uint64(source + k)]
            write += 2 + size
        elif kind == _H or kind == _DEBUG:  # noqa: SIM109 (compiled)
            state[IGNORED_COUNT] += 1
            read += 2 + length
        else:
            break
    state[SPLIT_AT] = read
    return write


@loop
def enframe(image: Any, pos: Any, end: Any, out: Any) -> Any:
    """Turn length-prefixed messages ``image[pos:end]`` into sequenced packets in `out`; returns ``(messages, bytes)``.

    It stops when `out` has no room for the next; a message of more than 65,534 bytes does not fit a packet and is cut off there.
    """
    read, write, count = np.int64(pos), np.int64(0), np.int64(0)
    while read + 2 <= end:
        size = np.int64(be16(image, read))
        if read + 2 + size > end or size == 65535 or write + 3 + size > np.int64(out.size):
            break
        put_be16(out, write, np.uint16(size + 1))
        out[np.uint64(write + 2)] = _S
        for k in range(size):
            out[np.uint64(write + 3 + k)] = image[np.uint64(read + 2 + k)]
        read += 2 + size
        write += 3 + size
        count += 1
    return count, write


def make_state() -> Any:
    """The state of :func:`unframe`."""
    return np.zeros(_WORDS, np.int64)


def warm() -> None:
    """Call each entry point once, so that it is compiled."""
    memory = np.zeros(64, np.uint8)
    unframe(memory, 0, 0, make_state())
    enframe(memory, 0, 0, np.zeros(8, np.uint8))
