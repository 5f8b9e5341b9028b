"""Reads a schema of Simple Binary Encoding (FIX SBE 1.0, XML) and checks it, reporting every fault with its file, line and element.

What it understands: types, composites (nested, ``ref``), enums, sets, fields, groups, nested groups, variable-length data, constants,
optional values and their nulls, explicit offsets and block lengths, ``sinceVersion`` and ``deprecated``, both byte orders, ``headerType``,
``dimensionType`` and ``xi:include`` of files beside the schema. Layouts are worked out here; :mod:`tickmesh.node.sbe_mapping` says which
event a message becomes, :mod:`tickmesh.node.sbe_encoder` writes messages.

Source: FIX Simple Binary Encoding, technical specification 1.0 with errata, FIX Trading Community.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from tickmesh.node.protocol import Problem, SpecError

SCHEMA_BYTES_MAX = 16 << 20
_INCLUDES_MAX, _DEPTH_MAX, _ELEMENTS_MAX, _ARRAY_MAX = 16, 16, 1 << 18, 65535
_HEADER_MAX = 56
"""Bytes of a header: decoders may read as far beyond a message's end before they know that it ends."""


class SchemaError(SpecError):
    """A schema is refused.

    Attributes:
        problems: every fault found; `key` of each is the element, e.g. ``message Car/group fuelFigures``.
    """


@dataclass(frozen=True)
class Primitive:
    """A primitive type: bytes, whether signed, and the specification's default null, least and greatest value (None for floats)."""

    name: str
    size: int
    signed: bool
    null: int | None
    least: int | None
    most: int | None

    @property
    def is_float(self) -> bool:
        return self.null is None


def _integer(name: str, size: int, signed: bool) -> Primitive:
    bits = 8 * size
    if signed:
        return Primitive(name, size, True, -(1 << (bits - 1)), 1 - (1 << (bits - 1)), (1 << (bits - 1)) - 1)
    return Primitive(name, size, False, (1 << bits) - 1, 0, (1 << bits) - 2)


PRIMITIVES: dict[str, Primitive] = {
    "char": Primitive("char", 1, False, 0, 0x20, 0x7E),
    **{f"int{8 * n}": _integer(f"int{8 * n}", n, True) for n in (1, 2, 4, 8)},
    **{f"uint{8 * n}": _integer(f"uint{8 * n}", n, False) for n in (1, 2, 4, 8)},
    "float": Primitive("float", 4, True, None, None, None),
    "double": Primitive("double", 8, True, None, None, None),
}
Value = int | float | bytes


# ---------------------------------------------------------------- what a checked schema is


@dataclass(frozen=True)
class Encoding:
    """A simple type: a number, a character, or `length` of them; 0 bytes on the wire if it is constant."""

    name: str
    primitive: Primitive
    length: int = 1
    presence: str = "required"
    null: int | float | None = None
    least: int | float | None = None
    most: int | float | None = None
    constant: Value | None = None
    text: str | None = None
    since: int = 0
    deprecated: int | None = None

    @property
    def size(self) -> int:
        return 0 if self.presence == "constant" else self.primitive.size * self.length


@dataclass(frozen=True)
class Enum:
    """An enumeration: `values` by name, `null` stands for "none"; it may be null wherever it is used if its encoding may (`optional`)."""

    name: str
    primitive: Primitive
    values: Mapping[str, int]
    null: int
    since: int = 0
    deprecated: int | None = None
    optional: bool = False

    @property
    def size(self) -> int:
        return self.primitive.size


@dataclass(frozen=True)
class Set:
    """Named bits of an unsigned number: `choices` gives the bit of each."""

    name: str
    primitive: Primitive
    choices: Mapping[str, int]
    since: int = 0
    deprecated: int | None = None

    @property
    def size(self) -> int:
        return self.primitive.size


@dataclass(frozen=True)
class Member:
    """A part of a composite, at `offset` bytes from the composite's start."""

    name: str
    offset: int
    type: Type
    since: int = 0
    deprecated: int | None = None


