"""Holding a process to a budget, and runs that were told one: what they record, say, and keep to."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from resnet_bk.cli.main import main
from resnet_bk.frugal.gradients import HostGradient
from resnet_bk.memory.strategy import STRATEGIES
from resnet_bk.memory.tracking import TensorTracker, training_tensors
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.devices import this_cpu
from resnet_bk.planner.predict import predict
from resnet_bk.training import budget as budget_module
from resnet_bk.training.budget import (
    KERNELS_BYTES,
    SMALL_CUBLAS_BYTES,
    STACK_LIMIT,
    WORKSPACES,
    context_bytes,
    given_back_bytes,
    half_type_of,
    has_small_workspaces,
    hold_to_budget,
)
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.data import prepare_dataset, training_batch
from resnet_bk.training.run import open_run
from resnet_bk.training.start import resume_run
from resnet_bk.training.step import train_step
from resnet_bk.training.strategy import describe_strategy, strategy_of, training_fields

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# Each strategy, and behind those with moments on the host the same in bfloat16.
ALL = [
    replace(strategy, name="", half_moments=half_moments)
    for strategy in STRATEGIES
    for half_moments in ((False, True) if strategy.offload_optimizer else (False,))
]


# The device.


@pytest.fixture
def no_choice(monkeypatch):
    """Of cuBLAS's workspaces in the environment, nor is one left behind."""
    monkeypatch.setenv(WORKSPACES, "")
    monkeypatch.delenv(WORKSPACES)


def test_a_cpu_computes_in_bfloat16_and_has_no_context():
    assert half_type_of(CPU) == "bf16"
    assert context_bytes(CPU) == 0
    hold_to_budget(1, CPU)


@pytest.mark.parametrize(("supported", "half"), [(True, "bf16"), (False, "fp16")])
def test_a_gpus_half_type_is_what_it_computes_in_itself(monkeypatch, supported, half):
    asked = []

    def is_bf16_supported(including_emulation=True):
        asked.append(including_emulation)
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert half_type_of(GPU) == half
    assert asked == [False]


@pytest.mark.parametrize("budget", [0.5, 1, 3], ids=["half of it", "all of it", "more than there is"])
def test_the_allocator_is_held_to_the_budget_less_the_context(monkeypatch, no_choice, budget):
    beside = KERNELS_BYTES + SMALL_CUBLAS_BYTES
    total, context, shares = 10_000_000_000, 1_000_000_000 - beside, []
    monkeypatch.setattr(budget_module, "nvidia_driver", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    class Properties:
        total_memory = total

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(budget_module, "context_bytes", lambda _: context)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append((share, device))
    )
    for device in (torch.device("cuda", 1), torch.device("cuda")):
        hold_to_budget(int(budget * total), device)
    share = pytest.approx(min(1.0, budget - 0.1))
    assert shares == [(share, 1), (share, 3)]


class Driver:
    """One that keeps a stack's size."""

    def __init__(self, stack):
        self.stack = stack

    def cuCtxGetLimit(self, size, limit):
        assert limit == STACK_LIMIT
        size._obj.value = self.stack
        return 0

    def cuCtxSetLimit(self, limit, size):
        assert limit == STACK_LIMIT
        self.stack = size.value
        return 0


@pytest.mark.parametrize(
    ("alone", "stack", "then"), [(True, 1024, 320), (False, 1024, 1024), (True, 4096, 4096), (True, 128, 128)]
)
def test_one_that_is_alone_does_with_small_stacks_and_workspaces(monkeypatch, no_choice, alone, stack, then):
    """Unless somebody chose them; of several, all stays as it is."""
    driver = Driver(stack)
    monkeypatch.setattr(budget_module, "nvidia_driver", lambda: driver)
    monkeypatch.setattr(budget_module, "drivers_bytes", lambda _: 0)
    monkeypatch.setattr(budget_module, "hold_allocator_to", lambda *_: None)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    hold_to_budget(10**9, GPU, alone=alone)
    assert driver.stack == then
    assert has_small_workspaces() is alone
    monkeypatch.setenv(WORKSPACES, ":16:8")
    hold_to_budget(10**9, GPU, alone=alone)
    assert os.environ[WORKSPACES] == ":16:8"


