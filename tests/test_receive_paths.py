"""Sockets, packet rings and AF_XDP over a real link: the same traffic makes the same events, and nothing stays behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nodes import until
from replays import DATA
from structlog.testing import capture_logs
from veth import (
    ENDPOINTS,
    WAYS,
    Received,
    assert_books_are_true,
    cable,
    make,
    market,
    needs_namespaces,
    programs_on,
    receiving,
    same_but_times,
    send,
    send_payloads,
    simulated,
)

from tickmesh.node.event import EVENT, Kind
from tickmesh.ops.namespaces import INTERFACE, VethPair
from tickmesh.transports.afxdp import filter_program, make_maps, open_xdp
from tickmesh.transports.bpf import AT_XDP, XDP_PROGRAM, Program
from tickmesh.transports.capture import read_capture
from tickmesh.transports.multicast import MulticastError
from tickmesh.transports.privileges import drop_capabilities
from tickmesh.transports.receive_path import BypassRefused, GroupTaken, Lack, Wish, open_way
from tickmesh.transports.ring import Ring
from tickmesh.transports.udp_frames import Wanted

pytestmark = needs_namespaces
GROUP, PORT = "239.78.1.1", 26400
ITCH_CAPTURES = sorted((DATA / "omi_pcaps").glob("Nasdaq/*TotalView*/*.pcap"))


def test_the_same_traffic_makes_the_same_events_by_every_way() -> None:
    made = {}
    with cable() as pair:
        for bypass, way in WAYS.items():
            lines = simulated(6000)
            with receiving(bypass) as received:
                send(pair, lines)
                received.ended()
                assert received.receiver.path.way == way
                assert_books_are_true(received, lines)
                counters = received.receiver.counters()
                assert (counters["gaps"], counters["malformed"], counters["dropped_by_kernel"]) == (0, 0, 0)
                assert counters["duplicates"] > 0, "line B was there too"
                made[way] = market(received.events())
    assert len(made["sockets"]) > 6000
    assert same_but_times(made["sockets"], made["packet"])
    assert same_but_times(made["sockets"], made["afxdp"])


@pytest.mark.skipif(not ITCH_CAPTURES, reason=f"no captures in {DATA / 'omi_pcaps'}; set TICKMESH_DATA")
def test_real_captures_make_the_same_events_by_every_way() -> None:
    payloads = []
    for path in ITCH_CAPTURES:
        buffer, packets = read_capture(path).packets()
        payloads += [buffer[int(p["offset"]) : int(p["offset"]) + int(p["length"])].tobytes() for p in packets]
    made = {}
    with cable() as pair:
        for bypass, way in WAYS.items():
            with receiving(bypass, gap_wait_ms=0.0) as received:  # captures of many sessions: what is missing is not waited for
                send_payloads(pair, payloads)
                wait_for_packets(received, len(payloads))
                events = market(received.events())
            whole_source = np.isin(events["kind"], (Kind.GAP, Kind.CLEAR))
            events["ts_event"][whole_source] = 0  # the host's clock
            made[way] = events
    assert np.count_nonzero(made["sockets"]["kind"] == Kind.ADD) > 0
    assert same_but_times(made["sockets"], made["packet"])
    assert same_but_times(made["sockets"], made["afxdp"])


def test_a_link_of_several_queues_is_read_whole() -> None:
    """The two lines come by different queues."""
    with cable(queues=2) as pair, receiving("afxdp") as received:
        assert len(received.receiver.path.face.kernels) == 2
        lines = simulated(3000)
        send(pair, lines)
        received.ended()
        assert_books_are_true(received, lines)


# ---------------------------------------------------------------- traffic that is not ours, or broken


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def frame(
    pair: VethPair, payload: bytes, *, group: str = GROUP, port: int = PORT, tag: bool = False, offset: int = 0, spoil_udp: int = 0,
    spoil_ip: int = 0, udp_length: int = 0, ip_length: int = 0, options: bytes = b"",
) -> bytes:  # fmt: skip
    """An Ethernet frame from the near end to a group, right but for what the arguments say."""
    addresses = socket.inet_aton(pair.left_address) + socket.inet_aton(group)
    length = 8 + len(payload)
    udp = struct.pack("!4H", 1234, port, udp_length or length, 0)
    pseudo = addresses + struct.pack("!BBH", 0, 17, length)
    udp = udp[:6] + struct.pack("!H", checksum(pseudo + udp + payload) ^ spoil_udp) + payload
    header = 20 + len(options)
    ip = struct.pack("!BBHHHBBH", 0x40 | header // 4, 0, ip_length or header + length, 7, offset, 1, 17, 0) + addresses + options
    ip = ip[:10] + struct.pack("!H", checksum(ip) ^ spoil_ip) + ip[12:]
    mac = bytes.fromhex("01005e") + bytes([socket.inet_aton(group)[1] & 127]) + socket.inet_aton(group)[2:]
    return mac + bytes.fromhex("020000000001") + (b"\x81\x00\x00\x07" if tag else b"") + b"\x08\x00" + ip + udp


def packet(sequence: int, count: int = 0) -> bytes:
    """A MoldUDP64 packet; without messages a heartbeat."""
    return b"TICKMESH  " + struct.pack("!QH", sequence, count) + b"\x00\x01S" * count


def put_on_the_wire(pair: VethPair, *frames: bytes) -> None:
    with pair.inside("left"), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((INTERFACE, 0))
        for one in frames:
            raw.send(one)


def wait_for_packets(received: Received, count: int) -> dict[str, int]:
    until(lambda: received.receiver.counters()["packets"] >= count, f"{count} packets", 10)
    return received.receiver.counters()


@pytest.mark.parametrize("bypass", ["packet", "afxdp"])
def test_what_is_broken_or_not_ours_is_counted_and_dropped(bypass: str) -> None:
    with cable() as pair, receiving(bypass) as received:
        good = packet(1)
        put_on_the_wire(
            pair,
            frame(pair, good),
            frame(pair, good + bytes(1), spoil_udp=0x0100),
            frame(pair, good, spoil_ip=0x0001),
            frame(pair, good, tag=True),
            frame(pair, good, offset=0x2000),
            frame(pair, good, offset=0x0010),
            frame(pair, good, udp_length=900),
            frame(pair, good, ip_length=900),
            frame(pair, good, port=PORT + 5),
            frame(pair, good, group="239.78.1.9"),
            frame(pair, good, options=bytes(4)),
            frame(pair, good) + bytes(30),
        )
        # what the filter in the kernel lets pass to the stack is counted there; IP options come in by the packet ring alone
        counters = wait_for_packets(received, 3 if bypass == "packet" else 2)
        found = {name: counters[name] for name in ("truncated", "fragments", "tagged", "bad_checksum")}
        assert found == {"truncated": 2, "fragments": 2, "tagged": 1, "bad_checksum": 2}
        assert counters["not_wanted"] == (0 if bypass == "packet" else 1)
        assert counters["malformed"] == counters["gaps"] == 0


def test_sockets_take_none_of_it_either() -> None:
    with cable() as pair, receiving("none") as received:
        good = packet(1)
        bad = [frame(pair, good, spoil_udp=0x0100), frame(pair, good, spoil_ip=1), frame(pair, good, tag=True),
               frame(pair, good, udp_length=900), frame(pair, good, ip_length=900), frame(pair, good, port=PORT + 5)]  # fmt: skip
        put_on_the_wire(pair, frame(pair, good), *bad, frame(pair, good) + bytes(30))
        assert wait_for_packets(received, 2)["packets"] == 2


def test_other_programs_still_get_what_af_xdp_leaves() -> None:
    with cable() as pair, receiving("afxdp") as received, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("", PORT + 7))
        membership = socket.inet_aton(GROUP) + socket.inet_aton(pair.right_address)
        other.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        other.settimeout(10)
        put_on_the_wire(pair, frame(pair, packet(1)), frame(pair, b"theirs", port=PORT + 7))
        assert other.recv(100) == b"theirs"
        wait_for_packets(received, 1)


# ---------------------------------------------------------------- overflow, stamps, privileges


@pytest.mark.parametrize("bypass", ["packet", "afxdp"])
def test_what_has_no_room_is_counted(bypass: str) -> None:
    """A receiver that is not started: nobody reads."""
    ring = Ring.create(None, 1 << 10, EVENT)
    with cable() as pair:
        receiver = make(bypass, ring, recv_buffer_kb=64)
        try:
            receiver.path.face.begin()
            put_on_the_wire(pair, *[frame(pair, packet(1))] * 400)
            until(lambda: receiver.counters()["rx_ring_full"] > 0, "an overflow", 10)
            counters = receiver.counters()
            assert counters["dropped_by_kernel"] == counters["rx_ring_full"]
            assert 0 < counters["rx_ring_full"] < 400
        finally:
            receiver.close()
            ring.close()


@pytest.mark.parametrize("bypass", WAYS)
def test_the_kernels_stamp_is_when_it_came_not_when_it_was_read(bypass: str) -> None:
    ring = Ring.create(None, 1 << 10, EVENT)
    with cable() as pair:
        receiver = make(bypass, ring, receive_stamps="kernel")
        try:
            receiver.path.face.begin()
            before = time.time_ns()
            put_on_the_wire(pair, frame(pair, packet(1)))
            until(lambda: receiver.path.face.peek(0, drop=False) is not None, "the packet", 10)
            after = time.time_ns()
            until(lambda: time.time_ns() > after + 50_000_000, "some time")
            (found,) = receiver.path.face.receive()
            stamped = int(found["ts_recv"])
            assert before - 1_000_000 <= stamped <= after + 1_000_000
        finally:
            receiver.close()
            ring.close()


def test_the_thread_that_reads_from_the_network_has_no_capability() -> None:
    with cable(), receiving("afxdp") as received:

        def effective() -> int:
            status = open(f"/proc/self/task/{received.receiver.thread_id}/status").read()  # noqa: SIM115
            return int(status.partition("CapEff:")[2].split()[0], 16)

        until(lambda: effective() == 0, "no capabilities", 10)
        mine = open("/proc/thread-self/status").read()  # noqa: SIM115
        assert int(mine.partition("CapEff:")[2].split()[0], 16) != 0, "the others keep theirs"


# ---------------------------------------------------------------- choosing


def test_auto_takes_af_xdp_on_a_link_and_says_so() -> None:
    with cable(), receiving("auto") as received:
        counters = received.receiver.counters()
        assert (received.receiver.path.way, counters["way"], counters["way_because"]) == ("afxdp", 2, Lack.NOTHING)


def test_auto_leaves_the_loopback_to_others_and_says_why() -> None:
    with cable(), receiving("auto", interface="lo") as received:
        assert received.receiver.path.way == "packet"
        assert received.receiver.counters()["way_because"] == Lack.LOOPBACK
        assert "loopback" in str(received.receiver.refusals[0])


@pytest.mark.parametrize("way", ["packet", "afxdp"])
def test_lines_that_come_by_different_interfaces_are_left_to_sockets(way: str) -> None:
    """Without the key interface each line follows the routing table; one ring or program sees one interface."""
    with cable():
        for arguments in (
            "link add second0 type veth peer name second1",
            "addr add 10.99.99.1/24 dev second0",
            "link set second0 up",
            f"route add {GROUP}/32 dev {INTERFACE}",
            "route add 239.78.1.2/32 dev second0",
        ):
            subprocess.run(["ip", *arguments.split()], check=True)
        with pytest.raises(BypassRefused, match="different interfaces") as caught:
            open_way(way, Wish(endpoints=ENDPOINTS))
        assert caught.value.refusal.lack == Lack.INTERFACES
        open_way("sockets", Wish(endpoints=ENDPOINTS)).close()


def test_a_second_source_on_the_interface_takes_the_next_best_way() -> None:
    ring = Ring.create(None, 1 << 10, EVENT)
    others = {"endpoint": "udp://239.78.2.1:26500", "endpoint_b": "udp://239.78.2.2:26501"}
    with cable() as pair, receiving("afxdp") as first:
        second = make("auto", ring, "other", **others)
        try:
            assert second.path.way == "packet"
            assert second.counters()["way_because"] == Lack.HELD
            put_on_the_wire(pair, frame(pair, packet(1)), frame(pair, packet(7), group="239.78.2.1", port=26500))
            until(lambda: second.path.face.peek(0, drop=False) is not None, "a packet of its group", 10)
            assert second.path.face.peek(0, drop=False) == packet(7)
            wait_for_packets(first, 1)
        finally:
            second.close()
        with pytest.raises(BypassRefused, match=r"lines.*has it") as caught:
            make("afxdp", ring, "other", **others)
        assert caught.value.refusal.lack == Lack.HELD
    ring.close()


@pytest.mark.parametrize("bypass", ["auto", "packet", "none"])
def test_a_second_source_of_groups_that_af_xdp_takes_is_refused(bypass: str) -> None:
    """Nothing would come, by whatever way: not a packet, not a gap."""
    ring = Ring.create(None, 1 << 10, EVENT)
    with cable():
        with receiving("afxdp"), pytest.raises(GroupTaken, match=r"'lines' takes this group") as caught:
            make(bypass, ring, "other", endpoint="udp://239.78.2.1:26500")  # line B is the same
        assert (caught.value.endpoint, caught.value.interface, caught.value.owner) == (ENDPOINTS[1], INTERFACE, "lines")
        make(bypass, ring, "other").close()
    ring.close()


def test_a_program_of_another_process_on_the_interface_is_warned_of() -> None:
    ring = Ring.create(None, 1 << 10, EVENT)
    with cable(), ExitStack() as closing:
        opened: list[Any] = []
        closing.callback(lambda: [one.close() for one in reversed(opened)])
        opened.append(program := Program(filter_program(*make_maps(1, opened)), XDP_PROGRAM, AT_XDP, "theirs"))
        opened.append(program.attach(socket.if_nametoindex(INTERFACE), 2))  # XDP_FLAGS_SKB_MODE
        with capture_logs() as logs:
            receiver = make("auto", ring)
        closing.callback(receiver.close)
        assert receiver.path.way == "packet"
        assert receiver.counters()["way_because"] == Lack.FOREIGN_PROGRAM
        assert [log["source"] for log in logs if log["log_level"] == "warning" and "takes these groups" in log["warning"]] == ["lines"]
    ring.close()


def test_a_receiver_follows_another_on_the_same_interface_without_losing_what_waits() -> None:
    """As when a running node gets another configuration of the source: the next is opened beside the one that runs."""
    first, second = Ring.create(None, 1 << 17, EVENT), Ring.create(None, 1 << 17, EVENT)
    with cable() as pair:
        halves = [[bytes(batch.payload(int(k))) for k in batch.lines[0]] for batch in simulated(4000).batches()]
        with receiving("afxdp") as before:
            send_payloads(pair, halves[0])
            until(lambda: before.receiver.counters()["packets"] >= len(halves[0]), "the first half", 10)
            after = make("afxdp", second, receive_stamps="kernel")
            before.receiver.ask_stop()
            assert before.receiver.join(10)
            send_payloads(pair, [p for half in halves[1:] for p in half])
            assert after.take_over(before.receiver)
        try:  # the one before is closed now
            after.start()
            until(lambda: after.counters()["messages"] >= 4000 - before.receiver.counters()["messages"], "the rest", 10)
            assert after.counters()["gaps"] == after.counters()["dropped_by_kernel"] == 0
        finally:
            after.ask_stop()
            assert after.join(10)
            after.close()
    first.close()
    second.close()


def test_without_privileges_auto_takes_sockets_and_says_what_is_missing() -> None:
    ring, found = Ring.create(None, 1 << 10, EVENT), []

    def unprivileged() -> None:
        drop_capabilities()
        found.append(make("auto", ring))
        try:
            make("packet", ring)
        except BypassRefused as refused:
            found.append(refused)

    with cable():
        thread = threading.Thread(target=unprivileged)
        thread.start()
        thread.join()
        receiver, refused = found
        try:
            assert receiver.path.way == "sockets"
            assert [(one.way, one.lack) for one in receiver.refusals] == [("afxdp", Lack.NO_NET_RAW), ("packet", Lack.NO_NET_RAW)]
            assert receiver.counters()["way_because"] == Lack.NO_NET_RAW
            assert "setcap cap_net_raw" in str(refused)
        finally:
            receiver.close()
    ring.close()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs the program setpriv (util-linux)")
@pytest.mark.parametrize(("without", "way", "word"), [("-net_raw", "sockets", "CAP_NET_RAW"), ("-bpf,-sys_admin", "packet", "CAP_BPF")])
def test_the_doctor_says_what_each_way_lacks(without: str, way: str, word: str) -> None:
    with cable():
        command = ["setpriv", f"--bounding-set={without}", "--inh-caps=-all", sys.executable, "-m", "tickmesh.ops.cli", "doctor", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    (check,) = [check for check in json.loads(done.stdout) if check["name"] == "receive paths"]
    assert f"{INTERFACE}: {way}" in check["found"]
    assert word in check["advice"]
    assert check["status"] == "warn"


# ---------------------------------------------------------------- nothing stays


def test_nothing_stays_on_the_interface_after_a_refusal_or_a_stop() -> None:
    with cable():
        assert programs_on(INTERFACE) == []
        with receiving("afxdp"):
            assert programs_on(INTERFACE) == ["tickmesh_rx"]
        assert programs_on(INTERFACE) == []
        ring = Ring.create(None, 1 << 10, EVENT)
        with pytest.raises(MulticastError, match="no interface"):
            make("afxdp", ring, interface="nosuch0")
        ring.close()


@pytest.mark.parametrize("bypass", WAYS)
def test_busy_polling_is_asked_of_every_socket(bypass: str) -> None:
    ring = Ring.create(None, 1 << 10, EVENT)
    with cable():
        receiver = make(bypass, ring, busy_poll_us=37)
        try:
            for descriptor in receiver.path.face.descriptors():
                with socket.socket(socket.AF_INET, socket.SOCK_RAW, fileno=os.dup(descriptor)) as shared:  # of whatever family
                    assert shared.getsockopt(socket.SOL_SOCKET, 46) == 37  # SO_BUSY_POLL
        finally:
            receiver.close()
            ring.close()


def test_stamping_changes_when_the_next_path_begins_and_leaves_no_program_behind() -> None:
    """A change of the configuration that is called off opens a path beside the one that runs, and closes it."""
    wanted = [Wanted(GROUP, PORT, None, 0)]

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with cable(), open_xdp(wanted, INTERFACE, owner="lines") as running:
        running.begin()
        open_xdp(wanted, INTERFACE, owner="lines", stamped=True).close()
        assert running.kernels[0].state["stamped"][0] == 0
        assert programs_on(INTERFACE) == ["tickmesh_rx"]
        before = descriptors()
        for stamped in (True, False, True):
            with open_xdp(wanted, INTERFACE, owner="lines", stamped=stamped) as after:
                after.begin()
                assert running.kernels[0].state["stamped"][0] == stamped
        assert descriptors() == before


@pytest.mark.parametrize("bypass", WAYS)
def test_no_descriptor_and_no_memory_stays(bypass: str) -> None:
    """Python's mappings hold descriptors of their own, which would keep a socket alive."""

    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().splitlines()
        return len(list(Path("/proc/self/fd").iterdir())), sum("socket:" in line for line in maps)

    ring = Ring.create(None, 1 << 10, EVENT)
    with cable():
        make(bypass, ring).close()
        before = held()
        for _ in range(5):
            receiver = make(bypass, ring, rerequest="udp://127.0.0.1:9")
            receiver.path.face.begin()
            receiver.close()
            del receiver
        assert held() == before
    ring.close()


def test_ring_words_are_the_kernels() -> None:
    """The mapped rings are views, not copies: what the kernel writes is seen."""
    with cable() as pair:
        ring = Ring.create(None, 1 << 10, EVENT)
        receiver = make("afxdp", ring)
        try:
            receiver.path.face.begin()
            kernel = receiver.path.face.kernels[0]
            assert 2 * kernel.rx.size == kernel.fill.size == 4096
            put_on_the_wire(pair, frame(pair, packet(1)))
            until(lambda: kernel.rx_words[int(kernel.state["produced_at"][0])] == 1, "the frame", 10)
            assert np.count_nonzero(kernel.rx["length"]) == 1
        finally:
            receiver.close()
            ring.close()


assert ENDPOINTS[0].endswith(f"{GROUP}:{PORT}")
