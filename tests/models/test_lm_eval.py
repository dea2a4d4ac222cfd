"""lm-evaluation-harness: its ``hf`` adapter loads the model and gives the log-likelihoods that ``evaluate`` gives."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.data import TextTokenizer, train_tokenizer
from resnet_bk.training.evaluate import evaluate

pytest.importorskip("lm_eval")
WINDOW = 32
END = "<|endoftext|>"
TEXTS = [
    "The Green's function of a chain says how far an excitation at one site is felt at another one. " * 4,
    "Tunnelling below the band, everything is real and decays; inside of it there are waves as well. " * 2,
]
TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TextTokenizer]:
    """A small model with weights far from uniform guesses, beside its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer("byte", [])
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(
        ResNetBKConfig.from_preset("tiny", vocab_size=tokenizer.vocab_size, initializer_range=0.5)
    )
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=END).save_pretrained(folder)
    return folder, tokenizer


@pytest.fixture(scope="module")
def adapter(checkpoint: tuple[Path, TextTokenizer]) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint[0]), device="cpu", dtype="float32", max_length=WINDOW, batch_size=2)


def test_a_local_task_has_the_loss_of_evaluate(
    checkpoint: tuple[Path, TextTokenizer], adapter: Any, tmp_path: Path
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    _, tokenizer = checkpoint
    data = tmp_path / "texts.jsonl"
    # Whole windows: the harness gives a last, shorter one more context than evaluate does.
    texts = [text[: len(text) // WINDOW * WINDOW] for text in TEXTS]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "local_text.yaml").write_text(TASK.format(data=data))
    found = simple_evaluate(
        model=adapter,
        tasks=["local_text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    perplexity = found["results"]["local_text"]["byte_perplexity,none"]
    model, nats, num_bytes = adapter.model, 0.0, 0
    for text in texts:
        tokens = np.array([adapter.prefix_token_id, *tokenizer.encode(text)])
        evaluation = evaluate(model, tokens, batch_size=2, sequence_length=WINDOW)
        assert evaluation.tokens == len(text.encode())
        nats += evaluation.loss * evaluation.tokens
        num_bytes += len(text.encode())
    assert np.log(perplexity) == pytest.approx(nats / num_bytes, rel=1e-5)
    assert abs(nats / num_bytes - np.log(tokenizer.vocab_size)) > 0.1


def test_continuations_have_the_models_own_log_probabilities(adapter: Any) -> None:
    from lm_eval.api.instance import Instance

    pairs = [("A resolvent is", " an inverse"), ("A resolvent is", " a verse"), ("", "x")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index) for index, pair in enumerate(pairs)
    ]
    for (context, continuation), (found, greedy) in zip(pairs, adapter.loglikelihood(requests), strict=True):
        prompt = adapter.tok_encode(context) or [adapter.prefix_token_id]
        answer = adapter.tok_encode(continuation)
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            log_p = adapter.model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = log_p.gather(1, torch.tensor(answer).unsqueeze(1)).sum()
        assert found == pytest.approx(float(expected), rel=1e-5)
        assert greedy == (log_p.argmax(-1).tolist() == answer)
