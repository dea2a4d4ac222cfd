"""Section 1: floating-point operations of a training step, counted while it runs and by formula.

Attention is counted as what it has to do, on every device: the pairs that causality, a window or a mask leave, such as
N (N + 1) / 2. torch counts N^2 on a GPU and nothing at all on a CPU. Backward of fused attention recomputes the scores:
5 matrix products to forward's 2.
Of a convolution with a filter for each channel torch counts the weights' gradient for every pair of channels: here
only what is computed.

An operator that has no formula and is not known to do no products is an error, and so is a Triton kernel that is
launched outside of an operator: a count that leaves out a product is worse than none.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.bench.cells import Cell, Outcomes, result_of
from resnet_bk.bench.contestants import BASELINE, OURS
from resnet_bk.bench.setup import Setup
from resnet_bk.bench.subject import Subject
from resnet_bk.models import ResNetBKConfig
from resnet_bk.models.flops import attended_pairs, formula_flops, windowed_pairs
from resnet_bk.schema import FlopsResult, ModelFlops

NAME = "flops"
RESULT = ModelFlops

# Of AdamW per parameter: decay 1, first moment 3, second moment 4, its root, scaling and epsilon 3, update 2; clipping
# squares, adds and multiplies.
OPTIMIZER_FLOPS = 13 + 3

aten = torch.ops.aten
ATTENTION_KERNELS: tuple[Any, ...] = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_cudnn_attention_backward,
    torch.ops.torch_attn._varlen_attn,
    torch.ops.torch_attn._varlen_attn_backward,
)

# Operators that multiply no matrices. Each was seen in a training step and looked at: of ResNet-BK with one of its
# mixers, of a language model of transformers (GPT-2, Llama, GPT-NeoX, OPT, Bloom, Gemma, Mixtral, Mamba), or of torch's
# own layers, in float32 or under autocast; those of a GPU stand for the same work. An operator's form in place (its
# name and an underscore) does what the operator does.
WITHOUT_PRODUCTS = frozenset(
    (
        # Made, copied, moved, looked at in another shape.
        *("alias", "arange", "cat", "clone", "constant_pad_nd", "copy_", "detach", "empty", "empty_like", "expand"),
        *("fill_", "flip", "full", "full_like", "lift_fresh", "new_empty", "new_empty_strided", "new_full"),
        *("new_ones", "new_zeros", "ones", "ones_like", "permute", "repeat", "roll", "scalar_tensor", "select"),
        *("select_backward", "slice", "slice_backward", "split", "split_with_sizes", "squeeze", "stack", "t"),
        *("transpose", "tril", "triu", "unbind", "unfold", "unfold_backward", "unsqueeze", "upsample_nearest1d"),
        *("upsample_nearest1d_backward", "view", "zero_", "zeros", "zeros_like"),
        *("_local_scalar_dense", "_to_copy", "_unsafe_view", "promote_types"),
        # Chosen by number: embeddings, routing, masks.
        *("argmax", "embedding", "embedding_dense_backward", "gather", "histc", "index", "index_add", "index_put"),
        *("index_select", "masked_fill", "masked_scatter", "masked_scatter_backward", "scatter", "scatter_add"),
        *("searchsorted", "sort", "topk", "where"),
        # Random numbers.
        *("bernoulli_", "exponential_", "native_dropout", "native_dropout_backward", "normal_", "rand_like"),
        *("randn_like", "uniform_"),
        # Number by number.
        *("abs", "add", "addcmul", "atan2", "bitwise_and", "bitwise_not", "clamp", "clamp_min", "cos", "div", "elu"),
        *("elu_backward", "eq", "erf", "exp", "expm1", "floor", "floor_divide", "ge", "gelu", "gelu_backward"),
        *("glu", "glu_backward", "gt", "hardsigmoid", "hardsigmoid_backward", "hardswish", "hardswish_backward"),
        *("hardtanh", "hardtanh_backward", "isnan", "le", "leaky_relu", "leaky_relu_backward", "lerp", "log"),
        *("log1p", "log_sigmoid_backward", "log_sigmoid_forward", "logical_and", "logical_or", "lt", "maximum"),
        *("minimum", "mish", "mish_backward", "mul", "nan_to_num", "ne", "neg", "pow", "reciprocal", "relu"),
        *("remainder", "round", "rsqrt", "rsub", "sgn", "sigmoid", "sigmoid_backward", "sign", "silu"),
        *("silu_backward", "sin", "sinh", "softplus", "softplus_backward", "sqrt", "sub", "tanh", "tanh_backward"),
        *("threshold_backward", "_prelu_kernel", "_prelu_kernel_backward"),
        # Sums over one tensor, and what is made of them: norms, softmax, losses, pooling.
        *("all", "amax", "aminmax", "any", "avg_pool2d", "avg_pool2d_backward", "binary_cross_entropy_with_logits"),
        *("cudnn_batch_norm", "cudnn_batch_norm_backward", "cumprod", "cumsum", "linalg_vector_norm", "logsumexp"),
        *("max", "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "mean", "min", "mse_loss"),
        *("mse_loss_backward", "native_batch_norm", "native_batch_norm_backward", "native_group_norm"),
        *("native_group_norm_backward", "native_layer_norm", "native_layer_norm_backward", "nll_loss_backward"),
        *("nll_loss_forward", "prod", "smooth_l1_loss", "smooth_l1_loss_backward", "std", "sum", "var"),
        *("_fused_rms_norm", "_fused_rms_norm_backward", "_log_softmax", "_log_softmax_backward_data"),
        *("_safe_softmax", "_softmax", "_softmax_backward_data"),
        *("resnet_bk.gated_norm", "resnet_bk.gated_norm_backward"),
        *("resnet_bk.layer_norm", "resnet_bk.layer_norm_backward"),
    )
)
# Triton kernels launched outside of an operator that multiply no matrices: loss and gradient from a chunk of logits.
KERNELS_WITHOUT_PRODUCTS = frozenset({"resnet_bk.ops.loss_kernels.loss_kernel"})


class UncountedOperatorError(Exception):
    """An operator ran that may do products and has no FLOP formula."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} has no FLOP formula, and is not known to do no products; register one with "
            "torch.utils.flop_counter.register_flop_formula"
        )