@dataclass(frozen=True)
class Composite:
    """Parts that stand side by side; `size` bytes in all."""

    name: str
    members: tuple[Member, ...]
    size: int
    since: int = 0
    deprecated: int | None = None

    def member(self, name: str) -> Member | None:
        """The part of that name."""
        return next((m for m in self.members if m.name == name), None)


Type = Encoding | Enum | Set | Composite


@dataclass(frozen=True)
class Field:
    """A field at `offset` of its block. `constant` is the value of one that is not on the wire."""

    name: str
    id: int
    type: Type
    offset: int
    presence: str
    since: int = 0
    deprecated: int | None = None
    constant: Value | None = None

    @property
    def size(self) -> int:
        return 0 if self.presence == "constant" else self.type.size


@dataclass(frozen=True)
class Dimension:
    """Header of a repeating group: `size` bytes, and where the entries' length and their number stand in it."""

    size: int
    block: Member
    count: Member
    count_max: int


@dataclass(frozen=True)
class Data:
    """A variable-length field: a length, then as many bytes. `size` is the header's."""

    name: str
    id: int
    size: int
    length: Member
    length_max: int
    text: str | None
    since: int = 0
    deprecated: int | None = None


@dataclass(frozen=True)
class Level:
    """A message's root or a group's entry: a block of `block_length` bytes with fields, then groups, then variable-length data."""

    name: str
    id: int
    block_length: int
    fields: tuple[Field, ...]
    groups: tuple[Group, ...]
    data: tuple[Data, ...]
    since: int
    deprecated: int | None
    line: int

    def field(self, name: str) -> Field | None:
        """The field of that name."""
        return next((f for f in self.fields if f.name == name), None)

    @property
    def flat(self) -> bool:
        """Whether an entry is its block and nothing else."""
        return not self.groups and not self.data


@dataclass(frozen=True)
class Group(Level):
    """A repeating group."""

    dimension: Dimension


@dataclass(frozen=True)
class Message(Level):
    """A message; `id` is its template id."""

    semantic_type: str | None = None


@dataclass(frozen=True)
class Schema:
    """A checked schema. `header` is the composite before every message."""

    package: str
    id: int
    version: int
    big: bool
    header: Composite
    types: Mapping[str, Type]
    messages: tuple[Message, ...]
    path: str
    semantic_version: str = ""

    def message(self, name: str) -> Message | None:
        """The message of that name."""
        return next((m for m in self.messages if m.name == name), None)


@dataclass(frozen=True)
class Leaf:
    """A value on the wire (or a constant) inside a block, found by its dotted path.

    Attributes:
        offset: bytes from the block's start.
        null: the raw value that stands for "none"; None if it must be there, or for text.
        constant: its value, if it is not on the wire.
        since: the version from which on the block has it.
    """

    path: str
    offset: int
    type: Encoding | Enum | Set
    null: int | float | None
    constant: Value | None
    since: int

    @property
    def primitive(self) -> Primitive:
        return self.type.primitive

    @property
    def length(self) -> int:
        return self.type.length if isinstance(self.type, Encoding) else 1


def leaves(level: Level) -> Iterator[Leaf]:
    """All values of a block, parts of composites by their dotted paths, in the order of the schema."""
    for one in level.fields:
        yield from _leaves_of(one.name, one.offset, one.type, one.presence == "optional", one.since, one.constant)


def _leaves_of(path: str, offset: int, type: Type, optional: bool, since: int, constant: Value | None) -> Iterator[Leaf]:
    if isinstance(type, Composite):
        for member in type.members:
            yield from _leaves_of(f"{path}.{member.name}", offset + member.offset, member.type, optional, max(since, member.since), None)
        return
    null: int | float | None = None
    if isinstance(type, Enum):
        null = type.null if optional or type.optional else None
    elif isinstance(type, Encoding):
        constant = type.constant if constant is None else constant
        if optional or type.presence == "optional":
            null = type.primitive.null if type.null is None else type.null
            null = float("nan") if null is None else null
    yield Leaf(path, offset, type, None if constant is not None else null, constant, since)


# ---------------------------------------------------------------- XML with lines


