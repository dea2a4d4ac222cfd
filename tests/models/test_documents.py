"""Documents packed into one row: nothing passes between them, with any mixer."""

import pytest
import torch

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM

KINDS = {
    "tunnelling": {"mixer": "resolvent"},
    "tunnelling-no-convolution": {"mixer": "resolvent", "conv_size": 0},
    "scattering": {"mixer": "resolvent", "resolvent_regime": "scattering"},
    "vector": {"mixer": "resolvent", "resolvent_state": "vector"},
    "bk": {"mixer": "bk"},
    "attention": {"mixer": "attention"},
    "local": {"mixer": "local", "local_attention_window": 16},
    "local-wide": {"mixer": "local"},
    "hybrid": {"mixer": "resolvent", "local_attention_every": 2, "local_attention_window": 32},
    "rotary-hybrid": {
        "mixer": "resolvent",
        "local_attention_every": 2,
        "local_attention_window": 32,
        "local_attention_positions": "rotary",
    },
    "position-table": {"mixer": "attention", "max_position_embeddings": 400},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
LENGTHS = [[70, 1, 2, 64, 63], [3, 1, 1, 150, 45]]  # of the documents of two rows


pytestmark = pytest.mark.usefixtures("one_thread")


def build(kind, **overrides):
    torch.manual_seed(0)
    config = ResNetBKConfig.from_preset("tiny", **{**KINDS[kind], **overrides})
    return ResNetBKForCausalLM(config).eval().double()


def packed(seed=0):
    """Token ids and document ids of two rows. Neighbouring ids count neither up nor from 0."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(512, (2, sum(LENGTHS[0])), generator=generator)
    names = torch.tensor([7, 3, 7, 0, 12])
    ids = torch.stack([names.repeat_interleave(torch.tensor(lengths)) for lengths in LENGTHS])
    return row, ids


def documents(row):
    """Each document's row, and its place there."""
    for index, lengths in enumerate(LENGTHS):
        first = 0
        for length in lengths:
            yield index, slice(first, first + length)
            first += length


@every_kind
def test_each_packed_document_has_the_logits_that_it_has_alone(kind):
    model = build(kind)
    row, ids = packed()
    with torch.no_grad():
        together = model(row, document_ids=ids).logits
        for index, place in documents(row):
            alone = model(row[index : index + 1, place]).logits
            torch.testing.assert_close(together[index : index + 1, place], alone, rtol=0, atol=1e-10)


@every_kind
def test_no_gradient_passes_between_documents(kind):
    model = build(kind)
    row, ids = packed()
    x = model.model.embed_tokens(row).detach().requires_grad_()
    place = slice(73, 137)  # the fourth of the first row
    logits = model(inputs_embeds=x, document_ids=ids).logits
    (gradient,) = torch.autograd.grad(logits[0, place].square().sum(), x)
    assert gradient[0, place].abs().sum(-1).min() > 0
    largest = gradient.abs().max()
    gradient[0, place] = 0
    assert gradient.abs().max() <= 1e-14 * largest


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_rows_may_be_padded_too(kind, side):
    model = build(kind)
    row, ids = packed()
    padding = 9
    real, none = torch.ones_like(row), torch.zeros(2, padding, dtype=torch.int64)

    def padded(x, filling):
        return torch.cat([filling, x] if side == "left" else [x, filling], dim=1)

    with torch.no_grad():
        expected = model(row, document_ids=ids).logits
        logits = model(
            padded(row, none + 5), attention_mask=padded(real, none), document_ids=padded(ids, none + 99)
        ).logits
    kept = logits[:, padding:] if side == "left" else logits[:, :-padding]
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-10)


@every_kind
def test_one_document_a_row_is_no_packing(kind):
    model, (row, _) = build(kind), packed()
    with torch.no_grad():
        assert torch.allclose(
            model(row, document_ids=torch.full_like(row, 4)).logits, model(row).logits, rtol=0, atol=1e-12
        )


@pytest.mark.filterwarnings("ignore:causal=False")
@pytest.mark.parametrize("mixer", ["bk", "attention"])
def test_documents_of_a_bidirectional_model_do_not_mix_either(mixer):
    model = build(mixer, causal=False, conv_size=0)
    row, ids = packed()
    with torch.no_grad():
        together = model(row, document_ids=ids).logits
        for index, place in documents(row):
            alone = model(row[index : index + 1, place]).logits
            torch.testing.assert_close(together[index : index + 1, place], alone, rtol=0, atol=1e-10)


@every_kind
@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(2, 199),
        torch.zeros(2, 199, dtype=torch.int64),
        torch.zeros(200, dtype=torch.int64),
        torch.zeros(2, 200),
    ],
    ids=["floating and short", "short", "no batch", "floating"],
)
def test_document_ids_that_do_not_fit_are_refused(kind, ids):
    with pytest.raises(ValueError, match="document_ids"):
        build(kind)(packed()[0], document_ids=ids)


