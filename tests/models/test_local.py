"""Local attention in a whole model: decoding, padding, memories at the start, gradients, precision."""

import pytest
import torch

from resnet_bk.layers import LocalAttention
from resnet_bk.layers.memories import memories
from resnet_bk.models import ResNetBKCache, ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.models.configuration import LONGEST_WINDOW

KINDS = {
    "window shorter than the text": {"local_attention_window": 16},
    "window longer than the text": {"local_attention_window": 1024},
    "own token only": {"local_attention_window": 1},
    "no convolution": {"local_attention_window": 16, "conv_size": 0},
    "hybrid": {"mixer": "resolvent", "num_layers": 3, "local_attention_every": 2, "local_attention_window": 16},
    "rotary": {"local_attention_window": 16, "local_attention_positions": "rotary"},
    # Keys of two widths, and so two tables of positions.
    "rotary hybrid": {
        "mixer": "resolvent",
        "num_layers": 3,
        "local_attention_every": 2,
        "local_attention_window": 16,
        "local_attention_positions": "rotary",
        "num_attention_heads": 4,
        "resolvent_key_size": 6,
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)
each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(kind="window shorter than the text", **overrides):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", **{"mixer": "local", **KINDS[kind], **overrides}))


def exact(kind):
    return tiny(kind).eval().double()


def tokens(batch_size=2, length=140, seed=0):
    return torch.randint(512, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def local_layers(model):
    return [module for module in model.modules() if isinstance(module, LocalAttention)]


# Decoding


@every_kind
@pytest.mark.parametrize("pieces", [[1] * 140, [1, 17, 64, 2, 56], [139, 1], [70, 70]], ids=str)
def test_pieces_with_a_cache_are_the_whole_row(kind, pieces):
    model, row = exact(kind), tokens()
    with torch.no_grad():
        whole = model(row, use_cache=True)
        cache, logits = ResNetBKCache(model.config), []
        for piece in row.split(pieces, dim=1):
            logits.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, rtol=0, atol=1e-9)
    for ours, theirs in zip(cache.layers, whole.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.state, theirs.state, rtol=1e-9, atol=1e-9)


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_each_row_alone_and_goes_on_as_it_does(kind, side):
    model, lengths, longest = exact(kind), (70, 1, 2, 90), 90
    rows, mask = tokens(4, longest), torch.zeros(4, longest, dtype=torch.int64)
    for index, length in enumerate(lengths):
        mask[index, longest - length if side == "left" else 0 :][:length] = 1
    more = [tokens(4, length, seed=length) for length in (1, 30, 1)]
    with torch.no_grad():
        batch = model(rows, attention_mask=mask, use_cache=True)
        of_batch, of_mask = [batch.logits], [mask]
        for piece in more:
            of_mask.append(torch.ones_like(piece))
            of_batch.append(
                model(piece, attention_mask=torch.cat(of_mask, 1), past_key_values=batch.past_key_values).logits
            )
        for index in range(len(lengths)):
            real = mask[index].bool()
            alone = model(torch.cat([rows[index, real], *(piece[index] for piece in more)]).unsqueeze(0)).logits[0]
            found = torch.cat([logits[index] for logits in (of_batch[0][:, real], *of_batch[1:])])
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-9)


@every_kind
def test_rows_reordered_in_the_cache_go_on_as_their_own(kind):
    """As beam search does it: rows have read different numbers of tokens."""
    model, rows, more = exact(kind), tokens(3, 30), tokens(3, 5, seed=1)
    mask, order = torch.ones_like(rows), torch.tensor([2, 0, 0])
    mask[0, :27], mask[1, :9] = 0, 0
    with torch.no_grad():
        cache = model(rows, attention_mask=mask, use_cache=True).past_key_values
        cache.reorder_cache(order)
        masks = torch.cat([mask[order], torch.ones_like(more)], dim=1)
        found = model(more, attention_mask=masks, past_key_values=cache).logits
        for index, row in enumerate(order):
            alone = model(torch.cat([rows[row, mask[row].bool()], more[index]]).unsqueeze(0)).logits[0, -5:]
            torch.testing.assert_close(found[index], alone, rtol=0, atol=1e-9)


# Memories at the start


@pytest.mark.parametrize(("window", "shortest"), [(1024, 4.0), (16, 4.0), (2, 2.0), (1, 1.0)])
def test_memories_at_the_start_go_from_four_tokens_to_the_window(window, shortest):
    (layer,) = local_layers(tiny(num_layers=1, num_attention_heads=4, local_attention_window=window))
    torch.testing.assert_close(1 / layer.log_rate.exp(), memories(4, shortest, float(window)))


