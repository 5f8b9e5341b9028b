"""The page docs/reference/events.md, written from node/event.py: ``python tests/events_page.py > docs/reference/events.md``.

What an enumeration's member means is the text below it in the source; where the name says enough there, the text is here.
"""

from __future__ import annotations

import ast
from enum import IntEnum, IntFlag
from pathlib import Path

from tickmesh.node import event
from tickmesh.node.event import EVENT, VIEWS, Flag, Kind, RiskReason, Told, TradingStatus

SOURCE = Path(event.__file__).resolve()
HEADER = 7
"""Fields that every view shares."""

MEANINGS = {
    "Kind.ADD": "A new resting order.",
    "Kind.DELETE": "Order `id` leaves the book.",
    "Kind.QUOTE": "A venue's own best bid and offer.",
    "Kind.STATUS": "The instrument's trading status; `aux` = a trading status below.",
    "Kind.REFERENCE": "An instrument's definition, before its first other event.",
    "Kind.CONFIG": "New parameters from here on: `id` = config version. The loop takes it; no part of a node makes it yet.",
    "Kind.PEER_TRADE": "A trade of another shard.",
    "Kind.BBO": "The best bid and offer of our book, whenever it differs from the last one put out.",
    "Kind.SIGNAL": "A value of a calculation.",
    "Kind.ALERT": "A condition has come true.",
    "Kind.BAR": "An interval of trades.",
    "Flag.SNAPSHOT": "Part of a snapshot, not a change as it happened.",
    "Flag.HIDDEN": "The order was not displayed.",
    "Flag.STALE": "The book misses data since a gap.",
    "Flag.CROSSED": "Bid above ask.",
    "Flag.HALTED": "Trading is halted or paused.",
    "Flag.LOCKED": "Bid equals ask.",
    "Flag.AUCTION": "Of an auction, a cross.",
    "Flag.REFUSED": "RISK: the intent may not go out.",
}
FIELDS = {
    "seq": "input: the source's sequence; output: the shard's output sequence, from 1 without holes",
    "ts_event": "the venue's time, ns since 1970 (of a feed that counts from midnight without `date`: ns since midnight); 0: it has none",
    "ts_recv": "when this host received it, ns since 1970",
    "instrument": "id of the instrument in its node; 4294967295: all of the source",
    "kind": "see below",
    "side": "0 bid, 1 ask, 2 none",
    "flags": "see below",
    "price": "in units of 1e-9; -9223372036854775808: no price",
    "qty": "in units of 10^-exponent of the instrument",
    "id": "order, trade or calculation",
    "aux": "what the kind says",
}


def member_texts() -> dict[str, str]:
    """``"Kind.ADD"`` -> the text below the member in the source."""
    found = {}
    for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for statement, after in zip(node.body, node.body[1:]):
                if isinstance(statement, ast.Assign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    target = statement.targets[0]
                    if isinstance(target, ast.Name) and isinstance(after.value.value, str):
                        found[f"{node.name}.{target.id}"] = " ".join(after.value.value.replace(":class:`", "`").split())
    return found


def meaning(member: IntEnum | IntFlag) -> str:
    """What a member means, on one line."""
    name = f"{type(member).__name__}.{member.name}"
    return member_texts().get(name) or MEANINGS[name]


def body_fields(kind: Kind) -> str:
    """Names of a kind's own fields, in their order; the flat view's where it has none."""
    names = VIEWS.get(kind, EVENT).names or ()
    return ", ".join(f"`{name}`" for name in names[HEADER:] if not name.startswith("_"))


def layout_rows() -> list[str]:
    """The plain event, field by field."""
    rows = ["| offset | field | type | |", "|---|---|---|---|"]
    for name, (dtype, offset, *_) in (EVENT.fields or {}).items():
        rows.append(f"| {offset} | `{name}` | {dtype.name} | {FIELDS[name]} |")
    return rows


def kind_rows() -> list[str]:
    """Inputs first, then outputs: number, name, fields of the last 32 bytes, meaning."""
    rows = ["| number | kind | last 32 bytes | meaning |", "|---|---|---|---|"]
    return rows + [f"| {kind.value} | {kind.name} | {body_fields(kind)} | {meaning(kind)} |" for kind in Kind]


def view_rows() -> list[str]:
    """Every typed view of the last 32 bytes."""
    views = {"EVENT": EVENT, **{name: getattr(event, name) for name in view_names()}}
    rows = ["| view | fields |", "|---|---|"]
    for name, dtype in views.items():
        parts = [f"`{n}` {d.name if d.kind != 'S' else f'text of {d.itemsize}'} at {o}" for n, (d, o, *_) in dtype.fields.items()]
        rows.append(f"| `{name}` | {', '.join(part for part in parts[HEADER:] if '`_' not in part)} |")
    return rows


def flag_rows() -> list[str]:
    """Every flag."""
    return ["| bit | flag | meaning |", "|---|---|---|", *(f"| {flag.value} | {flag.name} | {meaning(flag)} |" for flag in Flag)]


def view_names() -> list[str]:
    """Names of the views that kinds use, as node/event.py calls them."""
    used = {id(dtype) for dtype in VIEWS.values()}
    return [name for name, value in vars(event).items() if id(value) in used and name.isupper() and name != "EVENT"]


def page() -> str:
    """The whole page."""
    layout, kinds, views, flags = ("\n".join(rows()) for rows in (layout_rows, kind_rows, view_rows, flag_rows))
    parts = [_HEAD, layout, _KINDS, kinds, _VIEWS, views, _FLAGS, flags]
    parts += [_STATUS, ", ".join(f"{status.value} {status.name}" for status in TradingStatus) + "."]
    parts += ["What has told a TIMER, in its `aux`: " + " ".join(f"{told.value} {told.name}: {meaning(told)}" for told in Told)]
    parts += ["Reason of a RISK event: " + ", ".join(f"{reason.value} {reason.name}" for reason in RiskReason) + ".", _TAIL]
    return "\n\n".join(parts) + "\n"


_HEAD = """# Events

<!-- Written by `python tests/events_page.py`; a test compares it with node/event.py. -->

An event is 64 bytes, one cache line, little-endian. It is the only record inside a node: in rings, journals, batch frames and in what a
subscriber gets. The first 32 bytes mean the same for every kind, the last 32 are named by the kind's view."""
_KINDS = """## Kinds

Below 64: what comes into a shard. From 64: what it makes of that; `processing.outputs` chooses which kinds, inputs too, leave it."""
_VIEWS = """## Views

A view is a numpy dtype over the same 64 bytes, without a copy: `batch.events.view(QUOTE)["bid"]`. `VIEWS[kind]` is the view of a kind.
`ANY_VIEW` has the names of all views at once, where they do not clash; it is what calculations see."""
_FLAGS = "## Flags"
_STATUS = "## Codes\n\nTrading status:"
_TAIL = """An absent price is `NO_PRICE`, -2^63; its quantity is 0. Exact text of a price: `price_text(61685990000000)` is `'61685.99'`."""


if __name__ == "__main__":
    print(page(), end="")
