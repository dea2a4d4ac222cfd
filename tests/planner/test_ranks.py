"""Several GPUs under FSDP2: a rank's step is traced as it runs, searched, and printed as a command for torchrun."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from resnet_bk.cli.main import main
from resnet_bk.errors import UserError
from resnet_bk.imagined import Machine
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.memory.plan import Budget
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.devices import DEVICES, NCCL_BYTES
from resnet_bk.planner.predict import predict
from resnet_bk.planner.ranks import of_one_rank
from resnet_bk.planner.search import NothingFitsError, candidates, choose_ranks, choose_training, numbers_of_gpus
from resnet_bk.planner.sharded import tensors_of_a_rank
from resnet_bk.planner.trace import trace_training
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.distributed import World
from resnet_bk.training.start import check_ranks
from resnet_bk.training.strategy import strategy_of, training_shape

CPU, CUDA = Machine(kind="cpu"), Machine(kind="cuda", capability=(9, 0), multiprocessors=132)
H100 = DEVICES["h100"]
SCRIPT = Path(__file__).with_name("rank_steps.py")
GB = 10**9
MODEL = ResNetBKConfig.from_preset("100m", num_layers=2)
TRAINING = TrainingConfig(batch_size=8, sequence_length=512)


@pytest.mark.slow
def test_a_trace_has_the_tensors_of_a_real_rank():
    model = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "vocab_size": 301}
    plain = {"batch_size": 8, "sequence_length": 40}
    trainings = [
        {**plain, "precision": "bf16", "micro_batch_size": 2},
        {**plain, "checkpointing": "full"},
    ]
    asked = [(model, training) for training in trainings]
    asked.append(({**model, "tie_word_embeddings": True, "num_experts": 2}, plain))
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*ranks, str(SCRIPT), json.dumps(asked)], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for (fields, training), measured in zip(asked, json.loads(result.stdout), strict=True):
        config = ResNetBKConfig.from_preset("tiny", **fields)
        traced = trace_training(config, TrainingConfig(**training), CPU, ranks=2).peak_bytes
        assert measured == pytest.approx(traced, rel=0.01), training


def test_weights_moments_and_batch_are_shared_out():
    parts = {}
    for ranks in (2, 8):
        trace = trace_training(MODEL, TRAINING, CUDA, ranks=ranks)
        parts[ranks] = {
            kind: sum(p.num_bytes for p in trace.parts() if p.kind == kind) for kind in ("weights", "optimizer")
        }
        total = count_parameters(MODEL).total
        assert parts[ranks]["weights"] == pytest.approx(4 * total / ranks, rel=0.01)
        assert parts[ranks]["optimizer"] == pytest.approx(8 * total / ranks, rel=0.01)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("preset", "layers", "ranks", "fields"),
    [
        ("100m", 2, 4, {"checkpointing": "full"}),
        ("100m", 2, 2, {"micro_batch_size": 1}),
        ("1b", 3, 8, {}),
        ("70b", 4, 8, {"checkpointing": "full"}),
    ],
)
def test_the_formula_is_near_the_trace_and_not_below(preset, layers, ranks, fields):
    config = ResNetBKConfig.from_preset(preset, num_layers=layers)
    training = TrainingConfig(batch_size=8, sequence_length=1024, precision="bf16", **fields)
    shape = training_shape(of_one_rank(training, ranks))
    formula = tensors_of_a_rank(strategy_of(training), config, shape, count_parameters(config), ranks)
    traced = trace_training(config, training, CUDA, ranks=ranks).peak_bytes
    assert 0.97 * traced <= formula <= 1.2 * traced


def test_of_several_ranks_only_what_train_accepts_is_searched():
    ways = candidates(MODEL, TRAINING, H100, ranks=4)
    assert {way.training.checkpointing for way in ways} == {"none", "selective", "full", "offload"}
    for way in ways:
        check_ranks(way.training, World(size=4))
        assert way.training.batch_size == TRAINING.batch_size
        assert (way.training.micro_batch_size or 2) <= 2
    alone = min(way.cost.seconds for way in candidates(MODEL, TRAINING, H100))
    assert alone / 4 < min(way.cost.seconds for way in ways) < alone


def test_what_is_chosen_fits_each_gpu_and_less_room_is_slower():
    room = NCCL_BYTES + H100.context_bytes + 815_000_000
    budgets = (Budget(gpu_bytes=gpu_bytes) for gpu_bytes in (8 * GB, room))
    long = replace(TRAINING, sequence_length=2048)
    wide, tight = (choose_training(MODEL, long, budget, H100, ranks=4) for budget in budgets)
    assert wide.training == replace(long, precision="bf16")
    assert tight.gpu_bytes <= room < wide.gpu_bytes
    assert tight.cost.seconds > wide.cost.seconds
    assert wide.ranks == 4
    assert wide.nccl_bytes == NCCL_BYTES


def test_the_host_has_all_processes_and_a_checkpoint():
    predicted = predict(MODEL, TRAINING, H100, ranks=4)
    total = count_parameters(MODEL).total
    assert predicted.host_bytes == 4 * H100.process_bytes + 12 * total
    with pytest.raises(NothingFitsError, match="of host memory"):
        choose_training(MODEL, TRAINING, Budget(host_bytes=predicted.host_bytes - GB), H100, ranks=4)


def test_where_nothing_fits_the_refusal_is_of_each_gpu():
    with pytest.raises(NothingFitsError, match=r"at a time on each of 2 GPUs comes closest and misses by .* of GPU"):
        choose_training(MODEL, TRAINING, Budget(gpu_bytes=int(1.7 * GB)), H100, ranks=2)


def test_the_least_power_of_two_that_fits():
    model = ResNetBKConfig.from_preset("1b", num_layers=3)
    frugal = {"precision": "bf16", "checkpointing": "full", "micro_batch_size": 1, "loss_chunk_tokens": 512}
    training, budget = replace(TRAINING, **frugal), Budget(gpu_bytes=NCCL_BYTES + int(3.5 * GB))
    found = choose_ranks(model, training, budget, H100, fixed=frugal)
    assert found.ranks > 1
    assert not found.training.offload_optimizer
    fixed = {*frugal, "offload_optimizer"}
    with pytest.raises(NothingFitsError):
        choose_training(model, training, budget, H100, ranks=found.ranks // 2, fixed=fixed)
    few = replace(training, batch_size=4)
    with pytest.raises(NothingFitsError, match=r"\(up to 4 GPUs were tried; more cannot share a batch of 4 evenly\)"):
        choose_ranks(MODEL, few, Budget(gpu_bytes=GB), H100, fixed=frugal)
    assert numbers_of_gpus(replace(TRAINING, batch_size=12)) == [1, 2, 4]


def test_what_ranks_cannot_do_is_refused():
    with pytest.raises(UserError, match="take a multiple of 3"):
        predict(MODEL, TRAINING, H100, ranks=3)
    with pytest.raises(UserError, match="offload_optimizer is for one process"):
        predict(MODEL, replace(TRAINING, offload_optimizer=True), H100, ranks=2)


# The command line.


def planned(capsys, *words):
    code = main(["plan", *words, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else captured.err


def test_the_answer_is_a_command_for_torchrun(capsys):
    flags = ("--preset", "tiny", "--batch-size", "8", "--device", "rtx-3060", "--num-gpus", "2")
    code, document = planned(capsys, *flags)
    assert not code
    chosen = document["chosen"]
    assert chosen["command"].startswith("torchrun --nproc-per-node 2 -m resnet_bk train --preset tiny --batch-size 8 ")
    assert (chosen["num_gpus"], chosen["rows_of_a_gpu"], chosen["memory_is"]) == (2, 4, "traced")
    assert chosen["cost"]["link_seconds"] > 0
    _, held = planned(capsys, *flags, "--gpu-memory", "4GB")
    assert "--gpu-memory 4GB --strategy given" in held["chosen"]["command"]


def test_several_gpus_that_cannot_be_are_refused(capsys):
    for words, said in {
        ("--device", "cpu", "--num-gpus", "2"): "--num-gpus is for GPUs",
        ("--ladder", "--num-gpus", "2"): "--ladder does not",
        ("--num-gpus", "0"): "num_gpus is 0; give a number from 1",
        ("--num-gpus", "3", "--batch-size", "8"): "take a multiple of 3",
    }.items():
        code, errors = planned(capsys, *words)
        assert code == 2
        assert said in errors
