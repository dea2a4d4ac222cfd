"""FLOPs counted while a step runs against the formulas, and against counting by hand."""

from types import SimpleNamespace

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import flop_registry

from resnet_bk.bench import flops
from resnet_bk.bench.cells import Outcome
from resnet_bk.bench.contestants import contestant_configs
from resnet_bk.bench.flops import UncountedOperatorError, flop_counter, model_flops, seed_forward
from resnet_bk.bench.profiles import PROFILES
from resnet_bk.bench.setup import Setup
from resnet_bk.bench.subject import Subject, random_batch
from resnet_bk.models import ResNetBKConfig
from resnet_bk.models.flops import attended_pairs, formula_flops, windowed_pairs
from resnet_bk.schema import CellStatus, Failure
from resnet_bk.training.config import DataConfig, TrainingConfig

CPU = torch.device("cpu")


def counted(batch_size=3, length=24, precision="fp32", **overrides):
    configs = contestant_configs("tiny", {"vocab_size": 60, **overrides})
    training = TrainingConfig(batch_size=batch_size, sequence_length=length, precision=precision)
    return {
        key: model_flops(key, Subject.build(config, training, random_batch(config, batch_size, length, CPU)), config)
        for key, config in configs.items()
    }


def subject_of(model, training=None):
    training = training or TrainingConfig(batch_size=2, sequence_length=24)
    return Subject.of(model, training, random_batch(SimpleNamespace(vocab_size=60), 2, 24, CPU))


class Mixing(nn.Module):
    """A language model that mixes by a function of its own."""

    def __init__(self, mix):
        super().__init__()
        self.embedding, self.head, self.mix = nn.Embedding(60, 8), nn.Linear(8, 60), mix

    def forward(self, input_ids):
        return self.head(self.mix(self.embedding(input_ids)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"batch_size": 1, "length": 7},
        {"vocab_size": 100, "num_experts": 4, "num_bk_heads": 5},
        {"tie_word_embeddings": True, "num_layers": 3},
        {"conv_size": 0},
        {"num_resolvent_heads": 4, "resolvent_key_size": 6, "conv_size": 7, "length": 65},
        {"resolvent_regime": "scattering"},
        {"resolvent_state": "vector"},
        {"mixer": "bk"},
        {"mixer": "bk", "conv_size": 0, "num_bk_heads": 3},
        {"local_attention_every": 2, "local_attention_window": 8},
        {"local_attention_every": 1, "local_attention_window": 8, "length": 29},
        {"local_attention_every": 1, "local_attention_window": 16, "length": 21},
    ],
    ids=str,
)
def test_what_is_counted_is_what_the_formula_says(shape, precision):
    for model in counted(precision=precision, **shape).values():
        assert model.forward == pytest.approx(model.formula_forward, rel=1e-3), model.contestant
        assert model.backward == pytest.approx(model.formula_backward, rel=1e-3), model.contestant


def test_per_token_and_in_all():
    for model in counted(batch_size=2, length=8).values():
        assert model.forward_per_token == model.forward / 16
        assert model.step_per_token == (model.forward + model.backward + model.optimizer) / 16


@pytest.mark.parametrize(
    "operator", ["carry", "carry_backward", "bk_tunnel", "queries_keys_values", "queries_keys_values_backward"]
)
def test_an_operator_of_ours_that_lost_its_formula_is_an_error(monkeypatch, operator):
    monkeypatch.delitem(flop_registry, getattr(torch.ops.resnet_bk, operator))
    with pytest.raises(UncountedOperatorError, match=rf"resnet_bk\.{operator} has no FLOP formula.*register one"):
        counted()


@pytest.fixture
def own_operator():
    @torch.library.custom_op("resnet_bk_test::mixed", mutates_args=())
    def mixed(x: torch.Tensor) -> torch.Tensor:
        return x @ x.mT @ x

    mixed.register_autograd(lambda ctx, grad: grad)
    return mixed


