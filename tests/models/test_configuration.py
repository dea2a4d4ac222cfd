import json

import pytest

from resnet_bk.models import PRESETS, ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.models.matching import match_total_parameters, total_parameters


def built_parameters(config):
    import torch

    with torch.device("meta"):
        model = ResNetBKForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention", "local"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_formula_counts_what_the_model_has(name, mixer):
    config = ResNetBKConfig.from_preset(name, mixer=mixer)
    assert total_parameters(config) == built_parameters(config)


@pytest.mark.parametrize(
    "overrides",
    [
        {"token_dropout": 0.1},
        {"max_position_embeddings": 64},
        {"tie_word_embeddings": False},
        {"conv_size": 0},
        {"local_attention_positions": "rotary", "dropout": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention", "local"])
def test_the_formula_counts_what_options_add(mixer, overrides):
    config = ResNetBKConfig.from_preset("tiny", mixer=mixer, **overrides)
    assert total_parameters(config) == built_parameters(config)


@pytest.mark.parametrize(("name", "millions"), [("100m", 100), ("1b", 1000), ("7b", 7000), ("70b", 70_000)])
@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention", "local"])
def test_named_sizes_have_the_size_they_name(name, millions, mixer):
    total = total_parameters(ResNetBKConfig.from_preset(name, mixer=mixer))
    assert abs(total - millions * 1e6) <= 0.03 * millions * 1e6


@pytest.mark.parametrize("overrides", [{}, {"vocab_size": 2048}, {"num_layers": 3, "num_experts": 5}])
@pytest.mark.parametrize("name", PRESETS)
def test_the_baseline_matches_total_parameters_within_one_percent(name, overrides):
    ours = total_parameters(ResNetBKConfig.from_preset(name, **overrides))
    baseline = total_parameters(ResNetBKConfig.from_preset(name, mixer="attention", **overrides))
    assert abs(baseline - ours) <= 0.01 * ours


def test_the_seed_has_its_own_table_plus_what_the_text_leaves_out():
    config = ResNetBKConfig.from_preset("seed")
    assert (config.hidden_size, config.num_layers, config.num_experts) == (64, 4, 4)
    assert (config.vocab_size, config.max_position_embeddings, config.mixer) == (30_000, 128, "bk")
    seeds_table = 2 * 30_000 * 64 + 128 * 64 + 4 * (64 * 4 + 4 * 2 * 64 * 128 + 2 * 64 + 2 * 64) + 2 * 64
    assert seeds_table == 4_112_512
    potential_projections, energies = 4 * 64, 4 * 2
    assert built_parameters(config) == seeds_table + potential_projections + energies


def test_an_explicit_width_is_kept():
    config = ResNetBKConfig.from_preset("seed", mixer="attention", intermediate_size=128)
    assert config.intermediate_size == 128


def test_an_impossible_match_says_so():
    with pytest.raises(ValueError, match="does not exist"):
        match_total_parameters(ResNetBKConfig.from_preset("tiny", mixer="attention"), target=10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("hidden_size", -1),
        ("num_layers", 0),
        ("num_experts", 0),
        ("intermediate_size", 0),
        ("max_position_embeddings", 0),
        ("bk_eta", 0.0),
        ("bk_hopping", -1.0),
        ("bk_blend", 1.5),
        ("router_temperature", 0.0),
        ("mixer", "convolution"),
        ("bk_grad", "none"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(Exception, match=field):
        ResNetBKConfig(**{field: value})


def test_heads_must_split_the_hidden_size():
    with pytest.raises(ValueError, match="num_attention_heads"):
        ResNetBKConfig(mixer="attention", hidden_size=64, num_attention_heads=5)


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="seed, tiny"):
        ResNetBKConfig.from_preset("huge")
    with pytest.raises(ValueError, match="hiden_size"):
        ResNetBKConfig.from_preset("seed", hiden_size=3)


def test_it_survives_a_round_trip_through_json(tmp_path):
    config = ResNetBKConfig.from_preset("tiny", causal=True, bk_grad="blend", num_layers=3)
    config.save_pretrained(tmp_path)
    loaded = ResNetBKConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.num_hidden_layers == 3


def test_every_field_is_saved_so_that_a_new_default_changes_no_saved_model(tmp_path):
    config = ResNetBKConfig.from_preset("tiny")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in config.own_fields()} == config.own_fields()


@pytest.mark.parametrize("every", range(7))
def test_numbers_and_ends_of_mixers_are_those_of_the_blocks(every):
    for num_layers in range(1, 16):
        config = ResNetBKConfig(num_layers=num_layers, local_attention_every=every)
        mixers = config.layer_mixers
        for first in range(num_layers + 1):
            assert config.mixer_numbers(first) == {mixer: mixers[:first].count(mixer) for mixer in set(mixers[:first])}
        for mixer in config.mixer_numbers():
            indices = [index for index, found in enumerate(mixers) if found == mixer]
            assert config.ends_of(mixer) == (indices[0], indices[-1])
