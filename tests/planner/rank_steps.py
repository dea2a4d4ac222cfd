"""Run by torchrun: the most bytes of tensors that a rank has in a real step, for each training of a list in JSON."""

import json
import sys

import torch

from resnet_bk.memory.tracking import TensorTracker
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.planner.ranks import of_one_rank
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.distributed import joined, shard_model
from resnet_bk.training.step import train_step
from resnet_bk.training.strategy import prepare_training

CPU = torch.device("cpu")


def peak_bytes(config, training, world):
    own = of_one_rank(training, world.size)
    tracker = TensorTracker()
    with tracker, tracker.hearing_of_resizes():
        model = ResNetBKForCausalLM(config).train()
        shard_model(model, world, CPU)
        prepared = prepare_training(model, own, CPU)
        size = (own.batch_size, own.sequence_length)
        batch = (torch.randint(config.vocab_size, size), torch.randint(config.vocab_size, size))
        for step in range(2):
            tracker.reset_peak()
            train_step(prepared.model, prepared.optimizer, prepared.scaler, [batch], own, step, world=world)
    return tracker.peak_bytes


def main(models_and_trainings):
    torch.set_num_threads(1)
    found = []
    with joined() as world:
        for model, training in models_and_trainings:
            config = ResNetBKConfig.from_preset("tiny", **model)
            found.append(peak_bytes(config, TrainingConfig(**training), world))
        if world.is_main:
            print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
