"""Decoding with the state gives what recomputing from scratch gives, at a constant size."""

import pytest
import torch

from resnet_bk.models import ResNetBKCache, ResNetBKConfig, ResNetBKForCausalLM

MIXERS = ["bk", "attention"]
PATTERN = "to be or not to be that is the question whether tis nobler in the mind to suffer "


def trained(mixer, steps=60, **overrides):
    """A tiny model that has learned a short text, so that greedy decoding has clear winners."""
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", mixer=mixer, vocab_size=128, **overrides))
    text = torch.tensor([list((PATTERN * 8).encode())])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        start = (step * 37) % 400
        window = text[:, start : start + 96].repeat(4, 1)
        optimizer.zero_grad()
        model(window, labels=window).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=MIXERS)
def model(request):
    return trained(request.param)


def prompt(length=12, batch_size=1):
    rows = [list((PATTERN * 2).encode())[7 * row : 7 * row + length] for row in range(batch_size)]
    return torch.tensor(rows)


def test_512_greedy_tokens_are_those_of_recomputing_from_scratch(model):
    options = {"max_new_tokens": 512, "do_sample": False}
    cached = model.generate(prompt(), **options)
    recomputed = model.generate(prompt(), use_cache=False, **options)
    assert cached.shape == (1, 12 + 512)
    assert torch.equal(cached, recomputed)
    assert len(set(cached[0].tolist())) > 5, "a model that repeats one token would prove little"


def test_the_state_has_a_constant_size():
    model = trained("bk", steps=1)
    sizes = []
    cache = ResNetBKCache(model.config)
    for length in (1, 7, 500):
        cache = model(torch.randint(128, (3, length)), past_key_values=cache, use_cache=True).past_key_values
        sizes.append(cache.num_bytes)
    assert cache.get_seq_length() == 508
    assert sizes == [2 * 3 * 2 * 8] * 3  # layers x rows x heads x complex64


def test_prefill_in_pieces_is_prefill_at_once(model):
    row = torch.randint(128, (2, 40))
    whole = model(row, use_cache=True)
    cache, pieces = None, []
    for piece in row.split([1, 17, 2, 20], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert torch.allclose(torch.cat(pieces, dim=1), whole.logits, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_padded_batch_generates_what_each_row_alone_does(model, side, use_cache):
    lengths, longest = [4, 12, 9], 12
    rows, masks = [], []
    for row, length in zip(prompt(longest, batch_size=3), lengths, strict=True):
        padding = torch.full((longest - length,), 77)
        parts = [padding, row[:length]] if side == "left" else [row[:length], padding]
        real = [torch.zeros_like(padding), torch.ones(length, dtype=torch.int64)]
        rows.append(torch.cat(parts))
        masks.append(torch.cat(real if side == "left" else real[::-1]))
    batch = model.generate(
        torch.stack(rows), attention_mask=torch.stack(masks), max_new_tokens=24, do_sample=False, use_cache=use_cache
    )
    for index, length in enumerate(lengths):
        alone = model.generate(prompt(longest, 3)[index : index + 1, :length], max_new_tokens=24, do_sample=False)
        assert torch.equal(batch[index, longest:], alone[0, length:])


def test_beam_search_with_the_state_is_beam_search_without(model):
    options = {"max_new_tokens": 20, "num_beams": 4, "do_sample": False}
    rows = prompt(9, batch_size=2)
    assert torch.equal(model.generate(rows, **options), model.generate(rows, use_cache=False, **options))


def test_sampling_several_sequences(model):
    torch.manual_seed(0)
    sampled = model.generate(prompt(), max_new_tokens=8, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (3, 20)


@pytest.mark.filterwarnings("ignore:causal=False")
def test_a_bidirectional_model_generates_without_a_state_and_says_so():
    model = trained("bk", steps=1, causal=False)
    assert model.generate(prompt(), max_new_tokens=4, do_sample=False).shape == (1, 16)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(prompt(), use_cache=True)
