"""Blocks that keep little for backward: what is missing is computed again, or comes back from host memory."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from resnet_bk.frugal.activations import HostActivations

CheckpointPolicy = Literal["full", "selective", "offload"]
Operator = OpOverload | OpOverloadPacket | HigherOrderOperator | str
# As torch's: (SelectiveCheckpointContext, operator, *args, **kwargs) to torch.utils.checkpoint.CheckpointPolicy.
PolicyFunction = Callable[..., torch_checkpoint.CheckpointPolicy]

# What costs much for each byte of its result. A matrix product is 2 x width operations a number, where everything
# elementwise, norms, rotations and permutations are a few, and as quick to compute again as to read back.
# Batched products are not here: those of attention that is not fused are 2 x (head size) a number, and N^2 numbers.
# They are names, as an operator may be registered by a package that is not there.
SAVED_OPERATORS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_mm",
        "aten::_grouped_mm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "resnet_bk::bk_bidirectional",
        "resnet_bk::bk_causal",
        "resnet_bk::bk_tunnel",
        "resnet_bk::carry",
        "resnet_bk::grouped_product",
        "resnet_bk::linear_in_single",
    }
)


class CheckpointHandle:
    """Of blocks that are checkpointed; ``remove``, or leaving it as a context, gives them their forward back."""

    def __init__(self, blocks: list[nn.Module], host: HostActivations | None) -> None:
        self.blocks = blocks
        self.host = host
        """Where the inputs wait under ``offload``, otherwise None."""

    def remove(self) -> None:
        """Undoes ``checkpoint_blocks``; a second time it does nothing."""
        uncheckpoint_blocks(self.blocks)
        self.blocks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def checkpoint_blocks(
    blocks: Iterable[nn.Module],
    policy: CheckpointPolicy = "full",
    *,
    save: Collection[Operator] | PolicyFunction = SAVED_OPERATORS,
    host: HostActivations | None = None,
    determinism_check: bool = True,
) -> CheckpointHandle:
    """From now on each block keeps little for backward while it trains, and computes the rest again.

    It does so in training mode with gradients enabled; otherwise its forward runs as before. Values and gradients are
    the same, bit for bit: random numbers and autocast are in the second pass as they were in the first. Parameters,
    their names, classes and hooks stay as they are, and a deep copy of a block is checkpointed too. What forward does
    besides it does twice: a batch norm's running statistics move twice as fast, and hooks of modules inside run twice.

    - ``full`` keeps the block's inputs.
    - ``selective`` keeps the results of ``save`` too. Backward can run through its graph once only. As under every
      dispatch mode of torch's, the inside of a custom operator does not see autocast.
    - ``offload`` is as ``full``, with the inputs waiting in host memory.

    ``full`` and ``selective`` are part of the one graph that ``torch.compile`` makes of a model. ``offload`` is not, as
    no compiler sees the copies: a compiled model runs such blocks uncompiled, and ``fullgraph=True`` refuses them.
    Rather give this what ``torch.compile(block)`` returned, or make the blocks of a compiled model ``full`` and enter
    ``HostActivations`` around its call.

    Args:
        blocks: modules, none of them inside another. Tensors among their arguments may be in lists, tuples and dicts.
        policy: what to keep.
        save: under ``selective``, operators, or their names as in ``"aten::mm"``. A packet means all its overloads, a
            name that nobody registered means nothing. Or a function as torch's ``create_selective_checkpoint_contexts``
            takes; then no cast weight may come from autocast's cache, as with several micro-batches in one autocast.
        host: under ``offload``, where inputs wait; new by default, for tensors of at least 1 MiB.
        determinism_check: compare shapes, types and devices of the second pass with the first's.

    Raises:
        ValueError: a block is checkpointed already or inside another, the policy is unknown, ``host`` or ``save`` is
            not for it, or an operator of ``save`` writes to its arguments.
    """
    if policy not in get_args(CheckpointPolicy):
        raise ValueError(f"policy is {policy!r}; give one of {', '.join(get_args(CheckpointPolicy))}")
    if host is not None and policy != "offload":
        raise ValueError(f"host is for policy 'offload', not {policy!r}; leave it out")
    if save is not SAVED_OPERATORS and policy != "selective":
        raise ValueError(f"save is for policy 'selective', not {policy!r}; leave it out")
    blocks = list(dict.fromkeys(blocks))
    for block in blocks:
        if _is_checkpointed(block):
            raise ValueError(f"a {type(block).__name__} is checkpointed already; remove that first")
    inside = {id(module) for block in blocks for module in block.modules() if module is not block}
    for block in blocks:
        if id(block) in inside:
            raise ValueError(f"a {type(block).__name__} is inside another one of the blocks; give one of the two")
    if policy == "offload" and host is None:
        host = HostActivations()
    settings = _Settings(
        saved=_names(save) if policy == "selective" and not callable(save) else None,
        policy=_policy(save) if policy == "selective" else None,
        host=host,
        determinism_check="default" if determinism_check else "none",
    )
    for block in blocks:
        # A partial of the module, not a closure over it: copying the module copies it with the copy inside.
        block.__dict__["forward"] = partial(_checkpointed, block, block.__dict__.get("forward"), settings)
    return CheckpointHandle(blocks, host)


def uncheckpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Gives blocks the forward that they had before ``checkpoint_blocks``, also those of a copied model.

    Raises:
        ValueError: a block is not checkpointed, or something else replaced its forward since.
    """
    blocks = list(blocks)
    for block in blocks:
        if not _is_checkpointed(block):
            raise ValueError(f"a {type(block).__name__} is not checkpointed, or its forward was replaced since")
    for block in blocks:
        _, original, _ = block.__dict__.pop("forward").args
        if original is not None:
            block.__dict__["forward"] = original


