"""Copies of tensors that have shapes and no numbers, for modules that are made of copies of one another."""

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class CopiesOfFakes(TorchFunctionMode):
    """While it is entered, ``copy.deepcopy`` of a fake tensor makes one more.

    By itself it copies storage and attributes, among which is the mode that makes tensors fake; the copies are then of
    another mode than all else. ``nn.TransformerEncoder`` is made of such copies of its layer.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            return _copy(*args)
        return func(*args, **(kwargs or {}))


def _copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        values = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if is_parameter else values
        if not is_parameter:
            values.requires_grad_(tensor.requires_grad)
    copied: Tensor = memo[id(tensor)]
    return copied
