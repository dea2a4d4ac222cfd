"""The classes for use from Python: on any model, with planted faults."""

import time

import msgspec
import pytest
import torch
from torch import nn

import resnet_bk.bench
from resnet_bk.bench import (
    ComprehensiveBenchmark,
    ComprehensiveConfig,
    FLOPsCounter,
    MemoryProfiler,
    TimingBenchmark,
    machine,
    timing,
)
from resnet_bk.bench.comprehensive import loss_of
from resnet_bk.bench.contestants import build_model, contestant_configs
from resnet_bk.bench.subject import random_tokens
from resnet_bk.schema import Peaks

CPU = torch.device("cpu")
WIDTH, ROWS = 8, 16
PAUSE = 0.02


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for each other on a busy machine are no part of what is tested."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quick_machine(monkeypatch):
    """Its peaks and caches are for test_timing.py: looking at them takes longer than what is measured here."""
    monkeypatch.setattr(machine, "cache_bytes", lambda _: 2**16)
    monkeypatch.setattr(timing, "measure_peaks", lambda *_: Peaks(flops=1e11, copy_bandwidth=1e10))


class Sleeping(nn.Sequential):
    def forward(self, x):
        time.sleep(PAUSE)
        return super().forward(x)


class Leaking(nn.Sequential):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.kept = []

    def forward(self, x):
        self.kept.append(torch.zeros(1000))
        return super().forward(x)


class Broken(nn.Sequential):
    def forward(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory")


def regression(kind=nn.Sequential):
    torch.manual_seed(1)
    return kind(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 1))


def data(rows=4 * ROWS):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, WIDTH, generator=generator)
    return x, x.sum(1, keepdim=True)


def loaders():
    dataset = torch.utils.data.TensorDataset(*data())
    return torch.utils.data.DataLoader(dataset, batch_size=ROWS, shuffle=True), [data(ROWS)]


def config(**changes):
    small = {"rounds": 9, "builds": 1, "warmup_rounds": 1, "steps": 10, "evaluations": 2, "device": "cpu"}
    return ComprehensiveConfig(**{"criterion": nn.MSELoss(), **small, **changes})


def test_flops_are_counted_forward_backward_and_by_module():
    counter = FLOPsCounter(regression())
    x, y = data(ROWS)
    found = counter.count(x, y, nn.MSELoss())
    first, last = 2 * ROWS * WIDTH * 32, 2 * ROWS * 32
    assert found.forward == first + last
    assert found.backward == first + 2 * last, "nobody asks for the input's gradient"
    assert found.by_module == {"0": 2 * first, "2": 3 * last}
    assert counter.get_total_flops() == found.total == counter.get_report()["total_flops"]
    assert counter.count(x, y, nn.MSELoss()) == found, "counts do not add up over calls"
    counter.reset()
    assert counter.get_total_flops() == 0


def test_flops_without_a_loss_are_those_of_the_outputs_sum():
    x, _ = data(ROWS)
    assert FLOPsCounter(regression()).count(x).forward == 2 * ROWS * (WIDTH * 32 + 32)


def test_counting_leaves_the_model_as_it_was():
    model = regression().eval()
    before = [parameter.clone() for parameter in model.parameters()]
    FLOPsCounter(model).count(*data(ROWS), nn.MSELoss())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, model.parameters(), before))


def test_times_are_seconds_of_what_was_asked_for():
    x, y = data(ROWS)
    bench = TimingBenchmark("cpu", warmup_iters=1, measure_iters=4)
    slow = regression(Sleeping)
    forward = bench.benchmark_forward(slow, x)
    backward = bench.benchmark_backward(slow, x, y, nn.MSELoss())
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.1)
    before = slow[0].weight.clone()
    step = bench.benchmark_full_step(slow, x, y, optimizer, nn.MSELoss())
    assert len(forward.samples) == 4
    assert forward.minimum >= PAUSE
    assert backward.minimum < PAUSE, "the forward pass is not in it"
    assert step.minimum >= PAUSE
    assert not torch.equal(slow[0].weight, before)
    assert slow.training
    assert slow[0].weight.grad is None


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="measure_iters 0"):
        TimingBenchmark("cpu", measure_iters=0)


def test_memory_is_profiled_on_a_cpu_too():
    model, (x, y) = regression(), data(ROWS)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    profiler = MemoryProfiler("cpu")
    forward = profiler.profile_forward(model, x)
    assert forward.initial == forward.final == weights + x.nbytes
    assert forward.activations >= 4 * ROWS * 32
    backward = profiler.profile_backward(model, x, y, nn.MSELoss())
    assert backward.gradients == weights
    assert weights + x.nbytes + y.nbytes + 4 * ROWS * 32 <= backward.after_forward <= backward.peak
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_against_itself_is_no_different():
    result = ComprehensiveBenchmark(regression(), regression(), config()).run_all_benchmarks(*loaders())
    ratios = result.ratios
    assert ratios.flops == ratios.memory == 1
    assert result.convergence.difference.value == 0
    assert not result.convergence.difference.claimed
    assert result.failures == {}
    assert not [line for line in result.findings if "loss" in line or "leak" in line or "FLOPs" in line]
    ours, baseline = (
        [curve for curve in result.convergence.curves if curve.contestant == key] for key in ("model", "baseline")
    )
    assert [curve.train[-1].loss for curve in ours] == [curve.train[-1].loss for curve in baseline]
    assert msgspec.json.decode(msgspec.json.encode(result), type=type(result)) == result


