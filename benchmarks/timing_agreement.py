"""Times of the benchmark beside those of others' tools, of the same callables: do the clocks agree?

    python benchmarks/timing_agreement.py --device cpu
    python benchmarks/timing_agreement.py --device cuda --preset 100m --precision bf16 \\
        --batch-size 256 --sequence-length 1024 --turns 10

On a CPU the other is torch.utils.benchmark.Timer, on a GPU triton.testing.do_bench, which empties the cache before each
call; there the callable of ours is timed after the cache was emptied too. do_bench queues calls, so that the device
need not wait for launches; ours is the clock on the wall, from an idle device to an idle one: they agree where the
device is what takes long, as it is with many tokens, and do not where the launches are. Tools take turns, since a
machine's speed drifts, and what counts is the median of the turns' ratios. Turns go on until its 95% interval is narrow
enough to tell, whatever it says, or until there have been too many or too long; agreement is an interval that lies
within 5%. Prints JSON, and what is known of each callable to stderr as soon as it is.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from resnet_bk.bench.contestants import BASELINE, OURS, contestant_configs
from resnet_bk.bench.machine import CacheFlush
from resnet_bk.bench.statistics import Pairs, paired_ratio
from resnet_bk.bench.subject import Subject, random_batch, synchronizer
from resnet_bk.bench.timing import seconds_of, without_garbage_collection
from resnet_bk.environment import describe_environment
from resnet_bk.heap import keep_freed_memory
from resnet_bk.schema import Interval
from resnet_bk.training.config import Precision, TrainingConfig

WARMUP, AGREEMENT, VOCABULARY = 5, 0.05, 4096
# Half of an interval that is narrow enough, the resamples it is of, and how many times the least number of turns.
NARROW, RESAMPLES, AT_MOST = 0.015, 2000, 20
CALLS_BEFORE = 2  # that torch.utils.benchmark.Timer.timeit makes
Work = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--preset", default="seed")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--turns", type=int, default=30, help="at least; there may be twenty times as many")
    parser.add_argument("--seconds", type=float, default=120.0, help="the longest that a callable's turns may take")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    keep_freed_memory(device)
    works = callables(arguments.preset, arguments.precision, arguments.batch_size, arguments.sequence_length, device)
    rows = {}
    for name, work in works.items():
        rows[name] = compare(work, device, arguments.turns, arguments.seconds)
        told = {key: value for key, value in rows[name].items() if key != "samples"}
        print(name, json.dumps(told), file=sys.stderr, flush=True)
    document = {
        "environment": describe_environment(),
        "settings": vars(arguments),
        "tool": "torch.utils.benchmark.Timer" if device.type == "cpu" else "triton.testing.do_bench",
        "callables": rows,
        "agree": all(max(abs(bound) for bound in row["interval"]) < AGREEMENT for row in rows.values()),
    }
    print(json.dumps(document, indent=2))


def callables(
    preset: str, precision: Precision, batch_size: int, sequence_length: int, device: torch.device
) -> dict[str, Work]:
    """A matrix product, and forward passes and steps of both models."""
    training = TrainingConfig(batch_size=batch_size, sequence_length=sequence_length, precision=precision)
    # On a GPU as long as a model's pass: what a launch on an idle device takes longer is ours to count, not do_bench's.
    width = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(width, width, device=device) for _ in range(2))
    works: dict[str, Work] = {"matrix product": lambda: left @ right}
    configs = contestant_configs(preset, {"vocab_size": VOCABULARY})
    for key in (OURS, BASELINE):
        batch = random_batch(configs[key], batch_size, sequence_length, device)
        subject = Subject.build(configs[key], training, batch)
        works[f"{key}, forward"] = subject.forward
        works[f"{key}, step"] = subject.step
    return works


def compare(work: Work, device: torch.device, turns: int, seconds: float) -> dict[str, Any]:
    """Medians of both in seconds, and by which share ours is longer."""
    ours, theirs = (ours_on_gpu, theirs_on_gpu) if device.type == "cuda" else (ours_on_cpu, theirs_on_cpu)
    for _ in range(WARMUP):
        work()
    own: list[float] = []
    others: list[float] = []
    began = time.monotonic()
    for number in range(turns * AT_MOST):
        if number and time.monotonic() - began > seconds:
            break
        if number and number % turns == 0 and half(longer(own, others)) < NARROW:
            break
        for samples, tool in [(own, ours), (others, theirs)][:: 1 if number % 2 == 0 else -1]:
            samples.append(tool(work, device))
    ratio = longer(own, others)
    return {
        "ours": statistics.median(own),
        "theirs": statistics.median(others),
        "difference": ratio.value - 1,
        "interval": [ratio.low - 1, ratio.high - 1],
        "turns": len(own),
        "samples": {"ours": own, "theirs": others},
    }


def longer(own: list[float], others: list[float]) -> Interval:
    """How many times theirs is ours: of the turns' ratios."""
    return paired_ratio(Pairs(ours=others, baseline=own, blocks=[0] * len(own)), resamples=RESAMPLES)


def half(interval: Interval) -> float:
    """Of its width."""
    return (interval.high - interval.low) / 2


def ours_on_cpu(work: Work, device: torch.device) -> float:
    """Behind as many calls as Timer makes before it measures."""
    with without_garbage_collection():
        for _ in range(CALLS_BEFORE):
            work()
        return seconds_of(work, synchronizer(device))


def theirs_on_cpu(work: Work, _: torch.device) -> float:
    """Timer would use one thread by itself."""
    from torch.utils.benchmark import Timer

    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return float(timer.timeit(1).median)


def ours_on_gpu(work: Work, device: torch.device) -> float:
    """The benchmark's phase with a cold cache."""
    flush = cache_flush(device)
    with without_garbage_collection():
        work()
        flush()
        return seconds_of(work, synchronizer(device))


@functools.cache
def cache_flush(device: torch.device) -> CacheFlush:
    """One buffer for all turns."""
    return CacheFlush(device)


def theirs_on_gpu(work: Work, _: torch.device) -> float:
    """In milliseconds, says the tool."""
    from triton.testing import do_bench

    return 1e-3 * float(do_bench(work, warmup=5, rep=20, return_mode="median"))


if __name__ == "__main__":
    main()