@dataclass
class _Element:
    tag: str
    attributes: dict[str, str]
    path: str
    line: int
    children: list[_Element] = field(default_factory=list)
    text: str = ""


class _TreeBuilder:
    """Elements of an XML file with their lines; entities and what else a schema does not need are refused."""

    def __init__(self, path: Path) -> None:
        self.path, self.root = path, _Element("", {}, str(path), 1)
        self._open, self._elements = [self.root], 0
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = lambda _: self._open.pop()
        self.parser.CharacterDataHandler = self._text
        self.parser.EntityDeclHandler = self._entity
        self.parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._elements += 1
        line = self.parser.CurrentLineNumber
        if self._elements > _ELEMENTS_MAX or len(self._open) > 64:
            raise SchemaError([Problem(str(self.path), line, tag, f"more than {_ELEMENTS_MAX} elements, or nested deeper than 64")])
        element = _Element(tag.rpartition(":")[2], attributes, str(self.path), line)
        self._open[-1].children.append(element)
        self._open.append(element)

    def _text(self, text: str) -> None:
        self._open[-1].text += text

    def _entity(self, name: str, *_: Any) -> None:
        raise SchemaError([Problem(str(self.path), self.parser.CurrentLineNumber, name, "entities are not read: write the text itself")])


def _parse(path: Path) -> _Element:
    try:
        if path.stat().st_size > SCHEMA_BYTES_MAX:
            raise SchemaError([Problem(str(path), 1, "file", f"is larger than {SCHEMA_BYTES_MAX >> 20} MiB")])
        raw = path.read_bytes()
    except OSError as error:
        reason = f"cannot be read ({error.__class__.__name__}): give the path of the venue's SBE schema (.xml)"
        raise SchemaError([Problem(str(path), 0, "file", reason)]) from error
    builder = _TreeBuilder(path)
    try:
        builder.parser.Parse(raw, True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        line = getattr(error, "lineno", 1)
        raise SchemaError([Problem(str(path), line, "XML", str(error))]) from error
    return builder.root.children[0]


# ---------------------------------------------------------------- reading


def load_schema(path: str | Path) -> Schema:
    """Read and check a schema file.

    Raises:
        SchemaError: with every fault of the file.
    """
    root = _parse(Path(path))
    reader = _Reader(str(path))
    schema = reader.schema(root)
    if reader.problems or schema is None:
        raise SchemaError(sorted(reader.problems, key=lambda p: (p.path != str(path), p.path, p.line)))
    return schema


class _Reader:
    """Turns elements into a schema and collects what is wrong with them."""

    def __init__(self, path: str) -> None:
        self.path, self.problems = path, list[Problem]()
        self._elements: dict[str, _Element] = {}
        self._types: dict[str, Type | None] = {}
        self._resolving: list[str] = []
        self._included: set[Path] = {Path(path).resolve()}

    # ---- faults and attributes

    def fault(self, element: _Element, where: str, reason: str) -> None:
        self.problems.append(Problem(element.path, element.line, where, reason))

    def name(self, element: _Element, where: str) -> str:
        found = element.attributes.get("name", "")
        if not found or not found.replace("_", "a").replace(".", "?").replace("-", "?").isalnum() or found[0].isdigit():
            self.fault(element, where, f"name {found!r} is not a word of letters, digits and _")
        return found

    def number(self, element: _Element, where: str, key: str, low: int, high: int, default: int | None = None) -> int:
        raw = element.attributes.get(key)
        if raw is None:
            if default is None:
                self.fault(element, where, f"needs {key}")
                return low
            return default
        try:
            value = int(raw.strip(), 10)
        except ValueError:
            self.fault(element, where, f"{key}={raw!r} is not a whole number")
            return low if default is None else default
        if not low <= value <= high:
            self.fault(element, where, f"{key}={value} is not within {low} to {high}")
            return low if default is None else default
        return value

    def since(self, element: _Element, where: str) -> int:
        return self.number(element, where, "sinceVersion", 0, 65535, 0)

    def deprecated(self, element: _Element, where: str) -> int | None:
        return self.number(element, where, "deprecated", 0, 65535, 0) if "deprecated" in element.attributes else None

    def presence(self, element: _Element, where: str, default: str = "required") -> str:
        found = element.attributes.get("presence", default)
        if found not in ("required", "optional", "constant"):
            self.fault(element, where, f"presence={found!r} is not required, optional or constant")
            return default
        return found

    def literal(self, element: _Element, where: str, raw: str, primitive: Primitive, length: int = 1) -> Value:
        """A value as a schema writes it: a character, text, or a number that fits the type."""
        if primitive.name == "char":
            text = raw if length > 1 or raw == " " else raw.strip()
            if length == 1 and text.isdigit() and len(text) > 1:
                return int(text) & 0xFF
            try:
                encoded = text.encode("latin-1")
            except UnicodeEncodeError:
                encoded = b""
            if not encoded or (length == 1 and len(encoded) > 1):
                self.fault(element, where, f"{raw!r} is not one character")
                return 0
            return encoded[0] if length == 1 else encoded
        try:
            value: int | float = float(raw) if primitive.is_float else _whole_number(raw)
        except ValueError:
            self.fault(element, where, f"{raw!r} is not a value of {primitive.name}")
            return 0
        if not primitive.is_float:
            bits = 8 * primitive.size
            low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if primitive.signed else (0, (1 << bits) - 1)
            if not low <= value <= high:
                self.fault(element, where, f"{raw!r} does not fit {primitive.name}")
                return 0
        return value

    # ---- the file

    def schema(self, root: _Element) -> Schema | None:
        if root.tag != "messageSchema":
            self.fault(root, root.tag, "is not an SBE schema: the outermost element must be messageSchema")
            return None
        order = root.attributes.get("byteOrder", "littleEndian")
        if order not in ("littleEndian", "bigEndian"):
            self.fault(root, "messageSchema", f"byteOrder={order!r} is not littleEndian or bigEndian")
        messages = list(self._collect(root, 0))
        types = {name: found for name in self._elements if (found := self.type_named(name, root, "types"))}
        header = self._header(root)
        if not messages:
            self.fault(root, "messageSchema", "has no message")
        read = [self.message(element) for element in messages]
        self._unique(messages, read)
        schema = Schema(
            package=root.attributes.get("package", ""),
            id=self.number(root, "messageSchema", "id", 0, 65535),
            version=self.number(root, "messageSchema", "version", 0, 65535, 0),
            big=order == "bigEndian",
            header=header,
            types=types,
            messages=tuple(read),
            path=self.path,
            semantic_version=root.attributes.get("semanticVersion", ""),
        )
        self._fit_headers(root, schema, messages)
        return schema

    def _collect(self, parent: _Element, depth: int) -> Iterator[_Element]:
        """Note the types of a file and of those it includes; yields the messages."""
        for element in parent.children:
            if element.tag == "types":
                yield from self._collect(element, depth)
            elif element.tag == "include":
                yield from self._include(element, depth)
            elif element.tag == "message":
                yield element
            elif element.tag in ("type", "composite", "enum", "set"):
                name = self.name(element, element.tag)
                if name in self._elements:
                    self.fault(element, f"{element.tag} {name}", f"is defined in line {self._elements[name].line} already")
                self._elements.setdefault(name, element)
            else:
                self.fault(element, element.tag, "is not known here; known: types, type, composite, enum, set, message, include")

    def _include(self, element: _Element, depth: int) -> Iterator[_Element]:
        href = element.attributes.get("href", "")
        target = Path(element.path).parent / href
        if not href or Path(href).is_absolute() or ".." in Path(href).parts or "://" in href:
            self.fault(element, "include", f"href={href!r}: only a file in the schema's own folder is read")
        elif depth >= _INCLUDES_MAX or target.resolve() in self._included:
            self.fault(element, "include", f"{href} includes itself, or files include each other deeper than {_INCLUDES_MAX}")
        else:
            self._included.add(target.resolve())
            try:
                included = _parse(target)
            except SchemaError as error:
                self.problems += [Problem(element.path, element.line, "include", f"{p.path}:{p.line}: {p.reason}") for p in error.problems]
                return
            wrapper = _Element("", {}, included.path, included.line, [included])
            yield from self._collect(wrapper if included.tag == "types" else included, depth + 1)

    def _header(self, root: _Element) -> Composite:
        name = root.attributes.get("headerType", "messageHeader")
        found = self.type_named(name, root, "messageSchema")
        if not isinstance(found, Composite):
            self.fault(root, "messageSchema", f"headerType {name!r} is not a composite")
            return Composite(name, (), 0)
        for part in ("blockLength", "templateId", "schemaId", "version"):
            member = found.member(part)
            if member is None or not _is_unsigned(member.type, 4):  # 64 bits of length would wrap where decoders add to them
                reason = f"needs an unsigned part {part!r} of at most 32 bits, as the header of every message"
                self.fault(self._elements[name], f"composite {name}", reason)
        return found

    def _fit_headers(self, root: _Element, schema: Schema, elements: list[_Element]) -> None:
        """Ids and lengths must be such as their headers can say, else no message could."""
        self._fits(root, "messageSchema", schema.header, "schemaId", schema.id)
        self._fits(root, "messageSchema", schema.header, "version", schema.version)
        for element, message in zip(elements, schema.messages):
            where = f"message {message.name}"
            self._fits(element, where, schema.header, "templateId", message.id)
            self._fits(element, where, schema.header, "blockLength", message.block_length)

    def _fits(self, element: _Element, where: str, header: Composite, part: str, value: int) -> None:
        member = header.member(part)
        if member is not None and isinstance(member.type, Encoding) and value >= 1 << (8 * member.type.primitive.size):
            self.fault(element, where, f"{part} {value} does not fit {member.type.primitive.name}, its type in composite {header.name!r}")

    def _unique(self, elements: list[_Element], messages: list[Message]) -> None:
        by_id: dict[int, str] = {}
        names: set[str] = set()
        for element, message in zip(elements, messages):
            where = f"message {message.name}"
            if message.id in by_id:
                self.fault(element, where, f"id {message.id} is that of {by_id[message.id]} already")
            if message.name in names:
                self.fault(element, where, "there is a message of this name already")
            by_id[message.id] = message.name
            names.add(message.name)

    # ---- types

    def type_named(self, name: str, user: _Element, where: str) -> Type | None:
        """The type of that name, worked out the first time it is asked for; a primitive's name is one too."""
        if name in self._types:
            return self._types[name]
        element = self._elements.get(name)
        if element is None:
            if name in PRIMITIVES:
                return Encoding(name, PRIMITIVES[name])
            self.fault(user, where, f"there is no type {name!r}")
            return None
        if name in self._resolving or len(self._resolving) >= _DEPTH_MAX:
            self.fault(user, where, f"type {name!r} contains itself, or is nested deeper than {_DEPTH_MAX}")
            return None
        self._resolving.append(name)
        found = self._type(element, f"{element.tag} {name}")
        self._resolving.pop()
        self._types[name] = found
        return found

    def _type(self, element: _Element, where: str, depth: int = 0) -> Type | None:
        if element.tag == "type":
            return self._encoding(element, where)
        if element.tag == "enum":
            return self._enum(element, where)
        if element.tag == "set":
            return self._set(element, where)
        if depth > _DEPTH_MAX:
            self.fault(element, where, f"composites are nested deeper than {_DEPTH_MAX}")
            return None
        return self._composite(element, where, depth)

    def _primitive(self, element: _Element, where: str, key: str) -> tuple[Primitive, Encoding | None]:
        """The primitive that an attribute names, directly or by a simple type."""
        raw = element.attributes.get(key, "")
        if raw in PRIMITIVES:
            return PRIMITIVES[raw], None
        found = self.type_named(raw, element, where) if raw in self._elements else None
        if isinstance(found, Encoding) and found.length == 1:
            return found.primitive, found
        known = ", ".join(PRIMITIVES)
        self.fault(element, where, f"{key}={raw!r} is not a primitive type ({known}) or the name of a simple type of length 1")
        return PRIMITIVES["uint8"], None

    def _encoding(self, element: _Element, where: str) -> Encoding:
        primitive, inherited = self._primitive(element, where, "primitiveType")
        presence = self.presence(element, where, inherited.presence if inherited and inherited.presence == "optional" else "required")
        get = element.attributes.get
        length = self.number(element, where, "length", 0, _ARRAY_MAX, 1)
        limits = {k: self.literal(element, where, raw, primitive) for k in ("nullValue", "minValue", "maxValue") if (raw := get(k))}
        constant: Value | None = None
        if presence == "constant":
            constant = self._constant(element, where, primitive, length, get("valueRef"))
            if isinstance(constant, bytes) and "length" not in element.attributes:
                length = len(constant)
        null = limits.get("nullValue", inherited.null if inherited else None)
        return Encoding(
            element.attributes.get("name", ""), primitive, length, presence,
            null if isinstance(null, (int, float)) else None,
            _as_number(limits.get("minValue")), _as_number(limits.get("maxValue")), constant,
            get("characterEncoding") or ("ASCII" if primitive.name == "char" else None),
            self.since(element, where), self.deprecated(element, where),
        )  # fmt: skip

    def _constant(self, element: _Element, where: str, primitive: Primitive, length: int, reference: str | None) -> Value:
        if reference:
            return self.value_of(element, where, reference)
        raw = element.text
        if not raw.strip():
            self.fault(element, where, "is constant, so it needs a value: as its text, or as valueRef")
            return 0
        text = raw.strip()
        if primitive.name == "char" and (length > 1 or ("length" not in element.attributes and len(text) > 1)):
            return self.literal(element, where, text, primitive, max(2, len(text)))
        return self.literal(element, where, text, primitive)

    def value_of(self, element: _Element, where: str, reference: str) -> int:
        """The value that ``Enum.name`` stands for."""
        name, _, value = reference.rpartition(".")
        found = self.type_named(name, element, where) if name in self._elements else None
        if not isinstance(found, Enum) or value not in found.values:
            self.fault(element, where, f"valueRef={reference!r} is not ENUM.VALUE of an enum of this schema")
            return 0
        return found.values[value]

    def _enum(self, element: _Element, where: str) -> Enum:
        primitive, named = self._primitive(element, where, "encodingType")
        if primitive.is_float or (primitive.size > 2 and primitive.signed):
            self.fault(element, where, f"encodingType {primitive.name} cannot hold an enum")
        values: dict[str, int] = {}
        for child in self._children(element, where, ("validValue",)):
            name, inside = self.name(child, where), f"{where}/validValue {child.attributes.get('name', '')}"
            value = self.literal(child, inside, child.text or "", primitive)
            if name in values or value in values.values():
                self.fault(child, inside, "its name or value is there twice")
            values[name] = int(value) if not isinstance(value, bytes) else 0
        raw = element.attributes.get("nullValue")
        null: Value | None = self.literal(element, where, raw, primitive) if raw else (named.null if named else None)
        default = primitive.null if primitive.null is not None else 0
        return Enum(element.attributes.get("name", ""), primitive, values, default if null is None else int(null),
                    self.since(element, where), self.deprecated(element, where), bool(named and named.presence == "optional"))  # fmt: skip

    def _set(self, element: _Element, where: str) -> Set:
        primitive, _ = self._primitive(element, where, "encodingType")
        if primitive.signed or primitive.name == "char":
            self.fault(element, where, f"encodingType {primitive.name} cannot hold a set: use uint8, uint16, uint32 or uint64")
        choices: dict[str, int] = {}
        for child in self._children(element, where, ("choice",)):
            name, inside = self.name(child, where), f"{where}/choice {child.attributes.get('name', '')}"
            try:
                bit = int(child.text.strip())
            except ValueError:
                bit = -1
            if not 0 <= bit < 8 * primitive.size:
                self.fault(child, inside, f"{child.text.strip()!r} is not a bit of {primitive.name}")
            if name in choices or bit in choices.values():
                self.fault(child, inside, "its name or bit is there twice")
            choices[name] = max(bit, 0)
        since, deprecated = self.since(element, where), self.deprecated(element, where)
        return Set(element.attributes.get("name", ""), primitive, choices, since, deprecated)

    def _children(self, element: _Element, where: str, allowed: tuple[str, ...]) -> Iterator[_Element]:
        for child in element.children:
            if child.tag in allowed:
                yield child
            else:
                self.fault(child, where, f"{child.tag} is not known here; known: {', '.join(allowed)}")

    def _composite(self, element: _Element, where: str, depth: int) -> Composite:
        members: list[Member] = []
        at = 0
        for child in self._children(element, where, ("type", "ref", "enum", "set", "composite")):
            inside = f"{where}/{child.tag} {child.attributes.get('name', '')}"
            name = self.name(child, inside)
            if child.tag == "ref":
                found = self.type_named(child.attributes.get("type", ""), child, inside)
            else:
                found = self._type(child, inside, depth + 1)
            if found is None:
                continue
            size = found.size
            offset = self._place(child, inside, at) if size else at
            if any(m.name == name for m in members):
                self.fault(child, inside, "there is a part of this name already")
            members.append(Member(name, offset, found, self.since(child, inside), self.deprecated(child, inside)))
            at = offset + size if size else at
        since, deprecated = self.since(element, where), self.deprecated(element, where)
        return Composite(element.attributes.get("name", ""), tuple(members), at, since, deprecated)

    def _place(self, element: _Element, where: str, at: int) -> int:
        """Offset of what follows byte `at`: the explicit one, or at once."""
        offset = self.number(element, where, "offset", 0, 65535, at)
        if offset < at:
            self.fault(element, where, f"offset {offset} lies within what ends at byte {at - 1}")
            return at
        return offset

    # ---- messages

    def message(self, element: _Element) -> Message:
        where = f"message {self.name(element, 'message')}"
        template, since = self.number(element, where, "id", 0, 65535), self.since(element, where)
        parts = self._level(element, where, 0, since)
        return Message(element.attributes.get("name", ""), template, *parts, since, self.deprecated(element, where), element.line,
                       element.attributes.get("semanticType"))  # fmt: skip

    def _level(
        self, element: _Element, where: str, depth: int, since: int
    ) -> tuple[int, tuple[Field, ...], tuple[Group, ...], tuple[Data, ...]]:  # fmt: skip
        fields: list[Field] = []
        groups: list[Group] = []
        data: list[Data] = []
        names: set[str] = set()
        at = 0
        for child in self._children(element, where, ("field", "group", "data")):
            inside = f"{where}/{child.tag} {child.attributes.get('name', '')}"
            name = self.name(child, inside)
            if name in names:
                self.fault(child, inside, "there is something of this name already")
            names.add(name)
            if (child.tag == "field" and (groups or data)) or (child.tag == "group" and data):
                self.fault(child, inside, "stands too late: fields come first, then groups, then data")
            if child.tag == "field":
                found = self._field(child, inside, at, since)
                if found:
                    fields.append(found)
                    at = max(at, found.offset + found.size)
            elif child.tag == "group":
                group = self._group(child, inside, depth + 1, since)
                groups += [group] if group else []
            else:
                part = self._data(child, inside, since)
                data += [part] if part else []
        length = self.number(element, where, "blockLength", 0, 65535, at)
        if length < at:
            self.fault(element, where, f"blockLength {length} is shorter than its fields, which end at byte {at - 1}")
        return max(length, at), tuple(fields), tuple(groups), tuple(data)

    def _field(self, element: _Element, where: str, at: int, since: int) -> Field | None:
        found = self.type_named(element.attributes.get("type", ""), element, where)
        if found is None:
            return None
        presence = self.presence(element, where, found.presence if isinstance(found, Encoding) else "required")
        constant: Value | None = None
        if presence == "constant":
            reference = element.attributes.get("valueRef")
            if reference:
                constant = self.value_of(element, where, reference)
            elif isinstance(found, Encoding) and found.constant is not None:
                constant = found.constant
            elif isinstance(found, Encoding) and element.text.strip():
                constant = self._constant(element, where, found.primitive, found.length, None)
            else:
                self.fault(element, where, "is constant, so it needs valueRef, or a type with a constant value")
        size = 0 if presence == "constant" else found.size
        offset = self._place(element, where, at) if size else at
        return Field(element.attributes.get("name", ""), self.number(element, where, "id", 0, (1 << 32) - 1), found, offset, presence,
                     max(since, self.since(element, where)), self.deprecated(element, where), constant)  # fmt: skip

    def _header_parts(
        self, element: _Element, where: str, key: str, default: str, names: tuple[str, str]
    ) -> tuple[Composite, Member] | None:  # fmt: skip
        """The composite before a group or data, and its first named part, checked."""
        name = element.attributes.get(key, default)
        found = self.type_named(name, element, where) if name in self._elements else None
        parts = [found.member(part) for part in names] if isinstance(found, Composite) else [None]
        if not isinstance(found, Composite) or parts[0] is None or None in parts or not _is_unsigned(parts[0].type, 4):
            wanted = f"an unsigned {names[0]!r} (at most 32 bits) and {names[1]!r}"
            self.fault(element, where, f"{key} {name!r} is not a composite with {wanted}")
            return None
        if found.size > _HEADER_MAX:
            self.fault(element, where, f"{key} {name!r} is longer than {_HEADER_MAX} bytes")
        return found, parts[0]

    def _group(self, element: _Element, where: str, depth: int, since: int) -> Group | None:
        if depth > _DEPTH_MAX:
            self.fault(element, where, f"groups are nested deeper than {_DEPTH_MAX}")
            return None
        since = max(since, self.since(element, where))
        parts = self._level(element, where, depth, since)
        header = self._header_parts(element, where, "dimensionType", "groupSizeEncoding", ("blockLength", "numInGroup"))
        if header is None:
            return None
        count = header[0].member("numInGroup")
        if count is None or not _is_unsigned(count.type, 4):
            self.fault(element, where, f"numInGroup of {header[0].name!r} must be uint8, uint16 or uint32")
            return None
        self._fits(element, where, header[0], "blockLength", parts[0])
        dimension = Dimension(header[0].size, header[1], count, _most(count.type))
        return Group(element.attributes.get("name", ""), self.number(element, where, "id", 0, (1 << 32) - 1), *parts, since,
                     self.deprecated(element, where), element.line, dimension)  # fmt: skip

    def _data(self, element: _Element, where: str, since: int) -> Data | None:
        header = self._header_parts(element, where, "type", "varDataEncoding", ("length", "varData"))
        if header is None:
            return None
        blob = header[0].member("varData")
        if blob is None or not isinstance(blob.type, Encoding) or blob.type.primitive.size != 1:
            self.fault(element, where, f"varData of {header[0].name!r} must be of bytes or characters")
            return None
        size = blob.offset
        if header[1].offset + header[1].type.size > size:
            self.fault(element, where, f"length of {header[0].name!r} must stand before varData")
        since, deprecated = max(since, self.since(element, where)), self.deprecated(element, where)
        return Data(element.attributes.get("name", ""), self.number(element, where, "id", 0, (1 << 32) - 1), size, header[1],
                    _most(header[1].type), blob.type.text, since, deprecated)  # fmt: skip


def _whole_number(text: str) -> int:
    """A number as schemas write it: decimal, leading zeros allowed, or hexadecimal after 0x."""
    return int(text, 16 if text.strip().lower().startswith("0x") else 10)


def _is_unsigned(type: Type, size_max: int) -> bool:
    return isinstance(type, Encoding) and type.length == 1 and not type.primitive.signed and 0 < type.size <= size_max


def _as_number(value: Value | None) -> int | float | None:
    return value if isinstance(value, (int, float)) else None


def _most(type: Type) -> int:
    """The greatest number that a length or a count may have."""
    assert isinstance(type, Encoding)
    whole = (1 << (8 * type.primitive.size)) - 1
    return whole if type.most is None else min(whole, int(type.most))


