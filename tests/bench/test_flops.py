"""FLOPs counted while a step runs against the formulas, and against counting by hand."""

import pytest
import torch
import torch.nn.functional as F

from resnet_bk.bench.contestants import Subject, contestant_configs, random_batch
from resnet_bk.bench.flops import _counter, attended_pairs, formula_flops, measure_flops
from resnet_bk.models import ResNetBKConfig
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
    *("sub", "sum", "t", "transpose", "unbind", "unsqueeze", "view", "zeros", "zeros_like"),
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
    ],
    ids=str,
)
def test_what_is_counted_is_what_the_formula_says(shape):
    for model in measure_flops(subjects(**shape)).models:
        assert (model.forward, model.backward) == (model.formula_forward, model.formula_backward), model.contestant


def test_every_operator_without_a_formula_has_been_looked_at():
    for model in measure_flops(subjects()).models:
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


def test_the_formula_of_a_model_by_hand():
    config = ResNetBKConfig(
        vocab_size=10, hidden_size=4, num_layers=2, num_experts=3, intermediate_size=5, num_bk_heads=2
    )
    parts = {part.component: part.forward for part in formula_flops(config, batch_size=2, sequence_length=3)}
    tokens = 6
    assert parts["router"] == 2 * (2 * tokens * 4 * 3)
    assert parts["experts"] == 2 * (2 * tokens * (4 * 5 + 5 * 4))
    assert parts["potential and output projection"] == 2 * (2 * tokens * (4 * 2 + 2 * 2 * 4))
    assert parts["BK-Core"] == 2 * (10 * tokens * 2)
    assert parts["head"] == 3 * (2 * tokens * 4 * 10), "with both gradients, which come with the loss"


def test_equal_parameters_do_not_mean_equal_flops():
    result = measure_flops(subjects())
    ours, baseline = result.models
    assert result.ratio == pytest.approx(baseline.step / ours.step)
