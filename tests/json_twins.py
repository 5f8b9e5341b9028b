"""Slow twins of the compiled JSON decoders: books with texts in dicts, and messages of each venue, as they are and damaged."""

from __future__ import annotations

import json
from random import Random
from typing import Any
from zlib import crc32

from tickmesh.node.event import ASK, BID

Texts = list[tuple[str, str]]


def okx_checksum(bids: Texts, asks: Texts) -> int:
    """CRC32, signed, of ``bid:size:ask:size:…`` over at most 25 levels a side, best first (OKX API v5, "Checksum")."""
    parts: list[str] = []
    for i in range(25):
        for side in (bids, asks):
            if i < len(side):
                parts += side[i]
    value = crc32(":".join(parts).encode())
    return value - (1 << 32) if value >= 1 << 31 else value


def kraken_checksum(bids: Texts, asks: Texts) -> int:
    """CRC32 of price and quantity without points and zeros in front, ten asks, then ten bids (docs.kraken.com, "Book checksum")."""
    text = "".join(number.replace(".", "").lstrip("0") for side in (asks, bids) for level in side[:10] for number in level)
    return crc32(text.encode())


class TextBook:
    """A book with the venue's texts."""

    def __init__(self) -> None:
        self.sides: tuple[dict[int, tuple[str, str]], dict[int, tuple[str, str]]] = ({}, {})

    def set(self, side: int, price: int, qty: int, texts: tuple[str, str]) -> None:
        if qty:
            self.sides[side][price] = texts
        else:
            self.sides[side].pop(price, None)

    def best(self, side: int) -> Texts:
        return [self.sides[side][price] for price in sorted(self.sides[side], reverse=side == BID)]

    def fall(self, side: int, depth: int) -> list[int]:
        """Take out what is beyond `depth`: prices, worst first."""
        worst = sorted(self.sides[side], reverse=side == BID)[depth:][::-1]
        for price in worst:
            del self.sides[side][price]
        return worst


# ---------------------------------------------------------------- messages


