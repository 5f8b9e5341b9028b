"""A namedtuple of arrays handed to compiled functions by reference: one pointer, in place of seven values for each of its arrays.

numba passes a tuple as all of its members, and an array as seven values. For a shard that is some 300 arguments at every call, to compile
and to pass. :func:`refer` writes down once, in memory of the loop that calls it, where the arrays are and how long; functions that get the
reference read from there what they use, under the same names.

The words behind a reference never change while it is used. The loads say so (LLVM's ``invariant.load``), so that they need not be repeated
after a store. A reference lives as long as the call that made it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.core.extending import intrinsic, lower_getattr_generic, models, register_model
from numba.core.typing.templates import AttributeTemplate, infer_getattr

_I64, _I32, _I8 = ir.IntType(64), ir.IntType(32), ir.IntType(8)
_ARRAY_FIELDS = ("meminfo", "parent", "nitems", "itemsize", "data", "shape", "strides")


class Reference(types.Type):  # type: ignore[misc]
    """Type of a reference.

    Attributes:
        target: type of the namedtuple.
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        super().__init__(f"Reference({target})")

    @property
    def key(self) -> Any:
        """Namedtuples of two modules may have the same name."""
        return self.target


@register_model(Reference)
class _ReferenceModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _I8.as_pointer())


def _words(kind: Any) -> int:
    """Words of 8 bytes that a member takes: an array its address and its shape.

    Raises:
        TypingError: it is neither a contiguous array nor an integer, nor a namedtuple of those.
    """
    if isinstance(kind, types.BaseTuple):
        return sum(_words(inner) for inner in kind.types)
    if isinstance(kind, types.Array) and kind.layout == "C":
        return 1 + int(kind.ndim)
    if isinstance(kind, types.Integer):
        return 1
    raise TypingError(f"{kind} cannot be referred to: contiguous arrays, integers and namedtuples of them can")


@intrinsic  # type: ignore[untyped-decorator]
def refer(typingctx: Any, members: Any) -> Any:
    """A reference to a namedtuple of arrays and integers, for functions that are not inlined; valid until the caller returns."""
    words = _words(members)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(_I64, max(1, words)))
        for place, word in enumerate(_flat(context, builder, members, args[0])):
            builder.store(word, builder.gep(memory, [_I32(0), _I32(place)]))
        # an address that LLVM cannot follow back: it must not put an invariant load before the stores above
        hidden = cgutils.alloca_once(builder, _I64)
        builder.store_atomic(builder.ptrtoint(memory, _I64), hidden, "release", 8)
        return builder.inttoptr(builder.load_atomic(hidden, "acquire", 8), _I8.as_pointer())

    return Reference(members)(members), codegen


def _flat(context: Any, builder: Any, kind: Any, value: Any) -> list[Any]:
    """A member as words, in the order of :func:`_words`."""
    if isinstance(kind, types.BaseTuple):
        inner = ((one, builder.extract_value(value, place)) for place, one in enumerate(kind.types))
        return [word for one, member in inner for word in _flat(context, builder, one, member)]
    if isinstance(kind, types.Array):
        data, shape = (builder.extract_value(value, _ARRAY_FIELDS.index(name)) for name in ("data", "shape"))
        return [builder.ptrtoint(data, _I64), *(builder.extract_value(shape, axis) for axis in range(kind.ndim))]
    return [context.cast(builder, value, kind, types.int64 if kind.signed else types.uint64)]


@infer_getattr
class _Members(AttributeTemplate):  # type: ignore[misc]
    key = Reference

    def generic_resolve(self, reference: Any, name: str) -> Any:
        fields = getattr(reference.target, "fields", ())
        if name not in fields:
            return None
        kind = reference.target.types[fields.index(name)]
        return Reference(kind) if isinstance(kind, types.BaseTuple) else kind


@lower_getattr_generic(Reference)  # type: ignore[untyped-decorator]
def _member(context: Any, builder: Any, reference: Any, pointer: Any, name: str) -> Any:
    place = reference.target.fields.index(name)
    kind, offset = reference.target.types[place], 8 * sum(map(_words, reference.target.types[:place]))
    at = builder.gep(pointer, [_I64(offset)])
    if isinstance(kind, types.BaseTuple):
        return at
    if isinstance(kind, types.Integer):
        return context.cast(builder, _load(builder, at, 0, _I64), types.int64 if kind.signed else types.uint64, kind)
    return _array(context, builder, kind, at)


def _load(builder: Any, at: Any, word: int, kind: Any) -> Any:
    pointer = builder.bitcast(builder.gep(at, [_I64(8 * word)]) if word else at, kind.as_pointer())
    value = builder.load(pointer, align=8)
    value.set_metadata("invariant.load", builder.module.add_metadata([]))
    return value


def _array(context: Any, builder: Any, kind: Any, at: Any) -> Any:
    """numba's array of the words at an address. Its strides follow from its shape."""
    made = context.get_value_type(kind)
    size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    data = _load(builder, at, 0, made.elements[_ARRAY_FIELDS.index("data")])
    shape = [_load(builder, at, 1 + axis, _I64) for axis in range(kind.ndim)]
    strides = [_I64(size)]
    for length in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], length))
    count = shape[0]
    for length in shape[1:]:
        count = builder.mul(count, length)
    nothing = ir.Constant(made.elements[0], None)
    tables = {"shape": cgutils.pack_array(builder, shape), "strides": cgutils.pack_array(builder, strides)}
    members = {"meminfo": nothing, "parent": nothing, "nitems": count, "itemsize": _I64(size), "data": data} | tables
    array = ir.Constant(made, ir.Undefined)
    for place, field in enumerate(_ARRAY_FIELDS):
        array = builder.insert_value(array, members[field], place)
    return array
