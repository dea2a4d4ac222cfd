"""A budget chooses the fastest way to train that fits it, and what is chosen stays below it."""

import functools
import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_training import refused

from resnet_bk.cli.main import main
from resnet_bk.errors import UserError
from resnet_bk.frugal.gradients import HostGradient
from resnet_bk.memory.activations import TrainingShape
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.memory.plan import PROCESS_BYTES, Budget, plan_strategy
from resnet_bk.memory.strategy import STRATEGIES
from resnet_bk.memory.tracking import TensorTracker, training_tensors
from resnet_bk.memory.units import format_bytes
from resnet_bk.models import ResNetBKConfig
from resnet_bk.training import budget as budget_module
from resnet_bk.training.budget import (
    BUSY_TOKENS,
    FRAGMENTATION,
    KERNELS_BYTES,
    choose_strategy,
    context_bytes,
    half_type_of,
    hold_to_budget,
    usable_budget,
)
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.data import prepare_dataset, training_batch
from resnet_bk.training.run import open_run
from resnet_bk.training.start import resume_run
from resnet_bk.training.step import train_step
from resnet_bk.training.strategy import describe_strategy, strategy_of, training_fields, training_shape

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
STRATEGY_FIELDS = tuple(training_fields(STRATEGIES[0], "bf16"))
MODEL = ResNetBKConfig.from_preset("tiny", num_layers=16, hidden_size=64, intermediate_size=128, vocab_size=256)
TRAINING = TrainingConfig(batch_size=8, sequence_length=512, device="cpu")
MANY = 10**15
# The order that choose_strategy has: each strategy, and behind those with moments on the host the same in bfloat16.
ORDER = [
    replace(strategy, name="", half_moments=half_moments)
    for strategy in STRATEGIES
    for half_moments in ((False, True) if strategy.offload_optimizer else (False,))
]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if there were one that computes in bfloat16, and held nothing yet."""
    monkeypatch.setattr(budget_module, "half_type_of", lambda _: "bf16")
    monkeypatch.setattr(budget_module, "context_bytes", lambda _: 0)


@functools.cache
def counts_of(model_key):
    return count_parameters(ResNetBKConfig(**dict(model_key)))


def rows_of(training):
    return training.micro_batch_size or training.batch_size


def planned(training, model=MODEL):
    counts = counts_of(tuple(model.own_fields().items()))
    return plan_strategy(strategy_of(training), model, training_shape(training), counts, Budget())


def needs_on_device(training, device=CPU, model=MODEL):
    plan = planned(training, model)
    return plan.gpu_bytes if device.type == "cuda" else plan.tensor_bytes


def place(training):
    """Where in the order the chosen strategy is: last where gradients cross with each of several micro-batches."""
    strategy = strategy_of(training)
    crosses = strategy.offload_optimizer and not strategy.goes_by_block and rows_of(training) < training.batch_size
    return ORDER.index(replace(strategy, name="")) + (len(ORDER) if crosses else 0)


def choose(gpu_bytes=None, host_bytes=None, *, training=TRAINING, device=CPU, **options):
    return choose_strategy(MODEL, training, Budget(gpu_bytes=gpu_bytes, host_bytes=host_bytes), device, **options)


def all_candidates(*, in_half=True):
    """Every strategy with every number of rows, and what it needs."""
    for strategy in ORDER:
        if strategy.half or not in_half:
            for rows in (8, 4, 3, 2, 1):
                training = replace(TRAINING, **training_fields(strategy, "bf16"), micro_batch_size=rows)
                yield training, planned(training)


def least_budget():
    return min(int((1 + FRAGMENTATION) * plan.tensor_bytes) + 2 for _, plan in all_candidates(in_half=False))


def interesting_budgets():
    """Just below, at and just above what each strategy needs with each number of rows."""
    needs = {plan.tensor_bytes for _, plan in all_candidates(in_half=False)}
    budgets = {int(need * (1 + FRAGMENTATION)) + shift for need in needs for shift in (-1, 0, 1, 2)}
    return sorted(budget for budget in budgets if budget >= least_budget())


# What is chosen.


def test_with_room_for_everything_nothing_is_saved():
    chosen = choose(MANY, MANY)
    assert chosen == replace(TRAINING, precision="fp32")
    assert chosen.micro_batch_size is None


def test_on_a_gpu_it_is_mixed_precision_then(on_a_gpu):
    assert choose(MANY, MANY, device=GPU) == replace(TRAINING, precision="bf16")


def test_without_a_budget_everything_fits():
    assert choose() == TRAINING


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.0, 1.2))
def test_what_is_chosen_fits_with_what_segments_waste(share):
    largest = needs_on_device(TRAINING)
    gpu_bytes = int(least_budget() + share * (largest * (1 + FRAGMENTATION) - least_budget()))
    chosen = choose(gpu_bytes)
    assert needs_on_device(chosen) * (1 + FRAGMENTATION) <= gpu_bytes


def test_what_is_chosen_is_the_first_in_order_that_fits():
    """All rows that keep a GPU busy are tried for a strategy before the next one; fewer rows after all of them."""
    assert 4 * TRAINING.sequence_length == BUSY_TOKENS
    for gpu_bytes in interesting_budgets():
        usable = usable_budget(Budget(gpu_bytes=gpu_bytes), CPU).gpu_bytes
        fitting = [training for training, plan in all_candidates(in_half=False) if plan.tensor_bytes <= usable]
        first = min(fitting, key=lambda training: (rows_of(training) < 4, place(training), -rows_of(training)))
        chosen = choose(gpu_bytes)
        assert (place(chosen), rows_of(chosen)) == (place(first), rows_of(first)), gpu_bytes


def test_a_larger_budget_never_chooses_a_slower_strategy():
    chosen = [choose(gpu_bytes) for gpu_bytes in interesting_budgets()]
    ranks = [(rows_of(training) < 4, place(training), -rows_of(training)) for training in chosen]
    assert ranks == sorted(ranks, reverse=True)
    assert len({place(training) for training in chosen}) >= 5, "there was something to choose"
    assert {1, 4, 8} <= {rows_of(training) for training in chosen}


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_nor_with_a_fixed_number_of_rows(rows):
    training = replace(TRAINING, micro_batch_size=rows)
    places = []
    for gpu_bytes in interesting_budgets():
        try:
            chosen = choose(gpu_bytes, training=training, fixed={"micro_batch_size"})
        except UserError:
            assert not places, "a larger budget is refused where a smaller one was not"
            continue
        assert rows_of(chosen) == rows
        places.append(place(chosen))
    assert places == sorted(places, reverse=True)
    assert len(set(places)) >= 4


def test_on_a_gpu_nothing_is_chosen_that_is_slower_and_larger(on_a_gpu):
    for gpu_bytes in (MANY, *interesting_budgets()):
        try:
            chosen = choose(gpu_bytes, device=GPU)
        except UserError:
            continue
        assert chosen.precision == "bf16"
        assert needs_on_device(chosen, GPU) * (1 + FRAGMENTATION) <= gpu_bytes


def test_what_the_driver_has_taken_is_not_there_to_be_used(on_a_gpu, monkeypatch):
    whole = choose(MANY, device=GPU)
    need = int(needs_on_device(whole, GPU) * (1 + FRAGMENTATION)) + 2
    assert choose(need, device=GPU) == whole
    monkeypatch.setattr(budget_module, "context_bytes", lambda _: 500_000_000)
    taken = 500_000_000 + KERNELS_BYTES
    assert choose(need + taken, device=GPU) == whole
    assert choose(need + taken - 100_000, device=GPU) != whole


def test_the_host_is_a_budget_too():
    tight = choose(least_budget() + 100_000, MANY)
    assert tight.offload_optimizer
    host = planned(tight).host_bytes
    assert choose(least_budget() + 100_000, host) == tight
    with refused("nothing fits"):
        choose(least_budget() + 100_000, PROCESS_BYTES)
    # A tight host alone asks for nothing, as plain training keeps nothing there.
    assert choose(MANY, PROCESS_BYTES) == TRAINING


def test_bfloat16_moments_are_for_a_tight_host():
    strategy = {"checkpointing": "full", "offload_optimizer": True, "half_weights": True, "precision": "bf16"}
    training = replace(TRAINING, **strategy)
    fixed = set(strategy)
    wide = choose(MANY, MANY, training=training, fixed=fixed)
    assert wide.moments == "fp32"
    narrow = choose(MANY, planned(wide).host_bytes - 1, training=training, fixed=fixed)
    assert narrow == replace(wide, moments="bf16")


# What was asked for stays.

FIXED = {
    "precision": "fp32",
    "checkpointing": "selective",
    "offload_optimizer": True,
    "half_weights": False,
    "stream_weights": False,
    "micro_batch_size": 2,
}


@pytest.mark.parametrize("name", FIXED)
def test_a_field_that_was_given_stays(name):
    with_it = {"offload_optimizer": True} if name == "half_weights" and FIXED[name] else {}
    training = replace(TRAINING, **{name: FIXED[name]}, **with_it)
    tried = 0
    for gpu_bytes in interesting_budgets()[::7]:
        try:
            chosen = choose(gpu_bytes, training=training, fixed={name})
        except UserError:
            continue
        assert getattr(chosen, name) == FIXED[name]
        assert needs_on_device(chosen) * (1 + FRAGMENTATION) <= gpu_bytes
        tried += 1
    assert tried > 1


def test_all_that_is_no_strategy_stays():
    ours = replace(TRAINING, learning_rate=0.123, steps=7, seed=5, max_grad_norm=None, save_every=3)
    for gpu_bytes in (MANY, least_budget() + 1000):
        chosen, expected = asdict(choose(gpu_bytes, training=ours)), asdict(ours)
        changed = {name for name, value in chosen.items() if value != expected[name]}
        assert changed <= {*STRATEGY_FIELDS, "micro_batch_size"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("checkpointing", "offload"), ("stream_weights", True), ("moments", "bf16"), ("offload_optimizer", True)],
)
def test_without_being_fixed_it_gives_way_to_what_is_faster(name, value):
    needed = {"offload_optimizer": True, "checkpointing": "full"} if name in ("stream_weights", "moments") else {}
    given_up = choose(MANY, training=replace(TRAINING, **{**needed, name: value}))
    assert given_up == TRAINING


def test_more_rows_than_the_batch_has_are_the_batch():
    training = replace(TRAINING, micro_batch_size=100)
    assert rows_of(choose(MANY, training=training, fixed={"micro_batch_size"})) == 8


def test_fp32_that_was_asked_for_excludes_half_weights_even_where_little_fits():
    in_fp32 = {"precision": "fp32", "half_weights": False}
    needs = [
        needs_on_device(replace(TRAINING, micro_batch_size=1, **{**training_fields(strategy, "bf16"), **in_fp32}))
        for strategy in STRATEGIES
    ]
    chosen = choose(int(min(needs) * (1 + FRAGMENTATION)) + 2, fixed={"precision"})
    assert (chosen.precision, chosen.half_weights, chosen.stream_weights) == ("fp32", False, True)


# Refusals.


def test_where_nothing_fits_the_refusal_says_by_how_much():
    missing = (
        min(plan.tensor_bytes for _, plan in all_candidates(in_half=False))
        - usable_budget(Budget(gpu_bytes=100_000), CPU).gpu_bytes
    )
    with refused(
        rf"^nothing fits: streamed weights.* with one sequence at a time comes closest and misses by "
        rf"{re.escape(format_bytes(missing))}; take a larger budget, a shorter --sequence-length or a smaller model$"
    ):
        choose(100_000)


def test_what_is_missing_is_enough_to_add():
    usable = usable_budget(Budget(gpu_bytes=100_000), CPU).gpu_bytes
    missing = min(plan.tensor_bytes for _, plan in all_candidates(in_half=False)) - usable
    with refused("nothing fits"):
        choose(int((usable + missing - 1) * (1 + FRAGMENTATION)))
    choose(int((usable + missing) * (1 + FRAGMENTATION)) + 2)


@pytest.mark.parametrize(
    "fixed", [{"checkpointing": "selective", "stream_weights": True, "offload_optimizer": True}], ids=str
)
def test_flags_that_no_strategy_has_are_refused(fixed):
    with refused(r"^no strategy has the flags that were given; leave some of them out$"):
        choose(MANY, training=replace(TRAINING, **fixed), fixed=set(fixed))


def test_a_refusal_names_the_number_of_sequences_that_was_fixed():
    with refused("^nothing fits: .* with (4 sequences|one sequence|.*4.*) at a time"):
        choose(100_000, training=replace(TRAINING, micro_batch_size=1), fixed={"micro_batch_size"})
    with pytest.raises(UserError) as caught:
        choose(100_000, training=replace(TRAINING, micro_batch_size=4), fixed={"micro_batch_size"})
    assert "one sequence" not in str(caught.value)


# The device.


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


@pytest.mark.parametrize(("supported", "half"), [(True, "bf16"), (False, "fp16")])
def test_what_is_chosen_computes_in_it(monkeypatch, supported, half):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    monkeypatch.setattr(budget_module, "context_bytes", lambda _: 0)
    assert choose(MANY, device=GPU).precision == half


@pytest.mark.parametrize("budget", [0.5, 1, 3], ids=["half of it", "all of it", "more than there is"])
def test_the_allocator_is_held_to_the_budget_less_the_context(monkeypatch, budget):
    total, context, shares = 10_000_000_000, 1_000_000_000 - KERNELS_BYTES, []

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_allocator_refuses_what_exceeds_the_budget():
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


@pytest.mark.parametrize("strategy", ORDER, ids=in_words)
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


@functools.cache
def budgets_of_the_command():
    """From the largest to the smallest that fits, by the planner."""
    sizes = {"num_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 33}
    model = ResNetBKConfig.from_preset("tiny", mixer="attention", **sizes)
    plans = []
    for strategy in STRATEGIES:
        for rows in (8, 1):
            shape = TrainingShape(batch_size=rows, sequence_length=64, micro_batches=8 // rows)
            plans.append(plan_strategy(strategy, model, shape, count_parameters(model), Budget()).tensor_bytes)
    low, high = int(1.08 * min(plans)), int(1.1 * max(plans))
    return [high, (high + low) // 2, (high + 3 * low) // 4, low]


@pytest.mark.parametrize("size", [0, 1, 2, 3], ids=["roomy", "half", "quarter", "least"])
def test_a_run_in_a_budget_records_says_and_keeps_to_it(tmp_path, text_file, capfd, size):
    gpu_bytes = budgets_of_the_command()[size]
    assert main(command(text_file, tmp_path / "run", "--gpu-memory", gpu_bytes, "--host-memory", "8GB")) == 0
    said = capfd.readouterr().err
    training, model = recorded(tmp_path / "run"), recorded_model(tmp_path / "run")
    chosen = choose_strategy(
        model,
        replace(training, micro_batch_size=None, **training_fields(STRATEGIES[0], "bf16")),
        Budget(gpu_bytes=gpu_bytes, host_bytes=8 * 10**9),
        CPU,
    )
    assert training == replace(chosen, num_threads=1)
    words = describe_strategy(training)
    assert [line for line in said.splitlines() if line.startswith("memory: ")] == (
        [f"memory: {words}"] if words else []
    )
    assert re.search(rf"^on cpu, {training.precision}, 1 threads", said, re.MULTILINE)
    assert bool(words) == (size > 0), "a roomy budget asks for nothing"
    assert peak_of_a_step(tmp_path / "run") < gpu_bytes


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


def test_a_tighter_budget_is_a_lower_peak(tmp_path, text_file):
    """That the comparison above could fail: what the roomy budget chooses exceeds the others."""
    roomy, *_, least = budgets_of_the_command()
    for name, budget in (("roomy", roomy), ("least", least)):
        assert main(command(text_file, tmp_path / name, "--gpu-memory", budget)) == 0
    assert peak_of_a_step(tmp_path / "roomy") > 2 * least > 2 * peak_of_a_step(tmp_path / "least")


def test_flags_beside_a_budget_stay_as_they_are(tmp_path, text_file):
    roomy = budgets_of_the_command()[0]
    flags = ["--gpu-memory", roomy, "--checkpointing", "selective", "--micro-batch-size", "2", "--precision", "fp32"]
    assert main(command(text_file, tmp_path / "run", *flags)) == 0
    training = recorded(tmp_path / "run")
    assert (training.checkpointing, training.micro_batch_size, training.precision) == ("selective", 2, "fp32")


def test_a_run_in_a_budget_goes_on_as_what_it_is(tmp_path, text_file):
    least = budgets_of_the_command()[-1]
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
