"""Decoding with the state gives what recomputing from scratch gives, at a constant size."""

import pytest
import torch

from resnet_bk.models import ResNetBKCache, ResNetBKConfig, ResNetBKForCausalLM

KINDS = {
    "bk": {"mixer": "bk"},
    "attention": {"mixer": "attention"},
    "resolvent": {},
    "scattering": {"resolvent_regime": "scattering"},
    "hybrid": {"num_layers": 3, "local_attention_every": 2, "local_attention_window": 16},
    "hybrid with a wide window": {"num_layers": 3, "local_attention_every": 2},
    "rotary hybrid": {
        "num_layers": 3,
        "local_attention_every": 2,
        "local_attention_window": 16,
        "local_attention_positions": "rotary",
    },
}
PATTERN = "to be or not to be that is the question whether tis nobler in the mind to suffer "


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(kind, steps=60, **overrides):
    """A tiny model that has learned a short text, so that greedy decoding has clear winners."""
    torch.manual_seed(0)
    config = ResNetBKConfig.from_preset("tiny", vocab_size=128, **{**KINDS[kind], **overrides})
    model = ResNetBKForCausalLM(config)
    text = torch.tensor([list((PATTERN * 8).encode())])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        start = (step * 37) % 400
        window = text[:, start : start + 96].repeat(4, 1)
        optimizer.zero_grad()
        model(window, labels=window).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return trained(request.param)


def prompt(length=12, batch_size=1):
    rows = [list((PATTERN * 2).encode())[7 * row : 7 * row + length] for row in range(batch_size)]
    return torch.tensor(rows)


@pytest.mark.slow
def test_512_greedy_tokens_are_those_of_recomputing_from_scratch(model):
    options = {"max_new_tokens": 512, "do_sample": False}
    cached = model.generate(prompt(), **options)
    recomputed = model.generate(prompt(), use_cache=False, **options)
    assert cached.shape == (1, 12 + 512)
    assert torch.equal(cached, recomputed)
    assert len(set(cached[0].tolist())) > 5, "a model that repeats one token would prove little"


def test_the_state_has_a_constant_size():
    model = trained("bk", steps=1, conv_size=0)
    sizes = []
    cache = ResNetBKCache(model.config)
    for length in (1, 7, 500):
        cache = model(torch.randint(128, (3, length)), past_key_values=cache, use_cache=True).past_key_values
        sizes.append(cache.num_bytes)
    assert cache.get_seq_length() == 508
    assert sizes == [2 * 3 * 2 * 8] * 3  # layers x rows x heads x complex64


def test_local_attention_remembers_its_window_and_no_more():
    model = trained("hybrid", steps=1)
    sizes, cache = [], None
    for length in (40, 1, 500, *([1] * 20)):
        cache = model(torch.randint(128, (3, length)), past_key_values=cache, use_cache=True).past_key_values
        sizes.append(cache.num_bytes)
        # What lies behind them in memory, which is one token more where that saves a copy of all.
        stored = cache.layers[1].state["keys"].untyped_storage().nbytes() // (4 * 3 * 2 * 16)
        assert stored == (16 if length == 1 else 15)
    assert len(set(sizes)) == 1
    assert cache.layers[1].state["keys"].shape == (3, 15, 2, 16)


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


@pytest.mark.parametrize("num_beams", [3])
def test_beam_search_with_the_state_is_beam_search_without(model, num_beams):
    options = {"max_new_tokens": 20, "num_beams": num_beams, "do_sample": False}
    rows = prompt(9, batch_size=2)
    assert torch.equal(model.generate(rows, **options), model.generate(rows, use_cache=False, **options))


@pytest.mark.parametrize("prefill_chunk_size", [1, 33, 1000])
def test_a_prompt_in_chunks_gives_the_tokens_of_the_prompt_at_once(model, prefill_chunk_size):
    rows = prompt(65, batch_size=2)
    options = {"max_new_tokens": 20, "do_sample": False}
    in_chunks = model.generate(rows, prefill_chunk_size=prefill_chunk_size, **options)
    assert torch.equal(in_chunks, model.generate(rows, **options))


@pytest.mark.parametrize("prefill_chunk_size", [1, 5])
def test_a_padded_batch_in_chunks_gives_the_tokens_of_the_batch_at_once(model, prefill_chunk_size):
    # Whole chunks of the first row are padding, and the second row has some on either side of a chunk's border.
    rows = prompt(65, batch_size=3)
    mask = torch.ones_like(rows)
    mask[0, :61], mask[1, :7] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    in_chunks = model.generate(rows, prefill_chunk_size=prefill_chunk_size, **options)
    assert torch.equal(in_chunks, model.generate(rows, **options))


def test_beams_after_a_prompt_in_chunks_are_those_without_a_cache(model):
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    in_chunks = model.generate(prompt(20, batch_size=2), prefill_chunk_size=8, **options)
    assert torch.equal(in_chunks, model.generate(prompt(20, batch_size=2), use_cache=False, **options))


def test_a_cache_from_an_earlier_call_goes_on_where_it_was(model):
    options = {"max_new_tokens": 10, "do_sample": False}
    first = model.generate(prompt(20), return_dict_in_generate=True, **options)
    more = torch.cat([first.sequences, prompt(7)], dim=1)
    continued = model.generate(more, past_key_values=first.past_key_values, **options)
    assert torch.equal(continued, model.generate(more, **options))


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
