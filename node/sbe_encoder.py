"""Writes messages of an SBE schema: an encoder per message, compiled from the schema.

:class:`Encoder` takes a message as Python values and is for tests and tools. What writes millions of messages, such as a simulator,
calls the compiled writer that it contains with arrays of its own (:func:`block_dtype` gives the layout of a block)::

    write_NAME(buf, at, end, blocks, counts, texts) -> where the message ends, or one of the negative numbers of Failure

`blocks` u8: the blocks of root and entries; `counts` i64: entries of groups and lengths of data; `texts` u8: the data. Each holds its
things one after the other in the order of the wire. Nothing is written beyond `end`, and no count or length that the schema does not allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from types import ModuleType, NoneType
from typing import Any

import numpy as np
import numpy.typing as npt

from tickmesh.node.sbe_schema import Composite, Data, Encoding, Enum, Field, Group, Level, Member, Message, Schema, Set, Type, leaves
from tickmesh.transports.codecache import import_generated, load_generated, write_generated
from tickmesh.transports.toolbox import inlined


class Failure(IntEnum):
    """Why a compiled writer wrote no message."""

    NO_ROOM = -1
    """It would end beyond `end`."""
    SHORT_INPUT = -2
    """`blocks`, `counts` or `texts` hold less than the counts say."""
    BAD_COUNT = -3
    """More entries, or longer data, than the schema allows, or fewer than none."""


class EncodeError(ValueError):
    """A message cannot be written.

    Attributes:
        where: the field, as ``Car/performanceFigures/octaneRating``.
        reason: what is wrong with its value.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason


_KINDS = {"char": "S1", "float": "f4", "double": "f8"}


def block_dtype(level: Level, *, big: bool = False) -> np.dtype[Any]:
    """The block of a message's root or of a group's entry as a numpy record: parts of composites by their dotted names."""
    names, formats, offsets = [], [], []
    for leaf in leaves(level):
        if leaf.constant is not None or not leaf.length:
            continue
        primitive = leaf.primitive
        one = f"{'>' if big else '<'}{'i' if primitive.signed else 'u'}{primitive.size}"
        if primitive.is_float or primitive.name == "char":
            one = f"S{leaf.length}" if primitive.name == "char" else f"{'>' if big else '<'}{_KINDS[primitive.name]}"
        names.append(leaf.path)
        formats.append(one if leaf.length == 1 or primitive.name == "char" else (one, (leaf.length,)))
        offsets.append(leaf.offset)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": level.block_length})


# ---------------------------------------------------------------- kernels


@inlined
def put_number(buf: Any, at: Any, value: Any, size: Any, big: Any) -> None:
    """Store an unsigned number of 1 to 8 bytes."""
    for i in range(size):
        shift = np.uint64(8 * (size - 1 - i) if big else 8 * i)
        buf[at + i] = np.uint8((np.uint64(value) >> shift) & np.uint64(255))


@inlined
def put_bytes(buf: Any, at: Any, source: Any, first: Any, size: Any) -> None:
    """Copy bytes."""
    for i in range(size):
        buf[at + i] = source[first + i]


@inlined
def put_zeros(buf: Any, at: Any, size: Any) -> None:
    """Clear bytes."""
    for i in range(size):
        buf[at + i] = np.uint8(0)


# ---------------------------------------------------------------- generating

_HEAD = '''"""Writers of messages of {package}: generated from its schema."""
import numpy as np

from tickmesh.node.sbe_encoder import put_bytes, put_number, put_zeros
from tickmesh.transports.toolbox import loop, outlined

'''


def encoder_source(schema: Schema, messages: Iterable[str]) -> str:
    """Source of the writers' module.

    Raises:
        KeyError: the schema has no such message.
    """
    lines = [_HEAD.format(package=schema.package)]
    names = list(messages)
    for name in names:
        found = schema.message(name)
        if found is None:
            raise KeyError(f"{schema.path} has no message {name!r}; it has {', '.join(m.name for m in schema.messages)}")
        lines += _Writer(schema, found).lines
    calls = "\n    ".join(f"encode_{name}(buf, 0, 0, buf, counts, buf)" for name in names)
    lines.append(f"def warm():\n    buf, counts = np.zeros(64, np.uint8), np.zeros(1, np.int64)\n    {calls}\n")
    return "\n".join(lines)


