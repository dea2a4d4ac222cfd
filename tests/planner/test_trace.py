"""A traced step has the tensors of a real one, and on a GPU those of runs that are on record."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.bench.contestants import contestant_configs
from resnet_bk.imagined import Machine, is_imagined
from resnet_bk.memory.strategy import STRATEGIES
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.devices import DEVICES
from resnet_bk.planner.footprint import Footprint, footprint, larger
from resnet_bk.planner.predict import predict
from resnet_bk.planner.recorder import GRAPHS
from resnet_bk.planner.trace import trace_training
from resnet_bk.planner.verify import verify_training
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.strategy import training_fields

CPU, CUDA = Machine(kind="cpu"), Machine(kind="cuda", capability=(9, 0))
RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu"
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES if not strategy.stream_weights}
# Named by a strategy: fp16 too, whose scaler reads the gradients.
TRAININGS = {
    **{name: training_fields(strategy, "bf16") for name, strategy in BY_NAME.items()},
    "fp16": {"precision": "fp16"},
    "moments in bf16": {**training_fields(BY_NAME["offloaded optimizer"], "bf16"), "moments": "bf16"},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(mixer, **overrides):
    fields = {"mixer": mixer, "local_attention_every": 0, "intermediate_size": 64}
    return ResNetBKConfig.from_preset("tiny", **{**fields, **overrides})


OF_FEWER_RUNS = ("fp32", "selective checkpointing", "offloaded activations")
RUNS = [
    *(("resolvent", name, 3) for name in TRAININGS),
    *(("resolvent", name, 1) for name in OF_FEWER_RUNS),
    *((mixer, name, 3) for mixer in ("bk", "attention") for name in OF_FEWER_RUNS),
]


@pytest.mark.parametrize(("mixer", "name", "pieces"), RUNS)
def test_on_a_cpu_the_peak_is_that_of_a_real_step(mixer, name, pieces):
    config = tiny(mixer, num_layers=3)
    training = TrainingConfig(batch_size=6, micro_batch_size=6 // pieces, sequence_length=48, **TRAININGS[name])
    traced = trace_training(config, training, CPU).peak_bytes
    measured = verify_training(config, training, torch.device("cpu")).tensor_bytes
    assert measured <= traced <= 1.005 * measured


@settings(max_examples=6, deadline=None)  # of a second or two each
@given(
    mixer=st.sampled_from(["resolvent", "bk", "attention"]),
    hidden_size=st.sampled_from([16, 48, 64]),
    num_experts=st.integers(1, 6),
    vocab_size=st.integers(8, 3000),
    tie_word_embeddings=st.booleans(),
    batch_size=st.integers(1, 4),
    length=st.integers(1, 150),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_whatever_the_shape(
    mixer, hidden_size, num_experts, vocab_size, tie_word_embeddings, batch_size, length, precision
):
    config = tiny(
        mixer,
        hidden_size=hidden_size,
        num_experts=num_experts,
        vocab_size=vocab_size,
        tie_word_embeddings=tie_word_embeddings,
    )
    training = TrainingConfig(batch_size=batch_size, sequence_length=length, precision=precision)
    traced = trace_training(config, training, CPU).peak_bytes
    measured = verify_training(config, training, torch.device("cpu")).tensor_bytes
    assert measured <= traced <= 1.02 * measured


def test_nothing_is_allocated_and_nothing_stays_imagined():
    config = ResNetBKConfig.from_preset("70b", num_layers=2)
    trace = trace_training(config, TrainingConfig(batch_size=64, sequence_length=8192, precision="bf16"), CUDA)
    assert trace.peak_bytes > 100e9
    assert not is_imagined()
    assert torch.ones(2).sum().item() == 2


def test_the_parts_are_the_peak_and_have_their_names():
    config = tiny("resolvent", num_layers=4)
    training = TrainingConfig(batch_size=4, sequence_length=64)
    trace = trace_training(config, training, CUDA)
    parts = trace.parts()
    assert sum(part.num_bytes for part in parts) == trace.peak_bytes
    weights = sum(part.num_bytes for part in parts if part.kind == "weights")
    moments = sum(part.num_bytes for part in parts if part.kind == "optimizer")
    assert weights < moments < 2.01 * weights
    assert {f"model.layers.{layer}.mixer" for layer in range(4)} <= {part.where for part in parts}
    assert {part.kind for part in parts} <= {"weights", "gradients", "optimizer", "activations", "temporaries"}


def test_more_blocks_than_are_traced_are_there_all_the_same():
    training = TrainingConfig(
        batch_size=4,
        micro_batch_size=2,
        sequence_length=64,
        **training_fields(BY_NAME["offloaded activations"], "bf16"),
    )
    peaks = [trace_training(tiny("resolvent", num_layers=layers), training, CUDA).peak_bytes for layers in (4, 5, 9)]
    block = peaks[1] - peaks[0]
    assert block > 0
    assert peaks[2] - peaks[1] == 4 * block


def test_streamed_blocks_take_the_room_of_two():
    streamed = next(strategy for strategy in STRATEGIES if strategy.stream_weights)
    fields = training_fields(streamed, "bf16")
    training = TrainingConfig(batch_size=4, micro_batch_size=2, sequence_length=64, **fields)
    deep, shallow = (tiny("resolvent", num_layers=layers) for layers in (10, 2))
    with_all = trace_training(deep, replace(training, stream_weights=False), CUDA).peak_bytes
    with_two = trace_training(deep, training, CUDA).peak_bytes
    block = (
        trace_training(tiny("resolvent", num_layers=11), replace(training, stream_weights=False), CUDA).peak_bytes
        - with_all
    )
    assert with_all - with_two == pytest.approx(8 * block, rel=0.05)
    assert trace_training(shallow, training, CUDA).peak_bytes <= with_two


def test_a_step_that_is_replayed_has_rooms_and_a_pool_besides(monkeypatch):
    """The first step is not replayed: a prediction is of both."""
    streamed = next(strategy for strategy in STRATEGIES if strategy.stream_weights)
    fields = training_fields(replace(streamed, replayed=True), "bf16")
    config, training = (
        tiny("resolvent", num_layers=6),
        TrainingConfig(batch_size=4, micro_batch_size=2, sequence_length=64, **fields),
    )
    plain = replace(training, cuda_graphs=False)
    replayed, first = (trace_training(config, each, CUDA) for each in (training, plain))
    pool = [origin for origin in replayed.origins if origin.stream == GRAPHS]
    assert pool and not [origin for origin in first.origins if origin.stream == GRAPHS]
    assert {origin.phase for origin in pool} == {"forward", "backward"}
    device = DEVICES["h100"]
    found, of_plain = predict(config, training, device), predict(config, plain, device)
    assert found.footprint == larger(footprint(replayed), footprint(first))
    assert found.gpu_bytes > of_plain.gpu_bytes and found.host_bytes == of_plain.host_bytes

    def larger_without_graphs(trace, **_):
        size = 1 if any(origin.stream == GRAPHS for origin in trace.origins) else 2
        return Footprint(tensor_bytes=size, allocated_bytes=size, reserved_bytes=size, most_reserved_bytes=size)

    monkeypatch.setattr("resnet_bk.planner.predict.footprint", larger_without_graphs)
    assert predict(config, training, device).footprint.reserved_bytes == 2
    rooms = footprint(replayed).tensor_bytes - footprint(first).tensor_bytes
    assert rooms > 0, "inputs, gradients, results and the sums of gradients"


# An H100's own figures: benchmarks/step.py and benchmarks/frugal_gpu.py.
def recorded_steps():
    document = json.loads((RECORDS / "step.json").read_text())
    # All of them: benchmarks/planner_accuracy.py --only recorded.
    for point in document["points"][::3]:
        for key, row in point["models"].items():
            yield pytest.param(document, point, key, row["peak_bytes"], id=f"{key} {point['sequence_length']}")


@pytest.mark.parametrize(("document", "point", "key", "measured"), list(recorded_steps()))
@pytest.mark.slow
def test_recorded_peaks_of_an_h100_are_predicted(document, point, key, measured):
    config = contestant_configs(document["preset"], {})[key]
    training = TrainingConfig(
        batch_size=point["batch_size"], sequence_length=point["sequence_length"], precision=document["precision"]
    )
    predicted = footprint(trace_training(config, training, CUDA)).allocated_bytes
    assert measured <= predicted <= 1.002 * measured


FRUGAL = json.loads((RECORDS / "frugal.json").read_text())["cells"]


# Open points, all but the last of steps replayed from CUDA graphs: what is predicted beside the bounds below. Of what
# is reserved with what the driver takes, on which `resnet-bk plan` decides, each is predicted at least as high as it
# was.
PREDICTED_BESIDE = {
    "7b under 12 GB, 32,768 tokens": "tensors 1.3% too high, where 0.3% is asked",
    "100m under 1.6 GB": "4.1% too low of the most that is reserved, where 3% is asked; of tensors it is 0.1%",
    "7b under 8 GB, 32,768 tokens": "12% too high of what is reserved, where 5% is asked; of tensors it is 0.05%",
    "100m under 1 GB, 32,768 tokens": "tensors 0.4% too high, which is 1.5 MB",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.xfail(strict=True, reason=PREDICTED_BESIDE[name])] if name in PREDICTED_BESIDE else [],
        )
        for name, cell in FRUGAL.items()
        if "allocated_bytes" in cell
    ],
)
def test_recorded_frugal_runs_of_an_h100_are_predicted(name):
    cell = FRUGAL[name]
    config = ResNetBKConfig.from_preset(cell["cell"]["preset"])
    training = TrainingConfig(**cell["training"])
    held = cell["cell"]["cap_bytes"] is not None and "inside" not in name
    trace, small = trace_training(config, training, CUDA), cell.get("small_workspaces", False)
    found = footprint(trace, expandable=held, small_workspaces=small)
    assert cell["allocated_bytes"] <= found.allocated_bytes <= 1.003 * cell["allocated_bytes"]
    assert 0.95 * cell["reserved_bytes"] <= found.reserved_bytes <= 1.05 * cell["reserved_bytes"]
    # When copies end, nobody can say beforehand.
    assert 0.97 * cell["reserved_bytes"] <= found.most_reserved_bytes <= 1.12 * cell["reserved_bytes"]
