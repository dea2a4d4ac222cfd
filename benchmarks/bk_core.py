"""BK-Core's speed, on the CPU or the GPU: checked before it is timed, in shares of this machine's copy bandwidth.

    python benchmarks/bk_core.py --device cpu --out benchmarks/results/cpu/bk_core.json
    python benchmarks/bk_core.py --device cuda --out benchmarks/results/gpu/bk_core.json

A share counts only the bytes that must move, in float32: 12 for each site and head forward (v in, a complex number
out), 20 backward (a complex gradient and l in, v's gradient out). The copy is timed in the same run and counted as
bytes read plus bytes written. On the CPU the yardstick beside it is the loop over tokens that one would write in torch:
slices unbound once, results written in place, and the adjoint by hand; beside how many times faster we are stands how
many times faster anything could be that moves those bytes at the bandwidth of that copy.

Growth over lengths is fair only where every length is in the same memory. So forward and backward take turns, as in
training, and each call has tensors of its own, as layers have, until 512 MB are gone through: of one problem alone the
short ones would lie in the caches. At 8 x 1 heads most of their time is the call. The longest takes 17 GB.

Memory that is freed stays with the process, as in training: large results are not taken page by page anew. Growth is
measured in a process of its own that keeps no cuttings of large blocks aside (glibc's tcache): with them, a block that
is kept is now and then too small by a few bytes for the next result of its size, for which a 24 GB machine has no room.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet_bk.environment import describe_environment
from resnet_bk.files import read_json, write_json
from resnet_bk.heap import give_back_freed_memory, keep_freed_memory
from resnet_bk.ops.bk import choose_backend
from resnet_bk.ops.bk.operators import Sweeps, sweeps

FORWARD_BYTES, BACKWARD_BYTES = 12, 20
LIMIT = 2e-6
EVERYDAY = (8, 4096, 64)
LARGE = [(16, 65_536, 64), (16, 524_288, 8), (16, 4_194_304, 1)]  # 2^26 sites and heads each
FEW_HEADS = [(8, 262_144, 1), (1, 262_144, 8), (12, 65_536, 4)]
TUNNEL = [(8, 1024, 8), (12, 1024, 16), (1, 65_536, 8), (1, 65_536, 1), (12, 65_536, 4)]
LOOP_ROUNDS = 27
# Batch size and heads.
SCALING_CHAINS = [(8, 64), (8, 1), (1, 64)]
SCALING_LENGTHS = [4096, 16_384, 65_536, 262_144, 1_048_576]
SCALING_ROUNDS = 7
SCALING_BYTES, HELD_BYTES = 1 << 29, 20  # of different problems, and of a site of one: v, l and a gradient
GRAPH_SHAPE, GRAPH_LAUNCHES = (16, 4096, 1), 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only-scaling", action="store_true", help="what the CPU's own process for it does")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, measure_growth(device) if arguments.only_scaling else measure(device))


def measure(device: torch.device) -> dict[str, Any]:
    """Everything, as what is written."""
    backend = choose_backend(device).name
    keep_freed_memory(device)
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e9:.1f} GB/s")
    document: dict[str, Any] = {
        "environment": describe_environment(),
        "backend": backend,
        "copy_bytes_per_second": bandwidth,
        "errors": check(sweeps(backend), device),
    }
    if device.type == "cpu":
        document["scaling"] = growth_in_a_process()
    shapes = LARGE if device.type == "cuda" else [EVERYDAY, *FEW_HEADS]
    document["shapes"] = [time_shape(sweeps(backend), shape, device, bandwidth) for shape in shapes]
    if device.type == "cuda":
        document["small"] = time_under_a_graph(sweeps(backend), device)
    else:
        document["plain_torch"] = time_shape(sweeps("torch"), EVERYDAY, device, bandwidth, repeats=3)
        document["eager_loop"] = time_eager_loop(bandwidth)
        document["tunnel"] = [time_tunnel(sweeps(backend), shape, device) for shape in TUNNEL]
    return document


def inputs(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random problem at z = i, the seed's energy, and a gradient for its result."""
    batch_size, _, heads = shape
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
    return {
        "v": torch.randn(shape, **options),
        "shift": torch.tensor([-2.0, -1.0], device=device, dtype=dtype).repeat(heads, 1),
        "bonds": torch.ones(heads, device=device, dtype=dtype),
        "state": torch.zeros(batch_size, heads, 2, device=device, dtype=dtype),
        "grad": torch.randn(*shape, 2, **options),
    }


