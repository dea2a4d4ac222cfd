"""What differs on a GPU: the operators, a training step in every precision, the planner against the allocator."""

import gc

import pytest
import torch

from resnet_bk.bench.contestants import build_model, contestant_configs
from resnet_bk.bench.memory import measure_model_memory
from resnet_bk.bench.stability import accuracy, largest_change_before
from resnet_bk.bench.subject import Subject, random_batch
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.ops import bk_core, bk_tunnel
from resnet_bk.training.config import TrainingConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU = torch.device("cuda")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 127, 1000])
def test_bk_core_is_exact_on_the_gpu(causal, length):
    point = accuracy(causal=causal, length=length, eta=0.5, potential=1.0, device=GPU)
    assert point.value_error < 2e-6
    assert point.gradient_error < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_both_devices_give_the_same(dtype):
    torch.manual_seed(0)
    v = torch.randn(3, 50, 4).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(bk_core(v.to(GPU), 0.5 + 1j).cpu(), bk_core(v, 0.5 + 1j), atol=tolerance, rtol=tolerance)
    gap = v.abs()
    torch.testing.assert_close(bk_tunnel(gap.to(GPU)).cpu(), bk_tunnel(gap), atol=tolerance, rtol=tolerance)


def test_the_operators_pass_torchs_own_checks_on_the_gpu():
    v = torch.randn(2, 50, 3, device=GPU, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([[-2.0, -1.0]] * 3, device=GPU, dtype=torch.float64, requires_grad=True)
    bonds = torch.ones(3, device=GPU, dtype=torch.float64, requires_grad=True)
    state = torch.zeros(2, 3, 2, device=GPU, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.resnet_bk.bk_causal, (v, shift, bonds, state, None, "triton"))
    torch.library.opcheck(torch.ops.resnet_bk.bk_bidirectional, (v, shift, bonds, None, "triton"))
    gap = v.detach().abs().requires_grad_()
    torch.library.opcheck(torch.ops.resnet_bk.bk_tunnel, (gap, state[..., 0].detach(), "triton"))


@pytest.mark.parametrize("key", ["resnet-bk", "transformer"])
def test_no_logit_depends_on_a_later_token(key):
    config = contestant_configs("tiny", {})[key]
    assert largest_change_before(build_model(config, 0), config.vocab_size, GPU, config) <= 1e-10


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("key", ["resnet-bk", "transformer"])
def test_a_training_step_gives_finite_float32_gradients(key, precision):
    config = contestant_configs("tiny", {})[key]
    training = TrainingConfig(batch_size=2, sequence_length=32, precision=precision)
    subject = Subject.build(config, training, random_batch(config, 2, 32, GPU))
    subject.forward().backward()
    for parameter in subject.model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("preset", ["tiny", "seed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("key", ["resnet-bk", "transformer"])
def test_the_planner_never_promises_less_than_the_allocator_takes(preset, precision, key):
    config = contestant_configs(preset, {})[key]
    training = TrainingConfig(batch_size=20, sequence_length=128, precision=precision)
    # The allocator counts what earlier tests left in this process, which is not the model's; and a rest that is not
    # worth splitting off a segment that they took.
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated()
    model = measure_model_memory(key, Subject.build(config, training, random_batch(config, 20, 128, GPU)))
    assert model.peak_step - left <= model.predicted_peak


def test_generation_with_the_state_is_generation_without_it():
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny")).double().eval().to(GPU)
    row = torch.randint(512, (2, 9), device=GPU)
    arguments = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(row), "pad_token_id": 0}
    assert torch.equal(
        model.generate(row, use_cache=True, **arguments), model.generate(row, use_cache=False, **arguments)
    )


@pytest.mark.parametrize("causal", [True, False])
def test_the_operators_can_be_captured_in_a_cuda_graph(causal):
    v = torch.randn(2, 3000, 4, device=GPU)
    expected = bk_core(v, 1j, causal=causal)
    static = torch.zeros_like(v)
    z = torch.full((4,), 1j, device=GPU)  # a Python number would be copied to the device inside the graph
    h0, hopping = torch.full((4,), -2.0, device=GPU), torch.ones(4, device=GPU)
    bk_core(static, z, h0=h0, hopping=hopping, causal=causal)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = bk_core(static, z, h0=h0, hopping=hopping, causal=causal)
    static.copy_(v)
    graph.replay()
    assert torch.equal(result, expected)


@pytest.mark.filterwarnings("ignore")  # torch's own compiler warns of itself, in 2.11
def test_the_kernel_for_windows_compiles_without_a_graph_break():
    torch.manual_seed(0)
    fields = {"num_layers": 1, "local_attention_every": 1, "local_attention_window": 16, "vocab_size": 64}
    model = ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", **fields)).to(GPU).train()
    compiled = torch.compile(model, fullgraph=True)
    input_ids = torch.randint(64, (2, 65), device=GPU)

    def outcome(model):
        torch.manual_seed(1)
        # The router's noise from torch's own generator, the same for both.
        with torch.autocast("cuda", torch.bfloat16), torch._inductor.config.patch(fallback_random=True):
            loss = model(input_ids[:, :-1], shift_labels=input_ids[:, 1:], use_cache=False).loss
        loss.backward()
        found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return loss.item(), found

    (mine, gradients), (other, others) = outcome(compiled), outcome(model)
    assert mine == pytest.approx(other, rel=2e-3)
    for gradient, wanted in zip(gradients, others, strict=True):
        assert (gradient - wanted).norm() <= 0.05 * wanted.norm() + 1e-4