def test_a_foreign_operator_without_a_formula_is_an_error(own_operator):
    with pytest.raises(UncountedOperatorError, match=r"resnet_bk_test\.mixed has no FLOP formula"):
        model_flops("transformer", subject_of(Mixing(own_operator)))


def test_a_product_that_torch_has_no_formula_for_is_an_error():
    with pytest.raises(UncountedOperatorError, match=r"_cdist_forward"):
        model_flops("transformer", subject_of(Mixing(lambda x: x * torch.cdist(x, x).sum(-1, keepdim=True))))


def test_an_error_leaves_torch_and_the_model_as_they_were(own_operator):
    subject = subject_of(Mixing(own_operator))
    with pytest.raises(UncountedOperatorError):
        model_flops("transformer", subject)
    assert own_operator(torch.ones(1, 2, 2)).sum() == 16
    assert all(parameter.grad is None for parameter in subject.model.parameters())


@pytest.mark.parametrize("own", ["a kernel of someone's", "the loss"])
def test_a_kernel_launched_outside_of_an_operator_is_an_error_unless_it_is_known(monkeypatch, own):
    pytest.importorskip("triton")
    from resnet_bk.ops.loss_kernels import loss_kernel

    monkeypatch.setattr("triton.runtime.jit.KernelInterface.run", lambda *_, **__: None, raising=False)
    monkeypatch.setattr(type(loss_kernel.compiled), "run", lambda *_, **__: None)
    if own != "the loss":
        monkeypatch.setattr(flops, "KERNELS_WITHOUT_PRODUCTS", frozenset())

    def mix(x):
        loss_kernel[(1,)](x)
        return x

    if own == "the loss":
        assert model_flops("transformer", subject_of(Mixing(mix))).forward > 0
    else:
        with pytest.raises(UncountedOperatorError, match=r"loss_kernel, launched outside"):
            model_flops("transformer", subject_of(Mixing(mix)))


def test_products_with_vectors_and_in_place_count():
    def mix(x):
        matrix, vector = torch.ones(8, 8), torch.ones(8)
        (matrix @ vector).dot(vector)
        return torch.zeros(48, 8).addmm_(x.flatten(0, 1), matrix).view(2, 24, 8)

    plain = model_flops("transformer", subject_of(Mixing(lambda x: x)))
    mixed = model_flops("transformer", subject_of(Mixing(mix)))
    assert mixed.forward - plain.forward == 2 * 8 * 8 + 2 * 8 + 2 * 48 * 8 * 8


def test_products_that_are_added_in_single_precision_count():
    # As torch's counter asks for it: the product itself is a GPU's.
    formula = flop_counter().flop_registry[torch.ops.aten.addmm]
    total, left, right = (torch.zeros(*shape) for shape in ((48, 8), (48, 16), (16, 8)))
    assert formula(total, left, right, torch.float32, out=total, out_val=total) == 2 * 48 * 16 * 8


