"""The carry's kernels against flash-linear-attention's for the same recurrence, checked before they are timed.

    python benchmarks/carry.py --out benchmarks/results/gpu/carry.json

In bfloat16 on a GPU, values and keys 64 wide, as many heads as presets 100m and 1b have. Theirs is
`chunk_simple_gla`, S_i = l_i S_{i-1} + k_i v_i^T; with keys times l_i it is ours. Both are compared with the quadratic
form in double precision on a shorter text (ours must agree), then timed in turns, forward and forward with backward, at
131,072 tokens. Memory is what a forward and backward pass needs beside its arguments at the most. Where their backward
refuses (as it does on Hopper GPUs with Triton 3.4 to 3.7.0, which compiles it wrongly), its words are recorded instead.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_bk.environment import describe_environment
from resnet_bk.files import write_json
from resnet_bk.ops.bk import bk_tunnel
from resnet_bk.ops.carry import bk_carry

DEVICE = torch.device("cuda")
HEADS, LENGTHS, TOKENS, WIDTH = (8, 20), (1024, 4096, 16_384), 131_072, 64
LIMIT = 2e-2  # of bfloat16
TURNS, CALLS = 7, 10
Carry = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    import fla

    document: dict[str, Any] = {
        "environment": describe_environment(),
        "flash_linear_attention": fla.__version__,
        "errors": {"ours": error(ours)},
    }
    refusal = None
    try:
        document["errors"]["flash_linear_attention"] = error(theirs)
    except RuntimeError as reason:
        document["refusal"] = refusal = str(reason)
    document["points"] = [measure(heads, length, refusal) for heads in HEADS for length in LENGTHS]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, document)


def ours(q: Tensor, k: Tensor, v: Tensor, log_l: Tensor) -> Tensor:
    o = bk_carry(q, k, v, log_l)
    assert isinstance(o, Tensor)
    return o


def theirs(q: Tensor, k: Tensor, v: Tensor, log_l: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    o: Tensor = chunk_simple_gla(q, (k * log_l.exp().unsqueeze(-1)).to(k.dtype), v, g=log_l, scale=1.0)[0]
    return o


CARRIES: dict[str, Carry] = {"ours": ours, "flash_linear_attention": theirs}


def inputs(rows: int, length: int, heads: int) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(rows, length, heads, WIDTH, device=DEVICE, generator=generator).to(torch.bfloat16) for _ in range(3)
    )
    gap = torch.logspace(-6, 0, heads, device=DEVICE) * torch.rand(
        rows, length, heads, device=DEVICE, generator=generator
    )
    log_l = bk_tunnel(gap)
    assert isinstance(log_l, Tensor)
    return [part.detach().requires_grad_() for part in (q, k, v, log_l)]


def error(carry: Carry) -> dict[str, float]:
    """Norm-wise, of the output and of each gradient; too large a one of ours stops it all."""
    found, wanted = (_with_gradients(form) for form in (carry, _quadratic))
    errors = {
        name: float((mine.double() - exact).norm() / exact.norm())
        for name, mine, exact in zip(("o", "q", "k", "v", "log_l"), found, wanted, strict=True)
    }
    if carry is ours and max(errors.values()) > LIMIT:
        raise SystemExit(f"wrong: {errors}")
    return errors


def _with_gradients(carry: Carry) -> list[Tensor]:
    arguments = inputs(2, 1000, 4)
    o = carry(*arguments)
    return [o.detach(), *torch.autograd.grad(o.double().square().sum(), arguments)]


def _quadratic(q: Tensor, k: Tensor, v: Tensor, log_l: Tensor) -> Tensor:
    o = bk_carry(q.double(), k.double(), v.double(), log_l.double(), form="quadratic")
    assert isinstance(o, Tensor)
    return o


def measure(heads: int, length: int, refusal: str | None) -> dict[str, Any]:
    """Both, but for the backward pass of the one that refuses."""
    arguments = inputs(TOKENS // length, length, heads)
    gradient = torch.randn_like(arguments[2])
    point: dict[str, Any] = {"heads": heads, "length": length, "rows": TOKENS // length}
    kinds = {"ours": WORK, "flash_linear_attention": WORK if refusal is None else {"forward": _forward}}
    seconds: dict[str, dict[str, list[float]]] = {name: {what: [] for what in kinds[name]} for name in CARRIES}
    for turn in range(-1, TURNS):
        for name, carry in CARRIES.items():
            for what, work in kinds[name].items():
                took = _seconds(work, carry, arguments, gradient)
                if turn >= 0:
                    seconds[name][what].append(took)
    for name, carry in CARRIES.items():
        point[name] = {
            "seconds": {what: statistics.median(found) for what, found in seconds[name].items()},
            "samples": seconds[name],
            "peak_bytes": _peak(kinds[name], carry, arguments, gradient),
        }
    print(point["heads"], point["length"], {name: point[name]["seconds"] for name in CARRIES}, flush=True)
    return point


def _forward(carry: Carry, arguments: list[Tensor], _: Tensor) -> None:
    with torch.no_grad():
        carry(*arguments)


def _both(carry: Carry, arguments: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(carry(*arguments), arguments, gradient)


WORK: dict[str, Callable[..., None]] = {"forward": _forward, "both": _both}


def _peak(
    kinds: dict[str, Callable[..., None]], carry: Carry, arguments: list[Tensor], gradient: Tensor
) -> dict[str, int]:
    found = {}
    for what, work in kinds.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(carry, arguments, gradient)
        found[what] = torch.cuda.max_memory_allocated() - before
    return found


def _seconds(work: Callable[..., None], carry: Carry, arguments: list[Tensor], gradient: Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        work(carry, arguments, gradient)
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * float(begin.elapsed_time(end)) / CALLS


if __name__ == "__main__":
    main()
