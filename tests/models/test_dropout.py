"""Dropout: in training alone, everywhere it says, and right on average."""

from pathlib import Path

import pytest
import torch

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM

MIXERS = ["resolvent", "bk", "attention", "local"]


def model(mixer: str, dropout: float, **fields: float) -> ResNetBKForCausalLM:
    torch.manual_seed(0)
    # One expert: routing has no noise then, and nothing but dropout is random.
    config = ResNetBKConfig.from_preset("tiny", mixer=mixer, vocab_size=64, num_experts=1, dropout=dropout, **fields)
    return ResNetBKForCausalLM(config)


def hidden(one: ResNetBKForCausalLM, seed: int) -> torch.Tensor:
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(seed)
    with torch.no_grad():
        return one.model(ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("mixer", MIXERS)
def test_it_is_random_in_training_by_the_seed_and_absent_in_evaluation(mixer: str) -> None:
    with_it, without = model(mixer, 0.3), model(mixer, 0.0)
    torch.testing.assert_close(hidden(with_it.eval(), 0), hidden(without.eval(), 1), rtol=0, atol=0)
    torch.testing.assert_close(hidden(without.train(), 0), hidden(without.eval(), 1), rtol=0, atol=0)
    with_it.train()
    torch.testing.assert_close(hidden(with_it, 5), hidden(with_it, 5), rtol=0, atol=0)
    assert (hidden(with_it, 5) - hidden(with_it, 6)).abs().max() > 0.1


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_share_of_zeros_is_what_was_asked_for_in_each_place(mixer: str) -> None:
    one = model(mixer, 0.3).train()
    seen: list[torch.Tensor] = []
    places = [module for module in one.modules() if isinstance(module, torch.nn.Dropout)]
    for place in places:
        place.register_forward_hook(lambda _, __, dropped: seen.append(dropped))
    hidden(one, 0)
    # Of the embeddings, and in each block of what the mixer and what the experts add.
    assert len(places) == 1 + one.config.num_layers and len(seen) == 1 + 2 * one.config.num_layers
    for dropped in seen:
        assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.05)


def test_attentions_weights_are_dropped_too() -> None:
    one = model("attention", 0.3).train()
    for module in one.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert (hidden(one, 5) - hidden(one, 6)).abs().max() > 1e-3


@pytest.mark.parametrize("mixer", MIXERS)
def test_tokens_are_lost_as_a_whole_in_training_alone(mixer: str) -> None:
    one, without = model(mixer, 0.0, token_dropout=0.25), model(mixer, 0.0)
    torch.testing.assert_close(hidden(one.eval(), 0), hidden(without.eval(), 1), rtol=0, atol=0)
    entered: list[torch.Tensor] = []
    one.train().model.layers[0].register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    for seed in range(40):
        hidden(one, seed)
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    embedded = one.model.embed_tokens(ids).detach()
    lost_token = one.model.lost_token.weight.detach()
    is_lost = torch.stack([(x == lost_token).all(-1) for x in entered])
    assert float(is_lost.float().mean()) == pytest.approx(0.25, abs=0.04)
    for x, lost in zip(entered, is_lost, strict=True):
        torch.testing.assert_close(x, torch.where(lost[..., None], lost_token, embedded))
    assert (hidden(one, 5) == hidden(one, 5)).all() and not torch.equal(is_lost[0], is_lost[1])


def test_a_lost_token_keeps_its_place() -> None:
    one = model("resolvent", 0.0, token_dropout=1 - 1e-7, max_position_embeddings=32).train()
    entered: list[torch.Tensor] = []
    one.model.layers[0].register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    hidden(one, 0)
    there = one.model.lost_token.weight + one.model.embed_positions.weight[None, :24]
    torch.testing.assert_close(entered[0], there.detach().expand(2, -1, -1))


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_stay_what_they_are_where_a_text_begins_with_lost_tokens(mixer: str) -> None:
    def gradients(**fields: float) -> torch.Tensor:
        one = model(mixer, 0.0, **fields).train()
        ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        one(ids, labels=ids).loss.backward()
        if fields:
            assert one.model.lost_token.weight.grad.norm() > 0
        return torch.stack([parameter.grad.norm() for parameter in one.parameters()]).norm()

    assert gradients(token_dropout=0.9) < 3 * gradients()


def test_only_what_loses_tokens_has_an_embedding_for_them_and_it_is_saved(tmp_path: Path) -> None:
    one, without = model("resolvent", 0.0, token_dropout=0.25), model("resolvent", 0.0)
    assert set(one.state_dict()) - set(without.state_dict()) == {"model.lost_token.weight"}
    assert float(one.model.lost_token.weight.detach().std()) == pytest.approx(one.config.initializer_range, rel=0.3)
    one.save_pretrained(tmp_path)
    again = ResNetBKForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.lost_token.weight, one.model.lost_token.weight)


@pytest.mark.parametrize("state", ["matrix", "vector"])
def test_the_resolvent_drops_what_it_asks_and_reads(state: str) -> None:
    one = model("resolvent", 0.3, resolvent_state=state).train()
    mixer, reads, queries = one.model.layers[0].mixer, [], []
    carry = mixer._carry
    mixer._carry = lambda q, *others: carry(queries.append(q) or q, *others)
    mixer.output.register_forward_pre_hook(lambda _, arguments: reads.append(arguments[0]))
    for seed in range(20):
        hidden(one, seed)
    for found in (queries, reads) if state == "matrix" else (reads,):
        assert float((torch.stack(found) == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
        assert not torch.equal(found[0] == 0, found[1] == 0)
    if state == "matrix":
        # What is left is larger by as much: queries have length K^(1/2) otherwise.
        squares = torch.stack(queries).square().sum(-1).mean() / mixer.key_size
        assert float(squares) == pytest.approx(1 / (1 - 0.3), rel=0.05)


@pytest.mark.parametrize("name", ["dropout", "token_dropout"])
@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused_in_one_line(name: str, share: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is .*; it is a share") as error:
        ResNetBKConfig.from_preset("tiny", **{name: share})
    assert "\n" not in str(error.value)
