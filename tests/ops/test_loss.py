"""The chunked loss against the plain one: values, gradients, precision, memory and work."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.memory.tracking import TensorTracker
from resnet_bk.ops import loss as module
from resnet_bk.ops.bk.api import BackendChoice
from resnet_bk.ops.loss import choose_loss_backend, chunk_rows, cross_entropy, linear_cross_entropy, shift_targets


def plain(hidden, weight, targets):
    return cross_entropy(F.linear(hidden, weight), targets)


def inputs(batch=2, length=9, hidden=6, vocab=11, dtype=torch.float64, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, hidden, generator=generator, dtype=torch.float64).to(dtype)
    w = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab, (batch, length), generator=generator)
    targets[torch.rand(batch, length, generator=generator) < ignored] = -100
    return x.requires_grad_(), w.requires_grad_(), targets


def gradients(function, hidden, weight, targets, scale=1.0):
    return torch.autograd.grad(function(hidden, weight, targets) * scale, (hidden, weight))


def relative_error(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 7 tokens, so that small inputs have several, the last of them short."""
    monkeypatch.setattr(module, "chunk_rows", lambda *shape, **_: 7)


def test_targets_are_the_next_tokens():
    labels = torch.tensor([[5, 6, 7], [8, -100, 9]])
    assert shift_targets(labels).tolist() == [[6, 7, -100], [-100, 9, -100]]


def test_the_loss_is_the_mean_over_real_targets():
    logits, targets = torch.randn(2, 3, 11), torch.tensor([[1, -100, 3], [4, 5, -100]])
    log_p = F.log_softmax(logits.double(), dim=-1)
    expected = -torch.stack([log_p[0, 0, 1], log_p[0, 2, 3], log_p[1, 0, 4], log_p[1, 1, 5]]).mean()
    assert torch.allclose(cross_entropy(logits, targets).double(), expected, rtol=1e-6)


def test_half_precision_logits_lose_nothing_in_the_loss():
    logits, targets = torch.randn(2, 3, 11).bfloat16(), torch.randint(11, (2, 3))
    assert cross_entropy(logits, targets).dtype == torch.float32
    assert torch.equal(cross_entropy(logits, targets), cross_entropy(logits.float(), targets))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 12),
    hidden=st.integers(1, 5),
    vocab=st.integers(1, 9),
    rows=st.integers(1, 13),
    ignored=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_the_plain_ones_whatever_the_chunks(batch, length, hidden, vocab, rows, ignored, seed):
    x, w, targets = inputs(batch, length, hidden, vocab, seed=seed, ignored=ignored)
    targets[0, 0] = 0  # at least one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "chunk_rows", lambda *shape, **_: rows)
        torch.testing.assert_close(linear_cross_entropy(x, w, targets), plain(x, w, targets), rtol=1e-12, atol=1e-13)
        for ours, exact in zip(
            gradients(linear_cross_entropy, x, w, targets, -3.0), gradients(plain, x, w, targets, -3.0), strict=True
        ):
            torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_in_the_inputs_dtype_and_no_worse_than_the_plain_one(small_chunks, dtype):
    x, w, targets = inputs(4, 50, 16, 300, dtype=dtype)
    exact = gradients(plain, x.double(), w.double(), targets)
    ours, theirs = gradients(linear_cross_entropy, x, w, targets), gradients(plain, x, w, targets)
    assert linear_cross_entropy(x, w, targets).dtype == dtype
    for mine, other, wanted in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, wanted) <= 2 * relative_error(other, wanted) + 1e-15


def test_torchs_own_gradient_check(small_chunks):
    x, w, targets = inputs()
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets), (x, w))


@pytest.mark.parametrize("shape", [{"batch": 0}, {"length": 0}, {"ignored": 1.0}], ids=str)
def test_without_any_target_it_is_what_the_plain_one_is(shape):
    x, w, targets = inputs(**shape)
    assert torch.isnan(plain(x, w, targets)) and torch.isnan(linear_cross_entropy(x, w, targets))
    for ours, theirs in zip(
        gradients(linear_cross_entropy, x, w, targets), gradients(plain, x, w, targets), strict=True
    ):
        assert torch.equal(ours, theirs) and not ours.any()


