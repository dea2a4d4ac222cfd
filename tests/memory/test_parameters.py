"""Parameter counts by component against the built model."""

import pytest
import torch

from resnet_bk.memory.parameters import compare_with_seed, component_of, count_parameters
from resnet_bk.models import PRESETS, ResNetBKConfig, ResNetBKForCausalLM

OVERRIDES = [
    {},
    {"mixer": "resolvent"},
    {"mixer": "bk", "conv_size": 3},
    {"mixer": "attention"},
    {"conv_size": 0},
    {"mixer": "resolvent", "resolvent_regime": "scattering", "conv_size": 0},
    {"mixer": "resolvent", "resolvent_state": "vector", "conv_size": 5},
    {"mixer": "resolvent", "resolvent_key_size": 6},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"num_bk_heads": 3, "num_experts": 3, "intermediate_size": 40},
    {"max_position_embeddings": 77},
]


def built_on_meta(config):
    with torch.device("meta"):
        return ResNetBKForCausalLM(config)


@pytest.mark.parametrize("overrides", OVERRIDES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_counts_are_those_of_the_built_model(preset, overrides):
    config = ResNetBKConfig.from_preset(preset, **overrides)
    counts = count_parameters(config)
    model = built_on_meta(config)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.total == sum(counts.by_component.values())
    assert ("head" in counts.by_component) != config.tie_word_embeddings
    assert ("position embedding" in counts.by_component) == (config.max_position_embeddings is not None)


@pytest.mark.parametrize(("preset", "named"), [("100m", 1e8), ("1b", 1e9), ("7b", 7e9), ("70b", 70e9)])
def test_a_preset_has_the_size_in_its_name(preset, named):
    assert count_parameters(ResNetBKConfig.from_preset(preset)).total == pytest.approx(named, rel=0.03)


@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention"])
def test_active_parameters_are_those_of_a_model_with_one_expert_and_the_whole_router(mixer):
    config = ResNetBKConfig.from_preset("seed", mixer=mixer, num_experts=6)
    single = ResNetBKConfig(**{**config.own_fields(), "num_experts": 1})
    router = config.num_layers * config.hidden_size * config.num_experts
    active = count_parameters(single)
    assert count_parameters(config).active == active.total - active.by_component["router"] + router


@pytest.mark.parametrize("mixer", ["resolvent", "scattering", "vector", "bk", "attention"])
def test_components_are_named_by_what_they_are(mixer):
    resolvent = mixer in ("resolvent", "scattering", "vector")
    config = ResNetBKConfig.from_preset(
        "tiny",
        mixer="resolvent" if resolvent else mixer,
        resolvent_regime="scattering" if mixer == "scattering" else "tunnelling",
        resolvent_state="vector" if mixer == "vector" else "matrix",
        resolvent_key_size=6,
        max_position_embeddings=10,
        num_bk_heads=3,
        conv_size=5,
    )
    hidden, layers, experts = config.hidden_size, config.num_layers, config.num_experts
    expected = {
        "token embedding": 512 * hidden,
        "position embedding": 10 * hidden,
        "head": 512 * hidden,
        "router": layers * hidden * experts,
        "experts": layers * experts * 2 * hidden * config.intermediate_size,
    }
    if mixer == "bk":
        expected |= {
            "potential projection": layers * hidden * 3,
            "output projection": layers * 2 * 3 * hidden,
            "chain parameters": layers * 2 * 3,
            "short convolution": layers * 5 * hidden,
            "norms": (layers + 1) * 2 * hidden,
        }
    elif mixer == "attention":
        expected |= {
            "query, key and value projections": layers * 3 * hidden * hidden,
            "output projection": layers * hidden * hidden,
            "short convolution": layers * 5 * 3 * hidden,
            "norms": (2 * layers + 1) * 2 * hidden,
        }
    else:
        channels = hidden + (0 if mixer == "vector" else 2 * 2 * 6)
        expected |= {
            "query, key and value projections": layers * channels * hidden,
            "short convolution": layers * 5 * channels,
            "potential projection": layers * hidden * 2,
            "chain parameters": layers * 2 * (4 if mixer == "scattering" else 2),
            "gate projection": layers * hidden * hidden,
            "output projection": layers * hidden * hidden,
            "norms": (2 * layers + 1) * 2 * hidden + layers * hidden // 2,
        }
    assert count_parameters(config).by_component == expected


def test_a_parameter_of_no_known_component_is_not_counted_in_silence():
    with pytest.raises(StopIteration):
        component_of("model.layers.0.novelty.weight")


def test_the_seeds_table_adds_up_and_every_difference_has_a_reason():
    counts = count_parameters(ResNetBKConfig.from_preset("seed"))
    rows = compare_with_seed(counts)
    assert sum(row.seed for row in rows) == 4_112_512
    assert sum(row.ours for row in rows) == counts.total, "no component of ours is left out of the comparison"
    assert {row.component for row in rows if row.seed != row.ours} == {"potential projection", "chain parameters"}
    assert all(row.reason for row in rows if row.seed != row.ours)