class _Writer:
    """Writes the function of one message."""

    def __init__(self, schema: Schema, message: Message) -> None:
        self.schema, self.lines = schema, list[str]()
        self._depth = 1
        name = message.name
        self.lines.append(f"\n@outlined\ndef write_{name}(buf, at, end, blocks, counts, texts):")
        self("at, end, block, count, text = np.int64(at), min(np.int64(end), np.int64(buf.size)), np.int64(0), np.int64(0), np.int64(0)")
        header = schema.header
        self(f"if at < 0:\n    return np.int64({int(Failure.NO_ROOM)})")
        self._room(header.size)
        self(f"put_zeros(buf, at, {header.size})")
        parts = {"blockLength": message.block_length, "templateId": message.id, "schemaId": schema.id, "version": schema.version}
        for part, value in parts.items():
            self._number(header.member(part), str(value))
        self(f"at += {header.size}")
        self._level(message, 0)
        self("return at")
        self.lines.append(f"\n\n@loop\ndef encode_{name}(buf, at, end, blocks, counts, texts):")
        self.lines.append(f'    """Write a message {name}; returns where it ends, or a Failure."""')
        self.lines.append(f"    return write_{name}(buf, at, end, blocks, counts, texts)\n")

    def __call__(self, text: str) -> None:
        self.lines.extend("    " * self._depth + line for line in text.split("\n"))

    def _room(self, size: int | str) -> None:
        self(f"if at + {size} > end:\n    return np.int64({int(Failure.NO_ROOM)})")

    def _number(self, member: Member | None, value: str) -> None:
        assert member is not None
        assert isinstance(member.type, Encoding)
        self(f"put_number(buf, at + {member.offset}, {value}, {member.type.size}, {self.schema.big})")

    def _level(self, level: Level, depth: int) -> None:
        if level.block_length:
            size = level.block_length
            self._room(size)
            self(f"if block + {size} > blocks.size:\n    return np.int64({int(Failure.SHORT_INPUT)})")
            self(f"put_bytes(buf, at, blocks, block, {size})\nat += {size}\nblock += {size}")
        for group in level.groups:
            self._group(group, depth + 1)
        for data in level.data:
            self._data(data)

    def _next_count(self, most: int) -> None:
        self(f"if count >= counts.size:\n    return np.int64({int(Failure.SHORT_INPUT)})")
        self("size = counts[count]\ncount += 1")
        self(f"if size < 0 or size > {most}:\n    return np.int64({int(Failure.BAD_COUNT)})")

    def _group(self, group: Group, depth: int) -> None:
        dimension = group.dimension
        self._next_count(dimension.count_max)
        self._room(dimension.size)
        self(f"put_zeros(buf, at, {dimension.size})")
        self._number(dimension.block, str(group.block_length))
        self._number(dimension.count, "size")
        self(f"at += {dimension.size}\nfor _{depth} in range(size):")
        self._depth += 1
        self("pass")
        self._level(group, depth)
        self._depth -= 1

    def _data(self, data: Data) -> None:
        self._next_count(data.length_max)
        self(f"if at + {data.size} + size > end:\n    return np.int64({int(Failure.NO_ROOM)})")
        self(f"if text + size > texts.size:\n    return np.int64({int(Failure.SHORT_INPUT)})")
        self(f"put_zeros(buf, at, {data.size})")
        self._number(data.length, "size")
        self(f"put_bytes(buf, at + {data.size}, texts, text, size)\nat += {data.size} + size\ntext += size")


def encoder_parts(schema: Schema, messages: Iterable[str]) -> ModuleType:
    """The writers' module, not compiled: for a loop that contains them."""
    return import_generated(write_generated(f"encoder_{_word(schema.package)}", encoder_source(schema, messages)))


def _word(package: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in package) or "sbe"


# ---------------------------------------------------------------- Python values


