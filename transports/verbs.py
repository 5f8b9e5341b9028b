"""RDMA verbs, as little of them as a ring needs: devices, registered memory, reliable connections, one-sided writes, completions.

Three bindings have the same face, and pass the same tests:

* ``libibverbs``: the system's library called directly (:mod:`tickmesh.transports.verbs_native`). The only one whose queue pairs have an
  address, so that compiled code can post to them and poll them without Python (:class:`Poster`); taken first.
* ``pyverbs``: rdma-core's own Python (Debian: python3-pyverbs).
* ``ibverbs``: the wheel of that name (``pip install 'tickmesh[rdma]'``).

A queue is one reliable connection (RC) with its completion queue. Memory is registered for local and remote writes, without relaxed
ordering: writes of a queue appear in the order in which they were posted.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np

Binding = Literal["auto", "libibverbs", "pyverbs", "ibverbs"]
_MODULES: dict[str, str] = {
    "libibverbs": "tickmesh.transports.verbs_native",
    "pyverbs": "tickmesh.transports.verbs_pyverbs",
    "ibverbs": "tickmesh.transports.verbs_wheel",
}
"""In the order in which they are tried; each module has ``devices()`` and ``open_device(name)``."""
TIMEOUT_EXPONENT, RETRIES = 14, 3
"""A peer that does not answer is given up after 4.096 µs * 2**14 * (3 + 1) = 268 ms (IBA 1.4, 9.7.6.1.3)."""
RNR_RETRIES = 7
"""For ever: with an immediate, a receiver that has no room has not read yet."""
PSN_BITS = 24
STATUS_TEXTS = {
    0: "success",
    1: "local length error",
    2: "local queue pair operation error",
    4: "local protection error",
    5: "flushed: the connection has ended",
    6: "memory window bind error",
    7: "bad response",
    8: "local access error",
    9: "remote invalid request",
    10: "remote access error: the memory is not ours",
    11: "remote operation error",
    12: "the peer does not answer",
    13: "the peer has no receive posted",
    21: "fatal error of the device",
}
"""``enum ibv_wc_status`` of infiniband/verbs.h."""
MTU_BYTES = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}


class VerbsError(Exception):
    """A call of the verbs failed, or cannot be made.

    Attributes:
        what: the call.
        code: errno, 0 if it has none.
        hint: what to do.
    """

    def __init__(self, what: str, code: int = 0, hint: str = "") -> None:
        text = f"{what} ({os.strerror(code)})" if code else what
        super().__init__(f"{text}: {hint}" if hint else text)
        self.what, self.code, self.hint = what, code, hint


@dataclass(frozen=True)
class Endpoint:
    """Where a queue is, for the other side's :meth:`Queue.connect`.

    Attributes:
        number: of the queue pair, 24 bits.
        psn: the first packet's sequence number, 24 bits.
        gid: 32 hexadecimal digits.
        lid: of the port; 0 on Ethernet.
        mtu: of the port's active path, ``enum ibv_mtu``: 1 to 5.
    """

    number: int
    psn: int
    gid: str
    lid: int
    mtu: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Endpoint:
        """From plain data, checked.

        Raises:
            ValueError: it is none; the message names the field.
        """
        bounds = {"number": (0, 1 << 24), "psn": (0, 1 << PSN_BITS), "lid": (0, 1 << 16), "mtu": (1, 6)}
        found: dict[str, Any] = {}
        for name, (low, high) in bounds.items():
            value = data.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < high:
                raise ValueError(f"{name} is {value!r}, not {low} to {high - 1}")
            found[name] = value
        gid = data.get("gid")
        if not isinstance(gid, str) or len(gid) != 32 or not all(c in "0123456789abcdef" for c in gid):
            raise ValueError(f"gid is {gid!r}, not 32 hexadecimal digits")
        return cls(gid=gid, **found)


WRITE = np.dtype(
    [
        ("local", "<u8"),
        ("remote", "<u8"),
        ("id", "<u8"),
        ("local_key", "<u4"),
        ("remote_key", "<u4"),
        ("length", "<u4"),
        ("flags", "<u4"),
        ("immediate", "<u4"),
        ("unused", "<u4"),
    ]
)
"""A :class:`Write` for kernels."""
F_SIGNALED, F_INLINE, F_IMMEDIATE = 1, 2, 4


class Write(NamedTuple):
    """A one-sided write of `length` bytes.

    Attributes:
        inline: the bytes are copied as it is posted: the memory needs no key, and may be used again at once.
        immediate: 32 bits that complete a receive of the other side's, after the write; None: that side is not told.
    """

    local_address: int
    local_key: int
    length: int
    remote_address: int
    remote_key: int
    id: int = 0
    signaled: bool = False
    inline: bool = False
    immediate: int | None = None

    def planned(self) -> tuple[int, ...]:
        """As a :data:`WRITE`."""
        flags = F_SIGNALED * self.signaled | F_INLINE * self.inline | F_IMMEDIATE * (self.immediate is not None)
        at = (self.local_address, self.remote_address, self.id, self.local_key, self.remote_key)
        return (*at, self.length, flags, self.immediate or 0, 0)

    @classmethod
    def of(cls, planned: Any) -> Write:
        """Of a :data:`WRITE`."""
        flags = int(planned["flags"])
        return cls(
            int(planned["local"]),
            int(planned["local_key"]),
            int(planned["length"]),
            int(planned["remote"]),
            int(planned["remote_key"]),
            int(planned["id"]),
            bool(flags & F_SIGNALED),
            bool(flags & F_INLINE),
            int(planned["immediate"]) if flags & F_IMMEDIATE else None,
        )


class Completion(NamedTuple):
    """What has completed: a write of ours that was to be signaled or failed, or (with an immediate) a receive. `status` 0: well."""

    id: int
    status: int
    immediate: int | None


class Poster(NamedTuple):
    """A queue for kernels, see :func:`tickmesh.transports.verbs_post.post_writes`. It is the queue's memory: not for longer than that."""

    calls: Any
    sends: Any
    pieces: Any
    receives: Any
    completions: Any


