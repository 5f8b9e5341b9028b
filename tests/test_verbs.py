"""RDMA verbs: one contract for every binding, on real (or Soft-RoCE) devices; and what can be told without any."""

from __future__ import annotations

import ctypes.util
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdma_support import BINDINGS, need_binding, pair_of_devices, wait_until

from tickmesh.transports.toolbox import zeros_aligned
from tickmesh.transports.verbs import (
    RETRIES,
    TIMEOUT_EXPONENT,
    WRITE,
    Binding,
    Completion,
    Device,
    Endpoint,
    Queue,
    Region,
    VerbsError,
    Write,
    choose_gid,
    devices,
    open_device,
)

BYTES = 1 << 16
PAIRS = [(one, other) for one in BINDINGS for other in BINDINGS if one == other or "libibverbs" in (one, other)]


class Side:
    """A device, registered memory and a queue."""

    def __init__(self, name: str, binding: Binding, sends: int = 64) -> None:
        self.device: Device = open_device(name, binding=binding)
        self.memory = zeros_aligned(BYTES, np.uint8)
        self.region: Region = self.device.region(self.memory.ctypes.data, BYTES)
        self.queue: Queue = self.device.queue(sends=sends, receives=16, inline_bytes=64)

    def write(self, other: Side, at: int, data: bytes, **more: Any) -> Write:
        self.memory[at : at + len(data)] = np.frombuffer(data, np.uint8)
        base = self.region
        return Write(base.address + at, base.lkey, len(data), other.region.address + at, other.region.rkey, **more)

    def completions(self, count: int) -> list[Completion]:
        found: list[Completion] = []
        wait_until(lambda: found.extend(self.queue.poll(16)) or len(found) >= count)
        return found

    def close(self) -> None:
        self.queue.close()
        self.region.close()
        self.device.close()


def connected(one: Side, other: Side) -> None:
    ours, theirs = one.queue.endpoint(), other.queue.endpoint()
    other.queue.connect(ours)
    one.queue.connect(theirs)


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def sides(request: pytest.FixtureRequest) -> Iterator[tuple[Side, Side]]:
    for binding in request.param:
        need_binding(binding)
    first, second = pair_of_devices()
    one, other = Side(first, request.param[0]), Side(second, request.param[1])
    connected(one, other)
    yield one, other
    one.close()
    other.close()


@pytest.mark.rdma
def test_a_write_is_in_the_other_side_s_memory_when_it_has_completed(sides: tuple[Side, Side]) -> None:
    one, other = sides
    one.queue.write([one.write(other, 128, b"tick" * 1000, id=7, signaled=True)])
    assert one.completions(1) == [Completion(7, 0, None)]
    assert bytes(other.memory[128:4128]) == b"tick" * 1000
    assert not other.memory[4128:].any()


@pytest.mark.rdma
def test_inline_data_may_change_once_it_is_posted(sides: tuple[Side, Side]) -> None:
    one, other = sides
    one.queue.write([one.write(other, 0, b"before..", id=1, signaled=True, inline=True)])
    one.memory[:8] = 0
    one.completions(1)
    assert bytes(other.memory[:8]) == b"before.."


@pytest.mark.rdma
def test_a_chain_completes_in_order_and_tells_only_what_it_was_asked(sides: tuple[Side, Side]) -> None:
    one, other = sides
    chain = [one.write(other, 64 * i, bytes([i] * 64), id=i, signaled=i in (3, 9)) for i in range(10)]
    one.queue.write(chain)
    assert [c.id for c in one.completions(2)] == [3, 9]
    assert [int(other.memory[64 * i]) for i in range(10)] == list(range(10))
    assert one.queue.poll(16) == []


@pytest.mark.rdma
def test_an_immediate_tells_the_other_side_after_the_data(sides: tuple[Side, Side]) -> None:
    one, other = sides
    other.queue.receive(4)
    for number in (0x12345678, 0xFFFFFFFF, 0):
        one.queue.write([one.write(other, 0, number.to_bytes(8, "little"), immediate=number, signaled=True)])
        assert [c.immediate for c in other.completions(1)] == [number]
        assert int.from_bytes(bytes(other.memory[:8]), "little") == number
        assert [(c.status, c.immediate) for c in one.completions(1)] == [(0, None)]


