"""An independent ITCH 5.0 book reader for tests: plain dicts and struct, written from the specification, sharing no code with tickmesh."""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from collections.abc import Iterator

LENGTHS = {
    "S": 12, "R": 39, "H": 25, "Y": 20, "L": 26, "V": 35, "W": 12, "K": 28, "J": 35, "h": 21, "A": 36, "F": 40, "E": 31, "C": 36,
    "X": 23, "D": 19, "U": 35, "P": 44, "Q": 40, "B": 19, "I": 50, "N": 20, "O": 48,
}  # fmt: skip


def frames(image: bytes) -> Iterator[bytes]:
    """The messages of a BinaryFILE image; fails on a frame that is cut short."""
    at = 0
    while at < len(image):
        (size,) = struct.unpack_from(">H", image, at)
        message = image[at + 2 : at + 2 + size]
        assert len(message) == size, f"frame at {at} is cut short"
        yield message
        at += 2 + size


class ItchReader:
    """Books, trades and every rule of the message stream that can be checked from outside."""

    def __init__(self) -> None:
        self.orders: dict[int, list[int]] = {}
        """reference -> [locate, side, price, shares]; dict order is time order."""
        self.stocks: dict[int, str] = {}
        self.status: dict[int, str] = {}
        self.trades: Counter[int] = Counter()
        self.volume: Counter[int] = Counter()
        self.broken: Counter[int] = Counter()
        self.last: dict[int, int] = {}
        self.types: Counter[str] = Counter()
        self.system = ""
        self.time_ns = 0
        self.last_ref = self.last_match = 0
        self.executed_of: dict[int, int] = {}

    def read(self, message: bytes) -> None:
        """Take one message in; fails on anything that a venue would not send."""
        kind = chr(message[0])
        assert len(message) == LENGTHS[kind], f"{kind} of {len(message)} bytes"
        locate, _tracking, high, low = struct.unpack_from(">HHHI", message, 1)
        time_ns = high << 32 | low
        assert time_ns >= self.time_ns, "time went back"
        self.time_ns = time_ns
        self.types[kind] += 1
        if kind not in "SV":
            assert kind == "R" or locate in self.stocks
        handler = getattr(self, f"_on_{kind}", None)
        if handler:
            handler(locate, message)

    def _on_S(self, _locate: int, message: bytes) -> None:
        self.system += chr(message[11])

    def _on_R(self, locate: int, message: bytes) -> None:
        assert locate not in self.stocks
        self.stocks[locate] = message[11:19].decode().rstrip()

    def _on_H(self, locate: int, message: bytes) -> None:
        assert self._stock(message, 11) == self.stocks[locate]
        self.status[locate] = chr(message[19])

    def _stock(self, message: bytes, at: int) -> str:
        return message[at : at + 8].decode().rstrip()

    def _new_ref(self, ref: int) -> None:
        assert ref == self.last_ref + 1, "references are not sequential"
        self.last_ref = ref

    def _new_match(self, match: int) -> None:
        assert match == self.last_match + 1, "match numbers are not sequential"
        self.last_match = match

    def _on_A(self, locate: int, message: bytes) -> None:
        ref, side, shares = struct.unpack_from(">QcI", message, 11)
        (price,) = struct.unpack_from(">I", message, 32)
        assert self._stock(message, 24) == self.stocks[locate]
        assert side in (b"B", b"S")
        assert shares > 0
        assert price > 0
        assert price % 100 == 0
        self._new_ref(ref)
        self.orders[ref] = [locate, int(side == b"S"), price, shares]

    def _on_F(self, locate: int, message: bytes) -> None:
        assert message[36:40].isalpha()
        self._on_A(locate, message)

    def _cut(self, locate: int, ref: int, shares: int) -> list[int]:
        order = self.orders[ref]
        assert order[0] == locate
        assert 0 < shares <= order[3]
        order[3] -= shares
        if order[3] == 0:
            del self.orders[ref]
        return order

    def _print(self, locate: int, match: int, shares: int, price: int) -> None:
        self.trades[locate] += 1
        self.volume[locate] += shares
        self.last[locate] = price
        self.executed_of[match] = locate

    def _on_E(self, locate: int, message: bytes) -> None:
        ref, shares, match = struct.unpack_from(">QIQ", message, 11)
        assert self.status[locate] == "T", "a trade during a halt"
        self._new_match(match)
        _, side, price, _ = self.orders[ref]
        best = self.best(locate, side)
        assert price == best[0], "traded through a better price"
        assert ref == best[1], "traded past an older order"
        self._cut(locate, ref, shares)
        self._print(locate, match, shares, price)

    def _on_C(self, locate: int, message: bytes) -> None:
        ref, shares, match, printable, price = struct.unpack_from(">QIQcI", message, 11)
        self._new_match(match)
        self._cut(locate, ref, shares)
        if printable == b"Y":
            self._print(locate, match, shares, price)

    def _on_X(self, locate: int, message: bytes) -> None:
        ref, shares = struct.unpack_from(">QI", message, 11)
        assert shares < self.orders[ref][3]
        self._cut(locate, ref, shares)

    def _on_D(self, locate: int, message: bytes) -> None:
        (ref,) = struct.unpack_from(">Q", message, 11)
        self._cut(locate, ref, self.orders[ref][3])

    def _on_U(self, locate: int, message: bytes) -> None:
        old, ref, shares, price = struct.unpack_from(">QQII", message, 11)
        self._new_ref(ref)
        was = self.orders.pop(old)
        assert was[0] == locate
        self.orders[ref] = [locate, was[1], price, shares]

    def _on_P(self, locate: int, message: bytes) -> None:
        ref, side, shares = struct.unpack_from(">QcI", message, 11)
        price, match = struct.unpack_from(">IQ", message, 32)
        assert (ref, side) == (0, b"B")
        self._new_match(match)
        self._print(locate, match, shares, price)

    def _on_Q(self, locate: int, message: bytes) -> None:
        shares, stock, price, match, cross = struct.unpack_from(">Q8sIQc", message, 11)
        assert stock.decode().rstrip() == self.stocks[locate]
        assert cross in (b"O", b"C", b"H")
        self._new_match(match)
        if shares:
            self._print(locate, match, shares, price)

    def _on_B(self, locate: int, message: bytes) -> None:
        (match,) = struct.unpack_from(">Q", message, 11)
        assert self.executed_of.pop(match) == locate
        self.broken[locate] += 1

    def best(self, locate: int, side: int) -> tuple[int, int]:
        """Best price of a side and the oldest order there."""
        held = [(price, ref) for ref, (at, which, price, _) in self.orders.items() if at == locate and which == side]
        return min(held, key=lambda x: (x[0] if side else -x[0], x[1]))

    def levels(self, locate: int, side: int) -> list[list[int]]:
        """[price, quantity, orders], best first."""
        found: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for at, which, price, shares in self.orders.values():
            if (at, which) == (locate, side):
                found[price][0] += shares
                found[price][1] += 1
        return [[price, *found[price]] for price in sorted(found, reverse=side == 0)]

    def truth(self, depth: int = 10) -> dict[str, dict[str, object]]:
        """The same summary that a simulator gives of itself."""
        return {
            stock: {
                "bids": self.levels(locate, 0)[:depth],
                "asks": self.levels(locate, 1)[:depth],
                "orders": sum(order[0] == locate for order in self.orders.values()),
                "trades": self.trades[locate],
                "volume": self.volume[locate],
                "broken": self.broken[locate],
                "last": self.last.get(locate),
                "status": self.status[locate],
                "locate": locate,
            }
            for locate, stock in self.stocks.items()
        }


def read_image(image: bytes) -> ItchReader:
    """Read a whole BinaryFILE image."""
    reader = ItchReader()
    for message in frames(image):
        reader.read(message)
    return reader
