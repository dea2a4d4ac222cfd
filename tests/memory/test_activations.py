"""What the planner says a step keeps for backward, against what autograd saves on an imagined GPU."""

from contextlib import ExitStack

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_bk.errors import UserError
from resnet_bk.imagined import Machine, imagining
from resnet_bk.memory.activations import TrainingShape, block_activations, block_moments, outer_activations
from resnet_bk.memory.plan import activation_parts
from resnet_bk.memory.strategy import Strategy
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.planner.as_on_cuda import AsOnCuda
from resnet_bk.training.micro_step import autocast

pytestmark = pytest.mark.filterwarnings("ignore:causal=False")
GPU = Machine(kind="cuda", capability=(9, 0))
# What dominates, the fields that differ from preset tiny's, batch size, sequence length.
GRID = [
    ("activations", {}, 8, 64),
    (
        "experts",
        {"num_experts": 8, "num_layers": 1, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 256},
        1,
        4,
    ),
    ("many heads", {"num_bk_heads": 16, "num_attention_heads": 8, "hidden_size": 64}, 1, 256),
    ("narrow", {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 64, "num_experts": 8}, 2, 256),
    ("chunks of logits", {"vocab_size": 20_000, "num_layers": 1}, 8, 128),
    ("position table", {"max_position_embeddings": 4000}, 1, 16),
    ("no convolution", {"conv_size": 0}, 4, 64),
    ("a convolution as long as the rows", {"conv_size": 8, "num_layers": 1, "vocab_size": 64}, 8, 8),
    ("one token", {}, 4, 1),
    ("dropout", {"dropout": 0.1}, 4, 64),
    ("dropout of tokens", {"token_dropout": 0.1, "vocab_size": 64}, 4, 64),
    ("bidirectional", {"causal": False, "num_bk_heads": 8}, 2, 64),
    ("analytic gradient", {"bk_grad": "blend", "num_bk_heads": 8}, 2, 64),
]
LOCAL = [
    ("behind the window", {"local_attention_window": 16}, 4, 64),
    ("one row behind the window", {"local_attention_window": 32, "hidden_size": 64}, 1, 100),
    ("a wide window", {"local_attention_window": 64, "num_layers": 3}, 2, 256),
    ("dropout behind the window", {"local_attention_window": 16, "dropout": 0.1}, 4, 64),
]
ROTARY = {"local_attention_positions": "rotary"}
LOCAL += [
    (f"rotary, {name}", ROTARY | fields, *rows)
    for name, fields, *rows in [
        *LOCAL,
        ("short", {}, 4, 64),
        ("no convolution", {"conv_size": 0}, 4, 64),
        ("one token", {}, 4, 1),
        ("some tokens left", {"local_attention_window": 24}, 4, 64),
    ]
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
    ("dropout, narrow keys", {"dropout": 0.1, "resolvent_key_size": 6}, 4, 64),
    ("dropout, no convolution", {"dropout": 0.1, "conv_size": 0}, 4, 64),
    ("dropout, vector", {"dropout": 0.1, "resolvent_state": "vector"}, 4, 64),
    ("dropout, scattering", {"dropout": 0.1, "resolvent_regime": "scattering"}, 4, 64),
    ("scattering, many heads", {"resolvent_regime": "scattering", "num_resolvent_heads": 16, "conv_size": 0}, 2, 128),
]
CASES = [
    (mixer, *case)
    for mixer in ("resolvent", "bk", "attention", "local")
    for case in GRID
    if mixer in ("bk", "attention") or case[1].get("causal", True)
]
CASES += [("resolvent", *case) for case in RESOLVENT] + [("local", *case) for case in LOCAL]
THIRD = {"num_layers": 6, "local_attention_every": 3}
CASES += [
    ("resolvent", "local attention in a third of the blocks", THIRD, 4, 64),
    (
        "resolvent",
        "rotary local attention in a third of the blocks",
        THIRD | ROTARY | {"num_attention_heads": 2},
        4,
        64,
    ),
]
IDS = [f"{mixer}, {name}" for mixer, name, *_ in CASES]
over_the_cases = pytest.mark.parametrize(("mixer", "_name", "overrides", "batch_size", "length"), CASES, ids=IDS)
each_mixer = pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention", "local"])
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def configured(mixer, overrides):
    fields = {"mixer": mixer, "local_attention_every": 0, "intermediate_size": 64}
    return ResNetBKConfig.from_preset("tiny", **{**fields, **overrides})