class Encoder:
    """Encodes messages given as Python values.

    A field is a number, text or bytes; an enum's is the name of a value; a set's is a list of names; a composite's, a table of its parts.
    A group's is a list of tables, data is bytes or text. None, or leaving it out, means null: only what is optional may be.
    """

    def __init__(self, schema: Schema, messages: Iterable[str], progress: Callable[[str], None] | None = None) -> None:
        self.schema, self.names = schema, list(messages)
        source = encoder_source(schema, self.names)
        self._module: Any = load_generated(f"encoder_{_word(schema.package)}", source, progress)

    def encode(self, message: str, values: Mapping[str, Any], size_max: int = 1 << 16) -> bytes:
        """A message with its header.

        Raises:
            EncodeError: a value does not fit, or the message is longer than `size_max` bytes.
        """
        buf = np.zeros(size_max, np.uint8)
        return bytes(buf[: self.encode_into(buf, 0, message, values)])

    def encode_into(self, buf: npt.NDArray[np.uint8], at: int, message: str, values: Mapping[str, Any]) -> int:
        """Write a message at ``buf[at:]``; returns where it ends.

        Raises:
            EncodeError: a value does not fit, or there is no room.
        """
        level = self.schema.message(message)
        if level is None or message not in self.names:
            raise EncodeError(message, f"is not a message of this encoder; there are {', '.join(self.names)}")
        packed = _Packed(self.schema.big)
        packed.level(level, values, message)
        blocks, counts = np.frombuffer(bytes(packed.blocks) or b"\0", np.uint8), np.array(packed.counts or [0], np.int64)
        texts = np.frombuffer(bytes(packed.texts) or b"\0", np.uint8)
        end = int(getattr(self._module, f"encode_{message}")(buf, at, len(buf), blocks.copy(), counts, texts.copy()))
        if end == Failure.NO_ROOM:
            raise EncodeError(message, f"does not fit {len(buf) - at} bytes")
        if end < 0:
            raise EncodeError(message, Failure(end).name.lower())
        return end


class _Packed:
    """Python values as the three arrays of a writer."""

    def __init__(self, big: bool) -> None:
        self.order = "big" if big else "little"
        self.blocks, self.texts, self.counts = bytearray(), bytearray(), list[int]()

    def level(self, level: Level, values: Mapping[str, Any], where: str) -> None:
        known = {name for parts in (level.fields, level.groups, level.data) for name in (part.name for part in parts)}
        for name in values:
            if name not in known:
                raise EncodeError(f"{where}/{name}", f"is not there; there are {', '.join(sorted(known))}")
        block = bytearray(level.block_length)
        for field in level.fields:
            if field.presence != "constant":
                optional = field.presence == "optional"
                self._type(block, field.offset, field.type, values.get(field.name), optional, f"{where}/{field.name}")
            else:
                self._check_constant(field, values, where)
        self.blocks += block
        for group in level.groups:
                self._group(group, values.get(group.name) or (), f"{where}/{group.name}")
        for data in level.data:
            self._data(data, b"" if values.get(data.name) is None else values[data.name], f"{where}/{data.name}")

    def _check_constant(self, field: Field, values: Mapping[str, Any], where: str) -> None:
        if values.get(field.name) not in (None, field.constant):
            raise EncodeError(f"{where}/{field.name}", f"is always {field.constant!r}")

    def _group(self, group: Group, entries: Sequence[Mapping[str, Any]], where: str) -> None:
        if not isinstance(entries, Sequence) or not all(isinstance(entry, Mapping) for entry in entries):
            raise EncodeError(where, "must be a list of tables, one for each entry")
        if len(entries) > group.dimension.count_max:
            raise EncodeError(where, f"has {len(entries)} entries; the schema allows {group.dimension.count_max}")
        self.counts.append(len(entries))
        for entry in entries:
            self.level(group, entry, where)

    def _data(self, data: Data, value: Any, where: str) -> None:
        if not isinstance(value, (str, bytes, bytearray)):
            raise EncodeError(where, f"{value!r} is neither text nor bytes")
        raw = value.encode("utf-8") if isinstance(value, str) else bytes(value)
        if len(raw) > data.length_max:
            raise EncodeError(where, f"has {len(raw)} bytes; the schema allows {data.length_max}")
        self.counts.append(len(raw))
        self.texts += raw

    def _type(self, block: bytearray, at: int, type: Type, value: Any, optional: bool, where: str) -> None:
        if isinstance(type, Composite):
            table = {} if value is None else value
            if not isinstance(table, Mapping):
                raise EncodeError(where, f"must be a table of {', '.join(member.name for member in type.members)}")
            for member in type.members:
                self._type(block, at + member.offset, member.type, table.get(member.name), optional, f"{where}.{member.name}")
            return
        if isinstance(type, Encoding) and type.presence == "constant":
            return
        size = type.primitive.size
        if isinstance(type, Encoding) and type.length != 1:
            self._array(block, at, type, value, where)
            return
        number = _number(type, value, optional, where)
        block[at : at + size] = _packed(number, type, self.order)

    def _array(self, block: bytearray, at: int, type: Encoding, value: Any, where: str) -> None:
        size = type.primitive.size
        if type.primitive.name == "char" or (type.primitive.size == 1 and isinstance(value, (bytes, str))):
            if not isinstance(value, (str, bytes, bytearray, NoneType)):
                raise EncodeError(where, f"{value!r} is neither text nor bytes")
            raw = _latin(value, where) if isinstance(value, str) else bytes(value or b"")
            if len(raw) > type.length:
                raise EncodeError(where, f"{value!r} is longer than {type.length} bytes")
            block[at : at + type.length] = raw.ljust(type.length, b"\0")
            return
        if value is None or len(value) != type.length:
            raise EncodeError(where, f"must be {type.length} values")
        single = Encoding(type.name, type.primitive, 1, type.presence, type.null, type.least, type.most)
        for i, one in enumerate(value):
            block[at + i * size : at + (i + 1) * size] = _packed(_number(single, one, False, where), single, self.order)