class Venue:
    """Messages of a venue in an order that makes sense, mostly."""

    def __init__(self, name: str, random: Random) -> None:
        self.name, self.random = name, random
        self.at = {"AAA-B": 0, "CC": 0}
        self.books = {symbol: TextBook() for symbol in self.at}

    def message(self) -> Any:
        """The next one."""
        symbol = self.random.choice(list(self.at))
        kind = self.random.random()
        if self.at[symbol] == 0 or kind < 0.05:
            self.at[symbol] = self.random.randint(100, 10**9)
            return getattr(self, self.name)("snapshot", symbol)
        return getattr(self, self.name)("book" if kind < 0.55 else "trade" if kind < 0.8 else "quote", symbol)

    def next_id(self, symbol: str) -> int:
        self.at[symbol] += 1 if self.random.random() < 0.97 else self.random.randint(-3, 5)
        return self.at[symbol]

    def number(self, most: int, decimals: int, *, zero: bool = False) -> str:
        value = 0 if zero and self.random.random() < 0.3 else self.random.randint(1, most)
        return f"{value / 10**decimals:.{decimals}f}"

    def levels(self, symbol: str, count: int, *, more: tuple[str, ...] = (), whose: Any = None) -> list[list[list[str]]]:
        found: list[list[list[str]]] = []
        for side, base in ((BID, 400), (ASK, 500)):
            entries = []
            for _ in range(self.random.randint(0, count)):
                price = f"{(base + self.random.randint(0, 60)) / 10:.1f}"
                qty = self.number(99, 3, zero=True)
                self.books[symbol].set(side, int(price.replace(".", "")), int(qty.replace(".", "")), (price, qty))
                entries.append([price, qty, *more])
            found.append(entries)
        return found

    def binance(self, kind: str, symbol: str) -> Any:
        if kind == "snapshot":
            bids, asks = self.levels(symbol, 6)
            return {"lastUpdateId": self.at[symbol], "bids": bids, "asks": asks}
        if kind == "trade":
            word = self.random.choice([("trade", "t"), ("aggTrade", "a")])
            made = {"e": word[0], "E": 7, "s": symbol, word[1]: self.random.randint(0, 10**10), "p": self.number(99, 2),
                    "q": self.number(9, 1), "T": 5, "m": self.random.random() < 0.5, "M": True}  # fmt: skip
        elif kind == "quote":
            made = {"u": 4, "s": symbol, "b": self.number(99, 2), "B": self.number(9, 1, zero=True), "a": "9.9", "A": "1"}
            made |= self.random.choice([{}, {"e": "bookTicker", "E": 9, "T": 8}, {"E": 9}])
        else:
            before, last = self.at[symbol], self.next_id(symbol)
            bids, asks = self.levels(symbol, 4)
            made = {"e": "depthUpdate", "E": 1_700_000_000_123, "s": symbol, "U": before + 1, "u": last, "b": bids, "a": asks}
            made |= {"pu": before} if self.random.random() < 0.3 else {}
        return {"stream": "x@y", "data": made} if self.random.random() < 0.5 else made

    def okx(self, kind: str, symbol: str) -> Any:
        stamp = str(self.random.randint(0, 10**13))
        if kind in ("snapshot", "book"):
            before = self.at[symbol]
            if kind == "snapshot":
                self.books[symbol] = TextBook()
            bids, asks = self.levels(symbol, 5, more=("0", str(self.random.randint(0, 9))))
            last = self.next_id(symbol)
            told = okx_checksum(self.books[symbol].best(BID), self.books[symbol].best(ASK))
            entry = {"asks": asks, "bids": bids, "ts": stamp, "checksum": told + (self.random.random() < 0.03)}
            entry |= {"prevSeqId": before if kind == "book" else -1, "seqId": last} if self.random.random() < 0.7 else {}
            action = "update" if kind == "book" else "snapshot"
            return {"arg": {"channel": "books", "instId": symbol}, "action": action, "data": [entry]}
        if kind == "quote":
            entry = {"instType": "SPOT", "instId": symbol, "last": "1", "askPx": "1.5", "askSz": self.number(9, 1), "ts": stamp}
            entry |= {"bidPx": self.random.choice(["", "1.2"]), "bidSz": "2"}
            return {"arg": {"channel": "tickers", "instId": symbol}, "data": [entry]}
        side = self.random.choice(["buy", "sell"])
        trades = [
            {"instId": symbol, "tradeId": str(self.random.randint(0, 10**9)), "px": self.number(99, 2), "sz": "1.5", "side": side,
             "ts": stamp}
            for _ in range(self.random.randint(1, 3))
        ]  # fmt: skip
        return {"arg": {"channel": "trades", "instId": symbol}, "data": trades}

    def bybit(self, kind: str, symbol: str) -> Any:
        if kind in ("snapshot", "book", "quote"):
            bids, asks = self.levels(symbol, 4)
            data = {"s": symbol, "b": bids, "a": asks, "u": self.next_id(symbol), "seq": 7}
            word = "snapshot" if kind == "snapshot" else "delta"
            return {"topic": f"orderbook.50.{symbol}", "type": word, "ts": 1_700_000_000_000, "data": data, "cts": 3}
        trades = [
            {"T": 5, "s": symbol, "S": self.random.choice(["Buy", "Sell"]), "v": "1.5", "p": self.number(99, 2), "L": "PlusTick",
             "BT": False, "i": self.random.choice(["123456", "20f43950-d8dd-5b31-9112-a178eb6023AF"])}
            for _ in range(self.random.randint(1, 3))
        ]  # fmt: skip
        return {"topic": f"publicTrade.{symbol}", "type": "snapshot", "ts": 5, "data": trades}

    def coinbase(self, kind: str, symbol: str) -> Any:
        fraction = self.random.choice(["", ".5", ".123456", ".123456789", ".000001"])
        day = f"20{self.random.randint(20, 29)}-0{self.random.randint(1, 9)}-{self.random.randint(10, 28)}"
        time = f"{day}T23:59:0{self.random.randint(0, 9)}{fraction}Z"
        if kind == "snapshot":
            bids, asks = self.levels(symbol, 6)
            return {"type": "snapshot", "product_id": symbol, "bids": bids, "asks": asks}
        if kind == "book":
            bids, asks = self.levels(symbol, 3)
            changes = [["buy", *level] for level in bids] + [["sell", *level] for level in asks]
            self.random.shuffle(changes)
            return {"type": "l2update", "product_id": symbol, "changes": changes, "time": time}
        if kind == "quote":
            return {"type": "ticker", "sequence": 5, "product_id": symbol, "price": "1", "best_bid": "1", "best_bid_size": "2",
                    "best_ask": "3", "best_ask_size": self.number(9, 1), "time": time}  # fmt: skip
        return {"type": "match", "trade_id": self.random.randint(0, 10**9), "maker_order_id": "x", "taker_order_id": "y", "sequence": 3,
                "side": self.random.choice(["buy", "sell"]), "size": self.number(99, 2), "price": "2.5", "product_id": symbol,
                "time": time}  # fmt: skip

    def kraken_futures(self, kind: str, symbol: str) -> Any:
        if kind == "snapshot":
            bids, asks = ([{"price": float(p), "qty": float(q)} for p, q in side] for side in self.levels(symbol, 6))
            return {"feed": "book_snapshot", "product_id": symbol, "timestamp": 5, "seq": self.at[symbol], "bids": bids, "asks": asks}
        side = self.random.choice(["buy", "sell"])
        if kind == "trade":
            return {"feed": "trade", "product_id": symbol, "uid": "12", "side": side, "price": 1.5, "qty": 3, "time": 5, "seq": 2}
        return {"feed": "book", "product_id": symbol, "side": side, "seq": self.next_id(symbol), "price": float(self.number(999, 1)),
                "qty": self.random.choice([0, 1.5, 200]), "timestamp": 1_700_000_000_000}  # fmt: skip

    def kraken(self, kind: str, symbol: str) -> Any:
        time = "2023-10-06T17:35:55.440295Z"
        if kind in ("snapshot", "book", "quote"):
            book = self.books[symbol]
            if kind == "snapshot":
                book = self.books[symbol] = TextBook()
            bids, asks = self.levels(symbol, 9)
            if kind != "snapshot":
                book.fall(BID, 10), book.fall(ASK, 10)
            told = kraken_checksum(book.best(BID), book.best(ASK)) + (self.random.random() < 0.03)
            sides = [[{"price": _Number(p), "qty": _Number(q)} for p, q in side] for side in (bids, asks)]
            entry = {"symbol": symbol, "bids": sides[0], "asks": sides[1], "checksum": told, "timestamp": time}
            return {"channel": "book", "type": "snapshot" if kind == "snapshot" else "update", "data": [entry]}
        trades = [
            {"symbol": symbol, "side": self.random.choice(["buy", "sell"]), "price": _Number("45.5"), "qty": _Number(self.number(99, 3)),
             "ord_type": "limit", "trade_id": self.random.randint(0, 10**9), "timestamp": time}
            for _ in range(self.random.randint(1, 3))
        ]  # fmt: skip
        return {"channel": "trade", "type": "update", "data": trades}


