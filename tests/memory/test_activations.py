"""What the planner says a step keeps and needs, against tensors that real steps made."""

import functools

import pytest
import torch

from resnet_bk.bench.contestants import build_model, random_batch
from resnet_bk.errors import UserError
from resnet_bk.memory.activations import TrainingShape, block_activations, outer_activations
from resnet_bk.memory.plan import Budget, activation_parts, make_plan
from resnet_bk.memory.strategy import Strategy
from resnet_bk.memory.tracking import TensorTracker, training_tensors
from resnet_bk.models import ResNetBKConfig
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.micro_step import autocast
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.step import build_scaler, train_step

pytestmark = pytest.mark.filterwarnings("ignore:causal=False")
CPU = torch.device("cpu")
# What dominates, the fields that differ from preset tiny's, batch size, sequence length.
GRID = [
    ("few tokens", {}, 2, 16),
    ("activations", {}, 8, 64),
    (
        "experts",
        {"num_experts": 8, "num_layers": 1, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 256},
        1,
        4,
    ),
    ("one wide expert", {"num_experts": 1, "num_layers": 1, "vocab_size": 64, "intermediate_size": 2048}, 1, 8),
    ("many layers", {"num_layers": 6, "vocab_size": 64}, 4, 32),
    ("many heads", {"num_bk_heads": 16, "num_attention_heads": 8, "hidden_size": 64}, 1, 256),
    ("narrow", {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 64, "num_experts": 8}, 2, 256),
    ("logits", {"vocab_size": 20_000}, 1, 64),
    ("head and embedding", {"vocab_size": 20_000}, 1, 4),
    ("chunks of logits", {"vocab_size": 20_000, "num_layers": 1}, 8, 128),
    ("tied, logits", {"vocab_size": 20_000, "tie_word_embeddings": True}, 1, 64),
    ("tied, between", {"vocab_size": 20_000, "tie_word_embeddings": True}, 1, 24),
    ("tied, few tokens", {"vocab_size": 20_000, "tie_word_embeddings": True}, 1, 4),
    ("position table", {"max_position_embeddings": 4000}, 1, 16),
    ("no convolution", {"conv_size": 0}, 4, 64),
    ("a convolution as long as the rows", {"conv_size": 8, "num_layers": 1, "vocab_size": 64}, 8, 8),
    ("one token", {}, 4, 1),
    ("bidirectional", {"causal": False, "num_bk_heads": 8}, 2, 64),
    ("analytic gradient", {"bk_grad": "blend", "num_bk_heads": 8}, 2, 64),
]
# The resolvent mixer's own; the rest of the grid is for all mixers alike.
RESOLVENT = [
    ("many heads", {"num_resolvent_heads": 16, "hidden_size": 64}, 1, 256),
    ("one head", {"num_resolvent_heads": 1, "hidden_size": 64}, 4, 32),
    ("narrow keys", {"resolvent_key_size": 3, "num_resolvent_heads": 4}, 2, 100),
    ("wide keys", {"resolvent_key_size": 64, "num_layers": 3}, 3, 50),
    ("vector", {"resolvent_state": "vector"}, 4, 64),
    (
        "vector, many heads, no convolution",
        {"resolvent_state": "vector", "num_resolvent_heads": 32, "conv_size": 0},
        4,
        64,
    ),
    ("scattering", {"resolvent_regime": "scattering"}, 4, 64),
    ("scattering, many heads", {"resolvent_regime": "scattering", "num_resolvent_heads": 16, "conv_size": 0}, 2, 128),
]
CASES = [
    (mixer, *case)
    for mixer in ("resolvent", "bk", "attention")
    for case in GRID
    if mixer != "resolvent" or case[1].get("causal", True)
] + [("resolvent", *case) for case in RESOLVENT]
IDS = [f"{mixer}, {name}" for mixer, name, *_ in CASES]
over_the_cases = pytest.mark.parametrize(("mixer", "_name", "overrides", "batch_size", "length"), CASES, ids=IDS)
each_mixer = pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention"])
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def configured(mixer, overrides):
    return ResNetBKConfig.from_preset("tiny", **{"mixer": mixer, "intermediate_size": 64, **overrides})


