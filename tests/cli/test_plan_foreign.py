"""Foreign models that are named wrongly, described wrongly, or do not fit."""

import json

import pytest

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
}
SHAPE = ["--batch-size", "2", "--sequence-length", "16", "--device", "rtx-3060"]


@pytest.fixture
def folder(tmp_path):
    def described(config):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return tmp_path

    return described


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA, "num_attention_heads": 0}, "has no configuration that can be read"),
        ({**LLAMA, "num_hidden_layers": 0}, "has num_hidden_layers 0, which has to be at least 1"),
        ({**LLAMA, "vocab_size": -5}, "has vocab_size -5"),
        ({**LLAMA, "hidden_size": "64"}, "expected int, got str"),
        ({**LLAMA, "num_attention_heads": 4, "head_dim": "x"}, "expected int"),
        ({"model_type": "t5", "d_model": 64}, "is of type t5, no causal language model"),
        ({"model_type": "vit"}, "is of type vit, no causal language model"),
        ({"model_type": "unheard-of"}, "has no configuration that can be read"),
        ({**LLAMA, "model_type": "mixtral", "num_local_experts": 4}, "is a mixture of 4 experts"),
        ([1, 2], "has no configuration that can be read"),
    ],
    ids=str,
)
def test_a_configuration_that_describes_no_model_is_one_line(cli, folder, config, message):
    outcome = cli("plan", "--model", f"hf:{folder(config)}", *SHAPE)
    assert (outcome.code, outcome.out) == (2, "") and message in outcome.err
    said = [line for line in outcome.err.splitlines() if not line.startswith("tracing")]
    assert len(said) == 1 and said[0].startswith("error: ")


def test_a_folder_may_be_written_from_home(cli, folder, monkeypatch):
    home = folder(LLAMA)
    monkeypatch.setenv("HOME", str(home.parent))
    document = cli("plan", "--model", f"hf:~/{home.name}", *SHAPE, "--json").document
    assert document["fastest_that_fits"] == "fp32" and document["refusal"] is None


def test_what_does_not_fit_is_said_with_by_how_much(cli, folder):
    words = ["plan", "--model", f"hf:{folder(LLAMA)}", *SHAPE]
    assert "Fastest that fits: fp32" in cli(*words).out
    outcome = cli(*words, "--gpu-memory", "500MB")
    assert outcome.code == 0 and "Nothing fits: offloaded optimizer comes closest and misses by " in outcome.out
    assert "Fastest that fits" not in outcome.out
    document = cli(*words, "--gpu-memory", "500MB", "--json").document
    assert document["fastest_that_fits"] is None and document["refusal"] in outcome.out.replace("\n", "")
    assert not any(row["fits"] for row in document["strategies"])


def test_strategies_and_the_choice_agree_on_what_fits(cli):
    """The driver's context counts for both."""
    words = ["plan", "--preset", "tiny", "--batch-size", "4", "--sequence-length", "64", "--device", "rtx-3060"]
    found = cli(*words, "--gpu-memory", "500MB", "--json").document
    assert found["chosen"] is None and found["fastest_that_fits"] is None and "nothing fits" in found["refusal"]
    assert not any(row["fits"] for row in found["strategies"])
    found = cli(*words, "--gpu-memory", "885MB", "--json").document
    assert found["chosen"] is not None and found["fastest_that_fits"] == "fp32"


def test_on_a_cpu_formulas_have_no_verdict(cli):
    found = cli("plan", "--preset", "tiny", "--device", "cpu", "--host-memory", "8GB", "--json").document
    assert {row["fits"] for row in found["strategies"]} == {None} and found["chosen"] is not None
