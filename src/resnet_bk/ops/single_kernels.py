"""The Triton kernel that splits float32 numbers into bfloat16 ones."""

import triton.language as tl

from resnet_bk.ops.kernels import kernel


@kernel
def split_kernel(x, out, numbers, width, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    """Of rows of ``width`` numbers the first parts, then the second ones and the third; and the first ones AGAIN."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = number < numbers
    x_ = tl.load(x + number, mask=there, other=0.0)
    first = x_.to(tl.bfloat16)
    rest = x_ - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    row = number // width
    place = out + row * ((4 if AGAIN else 3) * width) + (number - row * width)
    tl.store(place, first, mask=there)
    tl.store(place + width, second, mask=there)
    tl.store(place + 2 * width, third, mask=there)
    if AGAIN:
        tl.store(place + 3 * width, first, mask=there)