@every_kind
def test_a_cache_that_has_tokens_takes_no_documents(kind):
    model = build(kind)
    row, ids = packed()
    with torch.no_grad():
        cache = model(row, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="document_ids are for whole rows"):
            model(row, document_ids=ids, past_key_values=cache)


@pytest.mark.parametrize("kind", ["tunnelling", "scattering", "vector", "bk"])
def test_decoding_goes_on_from_the_last_document(kind):
    model = build(kind)
    row, ids = packed()
    with torch.no_grad():
        cache = model(row, document_ids=ids, use_cache=True).past_key_values
        alone = model(row[:1, -63:], use_cache=True).past_key_values
    for ours, theirs in zip(cache.layers, alone.layers, strict=True):
        for name, x in theirs.state.items():
            torch.testing.assert_close(ours.state[name][:1], x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("has_padding", [False, True])
@every_kind
def test_what_is_written_behind_packed_documents_reads_the_last_one(kind, has_padding):
    model = build(kind)
    row, ids = packed()
    more, mask = row[:, :20], torch.ones_like(row)
    if has_padding:
        mask[1, :30], mask[1, -10:] = 0, 0
    masks = torch.cat([mask, torch.ones_like(more)], dim=1) if has_padding else None
    with torch.no_grad():
        cache = model(row, attention_mask=mask if has_padding else None, document_ids=ids, use_cache=True)
        is_last = (ids == ids[:, -1:]) & mask.bool()
        behind = model(
            more,
            attention_mask=masks,
            position_ids=is_last.sum(1, keepdim=True) + torch.arange(20),
            past_key_values=cache.past_key_values,
        ).logits
        for index in range(2):
            last = row[index, is_last[index]]
            alone = model(torch.cat([last, more[index]]).unsqueeze(0)).logits[0, -20:]
            torch.testing.assert_close(behind[index], alone, rtol=0, atol=1e-10)


def test_attention_forgets_nothing_of_packed_documents():
    row, ids = packed()
    with torch.no_grad():
        cache = build("attention", conv_size=0)(row, document_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="behind packed documents nothing can be forgotten"):
        cache.layers[0].crop(10)


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("length", [1, 2])
@every_kind
def test_behind_a_last_document_shorter_than_the_convolution_nothing_is_read_of_the_one_before(
    kind, length, has_padding
):
    model = build(kind)
    row = torch.randint(512, (1, 12), generator=torch.Generator().manual_seed(0))
    ids = (torch.arange(12) >= 12 - length).long()[None]
    more = torch.tensor([[3, 1, 4]])
    mask = None
    if has_padding:
        row, ids = torch.cat([row, row[:, :4]], 1), torch.cat([ids, torch.full((1, 4), 9)], 1)
        mask = (torch.arange(16) < 12).long()[None]
    with torch.no_grad():
        cache = model(row, attention_mask=mask, document_ids=ids, use_cache=True).past_key_values
        behind = model(
            more,
            attention_mask=None if mask is None else torch.cat([mask, torch.ones_like(more)], 1),
            position_ids=length + torch.arange(3)[None],
            past_key_values=cache,
        ).logits
        alone = model(torch.cat([row[:, 12 - length : 12], more], 1)).logits[:, -3:]
    torch.testing.assert_close(behind, alone, rtol=0, atol=1e-10)


@every_kind
def test_a_document_that_begins_with_padding_has_the_positions_that_it_has_alone(kind):
    model = build(kind)
    row = torch.randint(512, (1, 12), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0] * 6 + [1] * 6])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        together = model(row, attention_mask=mask, document_ids=ids).logits
        torch.testing.assert_close(together[:, 1:6], model(row[:, 1:6]).logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(together[:, 8:], model(row[:, 8:]).logits, rtol=0, atol=1e-10)


def test_a_position_table_is_as_long_as_the_longest_document_and_not_as_the_row():
    model = build("position-table", max_position_embeddings=16)
    row, ids = torch.arange(24)[None], torch.arange(24)[None] // 8
    with torch.no_grad():
        packed_logits = model(row, document_ids=ids).logits
        torch.testing.assert_close(packed_logits[:, 16:], model(row[:, 16:]).logits, rtol=0, atol=1e-10)
        mask = (torch.arange(24) >= 10).long()[None]
        padded_logits = model(row, attention_mask=mask).logits[:, 10:]
        torch.testing.assert_close(padded_logits, model(row[:, 10:]).logits, rtol=0, atol=1e-10)
    for given in (
        {"document_ids": torch.arange(24)[None] // 20},
        {},
        {"attention_mask": (torch.arange(24) > 3).long()[None]},
        {"position_ids": torch.arange(24)[None]},
    ):
        with pytest.raises(ValueError, match="more than this model's position table of 16"):
            model(row, **given)
    with pytest.raises(ValueError, match="position table of 16"):
        model(row[:, :3], position_ids=torch.tensor([[14, 15, 16]]))