@dataclass(frozen=True)
class _Settings:
    saved: frozenset[str] | None
    policy: PolicyFunction | None
    host: HostActivations | None
    determinism_check: str

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Settings":
        return self


def _is_checkpointed(block: nn.Module) -> bool:
    forward = block.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is _checkpointed


def _checkpointed(
    block: nn.Module, original: Callable[..., Any] | None, settings: _Settings, /, *args: Any, **kwargs: Any
) -> Any:
    forward = partial(type(block).forward, block) if original is None else original
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return (_checkpoint if settings.host is None else _offload)(forward, settings, args, kwargs)


def _checkpoint(forward: Callable[..., Any], settings: _Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Only tensors that are arguments themselves are saved as autograd saves them, with its checks and its hooks.
    leaves, structure = tree_flatten((args, kwargs))
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def on_tensors(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        both = [next(rest) if here else other for here, other in zip(is_tensor, others, strict=True)]
        args, kwargs = tree_unflatten(both, structure)
        return forward(*args, **kwargs)

    options: dict[str, Any] = {}
    if settings.policy is not None:
        contexts = partial(torch_checkpoint.create_selective_checkpoint_contexts, settings.policy)
        if settings.saved is not None and not torch.compiler.is_compiling():
            contexts = partial(_contexts_of_saved, contexts, settings.saved)
        options["context_fn"] = contexts
    return torch_checkpoint.checkpoint(
        on_tensors,
        *(leaf for leaf in leaves if isinstance(leaf, Tensor)),
        use_reentrant=False,
        preserve_rng_state=True,
        determinism_check=settings.determinism_check,
        **options,
    )


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="no compiler sees copies to host memory: checkpoint 'full', with HostActivations around the compiled call"
)
def _offload(forward: Callable[..., Any], settings: _Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    assert settings.host is not None
    with settings.host:
        return _checkpoint(forward, settings, args, kwargs)


def _names(save: Collection[Operator]) -> frozenset[str]:
    return frozenset(name for operator in save for name in _names_of(operator))


def _names_of(operator: Operator) -> list[str]:
    if isinstance(operator, str):
        if "::" not in operator:
            raise ValueError(f"{operator!r} is no operator's name; give one such as 'aten::mm'")
        return [operator]
    if isinstance(operator, OpOverloadPacket):
        overloads = [getattr(operator, name) for name in operator.overloads()]  # type: ignore[no-untyped-call]
        # Saving what an operator returns does not save what it wrote.
        names: list[str] = [overload.name() for overload in overloads if not overload._schema.is_mutable]
        if not names:
            raise ValueError(f"{operator} writes to its arguments, so that its result cannot be saved instead of it")
        return names
    if isinstance(operator, OpOverload) and operator._schema.is_mutable:
        raise ValueError(f"{operator} writes to its arguments, so that its result cannot be saved instead of it")
    name: str = operator.name()  # type: ignore[no-untyped-call]
    return [name]


def _policy(save: Collection[Operator] | PolicyFunction) -> PolicyFunction:
    return save if callable(save) else partial(_policy_of_saved, _names(save))


def _policy_of_saved(
    saved: frozenset[str], _context: Any, operator: Any, *_args: Any, **_kwargs: Any
) -> torch_checkpoint.CheckpointPolicy:
    decision = torch_checkpoint.CheckpointPolicy
    return decision.MUST_SAVE if operator.name() in saved else decision.PREFER_RECOMPUTE


def _contexts_of_saved(
    contexts: Callable[[], tuple[TorchDispatchMode, TorchDispatchMode]], saved: frozenset[str]
) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    first, second = contexts()
    return _OnlySaved(first, saved), _OnlySaved(second, saved)


class _OnlySaved(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """One of torch's two selective contexts, which sees nothing but the operators to save.

    torch's count every operator, and the second pass must have no other ones than the first. But it may well have:
    autocast keeps the weights that it has cast while it is entered, so that a second micro-batch casts none, and its
    second pass, when that is over, casts all of them.
    """

    supports_higher_order_operators = True

    def __init__(self, mode: TorchDispatchMode, saved: frozenset[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode, self.saved = mode, saved

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As torch's own: a block may be compiled inside."""
        return True

    def __enter__(self) -> Self:
        with self.mode:
            pass  # it begins to count again
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.name() in self.saved:
            return self.mode.__torch_dispatch__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))