@dataclass(frozen=True, kw_only=True)
class Counted:
    """FLOPs of both passes over a batch, and the operators that count nothing."""

    forward: int
    backward: int
    without_products: list[str]


def cells(setup: Setup, _: Outcomes) -> list[Cell]:
    """One for each contestant."""
    return [Cell(section=NAME, name=key, weight=2, timed=False) for key in setup.contenders]


def measure(setup: Setup, cell: Cell) -> ModelFlops:
    """Counts one step."""
    return model_flops(cell.name, setup.subject(cell.name), setup.contenders[cell.name].config)


def assemble(setup: Setup, outcomes: Outcomes) -> FlopsResult | None:
    """All contestants that could be counted, and the ratios if ours and the baseline are among them."""
    results: dict[str, ModelFlops | None] = {key: result_of(outcomes, key) for key in setup.contenders}
    found = {key: result for key, result in results.items() if result is not None}
    if not found:
        return None
    ratio = forward_ratio = None
    if {OURS, BASELINE} <= set(found):
        ours, baseline = found[OURS], found[BASELINE]
        ratio, forward_ratio = baseline.step / ours.step, baseline.forward / ours.forward
    return FlopsResult(models=list(found.values()), ratio=ratio, forward_ratio=forward_ratio)


def model_flops(key: str, subject: Subject, config: ResNetBKConfig | None = None) -> ModelFlops:
    """FLOPs of a training step of one batch; by formula too if the model is ours, of ``config``.

    Raises:
        UncountedOperatorError: an operator has no formula, and may do products.
    """
    counted = count_passes(subject)
    trained = sum(parameter.numel() for parameter in subject.model.parameters() if parameter.requires_grad)
    optimizer = OPTIMIZER_FLOPS * trained
    tokens = positions(subject)
    components = [] if config is None else formula_flops(config, *subject.inputs.shape)
    return ModelFlops(
        contestant=key,
        forward=counted.forward,
        backward=counted.backward,
        optimizer=optimizer,
        forward_per_token=counted.forward / tokens,
        step_per_token=(counted.forward + counted.backward + optimizer) / tokens,
        counted_as_zero=counted.without_products,
        components=components,
        formula_forward=sum(part.forward for part in components) or None,
        formula_backward=sum(part.backward for part in components) or None,
        seed_forward=None if config is None else seed_forward(config, *subject.inputs.shape),
    )


def positions(subject: Subject) -> int:
    """Tokens of the batch; rows where the inputs are no tokens."""
    inputs = subject.inputs
    return len(inputs) if inputs.is_floating_point() else inputs.numel()


def count_passes(subject: Subject) -> Counted:
    """Counts forward and backward of the batch while they run; leaves no gradients.

    Raises:
        UncountedOperatorError: an operator has no formula, and may do products.
    """
    forward, backward = flop_counter(), flop_counter()
    review = _Review(forward)
    try:
        with _reviewed_launches(review):
            with forward, review:
                loss = subject.forward()
            with backward, review:
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        subject.optimizer.zero_grad(set_to_none=True)
    totals = [counter.get_total_flops() for counter in (forward, backward)]
    if not all(totals):
        raise UncountedOperatorError("a whole pass (is the model compiled? then its operators are not seen, and it)")
    return Counted(forward=totals[0], backward=totals[1], without_products=sorted(review.names))


