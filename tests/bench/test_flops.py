"""FLOPs counted while a step runs against the formulas, and against counting by hand."""

import pytest
import torch
import torch.nn.functional as F

from resnet_bk.bench.contestants import Subject, contestant_configs, random_batch
from resnet_bk.bench.flops import _counter, measure_flops
from resnet_bk.models import ResNetBKConfig
from resnet_bk.models.flops import attended_pairs, formula_flops
from resnet_bk.training.config import TrainingConfig

CPU = torch.device("cpu")
REVIEWED = {
    *("_log_softmax", "_softmax", "_softmax_backward_data", "_to_copy", "_unsafe_view", "add", "arange"),
    *("argmax", "bitwise_not", "cat", "clamp", "clone", "copy_", "cos", "detach", "div", "embedding"),
    *("embedding_dense_backward", "empty", "empty_like", "eq", "exp_", "expand", "expm1", "exponential_", "full"),
    *("gather", "gelu", "gelu_backward", "index_add", "index_select", "log", "masked_fill", "masked_fill_"),
    *("mean", "mul", "mul_", "native_layer_norm", "native_layer_norm_backward", "neg", "new_empty", "new_zeros"),
    *("ones_like", "pow", "reciprocal", "rsub", "scatter_", "scatter_add", "searchsorted", "select", "sin"),
    *("slice", "slice_backward", "softplus", "softplus_backward", "sort", "split", "split_with_sizes", "stack"),
    *("add_", "atan2", "constant_pad_nd", "cumsum", "exp", "fill_", "flip", "new_empty_strided", "ones"),
    *("remainder", "rsqrt", "select_backward", "sigmoid", "silu", "squeeze", "sub_"),
    *("sub", "sum", "t", "transpose", "unbind", "unsqueeze", "view", "zeros", "zeros_like"),
    *("resnet_bk.gated_norm", "resnet_bk.gated_norm_backward"),
}


def subjects(batch_size=3, length=24, **overrides):
    configs = contestant_configs("tiny", overrides)
    training = TrainingConfig(batch_size=batch_size, sequence_length=length)
    return {
        key: Subject.build(config, training, random_batch(config, batch_size, length, CPU))
        for key, config in configs.items()
    }


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
    ],
    ids=str,
)
def test_what_is_counted_is_what_the_formula_says(shape):
    for model in measure_flops(subjects(**shape)).models:
        assert (model.forward, model.backward) == (model.formula_forward, model.formula_backward), model.contestant


def test_every_operator_without_a_formula_has_been_looked_at():
    models = [*measure_flops(subjects()).models, *measure_flops(subjects(resolvent_regime="scattering")).models]
    for model in models:
        assert {name.removeprefix("aten.") for name in model.counted_as_zero} <= REVIEWED


def test_causal_attention_counts_the_pairs_it_needs_and_full_attention_all():
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    for causal, pairs in ((True, 16 * 17 // 2), (False, 16 * 16)):
        with _counter() as forward:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        with _counter() as backward:
            out.sum().backward()
        assert forward.get_total_flops() == 2 * 2 * (2 * 3) * pairs * 8
        assert backward.get_total_flops() == 2 * 5 * (2 * 3) * pairs * 8


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
    with _counter() as forward:
        out = F.conv2d(x, weight, groups=6)
    with _counter() as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 3 * 17 * 6 * 4
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_equal_parameters_do_not_mean_equal_flops():
    result = measure_flops(subjects())
    ours, baseline, *_ = result.models
    assert result.ratio == pytest.approx(baseline.step / ours.step)
