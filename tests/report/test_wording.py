"""How a model's mixing is said, in reports and on the command line."""

import pytest

from resnet_bk.cli.wording import local_attention_in_words
from resnet_bk.models import ResNetBKConfig
from resnet_bk.report.wording import mixer_in_words
from resnet_bk.schema import Contestant

RESOLVENT = "keys and values carried by the resolvent"
LOCAL = "attention to the last tokens"


def contestant(**config):
    return Contestant(key="a", label="a", source="a file", parameters=1, active_parameters=1, config=config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"mixer": "gpt2"}, "from a file"),
        ({"mixer": "resolvent", "local_attention_every": 4, "num_layers": 2}, RESOLVENT),
        (
            {"mixer": "resolvent", "local_attention_every": 2, "num_layers": 2},
            f"{RESOLVENT}, {LOCAL} in one block of 2",
        ),
        (
            {
                "mixer": "resolvent",
                "local_attention_every": 2,
                "num_layers": 2,
                "local_attention_positions": "rotary",
                "conv_size": 4,
            },
            f"{RESOLVENT}, {LOCAL} with rotary positions in one block of 2, behind a short convolution over 4 tokens",
        ),
        ({"mixer": "local", "local_attention_positions": "fading"}, LOCAL),
        ({"mixer": "local", "local_attention_positions": "rotary"}, f"{LOCAL} with rotary positions"),
    ],
)
def test_a_report_says_how_tokens_mix(config, words):
    assert mixer_in_words(contestant(**config)) == words


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"local_attention_every": 0}, ""),
        ({"mixer": "local"}, ""),
        ({}, ", local attention over 1,024 tokens in 1 of 4 blocks"),
        ({"local_attention_positions": "rotary"}, ", rotary local attention over 1,024 tokens in 1 of 4 blocks"),
    ],
)
def test_the_command_line_says_where_attention_is_local(fields, words):
    assert local_attention_in_words(ResNetBKConfig(**fields)) == words
