"""Many neighbouring numbers at once, for numba kernels: a type, and what is done with it.

A sweep over tokens keeps what it carries of many lanes in registers this way. As a loop over lanes, it would be written
to memory and read back at each token, and the compiler would have to ask each time whether arrays overlap. LLVM makes
of a vector what the processor has: one of 64 numbers is four registers of AVX-512, or sixteen of NEON.

Numbers are read and written where a pointer says, and nothing is checked. Numbers keep their type. What is fused is
said, with ``multiply_add``, and not left to the compiler, which decides otherwise in vectors of another size.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, overload, register_model

STREAM_ALIGNMENT = 64  # bytes
CACHE_LINE = 64


class Vector(types.Type):
    """``lanes`` numbers of a type."""

    def __init__(self, dtype, lanes):
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vector({dtype}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        number = manager.lookup(vector.dtype).get_value_type()
        super().__init__(manager, vector, ir.VectorType(number, vector.lanes))


@intrinsic
def at(typing_context, array, indices):  # noqa: ARG001
    """A pointer to the number that an array has at ``indices``: a negative one is before its first."""
    if not isinstance(array, types.Array) or len(indices) != array.ndim:
        raise TypingError(f"{indices} do not say where in {array}")

    def generate(context, builder, signature, arguments):
        place = context.make_array(signature.args[0])(context, builder, arguments[0])
        shape, strides, found = (cgutils.unpack_tuple(builder, x) for x in (place.shape, place.strides, arguments[1]))
        return cgutils.get_item_pointer2(context, builder, place.data, shape, strides, array.layout, found)

    return types.CPointer(array.dtype)(array, types.UniTuple(types.intp, array.ndim)), generate


@intrinsic(prefer_literal=True)
def load(typing_context, pointer, lanes):  # noqa: ARG001
    """So many numbers, a constant, from there on."""
    vector = Vector(_number_of(pointer, types.Float), _constant(lanes))

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        return _load(context, builder, arguments[0], vector)

    return vector(pointer, lanes), generate


@intrinsic(prefer_literal=True)
def load_from_the_end(typing_context, pointer, lanes):  # noqa: ARG001
    """As ``load``, the last cache line first.

    Processors fetch ahead of what goes back line by line, and are confused by what goes back from token to token and
    forwards in each.
    """
    vector = Vector(_number_of(pointer, types.Float), _constant(lanes))

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        return _load_from_the_end(context, builder, arguments[0], vector)

    return vector(pointer, lanes), generate


@intrinsic
def store(typing_context, pointer, vector):  # noqa: ARG001
    """Puts the vector's numbers there."""
    _require_same(_number_of(pointer, types.Float), vector)

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        _store(context, builder, *arguments, vector)
        return context.get_dummy_value()

    return types.void(pointer, vector), generate


@intrinsic
def stream(typing_context, pointer, vector):  # noqa: ARG001
    """As ``store``, past the caches, to a multiple of ``STREAM_ALIGNMENT``; behind the last one a ``fence`` is due."""
    _require_same(_number_of(pointer, types.Float), vector)

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        _stream(context, builder, *arguments, vector)
        return context.get_dummy_value()

    return types.void(pointer, vector), generate


@intrinsic
def align_stack(typing_context):  # noqa: ARG001
    """In this function, vectors that find no register are kept where none lies in two cache lines at once."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        attributes = builder.function.attributes
        attributes.alignstack = CACHE_LINE
        attributes.add("nounwind")  # which it is; alone, an alignment is not written down
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def fence(typing_context):  # noqa: ARG001
    """What was stored before is there for whoever reads after."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def load_complex(typing_context, pointer, lanes):  # noqa: ARG001
    """Real and imaginary parts of so many complex numbers, a constant, from there on."""
    vector = Vector(_number_of(pointer, types.Complex).underlying_float, _constant(lanes))

    def generate(context, builder, signature, arguments):
        pairs = _load(context, builder, arguments[0], _pairs_of(vector))
        return context.make_tuple(builder, signature.return_type, _parts(builder, pairs, vector))

    return types.UniTuple(vector, 2)(pointer, lanes), generate


@intrinsic(prefer_literal=True)
def load_complex_from_the_end(typing_context, pointer, lanes):  # noqa: ARG001
    """As ``load_complex``, the last cache line first, as ``load_from_the_end`` does."""
    vector = Vector(_number_of(pointer, types.Complex).underlying_float, _constant(lanes))

    def generate(context, builder, signature, arguments):
        number = context.get_value_type(vector.dtype).as_pointer()
        pairs = _load_from_the_end(context, builder, builder.bitcast(arguments[0], number), _pairs_of(vector))
        return context.make_tuple(builder, signature.return_type, _parts(builder, pairs, vector))

    return types.UniTuple(vector, 2)(pointer, lanes), generate


@intrinsic
def store_complex(typing_context, pointer, real, imaginary):  # noqa: ARG001
    """Puts complex numbers there."""
    _require_same(_number_of(pointer, types.Complex).underlying_float, real, imaginary)

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        _store(context, builder, arguments[0], _paired(builder, *arguments[1:], real), _pairs_of(real))
        return context.get_dummy_value()

    return types.void(pointer, real, imaginary), generate