@pytest.mark.rdma
@pytest.mark.parametrize("wrong", ["beyond", "key", "before"])
def test_memory_that_is_not_offered_cannot_be_written(sides: tuple[Side, Side], wrong: str) -> None:
    one, other = sides
    write = one.write(other, 0, b"x" * 64, signaled=True)
    change = {
        "beyond": {"remote_address": other.region.address + BYTES - 32},
        "key": {"remote_key": other.region.rkey ^ 0x5A00},
        "before": {"remote_address": other.region.address - 64},
    }[wrong]
    one.queue.write([write._replace(**change)])
    assert one.completions(1)[0].status in (9, 10, 11, 12)
    assert not other.memory.any()


@pytest.mark.rdma
def test_a_peer_that_is_gone_is_noticed_in_the_time_that_was_asked(sides: tuple[Side, Side]) -> None:
    one, other = sides
    other.queue.close()
    begun = time.monotonic()
    one.queue.write([one.write(other, 0, b"x" * 64, signaled=True)])
    assert one.completions(1)[0].status == 12
    assert time.monotonic() - begun < 20 * 4.096e-6 * 2**TIMEOUT_EXPONENT * (RETRIES + 1) + 5
    one.queue.write([one.write(other, 0, b"x" * 64, id=9)])
    assert [(c.id, c.status) for c in one.completions(1)] == [(9, 5)]


@pytest.mark.rdma
def test_a_queue_that_failed_is_reset_and_connected_again(sides: tuple[Side, Side]) -> None:
    one, other = sides
    first = one.queue.endpoint()
    other.queue.fail()
    one.queue.write([one.write(other, 0, b"lost" * 16, signaled=True)])
    assert one.completions(1)[0].status != 0
    one.queue.reset()
    other.queue.reset()
    assert one.queue.endpoint() == replace(first, psn=one.queue.endpoint().psn)
    connected(one, other)
    one.queue.write([one.write(other, 0, b"kept" * 16, signaled=True)])
    assert one.completions(1)[0].status == 0
    assert bytes(other.memory[:64]) == b"kept" * 16


@pytest.mark.rdma
def test_more_writes_than_the_queue_takes_are_refused(sides: tuple[Side, Side]) -> None:
    one, other = sides
    other.queue.fail()  # so that nothing gets away
    too_many = [one.write(other, 0, b"x" * 64)] * 2_000
    with pytest.raises(VerbsError):
        one.queue.write(too_many)


@pytest.mark.rdma
def test_an_unknown_device_is_an_error_that_names_those_there_are() -> None:
    name = pair_of_devices()[0]
    with pytest.raises(VerbsError, match=name):
        open_device("mlx5_99")


# ---------------------------------------------------------------- without a device


def test_endpoints_survive_the_way_over_the_wire() -> None:
    given_ = Endpoint(0x123456, 0xABCDEF, "00" * 10 + "ffff0a4d0001", 0, 3)
    assert Endpoint.from_dict(given_.to_dict()) == given_


@pytest.mark.parametrize(
    "change", [{"number": 1 << 24}, {"psn": -1}, {"gid": "zz" * 16}, {"gid": None}, {"lid": True}, {"mtu": 0}, {"mtu": "3"}]
)
def test_a_damaged_endpoint_is_refused_by_name(change: dict[str, Any]) -> None:
    given_ = Endpoint(1, 2, "00" * 16, 0, 3).to_dict() | change
    with pytest.raises(ValueError, match=next(iter(change))):
        Endpoint.from_dict(given_)


@given(
    st.builds(
        Write,
        *[st.integers(0, (1 << 32) - 1)] * 5,
        id=st.integers(0, (1 << 64) - 1),
        signaled=st.booleans(),
        inline=st.booleans(),
        immediate=st.none() | st.integers(0, (1 << 32) - 1),
    )
)
def test_writes_are_the_same_for_kernels(write: Write) -> None:
    planned = np.zeros(1, WRITE)
    planned[0] = write.planned()
    assert Write.of(planned[0]) == write