class _Number(float):
    """A number that is written with the text it was made from."""

    def __new__(cls, text: str) -> _Number:
        made = super().__new__(cls, text)
        made.text = text
        return made

    text: str

    def __repr__(self) -> str:
        return self.text


def encoded(message: Any) -> bytes:
    """As venues write it: without spaces."""
    return _dumps(message).encode()


def _dumps(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{_dumps(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dumps, value)) + "]"
    return repr(value) if isinstance(value, _Number) else json.dumps(value)


_ODD = ["1e-3", "-1", "007", "1.", ".5", "1.0000000001", "9" * 20, "", "x", " 1", "1 ", "+1", "1.5.5", "é", "\u0661", "0", "-0.0"]
_ODD_TOKENS = [*b'null 1e5 -1 007 1.50 -0 true false [] {} "" 1. 99999999999999999999 "\\u0031"'.split(), b" 1"]


def damaged(text: bytes, random: Random) -> bytes:
    """A message with something done to it."""
    way = random.randrange(9)
    if way == 0:
        at = random.randrange(len(text))
        return text[:at] + bytes([random.randrange(256)]) + text[at + 1 :]
    if way == 1:
        return text[: random.randrange(len(text))]
    if way == 2:
        at = random.randrange(len(text))
        return text[:at] + random.choice([b" ", b"\n", b"\0", b"\\", b'"', b",", b"}", b"]", b"\xff", b"0"]) + text[at:]
    if way == 3:
        return text + random.choice([b" ", b"\n", b"x", b"}", text])
    loaded = json.loads(text, parse_float=_Number)
    if way == 4:
        return json.dumps(loaded).encode()  # with spaces
    if way == 5:
        return encoded(_shuffled(loaded, random))
    if way == 6:
        return encoded(_changed(loaded, random))
    if way == 7:  # a key twice
        at = text.find(b",")
        return text[:at] + b"," + text[1:at] + text[at:] if at > 0 and text[1:2] == b'"' else text
    places = [i for i in range(len(text)) if text[i : i + 1] == b":"]
    at = random.choice(places)
    end = min((text.find(c, at) for c in (b",", b"}") if text.find(c, at) > 0), default=len(text))
    return text[: at + 1] + random.choice(_ODD_TOKENS) + text[end:]


def _shuffled(value: Any, random: Random) -> Any:
    if isinstance(value, dict):
        items = list(value.items())
        random.shuffle(items)
        return {k: _shuffled(v, random) for k, v in items}
    return [_shuffled(v, random) for v in value] if isinstance(value, list) else value


def _changed(value: Any, random: Random) -> Any:
    """One leaf or key changed, dropped or added."""
    if isinstance(value, dict) and value:
        key = random.choice(list(value))
        if random.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if random.random() < 0.1:
            return {**value, "a_key_of_more_than_16_bytes": random.choice([1, "x", None, True, [1], {"a": 1}])}
        return {**value, key: _changed(value[key], random)}
    if isinstance(value, list) and value:
        at = random.randrange(len(value))
        if random.random() < 0.1:
            return [*value, value[at]]
        return [*value[:at], _changed(value[at], random), *value[at + 1 :]]
    if isinstance(value, str):
        return random.choice([*_ODD, 5, None])
    return random.choice([0, -1, 1 << 63, 1.5, "1", None, True, [], {}])