class _Closing(ABC):
    """What is closed once, by hand or by ``with``."""

    @abstractmethod
    def close(self) -> None:
        """Free it; more than once is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Region(_Closing):
    """Registered memory. `address`, `length` in bytes; `lkey`, `rkey`: for ourselves, for the other side."""

    address: int
    length: int
    lkey: int
    rkey: int


class Queue(_Closing):
    """One reliable connection. Calls of one queue are not for two threads at once.

    Attributes:
        number: of the queue pair.
        poster: for kernels; None where the binding does not tell where the queue is.
    """

    number: int
    poster: Poster | None = None

    def __init__(self, device: Device) -> None:
        self._device = device
        self._psn = secrets.randbits(PSN_BITS)

    def endpoint(self) -> Endpoint:
        """Where it is; another one after :meth:`reset`."""
        device = self._device
        return Endpoint(self.number, self._psn, device.gid.hex(), device.lid, device.mtu)

    def connect(self, peer: Endpoint, *, timeout_exponent: int = TIMEOUT_EXPONENT, retries: int = RETRIES) -> None:
        """Connect to the other side, which has to do the same; it may be written to once it has.

        Raises:
            VerbsError: it cannot be.
        """
        self._connect(peer, self._psn, timeout_exponent, retries)

    def reset(self) -> None:
        """End the connection, and forget what was posted: afterwards it can be connected again, from a new :meth:`endpoint`."""
        self._reset()
        while self.poll(64):
            pass
        self._psn = secrets.randbits(PSN_BITS)

    @abstractmethod
    def _connect(self, peer: Endpoint, psn: int, timeout_exponent: int, retries: int) -> None: ...

    @abstractmethod
    def _reset(self) -> None: ...

    @abstractmethod
    def fail(self) -> None:
        """End the connection: what is posted completes with an error, on both sides."""

    @abstractmethod
    def write(self, writes: Sequence[Write]) -> None:
        """Post writes, in this order, with one call.

        Raises:
            VerbsError: the queue is full, or not connected.
        """

    @abstractmethod
    def receive(self, count: int) -> None:
        """Post receives for writes with an immediate.

        Raises:
            VerbsError: there are as many as the queue takes.
        """

    @abstractmethod
    def poll(self, most: int) -> list[Completion]:
        """What has completed, in order; never waits."""

    @staticmethod
    def status_text(status: int) -> str:
        """What a completion's status means."""
        return STATUS_TEXTS.get(status, f"status {status}")


