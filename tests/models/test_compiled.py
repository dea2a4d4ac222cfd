"""The whole model as one graph: torch.compile finds nothing that it has to leave to Python."""

import shutil

import pytest
import torch

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM

pytestmark = [
    pytest.mark.slow,
    # torch's own, while it traces and compiles
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled:UserWarning"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)


def tiny(**overrides):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", **overrides)).to(DEVICE)


def tokens(seed=0):
    return torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def loss_and_gradients(model, run, row):
    """Of ``run``, which is the model or its compiled form, with the same routing noise for both."""
    torch.manual_seed(1)
    model.zero_grad()
    output = run(row, labels=row, use_cache=False)
    output.loss.backward()
    # In evaluation nothing leads to the routers: eager leaves their gradients out, the compiler gives zeros.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [output.loss.detach(), *gradients]


def compare(backend, mixer, training, **overrides):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny(mixer=mixer, **overrides).train(training)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(2):
        row = tokens(seed)
        ours, eager = (loss_and_gradients(model, run, row) for run in (compiled, model))
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "other tokens and routes need no other graph"


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention", "local"])
def test_one_graph_gives_the_same_loss_and_gradients(mixer, training):
    compare("aot_eager", mixer, training, router_bias_update_rate=0.01)


@needs_compiler
@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention"])
def test_compiled_code_gives_the_same_loss_and_gradients(mixer):
    # What joins two blocks is the same for all mixers, and a second one takes as long to compile as the first.
    layers = 2 if mixer == "attention" else 1
    with torch._inductor.config.patch(fallback_random=True):  # noise from torch's own generator, to compare with
        compare("inductor", mixer, training=True, num_layers=layers)


@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention", "local"])
def test_logits_without_targets_are_one_graph_too(mixer):
    torch._dynamo.reset()
    model, row = tiny(mixer=mixer).eval(), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = compiled(row, use_cache=False).logits
    torch.testing.assert_close(logits, model(row, use_cache=False).logits.detach())