def test_the_address_that_others_reach_is_chosen() -> None:
    link_local, ipv4, ipv6 = (
        bytes.fromhex("fe80" + "00" * 13 + "01"),
        bytes(10) + b"\xff\xff\x0a\x4d\x00\x01",
        bytes.fromhex("2001" + "00" * 13 + "01"),
    )
    assert choose_gid([(0, link_local), (1, ipv4), (2, ipv6)]) == (1, ipv4)
    assert choose_gid([(0, link_local), (3, ipv6), (5, bytes(16))]) == (3, ipv6)
    with pytest.raises(VerbsError, match="address"):
        choose_gid([(0, bytes(16))])


def test_a_host_without_rdma_has_no_devices_and_says_what_to_do() -> None:
    if devices():
        pytest.skip("this host has RDMA devices")
    with pytest.raises(VerbsError, match=r"rdma link|apt-get|RDMA"):
        open_device()


def test_layouts_are_those_of_the_header(tmp_path: Path) -> None:
    header, compiler = Path("/usr/include/infiniband/verbs.h"), shutil.which("cc")
    if compiler is None or not header.exists() or ctypes.util.find_library("ibverbs") is None:
        pytest.skip("needs a C compiler, libibverbs1 and libibverbs-dev; `make test-rdma` brings them")
    from tickmesh.transports import verbs_native as native
    from tickmesh.transports import verbs_post as post

    offsets = {
        "offsetof(struct ibv_context, ops)": post.OPERATIONS_OFFSET,
        "offsetof(struct ibv_context_ops, poll_cq)": post.POLL_CQ_OFFSET,
        "offsetof(struct ibv_context_ops, post_send)": post.POST_SEND_OFFSET,
        "offsetof(struct ibv_context_ops, post_recv)": post.POST_RECV_OFFSET,
        "sizeof(struct ibv_send_wr)": post.SEND_WR.itemsize,
        "offsetof(struct ibv_send_wr, send_flags)": post.SEND_WR.fields["flags"][1],
        "offsetof(struct ibv_send_wr, imm_data)": post.SEND_WR.fields["immediate"][1],
        "offsetof(struct ibv_send_wr, wr.rdma.remote_addr)": post.SEND_WR.fields["remote_address"][1],
        "offsetof(struct ibv_send_wr, wr.rdma.rkey)": post.SEND_WR.fields["remote_key"][1],
        "sizeof(struct ibv_recv_wr)": post.RECV_WR.itemsize,
        "sizeof(struct ibv_wc)": post.WC.itemsize,
        "offsetof(struct ibv_wc, imm_data)": post.WC.fields["immediate"][1],
        "offsetof(struct ibv_wc, wc_flags)": post.WC.fields["flags"][1],
        "sizeof(struct ibv_qp_init_attr)": native.ctypes.sizeof(native.QpInit),
        "sizeof(struct ibv_qp_attr)": native.ctypes.sizeof(native.QpAttr),
        "offsetof(struct ibv_qp_attr, ah_attr)": native.QpAttr.ah_attr.offset,
        "offsetof(struct ibv_qp_attr, rnr_retry)": native.QpAttr.rnr_retry.offset,
        "sizeof(struct ibv_ah_attr)": native.ctypes.sizeof(native.AddressAttr),
        "offsetof(struct ibv_port_attr, lid)": native.PORT_LID_OFFSET,
        "offsetof(struct ibv_mr, rkey)": native.MR_RKEY_OFFSET,
        "offsetof(struct ibv_qp, qp_num)": native.QP_NUMBER_OFFSET,
        "IBV_WR_RDMA_WRITE_WITH_IMM": post.WR_WRITE_WITH_IMMEDIATE,
        "IBV_SEND_INLINE": post.SEND_INLINE,
    }
    lines = "".join(f'printf("%zu\\n", (size_t)({expression}));' for expression in offsets)
    source = tmp_path / "offsets.c"
    source.write_text(f"#include <infiniband/verbs.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{{lines}}}\n")
    subprocess.run([compiler, str(source), "-o", str(tmp_path / "offsets")], check=True)
    told = subprocess.run([str(tmp_path / "offsets")], check=True, capture_output=True, text=True).stdout.split()
    assert dict(zip(offsets, map(int, told))) == offsets