def test_windows_out_of_range_are_refused_by_name():
    with pytest.raises(ValueError, match=f"local_attention_window is .*{LONGEST_WINDOW}"):
        ResNetBKConfig(mixer="local", local_attention_window=LONGEST_WINDOW + 1)


# Rotary positions


def test_rotary_positions_are_those_of_the_transformer_and_nothing_fades():
    ours = tiny("rotary", local_attention_window=1024).eval().double()
    (first, second), names = local_layers(ours), {name for name, _ in ours.named_parameters()}
    assert not hasattr(first, "log_rate") and not any("log_rate" in name for name in names)
    transformer = ResNetBKForCausalLM(ours.config.of_mixer("attention")).eval().double()
    transformer.load_state_dict(ours.state_dict())
    row = tokens(length=40)
    torch.testing.assert_close(ours(row).logits, transformer(row).logits, rtol=0, atol=1e-12)
    assert second.positions == "rotary"


def test_what_turns_depends_on_distances_alone():
    model, row = exact("rotary"), tokens(1, 40)
    near = torch.arange(40).unsqueeze(0)
    torch.testing.assert_close(
        model(row, position_ids=near).logits, model(row, position_ids=near + 1000).logits, rtol=0, atol=1e-9
    )
    assert (model(row).logits - model(row, position_ids=2 * near).logits).abs().max() > 1e-3


def test_heads_of_odd_width_do_not_turn():
    with pytest.raises(ValueError, match="does not split into 2 heads of even width"):
        ResNetBKConfig(hidden_size=6, num_attention_heads=2, num_resolvent_heads=2, local_attention_positions="rotary")
    ResNetBKConfig(hidden_size=6, num_attention_heads=2, num_resolvent_heads=2)
    with pytest.raises(ValueError, match="local_attention_positions is 'none'; choose one of fading, rotary"):
        ResNetBKConfig(local_attention_positions="none")


# Gradients and precision


def loss_and_gradients(model, row):
    torch.manual_seed(1)  # of the routing noise
    model.zero_grad()
    loss = model(row, labels=row, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@every_kind
def test_every_parameter_gets_a_gradient(kind):
    _, gradients = loss_and_gradients(tiny(kind).train(), tokens(4))
    silent = [name for name, grad in gradients.items() if not grad.abs().sum() > 0]
    # Of its own token alone a query reads all, whatever the rates.
    assert [name for name in silent if kind != "own token only" or not name.endswith("log_rate")] == []


@every_kind
def test_float32_agrees_with_float64(kind):
    # Without tied routes: an expert chosen otherwise would be another model.
    model, row = tiny(kind, num_experts=1).train(), tokens()
    loss, gradients = loss_and_gradients(model, row)
    exact_loss, exact_gradients = loss_and_gradients(model.double(), row)
    assert abs(loss - exact_loss) < 1e-6 * exact_loss
    for name, gradient in exact_gradients.items():
        assert (gradients[name] - gradient).norm() <= 2e-4 * gradient.norm() + 1e-9, name


@each_half
@every_kind
def test_autocast_trains_with_rates_in_float32(kind, dtype):
    model, row = tiny(kind, num_experts=1).train(), tokens(4)
    loss, _ = loss_and_gradients(model, row)
    with torch.autocast("cpu", dtype=dtype):
        half_loss, gradients = loss_and_gradients(model, row)
    assert abs(half_loss - loss) < 0.01
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())


@each_half
@every_kind
def test_half_precision_weights_stay_close_to_float32(kind, dtype):
    model, row = tiny(kind).eval(), tokens()
    wanted = model(row, labels=row).loss
    half = model.to(dtype)(row, labels=row)
    assert half.logits.dtype == dtype
    assert abs(half.loss - wanted) < 0.05


@each_half
def test_decoding_under_autocast_is_close_to_the_whole_row(dtype):
    model, row = tiny("hybrid", num_experts=1).eval(), tokens()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        whole = model(row).logits
        cache = ResNetBKCache(model.config)
        pieces = [model(piece, past_key_values=cache).logits for piece in row.split([100, *[1] * 40], dim=1)]
    assert (torch.cat(pieces, dim=1) - whole).norm() < 0.02 * whole.norm()
