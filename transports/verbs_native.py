"""libibverbs, called directly through ctypes; its queues have addresses, so that compiled code can post to them. See
:mod:`tickmesh.transports.verbs`."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
from collections.abc import Sequence
from typing import Any

from tickmesh.transports.toolbox import zeros_aligned
from tickmesh.transports.verbs import (
    RNR_RETRIES,
    WRITE,
    Completion,
    Device,
    Endpoint,
    Poster,
    Queue,
    Region,
    VerbsError,
    Write,
    choose_gid,
)
from tickmesh.transports.verbs_post import (
    C_COMPLETIONS,
    C_POLL,
    C_POST_RECV,
    C_POST_SEND,
    C_QUEUE,
    COMPLETIONS_AT_ONCE,
    OPERATIONS_OFFSET,
    POLL_CQ_OFFSET,
    POST_RECV_OFFSET,
    POST_SEND_OFFSET,
    SENDS_AT_ONCE,
    WC_RECEIVED_WRITE,
    make_poster,
    poll_now,
    post_receives_now,
    post_writes_now,
)

BINDING = "libibverbs"

# ---------------------------------------------------------------- what the library's calls take

MR_LKEY_OFFSET, MR_RKEY_OFFSET, QP_NUMBER_OFFSET = 36, 40, 52
PORT_BYTES, PORT_GIDS_OFFSET, PORT_MTU_OFFSET, PORT_LID_OFFSET = 64, 12, 8, 34
_ACCESS = 1 | 2  # local and remote write
_RC, _STATE_RESET, _STATE_INIT, _STATE_RTR, _STATE_RTS, _STATE_ERROR = 2, 0, 1, 2, 3, 6
_INIT_MASK, _ERROR_MASK = 1 | 8 | 16 | 32, 1
_RTR_MASK = 1 | 128 | 256 | 1048576 | 4096 | 131072 | 32768
_RTS_MASK = 1 | 512 | 1024 | 2048 | 65536 | 8192
_MIN_RNR_TIMER, _HOPS, GIDS_MAX = 1, 64, 256


class _Cap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("send_wr", "recv_wr", "send_sge", "recv_sge", "inline_data")]


class QpInit(ctypes.Structure):
    """``struct ibv_qp_init_attr``."""

    _fields_ = [
        ("qp_context", ctypes.c_void_p),
        ("send_cq", ctypes.c_void_p),
        ("recv_cq", ctypes.c_void_p),
        ("srq", ctypes.c_void_p),
        ("cap", _Cap),
        ("qp_type", ctypes.c_uint32),
        ("sq_sig_all", ctypes.c_int),
    ]


class AddressAttr(ctypes.Structure):
    """``struct ibv_ah_attr``."""

    _fields_ = [
        ("dgid", ctypes.c_uint8 * 16), ("flow_label", ctypes.c_uint32), ("sgid_index", ctypes.c_uint8), ("hop_limit", ctypes.c_uint8),
        ("traffic_class", ctypes.c_uint8), ("dlid", ctypes.c_uint16), ("sl", ctypes.c_uint8), ("src_path_bits", ctypes.c_uint8),
        ("static_rate", ctypes.c_uint8), ("is_global", ctypes.c_uint8), ("port_num", ctypes.c_uint8),
    ]  # fmt: skip


class QpAttr(ctypes.Structure):
    """``struct ibv_qp_attr``."""

    _fields_ = [
        ("qp_state", ctypes.c_uint32),
        ("cur_qp_state", ctypes.c_uint32),
        ("path_mtu", ctypes.c_uint32),
        ("path_mig_state", ctypes.c_uint32),
        ("qkey", ctypes.c_uint32),
        ("rq_psn", ctypes.c_uint32),
        ("sq_psn", ctypes.c_uint32),
        ("dest_qp_num", ctypes.c_uint32),
        ("qp_access_flags", ctypes.c_uint32),
        ("cap", _Cap),
        ("ah_attr", AddressAttr),
        ("alt_ah_attr", AddressAttr),
        ("pkey_index", ctypes.c_uint16),
        ("alt_pkey_index", ctypes.c_uint16),
        ("en_sqd_async_notify", ctypes.c_uint8),
        ("sq_draining", ctypes.c_uint8),
        ("max_rd_atomic", ctypes.c_uint8),
        ("max_dest_rd_atomic", ctypes.c_uint8),
        ("min_rnr_timer", ctypes.c_uint8),
        ("port_num", ctypes.c_uint8),
        ("timeout", ctypes.c_uint8),
        ("retry_cnt", ctypes.c_uint8),
        ("rnr_retry", ctypes.c_uint8),
        ("alt_port_num", ctypes.c_uint8),
        ("alt_timeout", ctypes.c_uint8),
        ("rate_limit", ctypes.c_uint32),
    ]


def _load() -> ctypes.CDLL:
    """The library; its functions are declared.

    Raises:
        OSError: it is not installed.
    """
    found = ctypes.CDLL("libibverbs.so.1", use_errno=True)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "get_device_list": (pointer, [pointer]),
        "free_device_list": (None, [pointer]),
        "get_device_name": (ctypes.c_char_p, [pointer]),
        "open_device": (pointer, [pointer]),
        "close_device": (number, [pointer]),
        "alloc_pd": (pointer, [pointer]),
        "dealloc_pd": (number, [pointer]),
        "reg_mr": (pointer, [pointer, pointer, ctypes.c_size_t, number]),
        "dereg_mr": (number, [pointer]),
        "create_cq": (pointer, [pointer, number, pointer, pointer, number]),
        "destroy_cq": (number, [pointer]),
        "create_qp": (pointer, [pointer, pointer]),
        "destroy_qp": (number, [pointer]),
        "modify_qp": (number, [pointer, pointer, number]),
        "query_port": (number, [pointer, ctypes.c_uint8, pointer]),
        "query_gid": (number, [pointer, ctypes.c_uint8, number, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, f"ibv_{name}")
        function.restype, function.argtypes = result, arguments
    return found


_library = _load()


def _made(what: str, pointer: int | None) -> int:
    if not pointer:
        code = ctypes.get_errno()
        hint = "raise the limit of locked memory: ulimit -l unlimited" if code in (errno.ENOMEM, errno.EAGAIN) else ""
        raise VerbsError(what, code, hint)
    return pointer


def _done(what: str, code: int) -> None:
    if code:
        raise VerbsError(what, abs(code))


def _word(address: int, kind: Any = ctypes.c_uint64) -> int:
    return int(kind.from_address(address).value)


# ---------------------------------------------------------------- the face


def devices() -> list[str]:
    """Names of the devices.

    Raises:
        VerbsError: the kernel has no RDMA.
    """
    count = ctypes.c_int()
    found = _made("the list of RDMA devices cannot be had", _library.ibv_get_device_list(ctypes.byref(count)))
    try:
        return [_library.ibv_get_device_name(_word(found + 8 * i)).decode() for i in range(count.value)]
    finally:
        _library.ibv_free_device_list(found)


def open_device(name: str) -> Device:
    """Open the device of this name, which there is.

    Raises:
        VerbsError: it cannot be opened.
    """
    return _Device(name)


class _Device(Device):
    binding = BINDING

    def __init__(self, name: str) -> None:
        self.name = name
        self.context = self.domain = 0
        count = ctypes.c_int()
        found = _made("the list of RDMA devices cannot be had", _library.ibv_get_device_list(ctypes.byref(count)))
        try:
            named = {_library.ibv_get_device_name(_word(found + 8 * i)).decode(): _word(found + 8 * i) for i in range(count.value)}
            if name not in named:
                raise VerbsError(f"the RDMA device {name} has gone")
            self.context = _made(f"the RDMA device {name} cannot be opened", _library.ibv_open_device(named[name]))
        finally:
            _library.ibv_free_device_list(found)
        try:
            self._look_at_port()
            self.domain = _made("no protection domain", _library.ibv_alloc_pd(self.context))
        except BaseException:
            self.close()
            raise

    def _look_at_port(self) -> None:
        port = (ctypes.c_uint8 * PORT_BYTES)()
        _done("the port cannot be asked", _library.ibv_query_port(self.context, 1, ctypes.byref(port)))
        at = ctypes.addressof(port)
        self.mtu, self.lid = _word(at + PORT_MTU_OFFSET, ctypes.c_uint32), _word(at + PORT_LID_OFFSET, ctypes.c_uint16)
        gids, gid = list[tuple[int, bytes]](), (ctypes.c_uint8 * 16)()
        for index in range(min(_word(at + PORT_GIDS_OFFSET, ctypes.c_uint32), GIDS_MAX)):
            found = _library.ibv_query_gid(self.context, 1, index, ctypes.byref(gid))
            gids += [(index, bytes(gid))] if found == 0 else []
        self.gid_index, self.gid = choose_gid(gids)

    def region(self, address: int, length: int) -> Region:
        return _Region(self, address, length)

    def queue(self, *, sends: int, receives: int, inline_bytes: int) -> Queue:
        return _Queue(self, sends, receives, inline_bytes)

    def close(self) -> None:
        if self.domain:
            _library.ibv_dealloc_pd(self.domain)
        if self.context:
            _library.ibv_close_device(self.context)
        self.domain = self.context = 0


class _Region(Region):
    def __init__(self, device: _Device, address: int, length: int) -> None:
        self._region = _made(f"{length} bytes cannot be registered", _library.ibv_reg_mr(device.domain, address, length, _ACCESS))
        self.address, self.length = address, length
        self.lkey = _word(self._region + MR_LKEY_OFFSET, ctypes.c_uint32)
        self.rkey = _word(self._region + MR_RKEY_OFFSET, ctypes.c_uint32)

    def close(self) -> None:
        region, self._region = self._region, 0
        if region:
            _done("a region cannot be given up", _library.ibv_dereg_mr(region))


class _Queue(Queue):
    def __init__(self, device: _Device, sends: int, receives: int, inline_bytes: int) -> None:
        super().__init__(device)
        self._native, self._pair = device, 0
        self._completions = _made("no completion queue", _library.ibv_create_cq(device.context, sends + receives, None, None, 0))
        init = QpInit(send_cq=self._completions, recv_cq=self._completions, qp_type=_RC)
        init.cap = _Cap(sends, max(1, receives), 1, 1, inline_bytes)
        try:
            self._pair = _made("no queue pair", _library.ibv_create_qp(device.domain, ctypes.byref(init)))
        except BaseException:
            self.close()
            raise
        self.number = _word(self._pair + QP_NUMBER_OFFSET, ctypes.c_uint32)
        self.poster = self._make_poster()
        self._writes = zeros_aligned(SENDS_AT_ONCE, WRITE)

    def _make_poster(self) -> Poster:
        operations = self._native.context + OPERATIONS_OFFSET
        made = make_poster()
        calls = made.calls
        calls[C_POST_SEND], calls[C_POST_RECV] = _word(operations + POST_SEND_OFFSET), _word(operations + POST_RECV_OFFSET)
        calls[C_POLL], calls[C_QUEUE], calls[C_COMPLETIONS] = _word(operations + POLL_CQ_OFFSET), self._pair, self._completions
        return made

    def _modify(self, what: str, mask: int, attributes: QpAttr) -> None:
        _done(what, _library.ibv_modify_qp(self._pair, ctypes.byref(attributes), mask))

    def _connect(self, peer: Endpoint, psn: int, timeout_exponent: int, retries: int) -> None:
        device = self._native
        self._modify("the queue pair cannot begin", _INIT_MASK, QpAttr(qp_state=_STATE_INIT, port_num=1, qp_access_flags=_ACCESS))
        to = QpAttr(qp_state=_STATE_RTR, path_mtu=min(peer.mtu, device.mtu), dest_qp_num=peer.number, rq_psn=peer.psn)
        to.max_dest_rd_atomic, to.min_rnr_timer = 1, _MIN_RNR_TIMER
        gid = (ctypes.c_uint8 * 16)(*bytes.fromhex(peer.gid))
        to.ah_attr = AddressAttr(dgid=gid, sgid_index=device.gid_index, hop_limit=_HOPS, dlid=peer.lid, is_global=1, port_num=1)
        self._modify("the queue pair cannot reach its peer", _RTR_MASK, to)
        ready = QpAttr(qp_state=_STATE_RTS, timeout=timeout_exponent, retry_cnt=retries, rnr_retry=RNR_RETRIES, sq_psn=psn, max_rd_atomic=1)
        self._modify("the queue pair cannot send", _RTS_MASK, ready)

    def _reset(self) -> None:
        self._modify("the queue pair cannot be reset", _ERROR_MASK, QpAttr(qp_state=_STATE_RESET))

    def fail(self) -> None:
        self._modify("the queue pair cannot be ended", _ERROR_MASK, QpAttr(qp_state=_STATE_ERROR))

    def write(self, writes: Sequence[Write]) -> None:
        assert self.poster is not None
        for first in range(0, len(writes), SENDS_AT_ONCE):
            part = writes[first : first + SENDS_AT_ONCE]
            for i, write in enumerate(part):
                self._writes[i] = write.planned()
            _done("a write cannot be posted", int(post_writes_now(self.poster, self._writes, len(part))))

    def receive(self, count: int) -> None:
        assert self.poster is not None
        _done("a receive cannot be posted", int(post_receives_now(self.poster, count)))

    def poll(self, most: int) -> list[Completion]:
        assert self.poster is not None
        count = int(poll_now(self.poster, min(most, COMPLETIONS_AT_ONCE)))
        if count < 0:
            raise VerbsError("completions cannot be polled", -count)
        return [_completion(entry) for entry in self.poster.completions[:count]]

    def close(self) -> None:
        pair, completions, self._pair, self._completions = self._pair, self._completions, 0, 0
        if self.poster is not None:  # a kernel that still has it is refused
            self.poster.calls[C_QUEUE] = self.poster.calls[C_COMPLETIONS] = 0
        if pair:
            _library.ibv_destroy_qp(pair)
        if completions:
            _library.ibv_destroy_cq(completions)


def _completion(entry: Any) -> Completion:
    told = int(entry["opcode"]) == WC_RECEIVED_WRITE and int(entry["status"]) == 0
    return Completion(int(entry["id"]), int(entry["status"]), byte_swapped_int(int(entry["immediate"])) if told else None)


def byte_swapped_int(word: int) -> int:
    """Four bytes in the other order, in Python."""
    return int.from_bytes(word.to_bytes(4, "little"), "big")
