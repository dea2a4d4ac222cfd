"""Loss on text that was not trained on."""

import math
from dataclasses import dataclass

import torch

from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.ops.loss import IGNORE_INDEX
from resnet_bk.training.config import Precision
from resnet_bk.training.data import evaluation_batches
from resnet_bk.training.data.dataset import Tokens
from resnet_bk.training.distributed import ALONE, World
from resnet_bk.training.micro_step import autocast


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """``loss`` in nats per token over ``tokens`` predicted tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that leaves the numbers."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """All tokens' bits over the bytes of the same text: comparable between tokenizers that lose nothing."""
        return self.loss * self.tokens / math.log(2) / num_bytes


@torch.no_grad()
def evaluate(
    model: ResNetBKForCausalLM,
    tokens: Tokens,
    *,
    batch_size: int,
    sequence_length: int,
    max_tokens: int | None = None,
    precision: Precision = "fp32",
    device: torch.device | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Mean loss over windows of ``tokens`` (:func:`evaluation_batches`); the model's mode is restored afterwards.

    ``device`` is where the model computes, if not where its weights are. Several ranks share each batch and return the
    same.
    """
    was_training, device = model.training, device or model.device
    model.eval()
    total, count = 0.0, 0
    for batch in evaluation_batches(
        tokens, batch_size=batch_size, sequence_length=sequence_length, max_tokens=max_tokens
    ):
        input_ids, targets = world.share(*batch)
        with autocast(device, precision):
            output = model(
                input_ids.to(device),
                shift_labels=targets.to(device),
                use_cache=False,
                return_logits=False,
            )
        predicted = int((targets != IGNORE_INDEX).sum())
        if predicted:
            total += float(output.cross_entropy) * predicted
            count += predicted
    model.train(was_training)
    total, all_predicted = world.totals(total, count)
    return Evaluation(loss=total / all_predicted, tokens=int(all_predicted))