def test_a_target_outside_the_vocabulary_is_refused_as_the_plain_one_does():
    x, w, targets = inputs()
    targets[0, 0] = 11
    for function in (linear_cross_entropy, plain):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            function(x, w, targets)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_costs_no_work(frozen):
    given_inputs = list(inputs(ignored=0.0))
    given_inputs[frozen] = given_inputs[frozen].detach()
    x, w, targets = given_inputs
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, w, targets).backward()
    assert counter.get_total_flops() == 2 * (2 * 18 * 6 * 11)
    assert (x.grad is None, w.grad is None) == (frozen == 0, frozen == 1)
    wanted = gradients(plain, *inputs(ignored=0.0))[1 - frozen]
    torch.testing.assert_close((w, x)[frozen].grad, wanted)


def test_evaluation_computes_no_gradient():
    x, w, targets = inputs(ignored=0.0)
    forward = 2 * 18 * 6 * 11
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(x, w, targets)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, w, targets).backward()
    assert counter.get_total_flops() == 3 * forward, "no logit twice"


def test_backward_again_gives_the_same_and_adds_up(small_chunks):
    x, w, targets = inputs()
    loss = linear_cross_entropy(x, w, targets)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(2 * loss, (x, w))
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b), "the second time must not reach into what the first gave away"
        torch.testing.assert_close(2 * a, c)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_second_derivative_is_refused():
    x, w, targets = inputs()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(x, w, targets), x, create_graph=True)


def test_a_tied_head_adds_its_gradient_to_the_embeddings():
    ids = torch.randint(11, (2, 9))
    results = []
    for function in (linear_cross_entropy, plain):
        w = inputs()[1].detach().requires_grad_()
        function(torch.tanh(F.embedding(ids, w)), w, ids.roll(1)).backward()
        results.append(w.grad)
    torch.testing.assert_close(*results)


def test_under_activation_checkpointing(small_chunks):
    x, w, targets = inputs()
    through = lambda *arguments: torch.utils.checkpoint.checkpoint(  # noqa: E731
        linear_cross_entropy, *arguments, use_reentrant=False
    )
    for ours, theirs in zip(gradients(through, x, w, targets), gradients(plain, x, w, targets), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_multiplies_in_the_half_type_and_is_no_worse_than_the_plain_one(small_chunks, dtype):
    x, w, targets = inputs(4, 50, 16, 300, dtype=torch.float32)
    exact = gradients(plain, x.double(), w.double(), targets)
    with torch.autocast("cpu", dtype):
        ours, theirs = (gradients(f, x, w, targets) for f in (linear_cross_entropy, plain))
        loss = linear_cross_entropy(x, w, targets).detach()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(x, w, targets).detach(), rtol=2e-3, atol=0)
    for mine, other, wanted in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.float32
        assert relative_error(mine, wanted) <= 1.2 * relative_error(other, wanted)


