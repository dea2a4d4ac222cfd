"""The Hugging Face model: losses, saving, loading, padding, hidden states."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from resnet_bk import layers
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM

MIXERS = ["resolvent", "bk", "attention", "local"]


def tiny(**overrides):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", **overrides)).eval()


def tokens(batch_size=2, length=17, seed=0):
    return torch.randint(512, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mixer", MIXERS)
def test_labels_and_shifted_labels_give_the_same_loss(mixer):
    model, row = tiny(mixer=mixer), tokens()
    output = model(row, labels=row)
    expected = F.cross_entropy(output.logits[:, :-1].reshape(-1, 512), row[:, 1:].reshape(-1))
    assert torch.allclose(output.loss, expected)
    shifted = F.pad(row[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(row, shift_labels=shifted).loss, output.loss)


def test_the_balancing_loss_counts_in_training_only():
    model, row = tiny(router_aux_loss_coef=0.5), tokens()
    assert torch.equal(model(row, labels=row).loss, model(row, labels=row).cross_entropy)
    output = model.train()(row, labels=row)
    assert torch.allclose(output.loss, output.cross_entropy + 0.5 * output.router_aux_loss)
    assert output.expert_load.shape == (2, 2)
    assert torch.allclose(output.expert_load.sum(1), torch.ones(2))


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_gets_a_gradient(mixer):
    model, row = tiny(mixer=mixer, max_position_embeddings=32).train(), tokens(8, 32)
    model(row, labels=row).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_straight_through_gradients_reach_the_router_without_the_balancing_loss():
    model, row = tiny(router_aux_loss_coef=0.0).train(), tokens()
    model(row, labels=row).loss.backward()
    assert all(layer.moe.router.weight.grad.abs().sum() > 0 for layer in model.model.layers)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixer", MIXERS)
def test_saving_and_loading_changes_nothing(tmp_path, mixer, tied):
    model, row = tiny(mixer=mixer, tie_word_embeddings=tied), tokens()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, ResNetBKForCausalLM)
    assert torch.equal(loaded(row).logits, model(row).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_importing_the_package_is_enough_for_the_auto_classes():
    program = (
        "import resnet_bk; from transformers import AutoConfig;"
        "assert type(AutoConfig.for_model('resnet_bk')).__name__ == 'ResNetBKConfig'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert isinstance(AutoConfig.for_model("resnet_bk"), ResNetBKConfig)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.filterwarnings("ignore:causal=False")
def test_padding_changes_no_real_token(mixer, causal, side):
    if mixer in ("resolvent", "local") and not causal:
        pytest.skip("this mixer is causal")
    model = tiny(mixer=mixer, causal=causal, max_position_embeddings=40).double()
    row = tokens(1, 11)
    before = {"left": 6, "right": 0, "both": 3}[side]
    padded = torch.cat([tokens(1, before, seed=1), row, tokens(1, 6 - before, seed=2)], dim=1)
    mask = torch.zeros_like(padded)
    mask[:, before : before + 11] = 1
    batch = torch.cat([padded, tokens(1, 17, seed=3)])
    logits = model(batch, attention_mask=torch.cat([mask, torch.ones_like(mask)])).logits
    assert torch.allclose(logits[:1, before : before + 11], model(row).logits, rtol=0, atol=1e-12)
    assert torch.allclose(logits[1:], model(batch[1:]).logits, rtol=0, atol=1e-12)
    assert torch.isfinite(logits).all()


def test_routing_statistics_leave_padding_out():
    model, row = tiny(num_experts=4), tokens(1, 9)
    padded = torch.cat([row, tokens(1, 30, seed=4)], dim=1)
    mask = torch.cat([torch.ones(1, 9), torch.zeros(1, 30)], dim=1)
    alone, with_padding = model(row), model(padded, attention_mask=mask)
    assert torch.allclose(with_padding.expert_load, alone.expert_load)
    assert torch.allclose(with_padding.router_aux_loss, alone.router_aux_loss)


def test_hidden_states_and_embeddings_in():
    model, row = tiny(), tokens()
    output = model(row, output_hidden_states=True)
    assert [h.shape for h in output.hidden_states] == [(2, 17, 32)] * 3
    embedded = model.model.embed_tokens(row)
    assert torch.equal(model(inputs_embeds=embedded).logits, output.logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": tokens(), "attention_mask": torch.ones(2, 3)}, "attention_mask"),
        ({"input_ids": tokens(), "labels": tokens(), "shift_labels": tokens()}, "not both"),
        ({"input_ids": tokens(), "labels": tokens(), "logits_to_keep": 1}, "logits_to_keep"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny()(**arguments)


def test_more_tokens_than_the_position_table_is_a_clear_error():
    model = ResNetBKForCausalLM(ResNetBKConfig.from_preset("seed", vocab_size=512))
    with pytest.raises(ValueError, match="position table of 128"):
        model(tokens(1, 129))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixer", MIXERS)
def test_half_precision_weights_stay_close_to_float32(mixer, dtype):
    model, row = tiny(mixer=mixer), tokens()
    exact = model(row, labels=row).loss
    half = model.to(dtype)(row, labels=row)
    assert half.logits.dtype == dtype
    assert half.loss.dtype == torch.float32
    assert abs(half.loss - exact) < 0.05


@pytest.mark.parametrize(
    ("mixer", "module", "operators"),
    [("resolvent", layers.resolvent, ["bk_tunnel", "bk_carry"]), ("bk", layers.bk, ["bk_core_pairs"])],
)
def test_autocast_keeps_router_resolvent_and_loss_in_float32(mixer, module, operators, monkeypatch):
    model, row = tiny(mixer=mixer).train(), tokens()
    dtypes = {}

    def watched(name, operator):
        def call(*arguments, **options):
            result = operator(*arguments, **options)
            # Of the carry what must be single is the logarithm that comes in and the state that goes out.
            checked = (arguments[3], result[1]) if name == "bk_carry" else (arguments[0], result)
            dtypes[name] = {x.dtype for x in checked}
            return result

        return call

    for name in operators:
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    monkeypatch.setattr(layers.mixture, "gumbel_noise", watched("router", layers.mixture.gumbel_noise))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(row, labels=row)
        assert model(row).logits.dtype == torch.bfloat16
    assert dtypes.pop("router") == {torch.float32}  # its logits, and the noise on them
    assert dtypes == {name: {torch.float32} for name in operators}
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_blended_gradient_trains_too(mixer):
    model, row = tiny(mixer=mixer, bk_grad="blend").train(), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(row, labels=row).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
