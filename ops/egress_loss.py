"""Packets lost at random on their way out of an interface, by a BPF program: silent, without netem, and gone with its process.

It meets whatever the receiver reads packets by, sockets or AF_XDP alike, since they never arrive. Takes root (CAP_BPF, CAP_NET_ADMIN) and
Linux 6.6 (tcx).
"""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self

from tickmesh.transports import bpf
from tickmesh.transports.bpf import Counts, Link, Program, jump, load_map, load_u64, op

_DROP, _NEXT = 2, -1
_PROTOCOL_AT = 16
"""Of ``struct __sk_buff``."""


class EgressLoss:
    """Loses a share of the IPv4 packets that leave an interface of this thread's network namespace, while it is open.

    Args:
        interface: its name.
        share: from 0 to 1.

    Raises:
        BpfError: not allowed, or the kernel is too old.
        OSError: no such interface.
    """

    def __init__(self, interface: str, share: float) -> None:
        self._opened: list[Counts | Program | Link] = []
        try:
            self._counts = Counts(2, "tickmesh_lost")
            self._opened.append(self._counts)
            program = Program(_program(self._counts, share), bpf.TRAFFIC_PROGRAM, bpf.AT_EGRESS, "tickmesh_loss")
            self._opened.append(program)
            self._opened.append(program.attach(socket.if_nametoindex(interface)))
        except BaseException:
            self.close()
            raise

    @property
    def lost(self) -> int:
        """Packets lost so far."""
        return int(self._counts.values[1])

    @property
    def passed(self) -> int:
        """Packets let through so far."""
        return int(self._counts.values[0])

    def close(self) -> None:
        """Lose nothing more."""
        for opened in reversed(self._opened):
            opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _program(counts: Counts, share: float) -> bytes:
    """Of IPv4 packets drop those whose 32 random bits are below `share`; count both in `counts`, others are let through uncounted."""
    return bpf.assemble(
        [
            op(bpf.LOAD_U32, 2, 1, _PROTOCOL_AT),
            op(bpf.SET, 7, value=_NEXT),
            jump(bpf.IF_UNEQUAL, "end", 2, value=socket.htons(0x0800)),
            op(bpf.SET, 6),
            op(bpf.CALL, value=bpf.RANDOM_U32),
            load_u64(1, int(share * (1 << 32))),
            jump(bpf.IF_LESS_REG, "drop", 0, register=1),
            jump(bpf.JUMP, "count"),
            "drop:",
            op(bpf.SET, 6, value=1), op(bpf.SET, 7, value=_DROP),
            "count:",
            op(bpf.STORE_U32, bpf.FRAME, 6, -4),
            load_map(1, counts), op(bpf.MOVE, 2, bpf.FRAME), op(bpf.ADD, 2, value=-4), op(bpf.CALL, value=bpf.MAP_LOOKUP),
            jump(bpf.IF_EQUAL, "end"),
            op(bpf.SET, 1, value=1), op(bpf.ADD_ATOMIC_U64, 0, 1),
            "end:",
            op(bpf.MOVE, 0, 7), op(bpf.EXIT),
        ]
    )  # fmt: skip
