"""``resnet-bk eval``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from resnet_bk.cli.console import print_json, remark, result_console
from resnet_bk.errors import UserError

if TYPE_CHECKING:
    from resnet_bk.training.data import TextTokenizer, TokenSplit
    from resnet_bk.training.run import Run

# From here on a loss is mostly one of telling when the unknown token comes.
TELLING_SHARE_OF_UNKNOWN = 0.1


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Measure a trained model's loss: on the text its run held out, or on another.

    The loss is in nats per token. Bits a byte can be compared between tokenizers that lose nothing (byte, bpe); with
    word:N or char, what became the unknown token counts as if that were the text.

    Examples:
      resnet-bk eval runs/first
      resnet-bk eval runs/first --data other.txt --json
      resnet-bk eval runs/first/checkpoints/step-00001000
      resnet-bk eval runs/first --sequence-length 4096 --batch-size 1
    """

    run_folder: tyro.conf.Positional[Path]
    """Run folder (its newest checkpoint), or one checkpoint folder of it."""
    data: str | None = None
    """Text to evaluate on. The run's own text, wherever it is by now, means its held-out part; any other is taken
    whole."""
    batch_size: int | None = None
    """Sequences at once; by default the run's."""
    sequence_length: int | None = None
    """Tokens per window; by default the run's. Longer ones put more before most tokens: a resolvent model's loss mostly
    falls there."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    json: bool = False
    """Print the figures as one JSON document on standard output."""

    def run(self) -> None:
        """Evaluates and prints."""
        from resnet_bk.heap import keep_freed_memory
        from resnet_bk.training.checkpoint import load_model_checkpoint, step_of
        from resnet_bk.training.evaluate import evaluate
        from resnet_bk.training.run import find_checkpoint
        from resnet_bk.training.step import choose_device

        device = choose_device(self.device)
        keep_freed_memory(device)
        run, checkpoint = find_checkpoint(self.run_folder)
        training = run.config.training
        batch_size, length = self._shape(run)
        model = load_model_checkpoint(checkpoint).to(device)
        tokenizer = run.tokenizer()
        split = self._text(run, tokenizer)
        unknown_share = split.share_of(tokenizer.unknown_id)
        if unknown_share > TELLING_SHARE_OF_UNKNOWN:
            remark(
                f"{unknown_share:.0%} of this text's tokens are unknown to the run's tokenizer ({tokenizer.spec}); "
                "the loss says little about it"
            )
        evaluation = evaluate(
            model, split.tokens, batch_size=batch_size, sequence_length=length, precision=training.precision
        )
        document = {
            "checkpoint": str(checkpoint),
            "step": step_of(checkpoint),
            "data": self.data or run.config.data.data,
            "split": split.name,
            "loss": evaluation.loss,
            "perplexity": evaluation.perplexity,
            "bits_per_byte": evaluation.bits_per_byte(split.num_bytes),
            "tokens": evaluation.tokens,
            "bytes": split.num_bytes,
            "unigram_entropy": split.unigram_entropy(),
            "unknown_share": unknown_share,
            "sequence_length": length,
            "precision": training.precision,
            "device": str(model.device),
            "leaks_targets": not model.config.causal,
        }
        self._print(document)

    def _shape(self, run: "Run") -> tuple[int, int]:
        training = run.config.training
        batch_size = training.batch_size if self.batch_size is None else self.batch_size
        length = training.sequence_length if self.sequence_length is None else self.sequence_length
        for name, value in (("batch_size", batch_size), ("sequence_length", length)):
            if value < 1:
                raise UserError(f"{name} is {value}; give a number of at least 1")
        limit = run.config.model.max_position_embeddings
        if limit is not None and length > limit:
            raise UserError(f"sequence_length {length} is more than the model's position table of {limit}; shorten it")
        return batch_size, length

    def _text(self, run: "Run", tokenizer: "TextTokenizer") -> "TokenSplit":
        from resnet_bk.training.data import tokenize_all

        corpus = run.read_text(self.data)
        if run.has_as_text(corpus):
            return run.prepare_text(corpus, on_progress=remark).validation
        return tokenize_all(corpus, tokenizer)

    def _print(self, document: dict[str, Any]) -> None:
        if self.json:
            print_json(document)
            return
        which = "the held-out part of" if document["split"] == "validation" else "all of"
        lines = [
            f"{document['checkpoint']} on {which} {document['data']}, {document['tokens']:,} tokens",
            f"  loss           {document['loss']:.4f} nats a token",
            f"  perplexity     {document['perplexity']:.2f}",
            f"  bits a byte    {document['bits_per_byte']:.4f}",
            f"  unigram        {document['unigram_entropy']:.4f} nats a token (no context at all)",
        ]
        if document["leaks_targets"]:
            lines.append("  This model is bidirectional: it reads its own targets. The loss is a leak, not skill.")
        for line in lines:
            result_console.print(line, markup=False, soft_wrap=True)
