"""The resolvent mixer in a whole model: causality, decoding, padding, memories at the start, gradients, precision."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from resnet_bk.models import ResNetBKCache, ResNetBKConfig, ResNetBKForCausalLM

KINDS = {
    "tunnelling": {},
    "tunnelling-no-convolution": {"conv_size": 0},
    "scattering": {"resolvent_regime": "scattering"},
    "scattering-no-convolution": {"resolvent_regime": "scattering", "conv_size": 0},
    "vector": {"resolvent_state": "vector"},
    "vector-no-convolution": {"resolvent_state": "vector", "conv_size": 0},
    "narrow-keys": {"resolvent_key_size": 6, "num_resolvent_heads": 4},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(kind="tunnelling", **overrides):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", **{**KINDS[kind], **overrides})).eval()


def tokens(batch_size=2, length=150, seed=0):
    return torch.randint(512, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def assert_states_equal(actual, expected, **tolerance):
    for ours, theirs in zip(actual.layers, expected.layers, strict=True):
        assert ours.state.keys() == theirs.state.keys()
        for name, x in theirs.state.items():
            torch.testing.assert_close(
                ours.state[name], x, **tolerance, msg=lambda words, name=name: f"{name}: {words}"
            )


# Causality


@every_kind
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("position", [1, 63, 64, 100, 149])
def test_logits_before_a_changed_token_keep_every_bit(kind, training, position):
    model, row = tiny(kind).train(training), tokens()
    changed = row.clone()
    changed[:, position] = (changed[:, position] + 1) % 512
    logits = []
    for ids in (row, changed):
        torch.manual_seed(1)  # of the routing noise
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(logits[0][:, :position], logits[1][:, :position])
    assert (logits[0][:, position] - logits[1][:, position]).abs().max() > 1e-4


# Decoding


@every_kind
@pytest.mark.parametrize("pieces", [[1] * 140, [1, 17, 64, 2, 56], [139, 1], [70, 70]], ids=str)
def test_pieces_with_a_cache_are_the_whole_row(kind, pieces):
    model, row = tiny(kind).double(), tokens(length=140)
    with torch.no_grad():
        whole = model(row, use_cache=True)
        cache, logits = ResNetBKCache(model.config), []
        for piece in row.split(pieces, dim=1):
            logits.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, rtol=0, atol=1e-9)
    assert_states_equal(cache, whole.past_key_values, rtol=1e-9, atol=1e-9)


@every_kind
def test_the_state_has_a_size_that_no_number_of_tokens_changes(kind):
    model, cache, sizes = tiny(kind), None, []
    for length in (1, 2, 300, 1):
        with torch.no_grad():
            cache = model(tokens(3, length), past_key_values=cache, use_cache=True).past_key_values
        sizes.append(cache.num_bytes)
        assert all(x.untyped_storage().nbytes() <= x.nbytes for layer in cache.layers for x in layer.state.values())
    assert cache.get_seq_length() == 304
    assert len(set(sizes)) == 1


# Padding


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_each_row_alone_in_logits_and_state(kind, side):
    model = tiny(kind).double()
    lengths, longest = (70, 1, 2, 90), 90
    rows, mask = tokens(4, longest), torch.zeros(4, longest, dtype=torch.int64)
    for index, length in enumerate(lengths):
        mask[index, longest - length if side == "left" else 0 :][:length] = 1
    with torch.no_grad():
        batch = model(rows, attention_mask=mask, use_cache=True)
        for index in range(len(lengths)):
            real = mask[index].bool()
            alone = model(rows[index : index + 1, real], use_cache=True)
            torch.testing.assert_close(batch.logits[index : index + 1, real], alone.logits, rtol=0, atol=1e-10)
            for ours, theirs in zip(batch.past_key_values.layers, alone.past_key_values.layers, strict=True):
                for name, x in theirs.state.items():
                    torch.testing.assert_close(ours.state[name][index : index + 1], x, rtol=0, atol=1e-10)


@every_kind
def test_rows_that_are_padding_only_keep_the_state_they_had(kind):
    model = tiny(kind).double()
    with torch.no_grad():
        first = model(tokens(2, 20), use_cache=True).past_key_values
        before = [{name: x.clone() for name, x in layer.state.items()} for layer in first.layers]
        mask = torch.ones(2, 25, dtype=torch.int64)
        mask[1, 20:] = 0
        model(tokens(2, 5, seed=1), attention_mask=mask, past_key_values=first)
    for layer, then in zip(first.layers, before, strict=True):
        for name, x in then.items():
            assert torch.equal(layer.state[name][1], x[1]), name
            assert not torch.equal(layer.state[name][0], x[0]), name


# Memories at the start


def decays_per_token(longest, **overrides):
    """The mean of -log|l| of every head of an untrained model's first layer, ``(H,)``, long after the chain's start.

    At its start a chain knows nothing older: l_i is i / (i + 1) there, whatever its memory.
    """
    model = tiny(num_resolvent_heads=8, hidden_size=64, resolvent_longest_memory=longest, **overrides)
    block, length = model.model.layers[0], int(8 * longest)
    with torch.no_grad():
        x_BND = block.mixer_norm(model.model.embed_tokens(tokens(1, length)))
        log_l_BNH = block.mixer._chains(x_BND, None, None, None)[0]
    return -log_l_BNH[:, length // 2 :].double().mean((0, 1))


def configured(longest):
    return 2 * (longest / 2) ** torch.linspace(0, 1, 8)


@pytest.mark.parametrize("longest", [64.0, 2048.0, 20_000.0])
def test_memories_at_the_start_go_from_two_tokens_to_the_longest(longest):
    memory_H = 1 / decays_per_token(longest)
    assert (memory_H[1:] > memory_H[:-1]).all()
    assert (memory_H / configured(longest)).log().abs().max() < 0.2


@pytest.mark.parametrize("longest", [64.0, 2048.0, 20_000.0])
def test_memories_of_the_scattering_regime_are_within_a_factor_of_three(longest):
    # The formula is for weak disorder, and the shortest memories are not weak.
    memory_H = 1 / decays_per_token(longest, resolvent_regime="scattering")
    assert (memory_H / configured(longest)).log().abs().max() < math.log(3)


# Gradients, precision, compilers


def loss_and_gradients(model, row, run=None):
    run = model if run is None else run
    torch.manual_seed(1)  # of the routing noise
    model.zero_grad()
    output = run(row, labels=row, use_cache=False)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@every_kind
def test_every_parameter_gets_a_gradient(kind):
    _, gradients = loss_and_gradients(tiny(kind).train(), tokens(4))
    assert [name for name, grad in gradients.items() if not grad.abs().sum() > 0] == []


@every_kind
def test_float32_agrees_with_float64(kind):
    # Without tied routes: an expert chosen otherwise would be another model.
    model, row = tiny(kind, num_experts=1).train(), tokens()
    loss, gradients = loss_and_gradients(model, row)
    exact_loss, exact_gradients = loss_and_gradients(model.double(), row)
    assert abs(loss - exact_loss) < 1e-6 * exact_loss
    for name, exact in exact_gradients.items():
        # Sums over tokens that nearly cancel, as the gaps' are, keep fewer digits.
        assert (gradients[name] - exact).norm() <= 2e-4 * exact.norm(), name


@every_kind
def test_bfloat16_autocast_trains_with_chains_in_float32(kind):
    model, row = tiny(kind).train(), tokens(4, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(row, labels=row, use_cache=True, return_logits=True)
        assert output.logits.dtype == torch.bfloat16
        state = output.past_key_values.layers[0].state
        assert state["chain"].dtype == state["carried"].dtype == torch.float32
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 0.5


@every_kind
def test_half_precision_weights_stay_close_to_float32(kind):
    model, row = tiny(kind), tokens()
    exact = model(row, labels=row).loss
    half = model.bfloat16()(row, labels=row)
    assert half.logits.dtype == torch.bfloat16
    assert abs(half.loss - exact) < 0.05


@every_kind
def test_saving_and_loading_changes_nothing(tmp_path, kind):
    model, row = tiny(kind), tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, ResNetBKForCausalLM)
    assert torch.equal(loaded(row).logits, model(row).logits)


@every_kind
def test_activation_checkpointing_changes_no_gradient(kind):
    model, row = tiny(kind).train(), tokens()
    loss, gradients = loss_and_gradients(model, row)
    for block in model.model.layers:
        forward = block.forward
        block.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, use_reentrant=False)
    again_loss, again = loss_and_gradients(model, row)
    assert torch.equal(loss, again_loss)
    assert [name for name, gradient in gradients.items() if not torch.equal(again[name], gradient)] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")
@every_kind
def test_one_graph_gives_the_same_loss_and_gradients(kind):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny(kind).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        row = tokens(seed=seed)
        torch.testing.assert_close(
            loss_and_gradients(model, row, compiled), loss_and_gradients(model, row), rtol=1e-4, atol=1e-5
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "other tokens and routes need no other graph"
