"""RDMA verbs through pyverbs, rdma-core's own Python binding (Debian: python3-pyverbs). See :mod:`tickmesh.transports.verbs`."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import pyverbs.enums as enums
from pyverbs.addr import AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context, get_device_list
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.pyverbs_error import PyverbsError, PyverbsRDMAError
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

from tickmesh.transports.verbs import RNR_RETRIES, Completion, Device, Endpoint, Queue, Region, VerbsError, Write, choose_gid

BINDING = "pyverbs"
_ACCESS = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
_MIN_RNR_TIMER = 1


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except PyverbsRDMAError as error:
        raise VerbsError(what, abs(error.error_code or 0)) from error
    except PyverbsError as error:
        raise VerbsError(f"{what} ({error})") from error


def devices() -> list[str]:
    """Names of the devices.

    Raises:
        VerbsError: the kernel has no RDMA.
    """
    with _told("the list of RDMA devices cannot be had"):
        return [device.name.decode() for device in get_device_list()]


def open_device(name: str) -> Device:
    """Open the device of this name.

    Raises:
        VerbsError: it cannot be opened.
    """
    return _Device(name)


class _Device(Device):
    binding = BINDING

    def __init__(self, name: str) -> None:
        self.name = name
        with _told(f"the RDMA device {name} cannot be opened"):
            self.context = Context(name=name)
            port = self.context.query_port(1)
            self.mtu, self.lid = int(port.active_mtu), int(port.lid)
            self.domain = PD(self.context)
            gids = [(i, _gid_bytes(self.context.query_gid(1, i).gid)) for i in range(min(int(port.gid_tbl_len), 256))]
        self.gid_index, self.gid = choose_gid(gids)

    def region(self, address: int, length: int) -> Region:
        return _Region(self, address, length)

    def queue(self, *, sends: int, receives: int, inline_bytes: int) -> Queue:
        return _Queue(self, sends, receives, inline_bytes)

    def close(self) -> None:
        self.domain.close()
        self.context.close()


def _gid_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


class _Region(Region):
    def __init__(self, device: _Device, address: int, length: int) -> None:
        with _told(f"{length} bytes cannot be registered"):
            self._region = MR(device.domain, length, _ACCESS, address=address)
        self.address, self.length, self.lkey, self.rkey = address, length, int(self._region.lkey), int(self._region.rkey)

    def close(self) -> None:
        with _told("a region cannot be given up"):
            self._region.close()


class _Queue(Queue):
    def __init__(self, device: _Device, sends: int, receives: int, inline_bytes: int) -> None:
        super().__init__(device)
        self._own = device
        with _told("no queue pair"):
            self._completions = CQ(device.context, sends + receives)
            cap = QPCap(max_send_wr=sends, max_recv_wr=max(1, receives), max_send_sge=1, max_recv_sge=1, max_inline_data=inline_bytes)
            init = QPInitAttr(qp_type=enums.IBV_QPT_RC, sq_sig_all=0, scq=self._completions, rcq=self._completions, cap=cap)
            self._pair = QP(device.domain, init)
        self.number = int(self._pair.qp_num)

    def _connect(self, peer: Endpoint, psn: int, timeout_exponent: int, retries: int) -> None:
        device, to = self._own, QPAttr(port_num=1)
        to.dest_qp_num, to.path_mtu, to.rq_psn, to.sq_psn = peer.number, min(peer.mtu, device.mtu), peer.psn, psn
        to.max_rd_atomic = to.max_dest_rd_atomic = 1
        to.min_rnr_timer, to.timeout, to.retry_cnt, to.rnr_retry = _MIN_RNR_TIMER, timeout_exponent, retries, RNR_RETRIES
        to.qp_access_flags = _ACCESS
        with _told("the queue pair cannot reach its peer"):
            route = GlobalRoute(dgid=_gid(peer.gid), sgid_index=device.gid_index)
            to.ah_attr = AHAttr(gr=route, is_global=1, port_num=1, dlid=peer.lid)
            self._pair.to_rts(to)

    def _to_state(self, state: int) -> None:
        with _told("the queue pair cannot change its state"):
            attributes = QPAttr(port_num=1)
            attributes.qp_state = state
            self._pair.modify(attributes, enums.IBV_QP_STATE)

    def _reset(self) -> None:
        self._to_state(enums.IBV_QPS_RESET)

    def fail(self) -> None:
        self._to_state(enums.IBV_QPS_ERR)

    def write(self, writes: Sequence[Write]) -> None:
        requests = described(writes)
        with _told("a write cannot be posted"):
            self._pair.post_send(requests[-1])

    def receive(self, count: int) -> None:
        with _told("a receive cannot be posted"):
            for _ in range(count):
                self._pair.post_recv(RecvWR(num_sge=1, sg=[SGE(0, 0, 0)]))

    def poll(self, most: int) -> list[Completion]:
        with _told("completions cannot be polled"):
            _, found = self._completions.poll(most)
        return [_completion(entry) for entry in found]

    def close(self) -> None:
        with _told("a queue pair cannot be given up"):
            self._pair.close()
            self._completions.close()


def _gid(text: str) -> Any:
    from pyverbs.addr import GID

    return GID(":".join(text[i : i + 4] for i in range(0, 32, 4)))


def described(writes: Sequence[Write]) -> list[Any]:
    """The work requests of writes, the last one first; each leads to the one before it, and does not hold it."""
    requests: list[Any] = []
    for write in reversed(writes):
        requests.append(_request(write, requests[-1] if requests else None))
    return requests


def _request(write: Write, following: Any) -> Any:
    flags = (enums.IBV_SEND_SIGNALED if write.signaled else 0) | (enums.IBV_SEND_INLINE if write.inline else 0)
    opcode = enums.IBV_WR_RDMA_WRITE if write.immediate is None else enums.IBV_WR_RDMA_WRITE_WITH_IMM
    piece = SGE(write.local_address, write.length, write.local_key)
    more: dict[str, Any] = {} if write.immediate is None else {"imm_data": socket.htonl(write.immediate)}
    request = SendWR(wr_id=write.id, opcode=opcode, num_sge=1, sg=[piece], send_flags=flags, next_wr=following, **more)
    request.set_wr_rdma(write.remote_key, write.remote_address)
    return request


def _completion(entry: Any) -> Completion:
    told = int(entry.opcode) == enums.IBV_WC_RECV_RDMA_WITH_IMM and int(entry.status) == 0
    return Completion(int(entry.wr_id), int(entry.status), socket.ntohl(int(entry.imm_data)) if told else None)
