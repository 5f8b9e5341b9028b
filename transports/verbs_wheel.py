"""RDMA verbs through the `ibverbs` wheel (``pip install 'tickmesh[rdma]'``). See :mod:`tickmesh.transports.verbs`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import ibverbs as ib

from tickmesh.transports.verbs import RNR_RETRIES, Completion, Device, Endpoint, Queue, Region, VerbsError, Write, choose_gid

BINDING = "ibverbs"
_ACCESS = ib.AccessFlags.LOCAL_WRITE | ib.AccessFlags.REMOTE_WRITE
_MIN_RNR_TIMER = 1


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except ib.VerbsError as error:
        raise VerbsError(what, abs(int(getattr(error, "errno", 0) or 0))) from error
    except (OSError, ValueError) as error:
        raise VerbsError(f"{what} ({error})") from error


def devices() -> list[str]:
    """Names of the devices.

    Raises:
        VerbsError: the kernel has no RDMA.
    """
    with _told("the list of RDMA devices cannot be had"):
        return [_name(device) for device in ib.get_device_list()]


def _name(device: Any) -> str:
    return device.name.decode() if isinstance(device.name, bytes) else str(device.name)


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
            found = next((device for device in ib.get_device_list() if _name(device) == name), None)
            if found is None:
                raise VerbsError(f"the RDMA device {name} has gone")
            self.context = found.open()
            self.port = self.context.query_port(1)
            self.domain = self.context.alloc_pd()
            self.mtu, self.lid = int(self.port.active_mtu), int(self.port.lid)
        self.gid_index, self.gid = choose_gid(self._gids())

    def _gids(self) -> list[tuple[int, bytes]]:
        gids = []
        for index in range(16):
            with contextlib.suppress(ib.VerbsError):
                gids.append((index, bytes(self.context.query_gid(1, index).raw)))
        return gids

    def region(self, address: int, length: int) -> Region:
        return _Region(self, address, length)

    def queue(self, *, sends: int, receives: int, inline_bytes: int) -> Queue:
        return _Queue(self, sends, receives, inline_bytes)

    def close(self) -> None:
        self.domain.close()
        self.context.close()


class _Region(Region):
    def __init__(self, device: _Device, address: int, length: int) -> None:
        with _told(f"{length} bytes cannot be registered"):
            self._region = device.domain.reg_mr(address, length, _ACCESS)
        self.address, self.length, self.lkey, self.rkey = address, length, int(self._region.lkey), int(self._region.rkey)

    def close(self) -> None:
        with _told("a region cannot be given up"):
            self._region.close()


class _Queue(Queue):
    def __init__(self, device: _Device, sends: int, receives: int, inline_bytes: int) -> None:
        super().__init__(device)
        self._own = device
        with _told("no queue pair"):
            self._completions = device.context.create_cq(sends + receives)
            sizes = {
                "max_send_wr": sends,
                "max_recv_wr": max(1, receives),
                "max_send_sge": 1,
                "max_recv_sge": 1,
                "max_inline_data": inline_bytes,
            }
            init = ib.QPInitAttr(send_cq=self._completions, recv_cq=self._completions, qp_type=ib.QPType.RC, **sizes)
            self._pair = device.domain.create_qp(init)
        self.number = int(self._pair.qp_num)

    def _connect(self, peer: Endpoint, psn: int, timeout_exponent: int, retries: int) -> None:
        info = ib.QPInfo(peer.number, peer.psn, peer.lid, bytes.fromhex(peer.gid), 1, min(peer.mtu, self._own.mtu))
        with _told("the queue pair cannot reach its peer"):
            ib.connect_rc(
                self._pair, info, port=1, sgid_index=self._own.gid_index, access=_ACCESS, local_psn=psn, timeout=timeout_exponent,
                retry_cnt=retries, rnr_retry=RNR_RETRIES,
            )  # fmt: skip

    def _reset(self) -> None:
        with _told("the queue pair cannot be reset"):
            self._pair.modify(ib.QPAttrMask.STATE, qp_state=ib.QPState.RESET)

    def fail(self) -> None:
        with _told("the queue pair cannot be ended"):
            self._pair.modify(ib.QPAttrMask.STATE, qp_state=ib.QPState.ERR)

    def write(self, writes: Sequence[Write]) -> None:
        with _told("a write cannot be posted"):
            self._pair.post_send(described(writes))

    def receive(self, count: int) -> None:
        with _told("a receive cannot be posted"):
            self._pair.post_recv([ib.RecvWR() for _ in range(count)])

    def poll(self, most: int) -> list[Completion]:
        with _told("completions cannot be polled"):
            return [_completion(entry) for entry in self._completions.poll(most)]

    def close(self) -> None:
        with _told("a queue pair cannot be given up"):
            self._pair.close()
            self._completions.close()


def described(writes: Sequence[Write]) -> list[Any]:
    """The work requests of writes."""
    return [_request(write) for write in writes]


def _request(write: Write) -> Any:
    flags = ib.SendFlags(0)
    if write.signaled:
        flags |= ib.SendFlags.SIGNALED
    if write.inline:
        flags |= ib.SendFlags.INLINE
    piece = ib.SGE(write.local_address, write.length, write.local_key)
    target: dict[str, Any] = {"remote_addr": write.remote_address, "rkey": write.remote_key, "send_flags": flags, "wr_id": write.id}
    if write.immediate is None:
        return ib.SendWR(sg_list=[piece], opcode=ib.WROpcode.RDMA_WRITE, **target)
    return ib.SendWR(sg_list=[piece], opcode=ib.WROpcode.RDMA_WRITE_WITH_IMM, imm_data=write.immediate, **target)


def _completion(entry: Any) -> Completion:
    status = int(entry.status)
    told = int(entry.opcode) == int(ib.WCOpcode.RECV_RDMA_WITH_IMM) and status == 0
    return Completion(int(entry.wr_id), status, int(entry.imm_data) if told else None)
