"""What a recording is: looks into a file and says which source settings read it."""

from __future__ import annotations

from pathlib import Path

from tickmesh.transports.capture import CaptureError, read_capture
from tickmesh.transports.recording import SLACK, RecordingError, read_bytes

_HEAD_BYTES = 1 << 20
_PCAP_MAGICS = tuple(bytes.fromhex(word) for word in ("a1b2c3d4", "d4c3b2a1", "a1b23c4d", "4d3cb2a1", "0a0d0d0a", "a1b2cd34", "34cdb2a1"))
_JSON_MARKS = (
    (b'"depthUpdate"', "binance"),
    (b'@bookTicker"', "binance"),
    (b'"channel":"books', "okx"),
    (b'"channel":"trades"', "okx"),
    (b'"topic":"orderbook', "bybit"),
)
_IEX = {0x8002: "iex_tops", 0x8003: "iex_tops", 0x8004: "iex_deep", 0x8005: "iex_deep_plus"}
"""Message protocol id in the header of IEX-TP."""


class UnknownCapture(Exception):
    """Nothing here reads this file.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, reason: str) -> None:
        advice = "describe it in a configuration ([data_sources.NAME] with data_format and framing) and use --config"
        super().__init__(f"{path}: {reason}; {advice}")
        self.path = path


def capture_settings(path: Path) -> dict[str, object]:
    """Source settings (`type`, `data_format`, …) for a recording.

    Raises:
        UnknownCapture: its format is not recognised.
        RecordingError: it cannot be read.
    """
    if not path.is_file():
        raise UnknownCapture(path, "there is no such file")
    try:
        data = read_bytes(path, problems=[])
    except RecordingError as error:
        raise UnknownCapture(path, str(error)) from error
    head = bytes(data[: min(len(data) - SLACK, _HEAD_BYTES)])
    if head[:4] in _PCAP_MAGICS:
        return {"type": "pcap", **_packet_protocol(path)}
    if head[:3] == b"DBN":
        return {"type": "file", "data_format": "dbn_mbo"}
    for mark, name in _JSON_MARKS:
        if mark in head:
            return {"type": "file", "data_format": name}
    if "_message_" in path.name and path.suffix in (".csv", ".gz", ".zst"):
        return {"type": "file", "data_format": "lobster"}
    if _is_itch(head):
        return {"type": "file", "data_format": "itch50", "framing": "binaryfile"}
    raise UnknownCapture(path, "its format is not recognised")


def _is_itch(head: bytes) -> bool:
    """The first three messages of a BinaryFILE image have the lengths that ITCH 5.0 gives them."""
    lengths = {b"S": 12, b"R": 39, b"H": 25, b"A": 36, b"F": 40, b"E": 31, b"D": 19, b"U": 35, b"X": 23, b"L": 26, b"Y": 20, b"V": 35}
    lengths[b"P"] = 44
    position, seen = 0, 0
    while position + 3 <= len(head) and seen < 3:
        if lengths.get(head[position + 2 : position + 3]) != int.from_bytes(head[position : position + 2], "big"):
            return False
        position += 2 + int.from_bytes(head[position : position + 2], "big")
        seen += 1
    return seen > 0


def _packet_protocol(path: Path) -> dict[str, object]:
    try:
        buffer, packets = read_capture(path, problems=[]).packets()
    except CaptureError as error:
        raise UnknownCapture(path, str(error)) from error
    for packet in packets[:64]:
        payload = bytes(buffer[int(packet["offset"]) : int(packet["offset"]) + int(packet["length"])])
        if len(payload) >= 40 and payload[0] == 1 and int.from_bytes(payload[2:4], "little") in _IEX:
            return {"data_format": _IEX[int.from_bytes(payload[2:4], "little")], "framing": "iex_tp"}
        if len(payload) >= 23 and _is_itch(payload[20:]):
            return {"data_format": "itch50", "framing": "moldudp64"}
    raise UnknownCapture(path, "no protocol that is known was found in its packets")