def kept_for_backward(config, batch, precision):
    """Bytes of each storage that autograd saves in one forward pass, weights left out."""
    model = build_model(config, seed=0).train()
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(CPU, precision):
        loss = model(batch[0], shift_labels=batch[1], use_cache=False).loss
    assert loss.requires_grad
    return sorted(storage.nbytes() for storage in saved.values())


@each_precision
@over_the_cases
def test_what_is_kept_for_backward_is_what_autograd_saves(mixer, _name, overrides, batch_size, length, precision):
    config, half = configured(mixer, overrides), precision != "fp32"
    shape = TrainingShape(batch_size=batch_size, sequence_length=length)
    sizes = kept_for_backward(config, random_batch(config, batch_size, length, CPU), precision)
    blocks = config.num_layers * sum(part.num_bytes for part in block_activations(config, shape, half=half))
    predicted = blocks + sum(part.num_bytes for part in outer_activations(config, shape, half=half))
    # Scalars and vectors of E numbers are not in the formulas: they show where there are next to no tokens.
    small_change = 4 * config.num_layers * (config.num_experts + 16) + 4 * length * 2
    assert predicted + small_change >= sum(sizes)
    assert predicted <= (1.06 if half else 1.03) * sum(sizes)


@functools.cache
def measured_peak(precision, index):
    mixer, _, overrides, batch_size, length = CASES[index]
    config = configured(mixer, overrides)
    training = TrainingConfig(batch_size=batch_size, sequence_length=length, precision=precision)
    model = build_model(config, seed=0).train()
    optimizer, scaler = build_optimizer(model, training), build_scaler(CPU, precision)
    batch = random_batch(config, batch_size, length, CPU)
    train_step(model, optimizer, scaler, [batch], training, 0)
    # The second step is the first that has the optimizer's moments; the gradients of the first are still there.
    with TensorTracker() as tracker:
        tracker.include([*training_tensors(model, optimizer), *batch])
        train_step(model, optimizer, scaler, [batch], training, 1)
    return tracker.peak_bytes


@each_precision
@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_the_planned_peak_is_never_below_the_measured_one_nor_15_percent_above(index, precision):
    mixer, _, overrides, batch_size, length = CASES[index]
    shape = TrainingShape(batch_size=batch_size, sequence_length=length)
    plans = make_plan(configured(mixer, overrides), shape, Budget()).strategies
    planned = {"fp32": plans[0], "bf16": plans[1]}[precision].tensor_bytes
    measured = measured_peak(precision, index)
    assert measured <= planned <= 1.15 * measured


@each_mixer
def test_the_attention_kernel_keeps_no_matrix_of_all_pairs(mixer):
    overrides = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 16, "num_experts": 1, "num_layers": 1}
    config = configured(mixer, overrides)
    short, long = (sum(kept_for_backward(config, random_batch(config, 1, n, CPU), "fp32")) for n in (256, 1024))
    assert long <= 4.01 * short


def test_checkpointing_keeps_each_blocks_input_and_one_block():
    config = configured("resolvent", {"num_layers": 5})
    shape = TrainingShape(batch_size=2, sequence_length=16)
    plain = activation_parts(config, shape, Strategy(name="plain"))
    frugal = activation_parts(config, shape, Strategy(name="frugal", checkpointing="full"))
    one_block = sum(part.num_bytes for part in block_activations(config, shape, half=False))
    # And what random numbers start from.
    inputs = 5 * shape.tokens * config.hidden_size * 4 + 5 * len(torch.get_rng_state())
    saved = sum(part.num_bytes for part in plain) - sum(part.num_bytes for part in frugal)
    assert saved == 4 * one_block - inputs


@pytest.mark.parametrize("numbers", [{"batch_size": 0, "sequence_length": 8}, {"batch_size": 8, "sequence_length": -1}])
def test_a_shape_without_tokens_is_refused(numbers):
    with pytest.raises(UserError, match="give a number of at least 1"):
        TrainingShape(**numbers)