def test_float16_keeps_gradients_that_are_small_only_for_being_divided():
    """p - onehot over the count is below float16's smallest number for most of the vocabulary, p - onehot is not."""
    x, w, targets = inputs(32, 256, 8, 5000, dtype=torch.float32, ignored=0.0)
    x = (1 + x / 10).detach().requires_grad_()
    exact = gradients(plain, x.double(), w.double(), targets)
    with torch.autocast("cpu", torch.float16):
        ours, theirs = (gradients(f, x, w, targets) for f in (linear_cross_entropy, plain))
    assert all(relative_error(a, b) < 2e-3 for a, b in zip(ours, exact, strict=True))
    assert relative_error(theirs[1], exact[1]) > 1e-2, "without a loss scale the plain one loses them"


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_float16_sums_over_many_tokens_do_not_overflow(scale):
    x = torch.full((1, 4096, 4), 50.0, requires_grad=True)
    w = torch.zeros(8, 4, requires_grad=True)
    targets = torch.zeros(1, 4096, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        _, weight_bar = gradients(linear_cross_entropy, x, w, targets, scale)
    assert torch.allclose(weight_bar[0], torch.tensor(-50.0 * 7 / 8 * scale), rtol=1e-3)


def test_a_model_in_half_precision_gets_gradients_in_half_precision(small_chunks):
    x, w, targets = inputs(dtype=torch.bfloat16)
    for ours, theirs in zip(
        gradients(linear_cross_entropy, x, w, targets), gradients(plain, x, w, targets), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.01)


def test_chunks_are_bounded_by_bytes_or_by_the_heads_own_gradient():
    assert chunk_rows(2560, 30_000, 64, bytes_per_logit=8) * 30_000 * 8 <= module.CHUNK_BYTES
    assert chunk_rows(2560, 2048, 64, bytes_per_logit=8) >= 2560, "few logits are one chunk"
    assert chunk_rows(8192, 32_768, 3072, bytes_per_logit=2) == 3072
    assert chunk_rows(2**20, 32_768, 512, bytes_per_logit=8) == 2**20 // module.MOST_CHUNKS
    assert chunk_rows(1, 10**9, 1, bytes_per_logit=8) == 1


def test_the_logits_of_the_seeds_batch_are_never_there():
    hidden, weight = torch.randn(20, 128, 64, requires_grad=True), torch.randn(30_000, 64, requires_grad=True)
    targets = torch.randint(30_000, (20, 128))
    with TensorTracker() as tracker:
        linear_cross_entropy(hidden, weight, targets).backward()
    logits, head = 4 * 20 * 128 * 30_000, 4 * 30_000 * 64
    small_change = 4 * 2**20
    assert tracker.peak_bytes < module.CHUNK_BYTES + 2 * head + small_change < logits / 3
    assert tracker.current_bytes < 2 * head + small_change, "the head and its gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # Triton's interpreter has no bfloat16
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 17), (2, 5000), (2, 9000), (0, 5)])
def test_the_kernel_gives_loss_and_gradient_in_the_logits_place(dtype, rows, vocab):
    from resnet_bk.ops.loss_gpu import loss_in_place

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    targets = torch.randint(vocab, (rows, 1), generator=generator)
    logits[:1, :1], targets[:1] = 40.0, 0  # a certain target: p - 1 is small and exact
    exact = F.log_softmax(logits.double(), dim=1)
    kept, result = logits.to(device, copy=True), logits.to(device, copy=True)
    assert torch.equal(
        loss_in_place(kept, targets.to(device), want_gradient=False),
        loss_in_place(result, targets.to(device), want_gradient=True),
    )
    assert torch.equal(kept.cpu(), logits)
    nats = loss_in_place(kept, targets.to(device), want_gradient=False).cpu()
    torch.testing.assert_close(nats.double(), -exact.gather(1, targets), rtol=1e-6, atol=1e-5)
    wanted = exact.exp().scatter(1, targets, exact.gather(1, targets).expm1())
    torch.testing.assert_close(result.cpu().double(), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_with_the_kernel_the_loss_and_its_gradients_are_the_same(monkeypatch, small_chunks, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, w, targets = (tensor.detach().to(device) for tensor in inputs(2, 9, 16, 40, dtype=torch.float32))
    x, w, results = x.requires_grad_(), w.requires_grad_(), []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(module, "choose_loss_backend", lambda *_, name=backend: BackendChoice(name=name, reason=""))
        with torch.autocast(device, dtype, enabled=dtype == torch.float16):
            results.append(
                [linear_cross_entropy(x, w, targets).detach(), *gradients(linear_cross_entropy, x, w, targets)]
            )
    for plain_torch, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain_torch, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=1e-6)


def test_the_backend_follows_the_device_and_dtype():
    assert choose_loss_backend(torch.device("cpu"), torch.float32).name == "torch"
    assert choose_loss_backend(torch.device("cuda"), torch.float64).name == "torch"
    assert choose_loss_backend(torch.device("cuda"), torch.bfloat16).name == "triton"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("training", [True, False])
def test_compiled_as_one_graph_it_is_the_same(small_chunks, training):
    x, w, targets = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x, w, targets), linear_cross_entropy(x, w, targets))
    if training:
        for ours, theirs in zip(
            gradients(compiled, x, w, targets), gradients(linear_cross_entropy, x, w, targets), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