def _packed(number: int | float, type: Encoding | Enum | Set, order: str) -> bytes:
    primitive = type.primitive
    if primitive.is_float:
        return np.array(number, f"{'>' if order == 'big' else '<'}f{primitive.size}").tobytes()
    whole = int(number) & ((1 << (8 * primitive.size)) - 1)
    return whole.to_bytes(primitive.size, "big" if order == "big" else "little")


def _number(type: Encoding | Enum | Set, value: Any, optional: bool, where: str) -> int | float:
    """A value as the number that stands for it on the wire."""
    if isinstance(type, Enum):
        return _enum_number(type, value, optional, where)
    if isinstance(type, Set):
        return _set_number(type, value, where)
    primitive = type.primitive
    if value is None:
        if not optional and type.presence != "optional":
            raise EncodeError(where, "is missing, and it is not optional")
        null = primitive.null if type.null is None else type.null
        return float("nan") if null is None else null
    if isinstance(value, (str, bytes)) and primitive.size == 1:
        raw = _latin(value, where) if isinstance(value, str) else value
        if len(raw) != 1:
            raise EncodeError(where, f"{value!r} is not one character")
        value = raw[0]
    if primitive.is_float:
        if not isinstance(value, (int, float)):
            raise EncodeError(where, f"{value!r} is not a number")
        return float(value)
    whole = (0, 255) if primitive.name == "char" else (primitive.least, primitive.most)
    least, most = (whole[0] if type.least is None else type.least), (whole[1] if type.most is None else type.most)
    if not isinstance(value, int) or least is None or most is None or not least <= value <= most:
        raise EncodeError(where, f"{value!r} is not a whole number within {least} to {most}")
    return value


def _latin(text: str, where: str) -> bytes:
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise EncodeError(where, f"{text!r} has characters beyond Latin-1, which no char holds") from None


def _enum_number(type: Enum, value: Any, optional: bool, where: str) -> int:
    if value is None and (optional or type.optional):
        return type.null
    if value in type.values:
        return type.values[value]
    if isinstance(value, int) and value in type.values.values():
        return value
    raise EncodeError(where, f"{value!r} is not one of {', '.join(type.values)}")


def _set_number(type: Set, value: Any, where: str) -> int:
    if isinstance(value, int) and 0 <= value < 1 << (8 * type.primitive.size):
        return value
    unknown = [name for name in value or () if name not in type.choices]
    if isinstance(value, int) or unknown:
        raise EncodeError(where, f"{value!r} is not a list of {', '.join(type.choices)}")
    return sum(1 << type.choices[name] for name in set(value or ()))
