"""Training in little memory is the same training: bit for bit where nothing is rounded, and resumed as such."""

import json
import math
import os
import random
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from small_training import (
    finish,
    metrics_without_times,
    refused,
    resume,
    start,
    state_without_times,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from resnet_bk.cli.main import main
from resnet_bk.frugal.activations import HostActivations
from resnet_bk.frugal.micro_batches import MicroBatches
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.checkpoint import MOMENTS, WEIGHTS, checkpoints, load_model_checkpoint, step_of
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.loop import TrainingInterruptedError
from resnet_bk.training.micro_step import seed_micro_step
from resnet_bk.training.step import train_step, updates_in_backward
from resnet_bk.training.strategy import prepare_training

CPU = torch.device("cpu")
MIXERS = ["resolvent", "bk", "attention"]
ALL_TOGETHER = {"checkpointing": "offload", "offload_optimizer": True, "stream_weights": True}
# What changes nothing but where things are, and when they are computed.
EXACT = {
    "selective checkpointing": {"checkpointing": "selective"},
    "full checkpointing": {"checkpointing": "full"},
    "offloaded inputs": {"checkpointing": "offload"},
    "offloaded optimizer": {"offload_optimizer": True},
    "streamed weights": {"checkpointing": "full", "offload_optimizer": True, "stream_weights": True},
    "all together": ALL_TOGETHER,
    "replayed": {**ALL_TOGETHER, "cuda_graphs": True},
}
ROUNDED = {
    "half weights": {"precision": "bf16", "offload_optimizer": True, "half_weights": True},
    "half moments": {"offload_optimizer": True, "moments": "bf16"},
    "all, halved": {**ALL_TOGETHER, "precision": "bf16", "half_weights": True, "moments": "bf16"},
    "all, halved, fp16": {**ALL_TOGETHER, "precision": "fp16", "half_weights": True, "moments": "bf16"},
    "updated in backward": {"offload_optimizer": True, "max_grad_norm": None},
    "replayed, halved": {**ALL_TOGETHER, "precision": "bf16", "half_weights": True, "cuda_graphs": True},
}


@pytest.fixture(autouse=True)
def small_tensors_move_too(monkeypatch):
    """Those of preset tiny are smaller than what is worth moving."""
    monkeypatch.setitem(HostActivations.__init__.__kwdefaults__, "min_bytes", 1)


def tiny(**overrides):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", vocab_size=64, **overrides)).train()


def tensors(checkpoint):
    """Weights and moments of any type, byte for byte."""
    return {
        (file, name): (value.dtype, value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for file in (WEIGHTS, MOMENTS)
        for name, value in load_file(checkpoint / file).items()
    }


def assert_same_state(checkpoint, expected):
    """Weights, moments, configuration, step and loss scale are equal bit for bit."""
    assert checkpoint.name == expected.name
    ours, theirs = tensors(checkpoint), tensors(expected)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if ours[key] != theirs[key]] == []
    assert state_without_times(checkpoint) == state_without_times(expected)
    assert (checkpoint / "config.json").read_text() == (expected / "config.json").read_text()


def random_batch(number, rows=2, length=8):
    ids = torch.randint(64, (rows, length + 1), generator=torch.Generator().manual_seed(number))
    return ids[:, :-1], ids[:, 1:]


class Session:
    """A model in training, a step at a time, on batches that depend on the step alone."""

    def __init__(self, *, model=None, overrides=(), rows=2, scaler=None, **training):
        defaults = {"warmup_steps": 10, "learning_rate": 3e-3, "gradient_accumulation_steps": 2, "device": "cpu"}
        self.config = TrainingConfig(**{**defaults, **training})
        prepared = prepare_training(model or tiny(**dict(overrides)), self.config, CPU)
        self.model, self.optimizer, self.scaler = prepared.model, prepared.optimizer, scaler or prepared.scaler
        self.by_block = prepared.by_block
        self.micro_batches = MicroBatches(min(rows, self.config.micro_batch_size or rows))
        self.rows, self.number = rows, 0

    def batches(self):
        count = self.config.gradient_accumulation_steps
        return [random_batch(count * self.number + micro_step, self.rows) for micro_step in range(count)]

    def step(self):
        arguments = (self.model, self.optimizer, self.scaler, self.batches(), self.config, self.number)
        result = train_step(*arguments, device=CPU, micro_batches=self.micro_batches, by_block=self.by_block)
        self.number += 1
        return result

    def curve(self, steps):
        results = [self.step() for _ in range(steps)]
        return [
            (float(result.cross_entropy), None if result.grad_norm is None else float(result.grad_norm))
            for result in results
        ]

    def weights(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def assert_same_weights(one, other):
    ours, theirs = one.weights(), other.weights()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def plain():
    """Plain training, once for each mixer and number of steps."""
    done = {}

    def train(mixer, steps, **training):
        key = (mixer, steps, *sorted(training.items()))
        if key not in done:
            session = Session(overrides={"mixer": mixer}, **training)
            done[key] = session.curve(steps), session
        return done[key]

    return train


# Losses and weights, bit for bit.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "steps"),
    [
        ("selective checkpointing", 50),
        ("full checkpointing", 50),
        ("offloaded inputs", 50),
        ("offloaded optimizer", 50),
        ("streamed weights", 50),
        ("all together", 200),
    ],
)
def test_many_steps_are_those_of_plain_training(plain, strategy, steps):
    expected, plainly = plain("attention", steps)
    session = Session(overrides={"mixer": "attention"}, **EXACT[strategy])
    assert session.curve(steps) == expected
    assert_same_weights(session, plainly)
    norms = [norm for _, norm in expected]
    assert min(norms) > 0 and max(norms) > session.config.max_grad_norm, "clipping had something to do"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("mixer", ["resolvent", "bk"])
def test_20_steps_are_those_of_plain_training(plain, mixer, strategy):
    expected, plainly = plain(mixer, 20)
    session = Session(overrides={"mixer": mixer}, **EXACT[strategy])
    assert session.curve(20) == expected
    assert_same_weights(session, plainly)


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("mixer", ["attention", "resolvent"])
def test_dropout_is_the_same_however_a_step_is_computed(strategy, mixer):
    overrides = {"mixer": mixer, "dropout": 0.2, "token_dropout": 0.2}
    plainly, session = (Session(overrides=overrides, **options) for options in ({}, EXACT[strategy]))
    assert session.curve(4) == plainly.curve(4)
    assert_same_weights(session, plainly)


@pytest.mark.parametrize("other", [{"seed": 1}, {"learning_rate": 3.001e-3}, {"max_grad_norm": 0.9}], ids=str)
def test_another_training_has_another_curve(plain, other):
    """That the comparisons above could fail."""
    assert Session(overrides={"mixer": "attention"}, **other).curve(8) != plain("attention", 8)[0]


@pytest.mark.parametrize("strategy", EXACT)
def test_so_it_is_under_autocast(plain, strategy):
    expected, plainly = plain("resolvent", 4, precision="bf16")
    session = Session(precision="bf16", **EXACT[strategy])
    assert session.curve(4) == expected
    assert_same_weights(session, plainly)


# Micro-batches.


@pytest.mark.parametrize("strategy", ["plain", "all together"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_micro_batches_are_the_batch(strategy, rows):
    """Without the balancing loss, which is of a micro-batch: but for rounding, and with the same noise exactly."""
    options = {"overrides": {"router_aux_loss_coef": 0.0}, "rows": 5, **EXACT.get(strategy, {})}
    whole, parts = Session(**options), Session(**options, micro_batch_size=rows)
    one, other = whole.step(), parts.step()
    assert torch.allclose(one.expert_load, other.expert_load, rtol=1e-6, atol=0)
    assert float(other.cross_entropy) == pytest.approx(float(one.cross_entropy), rel=1e-5)
    assert float(other.grad_norm) == pytest.approx(float(one.grad_norm), rel=1e-4)


def test_micro_batches_add_up_to_the_same_gradients():
    options = {"overrides": {"router_aux_loss_coef": 0.0}, "rows": 5, "max_grad_norm": None}
    whole, parts = Session(**options), Session(**options, micro_batch_size=2)
    whole.step(), parts.step()
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-7, msg=name)


# Weights in a half type.


def with_rounded(model, names=""):
    """The model with those of its parameters representable in bfloat16 that have ``names`` in their names."""
    for name, parameter in model.named_parameters():
        if names in name:
            parameter.data = parameter.data.bfloat16().float()
    return model


def host_numbers(gradient):
    """A gradient, wherever it is, as an ordinary tensor."""
    return (gradient + 0).float()


@pytest.mark.parametrize("mixer", MIXERS)
def test_half_weights_compute_what_float32_weights_do_under_autocast(mixer):
    """Autocast rounds the same weights at their use, all but the embedding: that one is rounded beforehand here."""
    half = Session(
        model=tiny(mixer=mixer),
        **ROUNDED["half weights"],
        gradient_accumulation_steps=1,
        max_grad_norm=1e9,
    )
    single = Session(
        model=with_rounded(tiny(mixer=mixer), "embed"),
        precision="bf16",
        gradient_accumulation_steps=1,
        max_grad_norm=1e9,
    )
    one, other = half.step(), single.step()
    assert torch.equal(one.cross_entropy, other.cross_entropy)
    assert torch.equal(one.expert_load, other.expert_load)
    assert float(one.grad_norm) == pytest.approx(float(other.grad_norm), rel=1e-3)
    for (name, ours), theirs in zip(half.model.named_parameters(), single.model.parameters(), strict=True):
        gradient, expected = host_numbers(ours.grad), theirs.grad
        if "embed" in name:  # added up in the half type
            assert float((gradient - expected).norm() / expected.norm()) < 2**-7, name
        elif name == "lm_head.weight":  # added up in float32, rounded once
            assert torch.equal(gradient, expected.bfloat16().float()), name
        else:
            assert torch.equal(gradient, expected), name


def test_where_the_embedding_is_not_rounded_the_loss_is_another():
    """That the comparison above could fail."""
    half = Session(**ROUNDED["half weights"])
    single = Session(precision="bf16")
    ours, theirs = float(half.step().cross_entropy), float(single.step().cross_entropy)
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=5e-3)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_embeddings_gradient_is_as_exact_as_its_type_where_a_token_is_frequent(tied):
    """Thousands of small numbers add up: in bfloat16 the sum would stand still once it is 256 times as large."""
    tokens = torch.zeros(8, 513, dtype=torch.int64)
    overrides = {"tie_word_embeddings": tied, "mixer": "attention"}
    gradients = []
    for options in (ROUNDED["half weights"], {"precision": "bf16"}):
        session = Session(
            model=with_rounded(tiny(**overrides), "embed"),
            **options,
            gradient_accumulation_steps=1,
            max_grad_norm=1e9,
        )
        session.batches = lambda: [(tokens[:, :-1], tokens[:, 1:])]
        session.step()
        gradients.append(host_numbers(session.model.model.embed_tokens.weight.grad)[0])
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 0.01


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("strategy", ["half weights", "all, halved"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_what_decides_recurs_or_scales_stays_float32(mixer, strategy, precision):
    session = Session(overrides={"mixer": mixer}, **{**ROUNDED[strategy], "precision": precision})
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    session.step()
    types = {name: parameter.dtype for name, parameter in session.model.named_parameters()}
    multiplied = r"embed_tokens|lm_head|\.qkv\.|\.gate\.|\.output\.|\.moe\.(up|down)$"
    for name, dtype in types.items():
        assert dtype == (half if re.search(multiplied, name) else torch.float32), name
    for part in ("router", "norm", "convolution"):
        assert any(part in name for name, dtype in types.items() if dtype == torch.float32)


class DtypesSeen(TorchDispatchMode):
    """Operators with the floating types that went in and came out."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.append((str(func), _floats((args, kwargs)), _floats(result)))
        return result

    def of(self, *parts):
        found = [(name, given, made) for name, given, made in self.seen if any(part in name for part in parts)]
        assert found, parts
        return found


def _floats(tree):
    return [leaf.dtype for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


@pytest.mark.parametrize("strategy", ["half weights", "all, halved", "all, halved, fp16"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_recurrences_router_norms_and_loss_compute_in_float32(mixer, strategy):
    session = Session(overrides={"mixer": mixer}, gradient_accumulation_steps=1, **ROUNDED[strategy])
    logits = []
    for layer in session.model.model.layers:
        layer.moe.router.weight.register_hook(lambda gradient: logits.append(gradient.dtype))
    with DtypesSeen() as dtypes:
        session.step()
    assert logits == 2 * [torch.float32]
    alone = {"attention": [], "bk": ["bk_causal"], "resolvent": ["bk_tunnel"]}[mixer]
    for name, given, made in dtypes.of(*alone, "softmax", "aten.exp", "aten.log", "native_layer_norm", "expm1"):
        assert set(given) | set(made) == {torch.float32}, name
    if mixer == "resolvent":
        for name, given, made in dtypes.of("resnet_bk.carry.default"):
            assert given[3:] == [torch.float32] * len(given[3:]), f"{name}: log|l| and the state"
            assert made[-1] == torch.float32, f"{name}: the state"
    half = AUTOCAST[session.config.precision]
    assert any(set(given) == {half} for _, given, _ in dtypes.of("aten.mm")), "products are what is halved"


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


# Loss scaling.


def absurd_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)


def scales_and_skips(session, steps):
    """The scale after each step, and whether the step was skipped: whether it left the weights as they were."""
    seen = []
    for _ in range(steps):
        before = session.weights()
        session.step()
        after = session.weights()
        skipped = all(torch.equal(before[name], after[name]) for name in before)
        seen.append((session.scaler.get_scale(), skipped))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "max_grad_norm"),
    [("offloaded optimizer", None), ("all together", 1.0)],
)
def test_overflowing_steps_are_skipped_where_plain_training_skips_them(strategy, max_grad_norm):
    options = {"overrides": {"mixer": "attention"}, "precision": "fp16", "max_grad_norm": max_grad_norm}
    plainly = Session(**options, scaler=absurd_scaler())
    session = Session(**options, scaler=absurd_scaler(), **EXACT[strategy])
    assert not updates_in_backward(session.optimizer, session.scaler, session.config)
    expected = scales_and_skips(plainly, 30)
    assert scales_and_skips(session, 30) == expected
    assert_same_weights(session, plainly)
    skips = [skipped for _, skipped in expected]
    assert 10 < sum(skips) < 28, "it began absurd, and came to its senses"


@pytest.mark.slow
def test_half_weights_skip_overflowing_steps_and_learn_from_the_others():
    session = Session(overrides={"mixer": "attention"}, scaler=absurd_scaler(), **ROUNDED["all, halved, fp16"])
    before = float(session.step().cross_entropy)
    seen = scales_and_skips(session, 30)
    scales = [2.0**39, *(scale for scale, _ in seen)]
    for (scale, skipped), last in zip(seen, scales, strict=False):
        assert skipped == (scale < last), "a step is skipped exactly where the scale falls"
    assert 10 < sum(skipped for _, skipped in seen) < 28
    assert all(bool(weight.isfinite().all()) for weight in session.weights().values())
    assert float(session.step().cross_entropy) < before + 1


# Updating during backward.


def unclipped_curve(steps, mixer):
    """torch's AdamW in a loop written out, without clipping."""
    session = Session(overrides={"mixer": mixer}, max_grad_norm=None)
    losses = []
    for _ in range(steps):
        config, number = session.config, session.number
        rate = config.learning_rate * min(1.0, (number + 1) / config.warmup_steps)
        for group in session.optimizer.param_groups:
            group["lr"] = rate
        session.optimizer.zero_grad()
        loss = torch.zeros(())
        for micro_step, (input_ids, targets) in enumerate(session.batches()):
            seed_micro_step(config.seed, number, micro_step)
            output = session.model(input_ids, shift_labels=targets, use_cache=False)
            (output.loss / 2).backward()
            loss += output.cross_entropy.detach() / 2
        session.optimizer.step()
        losses.append(float(loss))
        session.number += 1
    return losses, session


@pytest.mark.parametrize("strategy", ["offloaded optimizer", "all together"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_updating_during_backward_is_torchs_adamw_without_clipping(mixer, strategy):
    expected, plainly = unclipped_curve(6, mixer)
    session = Session(overrides={"mixer": mixer}, max_grad_norm=None, **EXACT[strategy])
    curve = session.curve(6)
    assert [loss for loss, _ in curve] == expected
    assert_same_weights(session, plainly)
    assert curve[0][1] > 0, "the first step shows that memory suffices, and has a norm"
    assert [norm for _, norm in curve[1:]] == 5 * [None]


@pytest.mark.parametrize("micro_batch_size", [None, 1])
@pytest.mark.parametrize("options", [ROUNDED["half weights"], ROUNDED["half moments"], ROUNDED["all, halved"]], ids=str)
def test_when_weights_are_updated_makes_no_difference(options, micro_batch_size):
    options = {"overrides": {"mixer": "attention"}, "micro_batch_size": micro_batch_size, **options}
    during, after = Session(max_grad_norm=None, **options), Session(max_grad_norm=1e30, **options)
    ours, theirs = during.curve(5), after.curve(5)
    assert [loss for loss, _ in ours] == [loss for loss, _ in theirs]
    assert [norm is None for _, norm in ours] == [False, *(4 * [True])]
    assert_same_weights(during, after)


@pytest.mark.parametrize("strategy", ["plain", "all together"])
def test_a_smaller_number_of_rows_must_prove_itself_before_weights_are_updated_in_backward(strategy):
    session = Session(rows=4, max_grad_norm=None, **EXACT.get(strategy, {}))
    norms = [session.step().grad_norm, session.step().grad_norm]
    session.micro_batches.proven = False
    norms += [session.step().grad_norm, session.step().grad_norm]
    in_backward = strategy != "plain"
    assert [norm is None for norm in norms] == [False, in_backward, False, in_backward]


# Run folders: stopped and resumed.


def run_options(strategy):
    options = {**EXACT, **ROUNDED}[strategy]
    return {"gradient_accumulation_steps": 2, "steps": 6, "eval_every": 4, **options}


def stopping_after(step):
    def observer(entry):
        if entry.get("step") == step and "loss" in entry:
            os.kill(os.getpid(), signal.SIGINT)

    return observer


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*EXACT, *ROUNDED])
def test_a_run_stopped_at_some_step_goes_on_bitwise(tmp_path, text_file, strategy):
    step = random.Random(strategy).randint(1, 5)
    options = {"model": {"mixer": "attention"}, **run_options(strategy)}
    whole = finish(start(tmp_path / "whole", text_file, **options))
    with pytest.raises(TrainingInterruptedError):
        finish(start(tmp_path / "parts", text_file, observer=stopping_after(step), **options))
    ready = resume(tmp_path / "parts")
    assert ready.state.step == step
    parts = finish(ready)
    assert_same_state(parts.checkpoint, whole.checkpoint)
    assert parts.validation == whole.validation
    ours, theirs = (without_norms(metrics_without_times(tmp_path / name)) for name in ("parts", "whole"))
    assert ours == theirs


def without_norms(entries):
    """After a resume the first step has a norm where the others, which update in backward, have none."""
    return [{key: value for key, value in entry.items() if key != "grad_norm"} for entry in entries]


@pytest.mark.parametrize("mixer", ["resolvent", "bk"])
def test_so_does_one_of_another_mixer(tmp_path, text_file, mixer):
    options = {"model": {"mixer": mixer}, **run_options("all, halved"), "steps": 4}
    whole = finish(start(tmp_path / "whole", text_file, **options))
    finish(start(tmp_path / "parts", text_file, **{**options, "steps": 2}))
    assert_same_state(finish(resume(tmp_path / "parts", steps=4)).checkpoint, whole.checkpoint)


@pytest.mark.parametrize("strategy", ["selective checkpointing", "offloaded optimizer", "all together"])
def test_a_checkpoint_does_not_tell_how_it_was_trained(tmp_path, text_file, strategy):
    options = {"model": {"mixer": "attention"}, "gradient_accumulation_steps": 2, "steps": 3}
    expected = finish(start(tmp_path / "plain", text_file, **options))
    summary = finish(start(tmp_path / "frugal", text_file, **options, **EXACT[strategy]))
    assert_same_state(summary.checkpoint, expected.checkpoint)
    assert summary.validation == expected.validation


def representable(x):
    return torch.equal(x, x.bfloat16().float())


@pytest.mark.parametrize("strategy", ["half weights", "all, halved", "all, halved, fp16"])
def test_masters_are_saved_as_the_models_weights(tmp_path, text_file, strategy):
    ready = start(tmp_path / "run", text_file, **{**run_options(strategy), "steps": 2})
    first = load_file(checkpoints(tmp_path / "run" / "checkpoints")[0] / WEIGHTS)
    summary = finish(ready)
    saved = load_file(summary.checkpoint / WEIGHTS)
    assert {weight.dtype for weight in (*first.values(), *saved.values())} == {torch.float32}
    model, optimizer = ready.trainer.model, ready.trainer.optimizer
    halves = [name for name, parameter in model.named_parameters() if parameter.dtype != torch.float32]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.moe.up"} <= set(halves)
    for name in halves:
        assert not representable(first[name]) and not representable(saved[name]), name
    for name, parameter in model.named_parameters():
        assert torch.equal(saved[name], optimizer.master(parameter)), name
        assert torch.equal(saved[name].to(parameter.dtype), parameter), name
    moments = load_file(summary.checkpoint / MOMENTS)
    assert {key.partition(".")[0] for key in moments} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("strategy", ["half moments", "all, halved"])
def test_bfloat16_moments_are_saved_as_such(tmp_path, text_file, strategy):
    summary = finish(start(tmp_path / "run", text_file, **{**run_options(strategy), "steps": 2}))
    moments = load_file(summary.checkpoint / MOMENTS)
    types = {key.partition(".")[0]: value.dtype for key, value in moments.items()}
    assert types == {"step": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}


def test_the_first_checkpoint_of_half_weights_is_that_of_plain_training(tmp_path, text_file):
    start(tmp_path / "plain", text_file)
    start(tmp_path / "half", text_file, **ROUNDED["all, halved"])
    one, other = (checkpoints(tmp_path / name / "checkpoints")[0] for name in ("plain", "half"))
    assert_same_state(one, other)


@pytest.mark.parametrize("strategy", ["streamed weights", "all, halved", "updated in backward"])
def test_whoever_reads_checkpoints_reads_these(tmp_path, text_file, strategy):
    summary = finish(start(tmp_path / "run", text_file, **{**run_options(strategy), "steps": 2}))
    saved = load_file(summary.checkpoint / WEIGHTS)
    tokens = torch.arange(12).view(2, 6) % 20
    logits = []
    for model in (
        load_model_checkpoint(summary.checkpoint),
        ResNetBKForCausalLM.from_pretrained(summary.checkpoint).eval(),
    ):
        assert {name: value.dtype for name, value in model.state_dict().items()} == dict.fromkeys(saved, torch.float32)
        assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
        logits.append(model(tokens).logits)
    assert torch.equal(*logits)


def test_block_by_block_a_tied_matrix_differs_by_rounding_alone():
    tied = {"tie_word_embeddings": True}
    plain, by_block = Session(overrides=tied), Session(overrides=tied, **ALL_TOGETHER)
    assert plain.config.gradient_accumulation_steps > 1
    for (ours, our_norm), (theirs, their_norm) in zip(by_block.curve(10), plain.curve(10), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert our_norm == pytest.approx(their_norm, rel=1e-4)


# Losses that are no numbers.


def poisoned(model, monkeypatch, *, at, poison):
    """From its call number ``at`` on, the model's loss goes through ``poison``."""
    loss_of, calls = model.loss_of, []

    def poisoned_loss(*arguments, **options):
        nats, loss = loss_of(*arguments, **options)
        if model.training:
            calls.append(1)
            if len(calls) >= at:
                return poison(nats, loss)
        return nats, loss

    monkeypatch.setattr(model, "loss_of", poisoned_loss)


def nan_loss(nats, loss):
    return nats * math.nan, loss * math.nan


def nan_gradient(nats, loss):
    loss.register_hook(lambda gradient: gradient * math.nan)
    return nats, loss


@pytest.mark.parametrize("poison", [nan_loss, nan_gradient])
@pytest.mark.parametrize("strategy", ["all together", "updated in backward"])
def test_what_is_no_number_ends_the_run_and_is_not_saved(tmp_path, text_file, monkeypatch, strategy, poison):
    options = {"model": {"mixer": "attention"}, "steps": 6, "save_every": 1, **{**EXACT, **ROUNDED}[strategy]}
    ready = start(tmp_path / "run", text_file, **options)
    poisoned(ready.trainer.model, monkeypatch, at=4, poison=poison)
    with refused(r"not a number at step 4; .*step-00000003"):
        finish(ready)
    good = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert step_of(good) == 3
    assert all(bool(weight.isfinite().all()) for weight in load_file(good / WEIGHTS).values())


# Out of memory.

ROOMS = {"plain": {}, "all together": ALL_TOGETHER, "all, halved": ROUNDED["all, halved"]}


def with_room_for(model, monkeypatch, most, *, where="forward", after=0):
    """Has more than ``most`` rows run out of memory once ``after`` losses were computed; returns the rows of each."""
    loss_of, calls = model.loss_of, []
    first_is_without_gradients = False

    def fails(x):
        return model.training and len(x) > most and len(calls) >= after

    def limited(hidden, *arguments, **options):
        fails_here = fails(hidden)
        calls.append(len(hidden))
        result = loss_of(hidden, *arguments, **options)
        if fails_here and where == "after forward":
            raise torch.OutOfMemoryError("no room")
        if fails_here and where == "backward":
            fail_in_backward(model)
        return result

    def in_the_last_block(_block, arguments):
        nonlocal first_is_without_gradients
        first_is_without_gradients |= model.training and not torch.is_grad_enabled()
        again = first_is_without_gradients and torch.is_grad_enabled()
        if where == "forward" and not again and fails(arguments[0]):
            calls.append(len(arguments[0]))
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(model, "loss_of", limited)
    model.model.layers[-1].register_forward_pre_hook(in_the_last_block)
    return calls


def fail_in_backward(model):
    """In the first block, once: those behind it have their gradients."""
    weight = model.model.layers[0].moe.router.weight

    def fail(_gradient):
        weight._backward_hooks.clear()
        raise torch.OutOfMemoryError("no room")

    if not weight._backward_hooks:
        weight.register_hook(fail)


def losses_of(run):
    return [entry["loss"] for entry in metrics_without_times(run) if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "where"),
    [
        ("plain", "backward"),
        ("all together", "forward"),
        ("all together", "after forward"),
        ("all together", "backward"),
        ("all, halved", "backward"),
    ],
)
def test_out_of_memory_is_training_with_smaller_micro_batches(tmp_path, text_file, monkeypatch, strategy, where):
    told = []
    options = {"model": {"mixer": "attention"}, "batch_size": 8, "steps": 2, "gradient_accumulation_steps": 2}
    options |= ROOMS[strategy]
    expected = finish(start(tmp_path / "small", text_file, micro_batch_size=2, **options))
    ready = start(tmp_path / "run", text_file, observer=told.append, **options)
    # The second batch of the first step is the first that does not fit: gradients are there already, except where all
    # batches go forward first.
    after = 0 if where == "forward" else 1
    calls = with_room_for(ready.trainer.model, monkeypatch, 3, where=where, after=after)
    summary = finish(ready)
    assert [entry for entry in told if "micro_batch_size" in entry] == [
        {"micro_batch_size": 4},
        {"micro_batch_size": 2},
    ]
    assert told[0] == {"micro_batch_size": 4}
    fours = 4 if where == "backward" and strategy != "plain" else 1  # losses, before the first block's backward
    assert [rows for rows in calls if rows > 2] == [8] * (1 + after) + [4] * fours, (
        "what did not fit is not tried again"
    )
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "small")
    assert metrics_without_times(tmp_path / "run") == metrics_without_times(tmp_path / "small")
    assert_same_state(summary.checkpoint, expected.checkpoint)


@pytest.mark.parametrize("strategy", ROOMS)
def test_it_may_run_out_in_a_later_step(tmp_path, text_file, monkeypatch, strategy):
    """The steps before were done in whole batches."""
    told = []
    options = {"model": {"mixer": "attention", "router_aux_loss_coef": 0.0}, "batch_size": 4, "steps": 5}
    options |= ROOMS[strategy]
    finish(start(tmp_path / "whole", text_file, **options))
    ready = start(tmp_path / "run", text_file, observer=told.append, **options)
    calls = with_room_for(ready.trainer.model, monkeypatch, 2, after=2)
    finish(ready)
    assert [rows for rows in calls if rows][:9] == [4, 4, 4, 2, 2, 2, 2, 2, 2]
    assert [entry for entry in told if "micro_batch_size" in entry] == [{"micro_batch_size": 2}]
    ours, theirs = losses_of(tmp_path / "run"), losses_of(tmp_path / "whole")
    assert ours[:2] == theirs[:2]
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5)


def test_without_the_balancing_loss_it_is_full_batch_training_but_for_rounding(monkeypatch):
    options = {"overrides": {"router_aux_loss_coef": 0.0}, "rows": 8}
    whole, pieces = Session(**options), Session(**options)
    with_room_for(pieces.model, monkeypatch, 3)
    for step in range(5):
        one, other = whole.step(), pieces.step()
        assert float(other.cross_entropy) == pytest.approx(float(one.cross_entropy), rel=1e-5)
        if step == 0:
            assert torch.equal(other.expert_load, one.expert_load), "each token meets the same noise"
    assert pieces.micro_batches.rows == 2


@pytest.mark.parametrize("where", ["forward", "after forward"])
@pytest.mark.parametrize("options", [ROUNDED["updated in backward"], {**ALL_TOGETHER, "max_grad_norm": None}], ids=str)
def test_it_may_run_out_in_a_step_that_would_update_in_backward(monkeypatch, options, where):
    options = {"overrides": {"mixer": "attention", "router_aux_loss_coef": 0.0}, "rows": 4, **options}
    whole, session = Session(**options), Session(**options)
    with_room_for(session.model, monkeypatch, 2, where=where, after=5)
    for _ in range(5):
        one, other = whole.step(), session.step()
        assert float(other.cross_entropy) == pytest.approx(float(one.cross_entropy), rel=1e-5)
    assert session.micro_batches.rows == 2


@pytest.mark.parametrize("options", [ROUNDED["updated in backward"], {**ALL_TOGETHER, "max_grad_norm": None}], ids=str)
def test_where_weights_were_being_updated_nothing_is_tried_again(monkeypatch, options):
    session = Session(rows=4, overrides={"mixer": "attention"}, **options)
    # Two passes of the first step; of the second step's two, the last one updates.
    with_room_for(session.model, monkeypatch, 2, where="backward", after=3)
    session.step()
    with refused("memory ran out while weights were being updated; go on from the last checkpoint with a smaller"):
        session.step()


@pytest.mark.parametrize("strategy", ROOMS)
def test_one_row_that_does_not_fit_is_one_line(tmp_path, text_file, monkeypatch, capfd, strategy):
    loss_of = ResNetBKForCausalLM.loss_of

    def out_of_memory(model, *arguments, **options):
        if model.training:
            raise torch.OutOfMemoryError("no room")
        return loss_of(model, *arguments, **options)

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ROOMS[strategy].items()]
    words = ["train", "--preset", "tiny", "--tokenizer", "char", "--data", str(text_file), "--steps", "2"]
    words += ["--batch-size", "4", "--sequence-length", "16", "--num-threads", "1", "--device", "cpu", *flags]
    with monkeypatch.context() as patch:
        patch.setattr(ResNetBKForCausalLM, "loss_of", out_of_memory)
        assert main([*words, "--out", str(tmp_path / "run")]) == 2
    captured = capfd.readouterr()
    *lines, last = captured.err.splitlines()
    assert captured.out == ""
    assert last.startswith("error: out of memory; take a smaller --batch-size, --sequence-length or model")
    assert not any("error" in line or "Traceback" in line for line in lines)
    told = [line for line in lines if line.startswith("out of memory")]
    assert [re.search(r"micro-batches of (\d+) rows", line)[1] for line in told] == ["2", "1"]
    # What was there before is there, and goes on once there is room.
    assert json.loads((tmp_path / "run" / "run.json").read_text())["training"]["batch_size"] == 4
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
