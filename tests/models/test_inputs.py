"""What the model is given by callers of transformers' kind: as they mean it, or refused in words, and never ignored."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from resnet_bk.models import ResNetBKCache, ResNetBKConfig, ResNetBKForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")


def build(**options):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", vocab_size=50, **options)).eval()


@pytest.fixture(scope="module")
def model():
    return build()


IDS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"atention_mask": torch.ones(2, 12)}, TypeError, "unexpected keyword argument 'atention_mask'"),
        ({"seq_idx": torch.zeros(2, 12)}, TypeError, "unexpected keyword argument 'seq_idx'"),
        ({"return_dict": False}, ValueError, "return_dict=False is not offered"),
        ({"output_attentions": True}, ValueError, "output_attentions=True is not offered"),
        ({"logits_to_keep": -3}, ValueError, "logits_to_keep is -3"),
        ({"attention_mask": torch.ones(1, 12)}, ValueError, r"shape \(1, 12\); give \(2, 12\)"),
        ({"position_ids": torch.zeros(1, 1, dtype=torch.long)}, ValueError, r"position_ids has shape \(1, 1\)"),
        ({"past_key_values": DynamicCache()}, ValueError, "past_key_values is a DynamicCache"),
        ({"shift_labels": IDS.reshape(3, 8)}, ValueError, "one target for each token"),
        ({"input_ids": IDS[0]}, ValueError, r"input_ids has shape \(12,\); give \(batch, tokens\)"),
        ({"input_ids": IDS[:, :0]}, ValueError, "at least one row and one token"),
        ({"input_ids": IDS[:0]}, ValueError, "at least one row and one token"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 8)}, ValueError, "inputs_embeds has shape"),
    ],
    ids=str,
)
def test_what_would_be_ignored_or_misread_is_refused(model, given, error, words):
    with pytest.raises(error, match=words):
        model(**({"input_ids": IDS} | given))


def test_a_cache_of_another_depth_is_refused(model):
    deeper = ResNetBKCache(build(num_layers=5).config)
    with pytest.raises(ValueError, match=f"a cache of 5 blocks; give what this model of {model.config.num_layers}"):
        model(IDS, past_key_values=deeper)


def test_what_is_usual_elsewhere_and_of_no_consequence_here_is_taken(model):
    usual = {"return_dict": True, "output_attentions": False, "token_type_ids": torch.zeros_like(IDS)}
    with torch.no_grad():
        assert torch.equal(model(IDS, **usual).logits, model(IDS).logits)


def test_logits_of_places_are_those_of_all(model):
    with torch.no_grad():
        whole = model(IDS).logits
        for places in (torch.tensor([3]), torch.tensor([7, 2]), torch.tensor([-1])):
            torch.testing.assert_close(model(IDS, logits_to_keep=places).logits, whole[:, places])


def test_the_configuration_may_ask_for_hidden_states(model):
    asked = build(output_hidden_states=True)
    assert len(asked(IDS).hidden_states) == asked.config.num_layers + 1
    assert asked(IDS, output_hidden_states=False).hidden_states is None and model(IDS).hidden_states is None


def test_labels_of_another_integer_type_have_the_same_loss(model):
    assert torch.equal(model(IDS, labels=IDS.int()).loss, model(IDS, labels=IDS).loss)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cache_implementation": "offloaded"}, "has a cache of its own"),
        ({"document_ids": torch.zeros_like(IDS)}, "without document_ids"),
        ({"prompt_lookup_num_tokens": 3}, "not supported with stateful models"),
    ],
    ids=str,
)
def test_generation_that_is_not_offered_is_refused(model, given, words):
    ids = IDS[:1] if "prompt_lookup_num_tokens" in given else IDS
    with pytest.raises(ValueError, match=words):
        model.generate(ids, max_new_tokens=3, **given)


def test_a_cache_that_can_forget_serves_assisted_decoding():
    attention = build(mixer="attention", conv_size=0)
    plain = attention.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(
        attention.generate(IDS[:1], max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3), plain
    )


def test_a_recurrent_cache_says_that_it_cannot_forget(model):
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot forget tokens"):
        cache.crop(5)


@pytest.mark.parametrize("kind", ["resolvent", "bk", "attention"])
def test_rows_that_end_in_an_earlier_piece_are_refused_and_padding_on_the_left_is_right(kind):
    model = build(mixer=kind, initializer_range=0.5)
    long, short = IDS[:1], IDS[:1, :3]
    fill = torch.zeros(1, 9, dtype=torch.long)
    words = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(short, **words)[0, 3:]
    for side in ("left", "right"):
        row = torch.cat([fill, short] if side == "left" else [short, fill], 1)
        real = torch.cat([fill, short * 0 + 1] if side == "left" else [short * 0 + 1, fill], 1)
        batch, mask = torch.cat([long, row]), torch.cat([torch.ones_like(long), real])
        assert torch.equal(model.generate(batch, attention_mask=mask, **words)[1, 12:], alone)
        if side == "left":
            pieces = model.generate(batch, attention_mask=mask, prefill_chunk_size=4, **words)
            assert torch.equal(pieces[1, 12:], alone)
        else:
            with pytest.raises(ValueError, match="the last token of row 1 is in an earlier piece"):
                model.generate(batch, attention_mask=mask, prefill_chunk_size=4, **words)


def test_checkpointing_is_asked_for_of_blocks(model):
    with pytest.raises(ValueError, match="checkpoint_blocks"):
        model.gradient_checkpointing_enable()


def test_the_trainer_evaluates_and_predicts(tmp_path):
    model = build()
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    options = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model=model, args=options, eval_dataset=rows)
    with torch.no_grad():
        expected = model(IDS, labels=IDS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    found = trainer.predict(rows)
    assert found.predictions.shape == (2, 12, 50) and found.label_ids.shape == (2, 12)


@pytest.mark.parametrize("options", [{}, {"resolvent_regime": "scattering"}, {"mixer": "bk"}], ids=str)
def test_what_decides_and_recurs_stays_in_float32_when_loaded_in_a_half_type(tmp_path, options):
    model = build(initializer_range=0.5, **options)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {
        part for name, weight in half.named_parameters() if weight.dtype == torch.float32 for part in name.split(".")
    }
    assert half.model.embed_tokens.weight.dtype == torch.bfloat16
    assert "router" in kept and len(kept) > 1
    assert ("raw_eta" in kept) == ("mixer" in options or "resolvent_regime" in options)
    with torch.no_grad():
        whole = half(IDS).logits
        assert (whole.float() - model(IDS).logits).norm() < 0.2 * model(IDS).logits.norm()
        cache = None
        for place in range(IDS.shape[1]):
            output = half(IDS[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
        assert (output.logits[:, -1] - whole[:, -1]).float().norm() < 0.1 * whole[:, -1].float().norm()
