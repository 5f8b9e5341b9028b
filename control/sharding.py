"""Placement of instruments on shards: rendezvous hashing by symbol, with overrides.

Every node must place a symbol alike, so the hash is fixed here to the bit; :mod:`tickmesh.node.instruments` computes the same in
compiled code, and a test compares them. The symbol is padded with zero bytes to 24 and read as three little-endian u64 words. All
arithmetic is modulo 2**64::

    mix(x) = x ^= x >> 32;  x *= 0xFF51AFD7ED558CCD;  x ^= x >> 29;  x *= 0xC4CEB9FE1A85EC53;  x ^= x >> 32
    h = mix(w0)                                                                  symbols of up to 8 bytes
    h = mix(mix(h ^ w1 ^ 0x9E3779B97F4A7C15) ^ w2 ^ 0xC4CEB9FE1A85EC53)           longer ones
    score(shard) = mix(h + (shard + 1) * 0x9E3779B97F4A7C15)

The shard with the highest score takes the symbol (the lowest shard on a tie). When a shard is added, only the symbols that the new
one wins move: about one in K. Source: Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996.
"""

from __future__ import annotations

from collections.abc import Mapping

SYMBOL_BYTES = 24

_MASK = (1 << 64) - 1
_M1, _M2, _GOLDEN = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53, 0x9E3779B97F4A7C15


class SymbolTooLong(ValueError):
    """A symbol does not fit.

    Attributes:
        symbol: the symbol.
    """

    def __init__(self, symbol: str) -> None:
        super().__init__(f"symbol {symbol!r} has more than {SYMBOL_BYTES} bytes: shorten it with a field mapping or leave it out")
        self.symbol = symbol


class NoSuchShard(ValueError):
    """A symbol is placed by hand on a shard that does not exist.

    Attributes:
        symbol: the symbol.
        shard: where it was placed.
        shards: how many there are.
    """

    def __init__(self, symbol: str, shard: int, shards: int) -> None:
        super().__init__(f"shard_overrides places {symbol!r} on shard {shard}, but shards are 0 to {shards - 1}")
        self.symbol, self.shard, self.shards = symbol, shard, shards


def _mix(x: int) -> int:
    x = ((x ^ (x >> 32)) * _M1) & _MASK
    x = ((x ^ (x >> 29)) * _M2) & _MASK
    return x ^ (x >> 32)


def _symbol_hash(symbol: bytes) -> int:
    """The part of the score that does not depend on the shard."""
    padded = symbol.ljust(SYMBOL_BYTES, b"\0")
    w0, w1, w2 = (int.from_bytes(padded[i : i + 8], "little") for i in (0, 8, 16))
    h = _mix(w0)
    return _mix(_mix(h ^ w1 ^ _GOLDEN) ^ w2 ^ _M2) if w1 | w2 else h


def shard_of(symbol: str | bytes, shards: int, overrides: Mapping[str, int] | None = None) -> int:
    """The shard that a symbol belongs to.

    Args:
        symbol: at most 24 bytes; trailing spaces and zero bytes do not count (wire formats pad with them).
        shards: number of shards, at least 1.
        overrides: symbols placed by hand, ``{symbol: shard}``.

    Returns:
        A shard in ``range(shards)``.

    Raises:
        SymbolTooLong: more than 24 bytes.
        NoSuchShard: an override names a shard that does not exist.
        ValueError: `shards` < 1.
    """
    if shards < 1:
        raise ValueError(f"cannot place a symbol on {shards} shards: at least 1")
    raw = (symbol.encode() if isinstance(symbol, str) else bytes(symbol)).rstrip(b" \0")
    text = raw.decode(errors="replace")
    if len(raw) > SYMBOL_BYTES:
        raise SymbolTooLong(text)
    placed = overrides.get(text) if overrides else None
    if placed is None:
        h = _symbol_hash(raw)
        return max(range(shards), key=lambda shard: (_mix((h + (shard + 1) * _GOLDEN) & _MASK), -shard))
    if not 0 <= placed < shards:
        raise NoSuchShard(text, placed, shards)
    return placed
