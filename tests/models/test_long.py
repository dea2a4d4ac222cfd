"""A prompt of a million tokens, in pieces: bounded memory, and no drift."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LENGTH = 2**20
# A fresh process, whose peak is the prompt's alone. The float64 model reads other pieces, after the peak is taken.
PROGRAM = """
import json, sys
import torch
from resnet_bk.environment import peak_resident_bytes
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM

length, regime, memory = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
config = ResNetBKConfig(
    vocab_size=256, hidden_size=64, num_layers=2, intermediate_size=128, resolvent_regime=regime,
    resolvent_longest_memory=memory,
)
model = ResNetBKForCausalLM(config).eval()
row = torch.randint(256, (1, length))


def last_logits(piece_size):
    cache = None
    with torch.inference_mode():
        for piece in row.split(piece_size, dim=1):
            output = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
    return output.logits.double(), cache.num_bytes


logits, cache_bytes = last_logits(16_384)
peak = peak_resident_bytes()
model.double()
exact, _ = last_logits(20_000)
error = ((logits - exact).norm() / exact.norm()).item()
print(json.dumps({"peak": peak, "error": error, "cache_bytes": cache_bytes}))
"""


# Rounding in the scattering regime grows as 1 / eta, that is with the longest memory: docs/mathematics.md, section 7.
@pytest.mark.parametrize(
    ("regime", "length", "memory"), [("tunnelling", LENGTH, 1e5), ("scattering", LENGTH // 8, 2048.0)]
)
def test_a_million_tokens_fit_in_4_gib_and_end_where_double_precision_does(regime, length, memory):
    command = [sys.executable, "-c", PROGRAM, str(length), regime, str(memory)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(run.stdout)
    assert figures["peak"] <= 4 * 2**30
    assert figures["cache_bytes"] < 100_000
    assert figures["error"] <= 1e-4