def test_seeds_are_orders_of_the_data_which_both_models_see_alike():
    result = ComprehensiveBenchmark(regression(), regression(), config()).benchmark_convergence(*loaders())
    finals = {curve.final_loss for curve in result.curves if curve.contestant == "model"}
    assert len(finals) == 3
    for curve in result.curves:
        assert [point.step for point in curve.validation] == [0, 5, 10]
        assert len(curve.train) == 10
        assert curve.final_loss < curve.validation[0].loss


def test_a_sleeping_baseline_is_found_slower():
    result = ComprehensiveBenchmark(regression(), regression(Sleeping), config())
    ratios = result.run_all_benchmarks(*loaders()).ratios
    assert ratios.forward.claimed
    assert ratios.forward.value > 1
    assert ratios.step.claimed
    assert not ratios.backward.claimed or ratios.backward.value < 10


def test_a_leaking_model_is_found():
    bench = ComprehensiveBenchmark(regression(Leaking), regression(), config())
    result = bench.benchmark_memory(data(ROWS))
    assert [model.grown_per_step for model in result.models] == [4000, 0]


def test_a_part_that_fails_is_told_and_the_others_are_there():
    result = ComprehensiveBenchmark(regression(Broken), regression(), config()).run_all_benchmarks(*loaders())
    assert result.flops is result.timing is None
    assert result.failures["memory"].kind == "out of memory"
    assert any("out of memory" in line for line in result.findings)


def test_a_better_baseline_is_said_to_be_better():
    torch.manual_seed(2)
    narrow = nn.Sequential(nn.Linear(WIDTH, 1, bias=False))
    narrow[0].weight.data.zero_()
    for parameter in narrow.parameters():
        parameter.requires_grad_()
    exact = nn.Sequential(nn.Linear(WIDTH, 1, bias=False))
    exact[0].weight.data.fill_(1)
    result = ComprehensiveBenchmark(narrow, exact, config(learning_rate=1e-4)).benchmark_convergence(*loaders())
    assert result.difference.claimed
    assert result.difference.high < 0


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_runs_that_are_all_the_same_carry_no_claim(seeds):
    fixed = [data(ROWS)]
    other = nn.Sequential(nn.Linear(WIDTH, 1))
    bench = ComprehensiveBenchmark(regression(), other, config(seeds=seeds))
    assert bench.benchmark_convergence(fixed, fixed).difference is None


def test_classes_of_every_row_of_logits_and_of_pictures():
    x, y = torch.randn(ROWS, WIDTH), torch.randint(3, (ROWS,))
    model = nn.Linear(WIDTH, 3)
    assert FLOPsCounter(model).count(x, y, nn.CrossEntropyLoss()).forward == 2 * ROWS * WIDTH * 3
    tokens = torch.randn(2, 5, WIDTH), torch.randint(3, (2, 5))
    assert FLOPsCounter(model).count(*tokens, nn.CrossEntropyLoss()).forward == 2 * 10 * WIDTH * 3
    picture, classes = torch.randn(2, 1, 6, 7), torch.randint(3, (2, 6, 7))
    model, criterion = nn.Conv2d(1, 3, 1), nn.CrossEntropyLoss()
    assert torch.equal(loss_of(criterion)(model, picture, classes), criterion(model(picture), classes))


def test_our_own_models_are_compared_with_and_without_a_criterion():
    configs = contestant_configs("tiny", {"vocab_size": 40})
    models = [build_model(configs[key], 0) for key in ("resnet-bk", "transformer")]
    loader = [random_tokens(40, 2, 16, CPU)]
    settings = config(criterion=None, rounds=2, steps=2, seeds=(0,))
    result = ComprehensiveBenchmark(*models, settings).run_all_benchmarks(loader, loader)
    assert result.failures == {}
    assert {row.phase for row in result.timing.ratios} >= {"forward", "backward", "step", "decode"}
    assert result.ratios.flops != 1
    assert result.convergence.difference is None
    by_logits = ComprehensiveBenchmark(*models, config(criterion=nn.CrossEntropyLoss(), steps=2, seeds=(0,)))
    losses = [curve.validation[0].loss for curve in by_logits.benchmark_convergence(loader, loader).curves]
    assert losses == pytest.approx([curve.validation[0].loss for curve in result.convergence.curves])


@pytest.mark.parametrize(
    ("loader", "complaint"), [([], "has no batch"), ([torch.zeros(2)], "pairs of tensors"), ([(1, 2)], "pairs")]
)
def test_a_loader_without_batches_is_refused(loader, complaint):
    bench = ComprehensiveBenchmark(regression(), regression(), config())
    with pytest.raises(ValueError, match=complaint):
        bench.run_all_benchmarks(loader, [data()])
    with pytest.raises(ValueError, match=complaint):
        bench.run_all_benchmarks([data()], loader)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"builds": 20}, {"seeds": ()}, {"seeds": (1, 1)}], ids=str)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="give"):
        config(**wrong)


def test_the_package_has_these_names_and_no_others():
    assert all(hasattr(resnet_bk.bench, name) for name in resnet_bk.bench.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = resnet_bk.bench.Nothing