def kept_for_backward(config, batch_size, length, precision):
    """Bytes of each storage that autograd saves in one forward pass on a GPU, weights left out."""
    saved = {}
    with ExitStack() as stack:
        for context in (imagining(GPU), FakeTensorMode(), AsOnCuda()):
            stack.enter_context(context)
        model = ResNetBKForCausalLM(config).train()
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        ids, targets = (torch.zeros(batch_size, length, dtype=torch.int64) for _ in range(2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(ids.device, precision):
            loss = model(ids, shift_labels=targets, use_cache=False).loss
        assert loss.requires_grad
        return sorted(storage.nbytes() for storage in saved.values())


@each_precision
@over_the_cases
def test_what_is_kept_for_backward_is_what_autograd_saves(mixer, _name, overrides, batch_size, length, precision):
    config, half = configured(mixer, overrides), precision != "fp32"
    shape = TrainingShape(batch_size=batch_size, sequence_length=length)
    sizes = kept_for_backward(config, batch_size, length, precision)
    blocks = sum(
        number * part.num_bytes
        for alike, number in config.alike()
        for part in block_activations(alike, shape, half=half)
    )
    predicted = blocks + sum(part.num_bytes for part in outer_activations(config, shape, half=half))
    # Scalars and vectors of E numbers are not in the formulas: they show where there are next to no tokens.
    small_change = 4 * config.num_layers * (config.num_experts + 16) + 4 * length * 2
    assert predicted + small_change >= sum(sizes)
    # Of a single token in halves the states behind it are counted that its recurrence need not keep.
    assert predicted <= (1.05 if half and length == 1 else 1.03) * sum(sizes)


@each_mixer
def test_the_attention_kernel_keeps_no_matrix_of_all_pairs(mixer):
    overrides = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 16, "num_experts": 1, "num_layers": 1}
    config = configured(mixer, overrides)
    short, long = (sum(kept_for_backward(config, 1, length, "fp32")) for length in (256, 1024))
    assert long <= 4.01 * short


def test_checkpointing_keeps_each_blocks_input():
    config = configured("resolvent", {"num_layers": 5})
    shape = TrainingShape(batch_size=2, sequence_length=16)
    plain = activation_parts(config, shape, Strategy(name="plain"))
    frugal = activation_parts(config, shape, Strategy(name="frugal", checkpointing="full"))
    one_block = sum(part.num_bytes for part in block_activations(config, shape, half=False))
    saved = sum(part.num_bytes for part in plain) - sum(part.num_bytes for part in frugal)
    assert saved == 5 * one_block - 5 * shape.tokens * config.hidden_size * 4


@each_mixer
def test_a_block_has_all_it_saves_when_it_has_been_computed_again(mixer):
    config, shape = configured(mixer, {}), TrainingShape(batch_size=2, sequence_length=16)
    block = block_activations(config, shape, half=True)
    first, *later = block_moments(config, shape, half=True)
    assert first.parts[:-1] == block
    assert all(part in block or part.name in {"norms", "gradients and results"} for m in later for part in m.parts)


@pytest.mark.parametrize("numbers", [{"batch_size": 0, "sequence_length": 8}, {"batch_size": 8, "sequence_length": -1}])
def test_a_shape_without_tokens_is_refused(numbers):
    with pytest.raises(UserError, match="give a number of at least 1"):
        TrainingShape(**numbers)
