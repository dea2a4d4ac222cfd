"""On a GPU: experts and loss by each of their kernels, and a training step that never waits for the device."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.ops.grouped import choose_moe_backend
from resnet_bk.ops.loss import cross_entropy, linear_cross_entropy
from resnet_bk.ops.moe import chosen_expert
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.step import build_scaler, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU = torch.device("cuda")
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@contextlib.contextmanager
def no_waiting():
    """Whatever waits for the GPU raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def experts(tokens, hidden, width, groups, dtype):
    generator = torch.Generator(GPU).manual_seed(0)
    make = lambda *size: torch.randn(*size, generator=generator, device=GPU, dtype=torch.float64)  # noqa: E731
    x, up, down = make(tokens, hidden), make(groups, hidden, width) / hidden**0.5, make(groups, width, hidden)
    expert = torch.randint(groups, (tokens,), generator=generator, device=GPU)
    # One expert gets nothing.
    return [t.to(dtype).requires_grad_() for t in (x, up, down / width**0.5)], expert.masked_fill(expert == 1, 0)


def relative_error(found, exact):
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 16, 2), (300, 20, 36, 5), (2560, 64, 128, 4), (8192, 512, 1024, 8)], ids=str)
def test_every_backend_of_the_experts_is_exact_and_waits_for_nothing(shape, dtype):
    (x, up, down), expert = experts(*shape, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, up, down)]
    assert choose_moe_backend(GPU, torch.float64, *shape[:3]).name == "loop"
    wanted = chosen_expert(exact[0], expert, *exact[1:])
    grad = torch.randn_like(wanted)
    with no_waiting():
        found = chosen_expert(x, expert, up, down)
        gradients = torch.autograd.grad(found, (x, up, down), grad.to(dtype))
    for ours, theirs in zip((found, *gradients), (wanted, *torch.autograd.grad(wanted, exact, grad)), strict=True):
        assert relative_error(ours, theirs) < 2 * ROUNDING[dtype]
    assert not gradients[1][1].any(), "an expert without tokens has a gradient of zeros"


def test_large_products_in_bfloat16_are_torchs_own_kernels():
    if torch.cuda.get_device_capability()[0] in (9, 10):
        assert choose_moe_backend(GPU, torch.bfloat16, 8192, 512, 1024).name == "grouped_mm"


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "vocab_size"), [(3, 11), (600, 70_000)])
def test_the_loss_is_the_plain_one_and_waits_for_nothing(tokens, vocab_size, precision):
    generator = torch.Generator(GPU).manual_seed(0)
    x = torch.randn(2, tokens, 32, generator=generator, device=GPU).requires_grad_()
    w = (torch.randn(vocab_size, 32, generator=generator, device=GPU) / 4).requires_grad_()
    targets = torch.randint(vocab_size, (2, tokens), generator=generator, device=GPU)
    targets[:, -1] = -100
    scale = 1024.0 if precision == torch.float16 else 1.0
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, w)]
    wanted = cross_entropy(F.linear(*exact), targets)
    with no_waiting(), torch.autocast("cuda", precision, enabled=precision is not None):
        found = linear_cross_entropy(x, w, targets)
        gradients = torch.autograd.grad(found, (x, w), torch.full_like(found, scale))
    rounding = ROUNDING[precision or torch.float32]
    assert relative_error(found, wanted) < 2 * rounding
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, exact), strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours / scale, theirs) < 4 * rounding


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mixer", ["bk", "attention"])
def test_a_training_step_waits_for_nothing(mixer, precision):
    torch.manual_seed(0)
    config = ResNetBKConfig.from_preset("tiny", mixer=mixer, router_bias_update_rate=0.01)
    model = ResNetBKForCausalLM(config).to(GPU).train()
    training = TrainingConfig(precision=precision, gradient_accumulation_steps=2)
    optimizer, scaler = build_optimizer(model, training), build_scaler(GPU, precision)
    ids = torch.randint(512, (4, 33))
    batches = 2 * [(ids[:, :-1], ids[:, 1:])]
    train_step(model, optimizer, scaler, batches, training, 0)
    with no_waiting():
        result = train_step(model, optimizer, scaler, batches, training, 1)
    assert torch.isfinite(result.cross_entropy)