def phases(backend: Sweeps, problem: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    v, shift, bonds, state, grad = problem.values()
    ratios = backend.causal(v, shift, bonds, state)
    return {
        "forward": lambda: backend.causal(v, shift, bonds, state),
        "backward": lambda: backend.causal_adjoint(grad, ratios, bonds, state, wants_bonds=False),
        "bidirectional": lambda: backend.bidirectional(v, shift, bonds),
    }


def check(backend: Sweeps, device: torch.device) -> list[dict[str, Any]]:
    """Relative errors of float32 against the compiled CPU sweep in double precision; too large a one stops it all."""
    rows = []
    for shape in (EVERYDAY, (2, 65_537, 3), (2, 1_048_576, 1)):
        problem = inputs(shape, device)
        exact = {name: x.cpu().double() for name, x in problem.items()}
        for name, ours in phases(backend, problem).items():
            wanted = phases(sweeps("cpu"), exact)[name]()
            found = ours()
            pairs = zip(found[:2], wanted[:2], strict=True) if name == "backward" else [(found, wanted)]
            error = max(float((x.cpu().double() - y).norm() / y.norm()) for x, y in pairs)
            rows.append({"shape": shape, "phase": name, "relative_error": error})
            if not error <= LIMIT:
                raise SystemExit(f"{name} at {shape} is off by {error:.1e}: not timed")
    print(f"largest error {max(row['relative_error'] for row in rows):.1e}")
    return rows


def time_shape(
    backend: Sweeps, shape: tuple[int, int, int], device: torch.device, bandwidth: float, *, repeats: int = 50
) -> dict[str, Any]:
    """Median seconds of each phase, and the share of the copy bandwidth that its bytes make."""
    elements = int(np.prod(shape))
    row: dict[str, Any] = {"shape": shape}
    seconds = {}
    for name, phase in phases(backend, inputs(shape, device)).items():
        samples = timed(phase, device, repeats)
        seconds[name] = statistics.median(samples)
        needed = BACKWARD_BYTES if name == "backward" else FORWARD_BYTES
        share = elements * needed / seconds[name] / bandwidth
        row[name] = {"seconds": seconds[name], "samples": samples, "share_of_copy": share}
    both = seconds["forward"] + seconds["backward"]
    row["forward_and_backward"] = {
        "seconds": both,
        "share_of_copy": elements * (FORWARD_BYTES + BACKWARD_BYTES) / both / bandwidth,
    }
    print(shape, {name: f"{value['share_of_copy']:.0%}" for name, value in row.items() if name != "shape"})
    return row


def time_eager_loop(bandwidth: float) -> dict[str, Any]:
    """The loop that one would write, forward and backward; how many times faster ours is, and a copy of its bytes.

    Both in turns, several rounds of them: a machine that is shared is now quick and now slow.
    """
    cpu = torch.device("cpu")
    problem = inputs(EVERYDAY, cpu)
    v, shift, _, _, grad = problem.values()
    a, upstream = v + torch.view_as_complex(shift), torch.view_as_complex(grad)
    ratios = eager_forward(a)
    wanted = sweeps("cpu").causal(v, shift, torch.ones(v.shape[2]), torch.zeros(v.shape[0], v.shape[2], 2))
    error = float((torch.view_as_real(ratios) - wanted).norm() / wanted.norm())
    if not error <= LIMIT:
        raise SystemExit(f"the loop and ours differ by {error:.1e}: not timed")
    compiled = phases(sweeps("cpu"), problem)
    rounds = [
        {
            "ours": sum(statistics.median(timed(compiled[name], cpu, 30)) for name in ("forward", "backward")),
            "loop": sum(
                statistics.median(timed(work, cpu, 3))
                for work in (lambda: eager_forward(a), lambda: eager_adjoint(upstream, ratios))
            ),
        }
        for _ in range(LOOP_ROUNDS)
    ]
    times = [turn["loop"] / turn["ours"] for turn in rounds]
    seconds = statistics.median(turn["loop"] for turn in rounds)
    copy_seconds = int(np.prod(EVERYDAY)) * (FORWARD_BYTES + BACKWARD_BYTES) / bandwidth
    print(
        f"{statistics.median(times):.0f} times as fast as the loop over tokens, forward and backward "
        f"({min(times):.0f} to {max(times):.0f} in {LOOP_ROUNDS} rounds); "
        f"at the copy's bandwidth the bytes would allow {seconds / copy_seconds:.0f}"
    )
    return {
        "rounds": rounds,
        "seconds": seconds,
        "times_ours": statistics.median(times),
        "times_at_copy_bandwidth": seconds / copy_seconds,
    }


def eager_forward(a_BNH: Tensor) -> Tensor:
    """l_i = 1 / (a_i - l_{i-1}), token by token."""
    sites_N = a_BNH.transpose(0, 1).contiguous()
    out_N = torch.empty_like(sites_N)
    before = torch.zeros_like(sites_N[0])
    for a, out in zip(sites_N.unbind(0), out_N.unbind(0), strict=True):
        torch.reciprocal(torch.sub(a, before), out=out)
        before = out
    return out_N.transpose(0, 1)


def eager_adjoint(grad_BNH: Tensor, l_BNH: Tensor) -> Tensor:
    """The gradient of v: lambda_i = g_i + conj(l_{i+1}^2) lambda_{i+1}, token by token from the last."""
    conj_square_N = (l_BNH * l_BNH).conj().resolve_conj().transpose(0, 1).contiguous()
    grads_N = grad_BNH.transpose(0, 1).contiguous().unbind(0)
    lambda_N = torch.empty_like(conj_square_N)
    outs, factors = lambda_N.unbind(0), conj_square_N.unbind(0)
    outs[-1].copy_(grads_N[-1])
    for site in range(len(outs) - 2, -1, -1):
        torch.addcmul(grads_N[site], factors[site + 1], outs[site + 1], out=outs[site])
    return (-conj_square_N * lambda_N).real.transpose(0, 1)


def time_tunnel(backend: Sweeps, shape: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """Median seconds of ``bk_tunnel``'s sweeps, checked against double precision."""
    generator = torch.Generator(device).manual_seed(0)
    gap, grad = (torch.rand(shape, generator=generator, device=device) for _ in range(2))
    gap *= 0.01  # a memory of some 10 tokens and more
    state = torch.ones(shape[0], shape[2], device=device)
    log_l, exact = backend.tunnel(gap, state), backend.tunnel(gap.double(), state.double())
    error = float((log_l - exact).norm() / exact.norm())
    if not error <= LIMIT:
        raise SystemExit(f"the tunnel at {shape} is off by {error:.1e}: not timed")
    work = {
        "forward": lambda: backend.tunnel(gap, state),
        "backward": lambda: backend.tunnel_adjoint(grad, log_l),
    }
    samples = {name: timed(phase, device, 20) for name, phase in work.items()}
    seconds = {name: statistics.median(found) for name, found in samples.items()}
    print("tunnel", shape, {name: f"{found * 1e3:.2f} ms" for name, found in seconds.items()})
    return {"shape": shape, "relative_error": error, "seconds": seconds, "samples": samples}


def growth_in_a_process() -> Any:
    """``measure_growth`` on the CPU, where the C library sets no cuttings aside; it reads that as it starts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scaling.json"
        command = [sys.executable, __file__, "--device", "cpu", "--out", str(out), "--only-scaling"]
        subprocess.run(command, check=True, env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"})
        return read_json(out)


def measure_growth(device: torch.device) -> list[dict[str, Any]]:
    """``measure_scaling`` of every batch size and number of heads."""
    keep_freed_memory(device)
    backend = sweeps(choose_backend(device).name)
    return [measure_scaling(backend, *chains, device) for chains in SCALING_CHAINS]


def measure_scaling(backend: Sweeps, batch_size: int, heads: int, device: torch.device) -> dict[str, Any]:
    """Forward and backward over lengths, and the exponent of a power law.

    Lengths take turns, the longest first, several rounds of them: a machine that is shared is now quick and now slow.
    """
    samples: dict[int, list[float]] = {length: [] for length in SCALING_LENGTHS}
    for _ in range(SCALING_ROUNDS):
        for length in reversed(SCALING_LENGTHS):
            samples[length] += time_layers(backend, (batch_size, length, heads), device)
            # Else what the next length leaves of this one's blocks is kept beside the longer ones of the next round.
            give_back_freed_memory()
    rows = [
        {"sequence_length": length, "samples": found, "seconds": statistics.median(found)}
        for length, found in samples.items()
    ]
    logs = [[np.log(row["sequence_length"]), np.log(row["seconds"])] for row in rows]
    exponent = float(np.polyfit(*np.array(logs).T, 1)[0])
    print(f"batch {batch_size}, heads {heads}: time grows as N^{exponent:.3f}")
    return {
        "batch_size": batch_size,
        "heads": heads,
        "points": rows,
        "exponent": exponent,
    }


def time_layers(backend: Sweeps, shape: tuple[int, int, int], device: torch.device) -> list[float]:
    """Seconds of forward and backward of one problem after the other."""
    number = max(1, SCALING_BYTES // (HELD_BYTES * int(np.prod(shape))))
    layers = itertools.cycle([phases(backend, inputs(shape, device)) for _ in range(number)])

    def forward_and_backward() -> None:
        work = next(layers)
        work["forward"]()
        work["backward"]()

    return timed(forward_and_backward, device, 3 if shape[1] > 65_536 else 12)


def time_under_a_graph(backend: Sweeps, device: torch.device) -> dict[str, Any]:
    """Seconds of one causal forward of a small problem, replayed from a CUDA graph."""
    forward = phases(backend, inputs(GRAPH_SHAPE, device))["forward"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_LAUNCHES):
            forward()
    seconds = statistics.median(timed(graph.replay, device, 50)) / GRAPH_LAUNCHES
    print(f"{GRAPH_SHAPE} under a CUDA graph: {seconds * 1e6:.1f} microseconds")
    return {"shape": GRAPH_SHAPE, "seconds": seconds}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus written in a second by torch's copy of 2 GiB (GPU) or 256 MiB (CPU)."""
    source = torch.randn(2**29 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(timed(lambda: target.copy_(source), device, 20))


def timed(work: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each call, after three that do not count.

    On a GPU they are the device's: each call stands in the queue behind a write of 1 GiB, during which the host gets
    ahead, and after which nothing of its data is in a cache.
    """
    for _ in range(3):
        work()
    samples = []
    swept = torch.empty(2**28, device=device) if device.type == "cuda" else torch.empty(0)
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            swept.zero_()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            samples.append(time.perf_counter() - began)
    return samples


if __name__ == "__main__":
    main()
