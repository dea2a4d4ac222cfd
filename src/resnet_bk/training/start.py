"""Starting a run, and going on with one: everything checked before anything is written."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from resnet_bk.errors import UserError
from resnet_bk.files import new_directory
from resnet_bk.heap import keep_freed_memory
from resnet_bk.memory.limits import check_training_fits
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.checkpoint import (
    CPU,
    TrainingState,
    load_model_checkpoint,
    path_of_step,
    restore_optimizer,
    save_checkpoint,
    step_of,
)
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.data import TokenDataset
from resnet_bk.training.data.batches import check_long_enough
from resnet_bk.training.distributed import ALONE, World
from resnet_bk.training.loop import Observer, Trainer
from resnet_bk.training.run import Run, RunConfig, check_new_run, open_run, write_record
from resnet_bk.training.step import choose_device
from resnet_bk.training.strategy import prepare_training, strategy_of, training_shape


@dataclass(frozen=True, kw_only=True)
class ReadyRun:
    """A trainer and the state to start from."""

    trainer: Trainer
    state: TrainingState


def check_config(config: RunConfig, dataset: TokenDataset) -> None:
    """Raises a UserError for what would fail only once training runs."""
    model, length = config.model, config.training.sequence_length
    if model.max_position_embeddings is not None and length > model.max_position_embeddings:
        raise UserError(
            f"sequence_length {length} is more than the model's position table of {model.max_position_embeddings}; "
            "shorten it, or choose a preset without a table"
        )
    if model.vocab_size < dataset.tokenizer.vocab_size:
        raise UserError(
            f"vocab_size {model.vocab_size} is less than the tokenizer's {dataset.tokenizer.vocab_size}; "
            "leave --vocab-size out, or choose a smaller tokenizer"
        )
    check_long_enough(dataset.train.tokens, length)


def start_run(
    out: Path,
    config: RunConfig,
    dataset: TokenDataset,
    *,
    command: list[str],
    observer: Observer,
    world: World = ALONE,
) -> ReadyRun:
    """Makes the run folder, with a checkpoint of step 0, in one rename: from then on a kill loses at most steps.

    Of several ranks, rank 0 makes it, with the weights that one process would begin with, and all go on from there.

    Raises:
        UserError: the configuration, the text or ``out`` does not fit.
    """
    check_config(config, dataset)
    check_ranks(config.training, world)
    device = world.place(choose_device(config.training.device))
    keep_freed_memory(device)
    if not world.is_main:
        world.wait()
        return resume_run(open_run(out), dataset, observer=observer, world=world)
    check_new_run(out)
    check_memory(config.model, config.training, device)
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    config = replace(config, training=replace(config.training, num_threads=torch.get_num_threads()))
    torch.manual_seed(config.training.seed)
    prepared = prepare_training(ResNetBKForCausalLM(config.model), config.training, device if world.size == 1 else CPU)
    with new_directory(out) as folder:
        write_record(folder, config, dataset, command)
        save_checkpoint(folder / "checkpoints", prepared.model, prepared.optimizer, prepared.scaler, TrainingState())
    if world.size > 1:
        del prepared
        world.wait()
        return resume_run(open_run(out), dataset, observer=observer, world=world)
    trainer = Trainer(run=open_run(out), prepared=prepared, device=device, dataset=dataset, observer=observer)
    return ReadyRun(trainer=trainer, state=TrainingState())


def resume_run(run: Run, dataset: TokenDataset, *, observer: Observer, world: World = ALONE) -> ReadyRun:
    """Goes on from the newest checkpoint, which any number of ranks may have written.

    Raises:
        UserError: a file is damaged, or the text or vocabulary is no longer the run's.
    """
    run.check_same_data(dataset)
    check_ranks(run.config.training, world)
    if run.config.training.num_threads is not None:
        torch.set_num_threads(run.config.training.num_threads)
    checkpoint = path_of_step(run.checkpoint_folder, world.as_main(step_of(run.latest_checkpoint())))
    device = world.place(choose_device(run.config.training.device))
    keep_freed_memory(device)
    if world.is_main:
        check_memory(run.config.model, run.config.training, device)
    model = load_model_checkpoint(checkpoint, world, device)
    if model.config.own_fields() != run.config.model.own_fields():
        raise UserError(f"{checkpoint} holds another model than {run.folder} records; restore one of them")
    prepared = prepare_training(model, run.config.training, device)
    state = restore_optimizer(checkpoint, prepared.model, prepared.optimizer, prepared.scaler, world)
    if run.config.training.cuda_graphs and device.type != "cuda":
        observer({"no_cuda_graphs": "this is a CPU"})
    trainer = Trainer(run=run, prepared=prepared, device=device, dataset=dataset, observer=observer, world=world)
    return ReadyRun(trainer=trainer, state=state)


def check_device(training: TrainingConfig) -> None:
    """Raises a UserError if the device is not there, or cannot do what a new run asks of it."""
    device = choose_device(training.device)
    if training.cuda_graphs and device.type != "cuda":
        raise UserError("CUDA graphs are recorded on a GPU, and this run would be on a CPU; leave out --cuda-graphs")


def check_ranks(training: TrainingConfig, world: World) -> None:
    """Raises a UserError for what several ranks cannot do: an uneven batch, or weights and moments kept on the host."""
    world.rows(training.batch_size)
    if world.size > 1 and training.offload_optimizer:
        raise UserError(
            f"offload_optimizer is for one process, and these are {world.size} ranks, which share weights and moments; "
            "leave it out, or train without torchrun"
        )


def check_memory(model: ResNetBKConfig, training: TrainingConfig, device: torch.device) -> None:
    """Raises a UserError if training the model so would need more host memory than there is."""
    check_training_fits(model, training_shape(training), strategy_of(training), device=device)