@pytest.mark.parametrize("name", ["GPT2Config", "LlamaConfig", "GPTNeoXConfig"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_models_of_transformers_can_be_counted(name, precision):
    import transformers

    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name != "GPT2Config":
        sizes["intermediate_size"] = 24
    config = getattr(transformers, name)(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    training = TrainingConfig(batch_size=2, sequence_length=24, precision=precision)
    model = transformers.AutoModelForCausalLM.from_config(config)
    found = model_flops("transformer", subject_of(model, training))
    # All parameters but embeddings are matrices, nearly: two for each and each token, and attention beside.
    matrices = sum(p.numel() for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(False))
    assert 2 * 48 * matrices * 0.9 < found.forward < 2 * 48 * matrices * 1.6
    assert found.backward == pytest.approx(2 * found.forward, rel=0.15)
    assert (found.components, found.formula_forward, found.formula_backward, found.seed_forward) == ([], *[None] * 3)


def test_the_earlier_documents_formulas_give_its_numbers():
    config = ResNetBKConfig.from_preset("seed")
    core, gating, routing, experts, projection = 2816, 655_360, 102_400, 41_943_040, 327_680
    assert seed_forward(config, 20, 128) == 4 * (core + gating + routing + experts + projection)


def test_the_earlier_documents_formulas_are_for_its_mixer_only():
    found = counted()
    assert [key for key, model in found.items() if model.seed_forward is not None] == ["seed-mixer"]


def test_causal_attention_counts_the_pairs_it_needs_and_full_attention_all():
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    for causal, pairs in ((True, 16 * 17 // 2), (False, 16 * 16)):
        with flop_counter() as forward:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        with flop_counter() as backward:
            out.sum().backward()
        assert forward.get_total_flops() == 2 * 2 * (2 * 3) * pairs * 8
        assert backward.get_total_flops() == 2 * 5 * (2 * 3) * pairs * 8


def test_every_kernel_of_attention_counts_two_products_forward_and_five_backward():
    """Those of a GPU too, which compute nothing here."""
    ops, pairs = torch.ops.aten, 2 * 3 * (16 * 17 // 2)
    calls = {
        "flash": lambda q, k, v: ops._scaled_dot_product_flash_attention(q, k, v, 0.0, True),
        "efficient": lambda q, k, v: ops._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True),
        "cudnn": lambda q, k, v: ops._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False),
        "for_cpu": lambda q, k, v: ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True),
    }
    counted = {}
    for name, call in calls.items():
        q, k, v = (torch.randn(2, 3, 16, 8, device="meta", requires_grad=True) for _ in range(3))
        with flop_counter() as forward:
            out = call(q, k, v)[0]
        with flop_counter() as backward:
            out.sum().backward()
        counted[name] = (forward.get_total_flops() / (2 * pairs * 8), backward.get_total_flops() / (2 * pairs * 8))
    assert counted == dict.fromkeys(calls, (2, 5))


@pytest.mark.parametrize("shape", [(16, 16), (1, 16), (1, 1, 16, 16), (2, 3, 16, 16)], ids=str)
def test_a_mask_counts_the_pairs_that_it_leaves(shape):
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 0] = True
    pairs = int(mask.expand(2, 3, 16, 16).sum())
    for written in (mask, torch.zeros(shape).masked_fill(~mask, -torch.inf)):
        with flop_counter() as forward:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=written)
        with flop_counter() as backward:
            out.sum().backward()
        assert forward.get_total_flops() == 2 * 2 * pairs * 8
        assert backward.get_total_flops() == 2 * 5 * pairs * 8


def test_a_window_counts_the_pairs_within_it():
    q, k, v = (torch.randn(2 * 16, 3, 8, device="meta", requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, 16, 32], dtype=torch.int32, device="meta")
    with flop_counter() as forward:
        out = varlen_attn(q, k, v, ends, ends, 16, 16, window_size=(4, 0))
    with flop_counter() as backward:
        out.sum().backward()
    pairs = 2 * 3 * sum(min(token + 1, 5) for token in range(16))
    assert forward.get_total_flops() == 2 * 2 * pairs * 8
    assert backward.get_total_flops() == 2 * 5 * pairs * 8


@pytest.mark.parametrize("window", [1, 2, 5, 30])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (3, 7), (1, 9), (20, 22)])
def test_pairs_of_a_window(queries, keys, window):
    by_hand = sum(min(token + 1, window) for token in range(keys - queries, keys))
    assert windowed_pairs(queries, keys, window) == by_hand


def test_pairs_of_a_causal_row():
    assert attended_pairs(4, 4, causal=True) == 1 + 2 + 3 + 4
    assert attended_pairs(4, 4, causal=False) == 16
    assert attended_pairs(1, 9, causal=True) == 9


