"""Many neighbouring numbers at once, for numba kernels: a type, and what is done with it.

A sweep over tokens keeps what it carries of many lanes in registers this way. As a loop over lanes, it would be written
to memory and read back at each token, and the compiler would have to ask each time whether arrays overlap. LLVM makes
of a vector what the processor has: one of 64 numbers is four registers of AVX-512, or sixteen of NEON.

Indices are of contiguous arrays and unchecked, as numba's own. Numbers keep their type. What is fused is said, with
``multiply_add``, and not left to the compiler, which decides otherwise in vectors of another size.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, overload, register_model

STREAM_ALIGNMENT = 64  # bytes


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


@intrinsic(prefer_literal=True)
def load(typing_context, array, index, lanes):  # noqa: ARG001
    """So many numbers, a constant, from an index on."""
    vector = Vector(_number_of(array, types.Float), _constant(lanes))

    def generate(context, builder, signature, arguments):
        pointer, size = _place(context, builder, signature, arguments, vector)
        return builder.load(pointer, align=size)

    return vector(array, types.intp, lanes), generate


@intrinsic
def store(typing_context, array, index, vector):  # noqa: ARG001
    """Puts the vector's numbers into the array from an index on."""
    _require_same(_number_of(array, types.Float), vector)

    def generate(context, builder, signature, arguments):
        pointer, size = _place(context, builder, signature, arguments, vector)
        builder.store(arguments[2], pointer, align=size)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def stream(typing_context, array, index, vector):  # noqa: ARG001
    """As ``store``, past the caches, where the place is a multiple of ``STREAM_ALIGNMENT``; then a ``fence`` is due."""
    _require_same(_number_of(array, types.Float), vector)

    def generate(context, builder, signature, arguments):
        pointer, _ = _place(context, builder, signature, arguments, vector)
        stored = builder.store(arguments[2], pointer, align=STREAM_ALIGNMENT)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def fence(typing_context):  # noqa: ARG001
    """What was stored before is there for whoever reads after."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def load_complex(typing_context, array, index, lanes):  # noqa: ARG001
    """Real and imaginary parts of so many complex numbers, a constant, from an index on."""
    vector = Vector(_number_of(array, types.Complex).underlying_float, _constant(lanes))

    def generate(context, builder, signature, arguments):
        pointer, size = _place(context, builder, signature, arguments, _pairs_of(vector))
        pairs = builder.load(pointer, align=size)
        parts = [_shuffled(builder, pairs, pairs, range(part, 2 * vector.lanes, 2)) for part in (0, 1)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(vector, 2)(array, types.intp, lanes), generate


@intrinsic
def store_complex(typing_context, array, index, real, imaginary):  # noqa: ARG001
    """Puts complex numbers into the array from an index on."""
    _require_same(_number_of(array, types.Complex).underlying_float, real, imaginary)
    places = [place for lane in range(real.lanes) for place in (lane, real.lanes + lane)]

    def generate(context, builder, signature, arguments):
        pointer, size = _place(context, builder, signature, arguments, _pairs_of(real))
        builder.store(_shuffled(builder, *arguments[2:], places), pointer, align=size)
        return context.get_dummy_value()

    return types.void(array, types.intp, real, imaginary), generate


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


def _number_of(array, kind):
    if isinstance(array, types.Array) and array.layout == "C" and array.ndim == 1 and isinstance(array.dtype, kind):
        return array.dtype
    raise TypingError(f"vectors are of contiguous rows of {kind.__name__} numbers, not of {array}")


def _constant(lanes):
    if isinstance(lanes, types.IntegerLiteral):
        return lanes.literal_value
    raise TypingError(f"how many numbers a vector has is a constant, not {lanes}")


def _require_same(number, *vectors):
    if not all(isinstance(vector, Vector) and vector == vectors[0] and vector.dtype == number for vector in vectors):
        raise TypingError(f"vectors are of the array's numbers, {number}, and not {vectors}")


def _pairs_of(vector):
    return Vector(vector.dtype, 2 * vector.lanes)


def _place(context, builder, signature, arguments, vector):
    """Where a vector's numbers lie from an index of an array on, and the bytes of one of them."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    begin = builder.gep(array.data, [arguments[1]])
    size = context.get_abi_sizeof(context.get_value_type(vector.dtype))
    return builder.bitcast(begin, context.get_value_type(vector).as_pointer()), size


def _shuffled(builder, one, other, places):
    places = list(places)
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))