@intrinsic
def stream_complex(typing_context, pointer, real, imaginary):  # noqa: ARG001
    """As ``store_complex``, past the caches, as ``stream`` does."""
    _require_same(_number_of(pointer, types.Complex).underlying_float, real, imaginary)

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        _stream(context, builder, arguments[0], _paired(builder, *arguments[1:], real), _pairs_of(real))
        return context.get_dummy_value()

    return types.void(pointer, real, imaginary), generate


@intrinsic(prefer_literal=True)
def fetch(typing_context, pointer, lanes):  # noqa: ARG001
    """Asks for the cache lines of so many numbers, a constant, without waiting; what is nobody's is no fault."""
    count = _constant(lanes)

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        size = count * context.get_abi_sizeof(context.get_value_type(pointer.dtype))
        for offset in range(0, size, CACHE_LINE):
            line = cgutils.pointer_add(builder, arguments[0], ir.Constant(ir.IntType(64), offset))
            prefetch(builder, builder.bitcast(line, ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(pointer, lanes), generate


def prefetch(builder, line):
    """The instruction that asks for a cache line."""
    byte, integer = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, integer, integer, integer])
    instruction = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    # to be read, kept in all caches, data
    builder.call(instruction, [line, integer(0), integer(3), integer(1)])


@intrinsic(prefer_literal=True)
def splat(typing_context, number, lanes):  # noqa: ARG001
    """The same number in all lanes, a constant."""
    vector = Vector(number, _constant(lanes))

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        undefined = ir.Constant(context.get_value_type(vector), ir.Undefined)
        first = builder.insert_element(undefined, arguments[0], ir.IntType(32)(0))
        return _shuffled(builder, first, undefined, [0] * vector.lanes)

    return vector(number, lanes), generate


@intrinsic
def multiply_add(typing_context, one, other, added):  # noqa: ARG001
    """``one * other + added`` lane by lane, rounded once where the processor does that at once."""
    _require_same(one.dtype, one, other, added)

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        kind = ir.FunctionType(arguments[0].type, [argument.type for argument in arguments])
        letter = {types.float32: "f32", types.float64: "f64"}[one.dtype]
        name = f"llvm.fmuladd.v{one.lanes}{letter}"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)

    return one(one, other, added), generate


def _overload(function, name):
    """Lane by lane, of two vectors of one type."""

    @intrinsic
    def operation(typing_context, one, other):  # noqa: ARG001
        def generate(context, builder, signature, arguments):  # noqa: ARG001
            return getattr(builder, name)(*arguments)

        return one(one, other), generate

    @overload(function)
    def overloaded(one, other):
        if isinstance(one, Vector) and one == other:
            return lambda one, other: operation(one, other)  # noqa: PLW0108  (numba wants a function to compile)
        return None


for _function, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _overload(_function, _name)


@intrinsic
def _negative(typing_context, vector):  # noqa: ARG001
    def generate(context, builder, signature, arguments):  # noqa: ARG001
        return builder.fneg(arguments[0])

    return vector(vector), generate


@overload(operator.neg)
def _overloaded_negative(vector):
    if isinstance(vector, Vector):
        return lambda vector: _negative(vector)  # noqa: PLW0108  (numba wants a function to compile)
    return None


def _number_of(pointer, kind):
    if isinstance(pointer, types.CPointer) and isinstance(pointer.dtype, kind):
        return pointer.dtype
    raise TypingError(f"vectors are where a pointer to a number of {kind.__name__} says, not {pointer}")


def _constant(lanes):
    if isinstance(lanes, types.IntegerLiteral):
        return lanes.literal_value
    raise TypingError(f"how many numbers a vector has is a constant, not {lanes}")


def _require_same(number, *vectors):
    if not all(isinstance(vector, Vector) and vector == vectors[0] and vector.dtype == number for vector in vectors):
        raise TypingError(f"vectors are of the pointer's numbers, {number}, and not {vectors}")


def _pairs_of(vector):
    return Vector(vector.dtype, 2 * vector.lanes)


def _load(context, builder, pointer, vector):
    kind = context.get_value_type(vector)
    # Aligned as one number is, not as all of them.
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=_size(context, vector))


def _load_from_the_end(context, builder, pointer, vector):
    lanes = min(vector.lanes, CACHE_LINE // _size(context, vector))
    lines = []
    for first in range(vector.lanes - lanes, -1, -lanes):
        line = builder.gep(pointer, [ir.Constant(ir.IntType(64), first)], inbounds=True)
        lines.insert(0, _load(context, builder, line, Vector(vector.dtype, lanes)))
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
    while len(lines) > 1:
        halves = zip(lines[::2], lines[1::2], strict=True)
        lines = [_shuffled(builder, one, other, range(2 * one.type.count)) for one, other in halves]
    return lines[0]


def _store(context, builder, pointer, numbers, vector):
    return builder.store(numbers, builder.bitcast(pointer, numbers.type.as_pointer()), align=_size(context, vector))


def _stream(context, builder, pointer, numbers, vector):
    stored = _store(context, builder, pointer, numbers, vector)
    stored.align = STREAM_ALIGNMENT
    stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))


def _size(context, vector):
    return context.get_abi_sizeof(context.get_value_type(vector.dtype))


def _parts(builder, pairs, vector):
    return [_shuffled(builder, pairs, pairs, range(part, 2 * vector.lanes, 2)) for part in (0, 1)]


def _paired(builder, real, imaginary, vector):
    places = [place for lane in range(vector.lanes) for place in (lane, vector.lanes + lane)]
    return _shuffled(builder, real, imaginary, places)


def _shuffled(builder, one, other, places):
    places = list(places)
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))
