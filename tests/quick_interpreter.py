"""Triton's interpreter, without what it works out anew at each operation of a kernel.

More than half of its time goes to types of blocks, which are made, checked and given a name for every value on the way,
and to looking for what is to be interpreted before each call of a function. That is the same every time, and is
remembered here. What kernels compute, and what is checked of it, stays as it is.
"""

import inspect
from functools import cache

from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

NUMPYS, BLOCKS, SHAPES = {}, {}, {}
make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
same_type, same_values = core.dtype.__eq__, core.tuple.__eq__
unwrap, numpys_type = core._unwrap_if_constexpr, interpreter._get_np_dtype
broadcast = TritonSemantic.broadcast_impl_value


def hurry():
    """From now on."""
    core._unwrap_if_constexpr = _unwrapped
    core.block_type.__init__ = _make_block
    core.tensor.__init__ = _make_tensor
    core.dtype.__eq__ = lambda self, other: self is other or same_type(self, other)
    core.tuple.__eq__ = _same_values
    interpreter._get_np_dtype = _numpys_type
    interpreter._patch_builtin = _patch_builtin
    TritonSemantic.broadcast_impl_value = _broadcast


def _unwrapped(value):
    """Nearly always of a plain value."""
    kind = type(value)
    if kind is core.constexpr:
        return value.value
    return value if kind in (int, core.dtype, core.block_type, core.pointer_type) else unwrap(value)


def _numpys_type(kind):
    name = kind.scalar.name
    if name not in NUMPYS:
        NUMPYS[name] = numpys_type(kind)
    return NUMPYS[name]


def _make_block(self, element_ty, shape):
    """A type is its element's and its shape, with what follows from them."""
    sizes = shape.values if type(shape) is core.tuple else shape
    plain = [size if type(size) is int else _unwrapped(size) for size in sizes]
    key = element_ty.name, getattr(element_ty, "address_space", None), *plain
    if key not in BLOCKS:
        make_block(self, element_ty, shape)
        BLOCKS[key] = dict(self.__dict__)
    self.__dict__.update(BLOCKS[key])


def _make_tensor(self, handle, kind):
    """Tensors of one shape share what says so; a kernel cannot change it."""
    sizes = tuple(kind.shape.values) if kind.is_block() else ()
    if sizes not in SHAPES:
        make_tensor(self, handle, kind)
        SHAPES[sizes] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.shape, self.numel = SHAPES[sizes]


def _same_values(self, other):
    values = other.values if type(other) is core.tuple else other
    if type(values) is list and all(type(value) is int for value in values):
        return core.constexpr(self.values == values)
    return same_values(self, other)


def _broadcast(self, lhs, rhs):
    """Blocks of one shape, and two scalars, are as they should be."""
    one, other = lhs.type, rhs.type
    is_block = one.is_block()
    if is_block == other.is_block() and (not is_block or one.shape.values == other.shape.values):
        return lhs, rhs
    return broadcast(self, lhs, rhs)


@cache
def _names_of_builtins(package):
    return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]


def _patch_builtin(package, builder, scope):
    """Those that are patched already are no builtins."""
    for name in _names_of_builtins(package):
        member = getattr(package, name)
        if core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)