def test_what_is_given_back_is_of_stacks_and_of_large_workspaces():
    hopper, ampere = given_back_bytes((9, 0), 132, 2048), given_back_bytes((8, 6), 68, 1536)
    assert hopper == 132 * 2048 * 704 + 2 * (64 * 2**20 - SMALL_CUBLAS_BYTES)
    assert ampere == 68 * 1536 * 704


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_card_has_more_for_others_once_a_process_is_held(no_choice):
    """Both in processes of their own, of which cuBLAS has not been used."""
    words = "import torch; from resnet_bk.training import budget; d = torch.device('cuda'); {}; "
    words += "print(budget.context_bytes(d))"
    usual, held = (
        int(subprocess.run([sys.executable, "-c", words.format(first)], capture_output=True, check=True).stdout)
        for first in ("pass", "budget.hold_to_budget(4 * 10**9, d)")
    )
    card = torch.cuda.get_device_properties(0)
    capability = (card.major, card.minor)
    saved = given_back_bytes(capability, card.multi_processor_count, card.max_threads_per_multi_processor)
    # The second of the threads that multiply has not begun.
    assert usual - held > 0.75 * saved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_allocator_refuses_what_exceeds_the_budget(no_choice):
    device = torch.device("cuda")
    try:
        # Far apart: what other processes take meanwhile counts as this one's context.
        room = context_bytes(device) + torch.cuda.memory_reserved(device) + 2_000_000_000
        hold_to_budget(room, device)
        torch.empty(500_000_000, dtype=torch.uint8, device=device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(4_000_000_000, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# A strategy and a configuration say the same.


def in_words(strategy):
    return describe_strategy(TrainingConfig(**training_fields(strategy, "bf16"))) or f"half {strategy.half}"


@pytest.mark.parametrize("strategy", ALL, ids=in_words)
@pytest.mark.parametrize("half_type", ["bf16", "fp16"])
def test_a_strategys_fields_are_that_strategy(strategy, half_type):
    training = TrainingConfig(**training_fields(strategy, half_type))
    assert replace(strategy_of(training), name="") == strategy
    assert training.precision == (half_type if strategy.half else "fp32")


# The command line.

WORDS = ["train", "--preset", "tiny", "--tokenizer", "char", "--num-layers", "4", "--hidden-size", "64"]
WORDS += ["--mixer", "attention"]
WORDS += ["--intermediate-size", "128", "--batch-size", "8", "--sequence-length", "64", "--steps", "2"]
WORDS += ["--num-threads", "1", "--device", "cpu", "--warmup-steps", "1", "--eval-tokens", "64"]


def command(text_file, out, *more):
    return [*WORDS, "--data", str(text_file), "--out", str(out), *map(str, more)]


def recorded(out):
    return TrainingConfig(**json.loads((out / "run.json").read_text())["training"])


def recorded_model(out):
    document = json.loads((out / "run.json").read_text())["model"]
    return ResNetBKConfig(**document)


SIZES = {"num_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 33}
MODEL = ResNetBKConfig.from_preset("tiny", mixer="attention", **SIZES)
FRUGAL = next(strategy for strategy in STRATEGIES if strategy.stream_weights)


@pytest.fixture(scope="module")
def budgets():
    """From more than plain training takes to little more than the most frugal one does, by the planner."""
    training = TrainingConfig(batch_size=8, sequence_length=64)
    least = replace(training, micro_batch_size=1, **training_fields(FRUGAL, "bf16"), max_grad_norm=1.0)
    low, high = (predict(MODEL, way, this_cpu()).footprint.tensor_bytes for way in (least, training))
    low, high = int(1.1 * low), int(1.1 * high)
    return {"roomy": high, "half": (high + low) // 2, "quarter": (high + 3 * low) // 4, "least": low}


@pytest.mark.parametrize("size", ["roomy", "half", "quarter", "least"])
def test_a_run_in_a_budget_records_says_and_keeps_to_it(tmp_path, text_file, capfd, budgets, size):
    gpu_bytes = budgets[size]
    assert main(command(text_file, tmp_path / "run", "--gpu-memory", gpu_bytes, "--host-memory", "8GB")) == 0
    said = capfd.readouterr().err
    training, model = recorded(tmp_path / "run"), recorded_model(tmp_path / "run")
    predicted = predict(model, training, this_cpu()).footprint.tensor_bytes
    assert predicted <= gpu_bytes
    words = describe_strategy(training)
    assert [line for line in said.splitlines() if line.startswith("memory: ")] == (
        [f"memory: {words}"] if words else []
    )
    assert re.search(rf"^on cpu, {training.precision}, 1 threads", said, re.MULTILINE)
    assert re.search(r"^planned: host .* GB|MB, tensors .* on the device$", said, re.MULTILINE)
    assert bool(words) == (size != "roomy"), "a roomy budget asks for nothing"
    assert peak_of_a_step(tmp_path / "run") <= predicted


def peak_of_a_step(out):
    """Most bytes of tensors on the device in a step of the run, gone on with from its last checkpoint."""
    run = open_run(out)
    trainer = resume_run(run, prepare_dataset(run.config.data), observer=lambda _: None).trainer
    trainer.model.train()
    config = trainer.config
    arguments = (trainer.model, trainer.optimizer, trainer.scaler)
    batches = [
        training_batch(
            trainer.dataset.train.tokens,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            seed=config.seed,
            step=step,
        )
        for step in (2, 3)
    ]

    def step(number):
        more = {"device": CPU, "micro_batches": trainer.micro_batches, "by_block": trainer.by_block}
        train_step(*arguments, [batches[number]], config, 2 + number, **more)

    step(0)
    with TensorTracker() as tracker:
        on_device = (x for x in training_tensors(*arguments[:2]) if not isinstance(x, HostGradient))
        tracker.include(on_device)
        step(1)
    return tracker.peak_bytes


def test_a_tighter_budget_is_a_lower_peak(tmp_path, text_file, budgets):
    """That the comparison above could fail: what the roomy budget chooses exceeds the others."""
    for name in ("roomy", "least"):
        assert main(command(text_file, tmp_path / name, "--gpu-memory", budgets[name])) == 0
    assert peak_of_a_step(tmp_path / "roomy") > 1.5 * budgets["least"] > 1.5 * peak_of_a_step(tmp_path / "least")


def test_given_flags_are_kept_under_a_budget_that_does_not_choose(tmp_path, text_file, budgets):
    flags = ["--gpu-memory", budgets["least"], "--strategy", "given"]
    assert main(command(text_file, tmp_path / "run", *flags)) == 0
    training = recorded(tmp_path / "run")
    assert describe_strategy(training) == "" and training.precision == "fp32"


def test_without_a_budget_the_machine_is_it(tmp_path, text_file, capfd):
    assert main(command(text_file, tmp_path / "run", "--strategy", "auto")) == 0
    assert "planned: host" in capfd.readouterr().err
    assert recorded(tmp_path / "run").precision == "fp32"


def test_flags_beside_a_budget_stay_as_they_are(tmp_path, text_file, budgets):
    roomy = budgets["roomy"]
    flags = ["--gpu-memory", roomy, "--checkpointing", "selective", "--micro-batch-size", "2", "--precision", "fp32"]
    assert main(command(text_file, tmp_path / "run", *flags)) == 0
    training = recorded(tmp_path / "run")
    assert (training.checkpointing, training.micro_batch_size, training.precision) == ("selective", 2, "fp32")


def test_a_run_in_a_budget_goes_on_as_what_it_is(tmp_path, text_file, budgets):
    least = budgets["least"]
    assert main(command(text_file, tmp_path / "run", "--gpu-memory", least)) == 0
    before = recorded(tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "3", "--gpu-memory", str(least)]) == 0
    assert recorded(tmp_path / "run") == replace(before, steps=3)


@pytest.mark.parametrize("flag", ["--gpu-memory", "--host-memory"])
@pytest.mark.parametrize(
    ("words", "mend"),
    [
        ("lots", "'lots' is no amount of memory; write it like 12GB"),
        ("0GB", "give an amount above 0, like 12GB"),
        ("-4GB", "give an amount above 0, like 12GB"),
        ("nan", "write it like 12GB"),
        ("1e30GB", "more than an exabyte"),
        ("", "write it like 12GB"),
        ("1kB", "nothing fits: .*take a larger budget"),
    ],
)
def test_bad_amounts_are_refused_and_nothing_is_written(tmp_path, text_file, capfd, flag, words, mend):
    fixed = ["--stream-weights=True", "--offload-optimizer=True", "--checkpointing=offload"]
    assert main(command(text_file, tmp_path / "run", f"{flag}={words}", *fixed)) == 2
    captured = capfd.readouterr()
    *_, last = captured.err.splitlines()
    assert captured.out == ""
    assert last.startswith("error: ") and re.search(mend, last), captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--gpu-memory", "--host-memory"])
def test_a_bad_amount_is_refused_on_resume_too(tmp_path, text_file, capfd, flag):
    assert main(command(text_file, tmp_path / "run")) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "3", flag, "lots"]) == 2
    assert "'lots' is no amount of memory" in capfd.readouterr().err.splitlines()[-1]
    assert recorded(tmp_path / "run").steps == 2
