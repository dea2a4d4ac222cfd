"""Numbers that threads share without a lock of Python's, for numba kernels: int64 cells of an array, as of a crew."""

import platform

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic
from numpy.typing import NDArray

# What tells a processor that a loop only waits: LLVM's name for it, and the number that ARM's hint takes.
_X86, _ARM = ("llvm.x86.sse2.pause", None), ("llvm.aarch64.hint", 1)
_WAITS = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}
ORDERING = "seq_cst"

Cells = NDArray[np.int64]
# A crew's, each in a cache line of its own: calls, calls that were announced to helpers, how often a helper has ended.
CALLED, ANNOUNCED, ENDED, CELLS = 0, 8, 16, 24


def nobody() -> Cells:
    """Cells that no helper looks at."""
    return np.zeros(CELLS, np.int64)


@intrinsic
def read(typing_context, cells, index):  # noqa: ARG001
    """What a cell has now."""
    _require_cells(cells)

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_cell(context, builder, signature, arguments), ORDERING, align=8)

    return types.int64(cells, types.intp), generate


@intrinsic
def write(typing_context, cells, index, number):  # noqa: ARG001
    """Puts a number into a cell; what was written before is seen by whoever reads it."""
    _require_cells(cells)

    def generate(context, builder, signature, arguments):
        builder.store_atomic(arguments[2], _cell(context, builder, signature, arguments), ORDERING, align=8)
        return context.get_dummy_value()

    return types.void(cells, types.intp, types.int64), generate


@intrinsic
def add(typing_context, cells, index, number):  # noqa: ARG001
    """Adds to a cell, at once; what it had before."""
    _require_cells(cells)

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _cell(context, builder, signature, arguments), arguments[2], ORDERING)

    return types.int64(cells, types.intp, types.int64), generate


@njit(nogil=True, cache=True)
def wait_for(cells, index, number, rounds):
    """Looks at a cell so many times, until it has at least the number; what it has."""
    found = read(cells, index)
    while found < number and rounds > 0:
        _pause()
        rounds -= 1
        found = read(cells, index)
    return found


@njit(nogil=True, cache=True)
def announce(cells):
    """A crew's helpers may begin: for kernels, which hold no lock of Python's."""
    write(cells, ANNOUNCED, read(cells, CALLED))


@njit(nogil=True, cache=True)
def look_out(cells, ended, wanted, rounds):
    """A helper has ended so many times more, and waits until so many calls were announced; how many were."""
    add(cells, ENDED, ended)
    return wait_for(cells, ANNOUNCED, wanted, rounds)


@intrinsic
def _pause(typing_context):  # noqa: ARG001
    def generate(context, builder, signature, arguments):  # noqa: ARG001
        if platform.machine() in _WAITS:
            name, number = _WAITS[platform.machine()]
            given = [] if number is None else [ir.IntType(32)(number)]
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in given])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), given)
        return context.get_dummy_value()

    return types.void(), generate


def _require_cells(cells):
    if not (isinstance(cells, types.Array) and cells.ndim == 1 and cells.dtype == types.int64):
        raise TypingError(f"cells are int64, in an array of one axis, and not {cells}")


def _cell(context, builder, signature, arguments):
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    shape, strides = (cgutils.unpack_tuple(builder, x) for x in (array.shape, array.strides))
    layout = signature.args[0].layout
    return cgutils.get_item_pointer2(context, builder, array.data, shape, strides, layout, [arguments[1]])
