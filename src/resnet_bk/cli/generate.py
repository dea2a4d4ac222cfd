"""``resnet-bk generate``."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from resnet_bk.cli.console import print_json
from resnet_bk.errors import UserError
from resnet_bk.training.config import LARGEST_INTEGER

# Beyond these, float32's probabilities are those of --greedy, or the same for every token.
SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 0.001, 1000.0


@dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continue a text, a token at a time, as it is made.

    Decoding keeps a state of constant size: a token costs the same after ten tokens and after ten thousand. (A model
    with attention keeps every token's keys and values.) A model with a position table, as preset seed's of 128, takes
    no more tokens than that, prompt and text together.

    Examples:
      resnet-bk generate runs/first --prompt "def main("
      resnet-bk generate runs/first --prompt "import " --max-new-tokens 100 --temperature 0.7 --top-k 40
      resnet-bk generate runs/first --prompt "class " --greedy --json
    """

    run_folder: tyro.conf.Positional[Path]
    """Run folder (its newest checkpoint), or one checkpoint folder of it."""
    prompt: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: a line break)")] = "\n"
    """Text to continue."""
    max_new_tokens: int = 100
    """Tokens to make at most. Prompt and text together must fit a position table, where the model has one."""
    prefill_chunk_size: int = 4096
    """Tokens of the prompt that are read at once: fewer need less memory, and the text is the same."""
    temperature: float = 0.8
    """Below 1 prefers likely tokens, above 1 flattens; from 0.001 to 1000."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that hold this share of the probability."""
    greedy: bool = False
    """Always the likeliest token."""
    seed: int = 0
    """Of the choices."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    json: bool = False
    """Print prompt, text and figures as one JSON document on standard output."""

    def run(self) -> None:
        """Generates and prints."""
        self._check()
        import torch

        from resnet_bk.heap import keep_freed_memory
        from resnet_bk.training.checkpoint import load_model_checkpoint
        from resnet_bk.training.run import find_checkpoint
        from resnet_bk.training.step import choose_device

        device = choose_device(self.device)
        keep_freed_memory(device)
        run, checkpoint = find_checkpoint(self.run_folder)
        tokenizer = run.tokenizer()
        prompt_ids = tokenizer.encode(self.prompt)
        if not prompt_ids:
            raise UserError("the prompt has no token; give some text")
        model = load_model_checkpoint(checkpoint).to(device)
        limit = model.config.max_position_embeddings
        if limit is not None and len(prompt_ids) + self.max_new_tokens > limit:
            left = limit - len(prompt_ids)
            mend = f"use --max-new-tokens {left} or a shorter prompt" if left > 0 else "use a shorter prompt"
            raise UserError(
                f"{len(prompt_ids)} prompt tokens and {self.max_new_tokens} new ones are more than the model's "
                f"position table of {limit}; {mend}"
            )
        torch.manual_seed(self.seed)
        streamer = _TokenStreamer(tokenizer.stream_decoder(), echo=not self.json)
        streamer.begin(self.prompt)
        began = time.perf_counter()
        row = torch.tensor([prompt_ids], device=model.device)
        model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=tokenizer.end_of_text_id,
            pad_token_id=tokenizer.end_of_text_id,
            streamer=streamer,
            **self._prefill(len(prompt_ids), causal=model.config.causal),
            **self._choice(),
        )
        seconds = time.perf_counter() - began
        if self.json:
            document = {
                "prompt": self.prompt,
                "text": "".join(streamer.pieces),
                "new_tokens": streamer.num_tokens,
                "seconds": seconds,
                "tokens_per_second": streamer.num_tokens / seconds,
                "checkpoint": str(checkpoint),
                "leaks_targets": not model.config.causal,
            }
            print_json(document)

    def _check(self) -> None:
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are no characters
            place = f"character {error.start + 1:,} is not"
            raise UserError(f"the prompt is not UTF-8 text ({place}); convert it") from None
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; give a number of at least 1")
        if self.prefill_chunk_size < 1:
            raise UserError(f"prefill_chunk_size is {self.prefill_chunk_size}; give a number of tokens, at least 1")
        if not SMALLEST_TEMPERATURE <= self.temperature <= LARGEST_TEMPERATURE:
            raise UserError(
                f"temperature is {self.temperature}; give a number from {SMALLEST_TEMPERATURE} to "
                f"{LARGEST_TEMPERATURE:g}, or --greedy for the likeliest token"
            )
        if not 0 <= self.seed <= LARGEST_INTEGER:
            raise UserError(f"seed is {self.seed}; give a number from 0 to {LARGEST_INTEGER}")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; give 0 for all, or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; give a share above 0 and up to 1")

    def _prefill(self, prompt_length: int, *, causal: bool) -> dict[str, Any]:
        # A bidirectional model has no state to go on from: it reads everything again for each token.
        return {"prefill_chunk_size": min(self.prefill_chunk_size, prompt_length)} if causal else {}

    def _choice(self) -> dict[str, Any]:
        if self.greedy:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


class _TokenStreamer:
    """What ``generate`` hands its tokens to: the prompt first, then one at a time."""

    def __init__(self, decoder: Any, *, echo: bool) -> None:
        self._decoder, self._echo, self._prompt_seen = decoder, echo, False
        self.pieces: list[str] = []
        self.num_tokens = 0

    def begin(self, prompt: str) -> None:
        """Prints what is continued."""
        if self._echo:
            self._write(prompt)

    def put(self, value: Any) -> None:
        """Takes token ids."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token_id in value.flatten().tolist():
            self.num_tokens += 1
            piece = self._decoder.step(token_id)
            self.pieces.append(piece)
            if self._echo:
                self._write(piece)

    def end(self) -> None:
        """Ends the line."""
        if self._echo:
            self._write("\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
