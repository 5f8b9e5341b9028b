"""A MoldUDP64 re-request server for a simulated feed: it keeps what was sent and sends again what a receiver asks for.

A request is session, first sequence and message count in 20 bytes; the answer is one packet of the feed, from that sequence on, with
as many of the messages as fit (MoldUDP64 1.00, "Request Packet"). What is not kept any more, or of another session, is not answered.
"""

from __future__ import annotations

import bisect
import socket
import threading
from types import TracebackType
from typing import Self

from tickmesh.ops.simulated_lines import END_OF_SESSION, HEADER_BYTES, UDP_OVERHEAD_BYTES, Batch
from tickmesh.transports.multicast import SocketRefused, parse_endpoint

_PRUNED_AT_ONCE = 1024
_SLICE_S = 0.05


class RerequestServer:
    """Serves from a thread between entering and leaving its context.

    Args:
        endpoint: ``udp://ADDRESS:PORT`` where it listens; port 0 is not an endpoint, so `address` and 0 go by themselves.
        address, port: instead of an endpoint; port 0: a free one.
        mtu_bytes: largest IP packet of an answer.
        keep_bytes: of messages; older ones are forgotten.

    Attributes:
        requests, answered: how many came and had an answer.

    Raises:
        BadEndpoint, SocketRefused: it cannot listen there.
    """

    def __init__(
        self, endpoint: str | None = None, *, address: str = "127.0.0.1", port: int = 0, mtu_bytes: int = 1500, keep_bytes: int = 256 << 20
    ) -> None:
        if endpoint is not None:
            address, port, _ = parse_endpoint(endpoint)
        self._payload_max, self._keep_bytes = mtu_bytes - UDP_OVERHEAD_BYTES, keep_bytes
        self._lock = threading.Lock()
        self._firsts: list[int] = []
        self._payloads: list[bytes] = []
        self._kept_bytes, self.requests, self.answered = 0, 0, 0
        self._stop = threading.Event()
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._sock.bind((address, port))
            self._sock.settimeout(_SLICE_S)
        except OSError as error:
            self._sock.close()
            raise SocketRefused(f"udp://{address}:{port}", "listening", error) from error
        self.endpoint = f"udp://{address}:{self._sock.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, name="rerequest-server", daemon=True)

    def keep(self, batch: Batch) -> None:
        """Keep the messages of a batch, in order, before it is sent."""
        with self._lock:
            for k, entry in enumerate(batch.datagrams):
                if entry["count"] > 0:
                    self._firsts.append(int(entry["sequence"]))
                    self._payloads.append(bytes(batch.payload(k)))
                    self._kept_bytes += len(self._payloads[-1])
            while self._kept_bytes > self._keep_bytes and len(self._payloads) > 1:
                gone = min(_PRUNED_AT_ONCE, len(self._payloads) - 1)
                self._kept_bytes -= sum(map(len, self._payloads[:gone]))
                del self._firsts[:gone], self._payloads[:gone]

    def answer(self, request: bytes) -> bytes | None:
        """The packet that answers a request; None: there is none."""
        if len(request) < HEADER_BYTES:
            return None
        session, first, count = request[:10], int.from_bytes(request[10:18], "big"), int.from_bytes(request[18:20], "big")
        with self._lock:
            place = bisect.bisect_right(self._firsts, first) - 1
            if place < 0 or count in (0, END_OF_SESSION) or self._payloads[place][:10] != session:
                return None
            blocks = self._blocks(place, first, count)
        if not blocks:
            return None
        return session + first.to_bytes(8, "big") + len(blocks).to_bytes(2, "big") + b"".join(blocks)

    def _blocks(self, place: int, first: int, count: int) -> list[bytes]:
        """Up to `count` messages with their lengths, from sequence `first` on, as many as fit."""
        found: list[bytes] = []
        room = self._payload_max - HEADER_BYTES
        for k in range(place, len(self._payloads)):
            payload, at = self._payloads[k], HEADER_BYTES
            for sequence in range(self._firsts[k], self._firsts[k] + int.from_bytes(payload[18:20], "big")):
                end = at + 2 + int.from_bytes(payload[at : at + 2], "big")
                if sequence >= first:
                    room -= end - at
                    if room < 0 or len(found) == count:
                        return found
                    found.append(payload[at:end])
                at = end
        return found

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                request, sender = self._sock.recvfrom(2048)
            except TimeoutError:
                continue
            self.requests += 1
            packet = self.answer(request)
            if packet is not None:
                self._sock.sendto(packet, sender)
                self.answered += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._sock.close()