class Device(_Closing):
    """An open device and its port 1. `gid`: 16 bytes, the address on the network; `lid`, `mtu` as in :class:`Endpoint`."""

    name: str
    binding: str
    gid: bytes
    gid_index: int
    lid: int
    mtu: int

    @abstractmethod
    def region(self, address: int, length: int) -> Region:
        """Register memory, which must stay where it is until the region is closed.

        Raises:
            VerbsError: the device does not take it, e.g. for RLIMIT_MEMLOCK.
        """

    @abstractmethod
    def queue(self, *, sends: int, receives: int, inline_bytes: int) -> Queue:
        """A queue for so many writes and receives under way.

        Raises:
            VerbsError: the device has not got so many.
        """


# ---------------------------------------------------------------- choosing


def devices(binding: Binding = "auto") -> list[str]:
    """Names of this host's RDMA devices; none where there is no RDMA at all, or no binding."""
    for module in _bindings(binding):
        try:
            return sorted(module.devices())
        except VerbsError:
            continue
    return []


def open_device(name: str | None = None, *, binding: Binding = "auto") -> Device:
    """Open a device.

    Args:
        name: its name; None: the first one.

    Raises:
        VerbsError: there is none, or no binding; the hint says what to install.
    """
    reasons = []
    for module in _bindings(binding):
        try:
            found = sorted(module.devices())
            if not found:
                raise VerbsError("this host has no RDMA device", hint="rdma link show lists them; see tickmesh doctor")
            if name is not None and name not in found:
                raise VerbsError(f"there is no RDMA device {name!r}", hint=f"there are {', '.join(found)}")
            device: Device = module.open_device(name or found[0])
            return device
        except VerbsError as error:
            reasons.append(error)
    raise reasons[0] if reasons else VerbsError("no binding for RDMA", hint="apt-get install libibverbs1 ibverbs-providers")


def installed(binding: Binding = "auto") -> list[str]:
    """Which bindings can be loaded here."""
    return [module.BINDING for module in _bindings(binding)]


def _bindings(binding: Binding) -> list[Any]:
    """The modules of the bindings that can be loaded."""
    found = []
    for name, module in _MODULES.items():
        if binding in ("auto", name):
            try:
                found.append(importlib.import_module(module))
            except (ImportError, OSError):
                continue
    return found


def choose_gid(gids: Sequence[tuple[int, bytes]]) -> tuple[int, bytes]:
    """The GID by which others reach a port: an IPv4 address (RoCE v2) before a global IPv6 one, before what there is.

    Args:
        gids: index and 16 bytes of each entry of the port's table.

    Raises:
        VerbsError: the table is empty.
    """

    def rank(entry: tuple[int, bytes]) -> tuple[int, int]:
        address = ipaddress.IPv6Address(entry[1])
        kind = 0 if address.ipv4_mapped else 2 if address.is_link_local else 1
        return kind, entry[0]

    used = [entry for entry in gids if any(entry[1])]
    if not used:
        raise VerbsError("the device's port has no address", hint="give its network interface an address and set it up")
    return min(used, key=rank)