def seed_forward(config: ResNetBKConfig, batch_size: int, sequence_length: int) -> int | None:
    """What the formulas of the document that this project began with give for a model with its mixer; None for others.

    They count multiply-adds once, the recursions of one row whatever the batch, and neither the potential's projection
    nor the head; experts are twice the hidden size wide.
    """
    if config.mixer != "bk":
        return None
    tokens, hidden, experts = batch_size * sequence_length, config.hidden_size, config.num_experts
    core = (6 + 6 + 8 + 2) * sequence_length
    mixture = tokens * hidden * experts + 10 * tokens * experts + tokens * 2 * (hidden * 2 * hidden)
    projection = tokens * 2 * hidden
    return config.num_layers * (core + mixture + projection)


def flop_counter() -> FlopCounterMode:
    """torch's counter with what it has no formula for, or another than what is computed."""
    mapping: dict[Any, Any] = {kernel: _attention_formula(kernel) for kernel in ATTENTION_KERNELS}
    mapping[aten.convolution_backward] = _convolution_backward
    mapping |= dict.fromkeys((aten.addmm, aten.addmm_, aten._addmm_activation, aten.baddbmm_), _added_product)
    mapping |= {aten.mv: _matrix_vector, aten.dot: _dot, aten.vdot: _dot, aten._grouped_mm: _grouped_product}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _added_product(_: torch.Size, left: torch.Size, right: torch.Size, *__: Any, **___: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _matrix_vector(matrix_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix_shape)


def _dot(shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(shape)


def _grouped_product(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """Of groups of rows ``(T, K)`` with ``(E, K, M)``, or of columns ``(K, T)`` with ``(T, M)``: each number of the
    left is multiplied with M. Groups on both sides have a matrix each."""
    return 2 * math.prod(left) * right[-1]


def _convolution_backward(*args: Any, **_: Any) -> int:
    """Each gradient that is wanted costs what forward does: a product for each output, filter tap and input channel."""
    grad_shape, weight_shape, output_mask = args[0], args[2], args[-1]
    forward = 2 * grad_shape[0] * math.prod(grad_shape[2:]) * math.prod(weight_shape)
    return int(forward * sum(output_mask[:2]))


def _attention_formula(kernel: Any) -> Callable[..., int]:
    names = [argument.name for argument in kernel.default._schema.arguments]
    backward = any(name.startswith("grad_out") for name in names)

    def flops(*args: Any, **kwargs: Any) -> int:
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        key_width, value_width = bound["query"].shape[-1], bound["value"].shape[-1]
        widths = 3 * key_width + 2 * value_width if backward else key_width + value_width
        return int(2 * _pairs_of(bound) * widths)

    flops._get_raw = True  # type: ignore[attr-defined]  # torch's counter hands on tensors, not their shapes
    return flops


def _pairs_of(bound: dict[str, Any]) -> int:
    """Query-key pairs of all rows and heads that an attention kernel called like this has to look at."""
    query, key = bound["query"], bound["key"]
    if "cu_seq_q" in bound:
        rows = len(bound["cu_seq_q"]) - 1
        window = bound["window_size"][0] + 1
        return int(rows * query.shape[1] * windowed_pairs(bound["max_q"], bound["max_k"], window))
    batch_size, heads, queries, _ = query.shape
    mask = bound.get("attn_mask", bound.get("attn_bias"))
    if mask is None or not mask.numel():
        return int(batch_size * heads * attended_pairs(queries, key.shape[2], bool(bound.get("is_causal", False))))
    share = int((mask if mask.dtype == torch.bool else mask > -math.inf).sum())
    return int(share * batch_size * heads * queries * key.shape[2] // mask.numel())


class _Review(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Stops at an operator that nobody counts, unless it is known to do no products; names those that are."""

    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._formulas = counter.flop_registry
        self.names: set[str] = set()
        self.inside = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            if func not in self._formulas:
                raise UncountedOperatorError(str(func))
        elif func._overloadpacket not in self._formulas:
            name = str(func._overloadpacket).removeprefix("aten.")
            if not {name, name.removesuffix("_")} & WITHOUT_PRODUCTS:
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is NotImplemented:
                    raise UncountedOperatorError(name)
                return result
            self.names.add(name)
        before, self.inside = self.inside, True
        try:
            return func(*args, **kwargs)
        finally:
            self.inside = before


@contextmanager
def _reviewed_launches(review: _Review) -> Iterator[None]:
    """Triton kernels that are launched outside of an operator pass torch's modes by: here they do not."""
    try:
        from triton.runtime.jit import KernelInterface
    except ImportError:
        yield
        return
    original = KernelInterface.__getitem__

    def launcher(kernel: Any, grid: Any) -> Any:
        if not review.inside and (name := _kernel_name(kernel)) not in KERNELS_WITHOUT_PRODUCTS:
            raise UncountedOperatorError(f"the Triton kernel {name}, launched outside of an operator,")
        return original(kernel, grid)

    KernelInterface.__getitem__ = launcher
    try:
        yield
    finally:
        KernelInterface.__getitem__ = original


def _kernel_name(kernel: Any) -> str:
    """Of the function that autotuners and heuristics are wrapped around."""
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return f"{kernel.__module__}.{kernel.__qualname__}"