def by_hand(**fields):
    """Forward FLOPs by component of two layers and six tokens."""
    config = ResNetBKConfig(
        vocab_size=10, hidden_size=4, num_layers=2, num_experts=3, intermediate_size=5, num_bk_heads=2, **fields
    )
    return {part.component: part.forward for part in formula_flops(config, batch_size=2, sequence_length=3)}


def test_the_formula_of_a_model_by_hand():
    parts, tokens = by_hand(mixer="bk", conv_size=0), 6
    assert parts["router"] == 2 * (2 * tokens * 4 * 3)
    assert parts["experts"] == 2 * (2 * tokens * (4 * 5 + 5 * 4))
    assert parts["potential and output projection"] == 2 * (2 * tokens * (4 * 2 + 2 * 2 * 4))
    assert parts["BK-Core"] == 2 * (10 * tokens * 2)
    assert parts["head"] == 3 * (2 * tokens * 4 * 10), "with both gradients, which come with the loss"
    assert "short convolution" not in parts


def test_the_formula_of_the_resolvent_mixer_by_hand():
    parts, tokens, heads, keys, values = by_hand(num_resolvent_heads=2, resolvent_key_size=3, conv_size=4), 6, 2, 3, 2
    channels = heads * (2 * keys + values)
    assert parts["query, key and value projection"] == 2 * (2 * tokens * 4 * channels)
    assert parts["short convolution"] == 2 * (2 * tokens * channels * 4)
    assert parts["potential projection"] == 2 * (2 * tokens * 4 * heads)
    assert parts["chains"] == 2 * (4 * tokens * heads)
    # Scores of a chunk of 64 tokens and their values; then what is written to the state and read from it.
    assert parts["carry"] == 2 * (tokens * heads * (2 * 64 * (keys + values) + 2 * 2 * keys * values))
    assert parts["gate and output projection"] == 2 * (2 * 2 * tokens * 4 * 4)


def test_a_convolution_with_a_filter_for_each_channel_counts_no_pairs_of_channels():
    x, weight = torch.randn(3, 6, 1, 20, requires_grad=True), torch.randn(6, 1, 1, 4, requires_grad=True)
    with flop_counter() as forward:
        out = F.conv2d(x, weight, groups=6)
    with flop_counter() as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 3 * 17 * 6 * 4
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.fixture
def setup():
    return Setup(
        preset="tiny",
        overrides={},
        baseline=None,
        vocab_size=256,
        data=DataConfig(data=__file__, tokenizer="byte"),
        training=TrainingConfig(batch_size=2, sequence_length=16, device="cpu"),
        profile=PROFILES["smoke"],
    )


def outcome(result=None):
    failure = None if result else Failure(kind="error", message="it broke")
    return Outcome(status=CellStatus(seconds=1.0, failure=failure), result=result)


def test_cells_go_through_json_and_come_together(setup):
    found = {}
    for cell in flops.cells(setup, {}):
        measured = msgspec.json.encode(flops.measure(setup, cell))
        found[cell.name] = outcome(msgspec.json.decode(measured, type=flops.RESULT))
    assert list(found) == ["resnet-bk", "transformer", "seed-mixer"]
    result = flops.assemble(setup, found)
    ours, baseline, _ = result.models
    assert result.ratio == baseline.step / ours.step
    assert result.forward_ratio == baseline.forward / ours.forward


@pytest.mark.parametrize("missing", ["resnet-bk", "transformer"])
def test_without_one_of_both_there_is_no_ratio(setup, missing):
    models = counted()
    found = {key: outcome(None if key == missing else model) for key, model in models.items()}
    result = flops.assemble(setup, found)
    assert {model.contestant for model in result.models} == set(models) - {missing}
    assert result.ratio is None
    assert result.forward_ratio is None


def test_without_any_there_is_no_result(setup):
    assert flops.assemble(setup, {}) is None
    assert flops.assemble(setup, {"resnet-bk": outcome()}) is None
