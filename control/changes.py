"""What differs between two configurations, and whether a running node takes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tickmesh.control.config import Config, Delivery, Problem, key_extra


@dataclass(frozen=True)
class ChangedKey:
    """A key, or a whole table, that differs; `old` or `new` is None where it is absent. `live`: a running node takes it."""

    path: str
    old: Any
    new: Any
    live: bool


def changed_keys(old: Config, new: Config) -> list[ChangedKey]:
    """What differs, in the order of the model. A table that comes or goes is one entry."""
    return list(_in_table(old, new, ""))


def _in_table(old: BaseModel, new: BaseModel, path: str) -> Iterator[ChangedKey]:
    for name in type(old).model_fields:
        here = f"{path}.{name}" if path else name
        yield from _in_value(getattr(old, name), getattr(new, name), here, key_extra(type(old), name)["change"] == "live")
    ours, theirs = old.model_extra or {}, new.model_extra or {}  # parameters of a calculation
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            yield ChangedKey(f"{path}.{name}", ours.get(name), theirs.get(name), True)


def _in_value(old: Any, new: Any, path: str, live: bool) -> Iterator[ChangedKey]:
    if isinstance(old, BaseModel) and isinstance(new, BaseModel):
        yield from _in_table(old, new, path)
    elif _tables(old) and _tables(new) and (old or new):
        for name in [*old, *(name for name in new if name not in old)]:
            before, after = old.get(name), new.get(name)
            if before is None or after is None:
                yield ChangedKey(f"{path}.{name}", before, after, comes_live(before or after))
            else:
                yield from _in_table(before, after, f"{path}.{name}")
    elif _plain(old) != _plain(new):
        yield ChangedKey(path, old, new, live)


def _tables(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(inner, BaseModel) for inner in value.values())


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list) else value.model_dump() if isinstance(value, BaseModel) else value


def comes_live(table: Any) -> bool:
    """Whether a running node can take a table (a source, a calculation, a delivery) that comes or goes."""
    return not isinstance(table, Delivery) or table.method == "rdma" or (table.method == "nats" and not table.embedded)


def restart_needed(old: Config, new: Config) -> list[Problem]:
    """The changes that a running node cannot take, as reasons to refuse them."""
    advice = "stop the node and start it with this configuration, or take the change back"
    found = [change for change in changed_keys(old, new) if not change.live]
    return [Problem(c.path, new.line(*c.path.split(".")), c.new, "needs a restart of the node", advice) for c in found]
