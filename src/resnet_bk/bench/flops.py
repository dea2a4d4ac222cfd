"""Section 1: floating-point operations of a training step, counted while it runs and by formula.

Causal attention is counted as what it has to do, N (N + 1) / 2 pairs, on every device: torch counts N^2 on a GPU and
nothing at all on a CPU. Backward of fused attention recomputes the scores: 5 matrix products to forward's 2.
Of a convolution with a filter for each channel torch counts the weights' gradient for every pair of channels: here
only what is computed.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from resnet_bk.bench.contestants import BASELINE, OURS, Subject
from resnet_bk.models.flops import attended_pairs, formula_flops
from resnet_bk.schema import FlopsResult, ModelFlops

# Of AdamW per parameter: decay 1, first moment 3, second moment 4, its root, scaling and epsilon 3, update 2; clipping
# squares, adds and multiplies.
OPTIMIZER_FLOPS = 13 + 3

aten = torch.ops.aten
# Where each kernel has its is_causal among the positional arguments, and which matrix products it does.
ATTENTION_KERNELS: tuple[tuple[Any, int, int, int], ...] = (
    # operator, index of the query, index of is_causal, matrix products
    (aten._scaled_dot_product_flash_attention_for_cpu, 0, 4, 2),
    (aten._scaled_dot_product_flash_attention_for_cpu_backward, 1, 7, 5),
    (aten._scaled_dot_product_flash_attention, 0, 4, 2),
    (aten._scaled_dot_product_flash_attention_backward, 1, 11, 5),
    (aten._scaled_dot_product_efficient_attention, 0, 6, 2),
    (aten._scaled_dot_product_efficient_attention_backward, 1, 11, 5),
    (aten._scaled_dot_product_cudnn_attention, 0, 6, 2),
    (aten._scaled_dot_product_cudnn_attention_backward, 1, 14, 5),
)


def measure_flops(subjects: Mapping[str, Subject]) -> FlopsResult:
    """Counts one step of every contestant."""
    models = [_model_flops(key, subject) for key, subject in subjects.items()]
    steps = {model.contestant: model.step for model in models}
    return FlopsResult(models=models, ratio=steps[BASELINE] / steps[OURS])


def _model_flops(key: str, subject: Subject) -> ModelFlops:
    counted_as_zero = _OperatorsWithoutFormula()
    forward_counter, backward_counter = _counter(), _counter()
    with counted_as_zero:
        with forward_counter:
            loss = subject.forward()
        with backward_counter:
            loss.backward()  # type: ignore[no-untyped-call]
    subject.optimizer.zero_grad(set_to_none=True)
    config = subject.model.config
    batch_size, sequence_length = subject.input_ids.shape
    components = formula_flops(config, batch_size, sequence_length)
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    forward = forward_counter.get_total_flops()
    return ModelFlops(
        contestant=key,
        forward=forward,
        backward=backward_counter.get_total_flops(),
        optimizer=OPTIMIZER_FLOPS * parameters,
        forward_per_token=forward / subject.input_ids.numel(),
        components=components,
        formula_forward=sum(part.forward for part in components),
        formula_backward=sum(part.backward for part in components),
        counted_as_zero=sorted(counted_as_zero.names),
    )


def _counter() -> FlopCounterMode:
    mapping: dict[Any, Any] = {kernel: _attention_formula(*rest) for kernel, *rest in ATTENTION_KERNELS}
    mapping[aten.convolution_backward] = _convolution_backward
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _convolution_backward(*args: Any, **_: Any) -> int:
    """Each gradient that is wanted costs what forward does: a product for each output, filter tap and input channel."""
    grad_shape, weight_shape, output_mask = args[0], args[2], args[-1]
    forward = 2 * grad_shape[0] * math.prod(grad_shape[2:]) * math.prod(weight_shape)
    return int(forward * sum(output_mask[:2]))


def _attention_formula(query: int, is_causal: int, products: int) -> Callable[..., int]:
    def flops(*args: Any, **kwargs: Any) -> int:
        causal = bool(args[is_causal]) if len(args) > is_causal else bool(kwargs.get("is_causal", False))
        batch_size, heads, queries, width = args[query]
        keys = args[query + 1][2]
        pairs = attended_pairs(queries, keys, causal)
        return int(2 * products * batch_size * heads * pairs * width)

    return flops


class _OperatorsWithoutFormula(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Names the operators that ran and that nobody counted: elementwise work, sums, sorts and copies, one hopes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counted = {*flop_registry, *(kernel for kernel, *_ in ATTENTION_KERNELS)}
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._overloadpacket not in self._counted:
            self.names.add(str(func._overloadpacket))
        return func(*args, **(kwargs or {}))
