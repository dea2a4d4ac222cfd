"""How long a training step will take, roughly: enough to tell which of two strategies is faster.

    device  = 1.9 x FLOPs / rate of matrix products + 10 x kept bytes / copy bandwidth + time of launches
    bus     = bytes each way / bandwidth of the bus, the longer way
    host    = parameters / rate of the update
    link    = bytes that ranks exchange, one way / bandwidth between GPUs

The two factors were fitted to 23 steps on an H100 (benchmarks/results/gpu/step-h100.json and frugal.json: presets 100m
and 1b, three mixers, N from 128 to 131,072, with and without recomputation); the formula is within a fifth of those of
one micro-batch. What launches, replays and the host's update take is fitted to the capped steps of frugal.json, on
hosts of which one is up to a third faster than another: within a third.
What runs side by side counts as the longest, and a twentieth of the rest. Of several ranks each computes its share of
the batch, and the bandwidth of their link is a data sheet's: of them nothing was fitted.
"""

from dataclasses import dataclass, replace

from resnet_bk.memory.activations import TrainingShape, block_activations, tokens_with_logits
from resnet_bk.memory.parameters import ParameterCounts
from resnet_bk.memory.strategy import Strategy
from resnet_bk.models import ResNetBKConfig
from resnet_bk.models.flops import formula_flops
from resnet_bk.planner.devices import Device

FLOPS_FACTOR, BYTES_FACTOR = 1.9, 10.0
# Python and the driver, for one block's forward or backward pass, beside what runs of those before.
LAUNCH_SECONDS, OVERLAP_LOSS = 5e-3, 0.05
# The same where a CUDA graph is, of forward or of both passes of backward (benchmarks/results/gpu/frugal.json).
REPLAY_SECONDS = 1.4e-3
# Block by block, for each piece of a block that no graph goes through: its own call of backward, what waits for it, and
# the random numbers' states (benchmarks/results/gpu/frugal-by-block.json).
PIECE_SECONDS = 1e-2
FORWARD_SHARE = 1 / 3  # of a step's time on the device
# Work of a second forward pass that selective checkpointing does not do: products and operators are kept.
SELECTIVE_SHARE = 0.15
# Python for the updates of a block's parameters, of which each is one: 0.15 ms for each of some twenty.
UPDATE_SECONDS = 3e-3
# The update moves 30 bytes a parameter, or 24 with half the moments.
HALF_MOMENTS_SPEEDUP = 1.25
# The update by gradients in a half type, or adding them up: piece by piece they are made float32 before.
HALF_GRADIENTS_FACTOR = 1.6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of a step, by what is busy; ``seconds`` is of all of it together."""

    device_seconds: float
    bus_seconds: float
    host_seconds: float
    seconds: float
    tokens_per_second: float
    link_seconds: float = 0.0

    @property
    def bound_by(self) -> str:
        """What the step waits for."""
        times = {
            "the GPU": self.device_seconds,
            "the bus": self.bus_seconds,
            "the host's update": self.host_seconds,
            "the link between GPUs": self.link_seconds,
        }
        return max(times, key=lambda name: times[name])


def step_cost(
    strategy: Strategy,
    config: ResNetBKConfig,
    shape: TrainingShape,
    counts: ParameterCounts,
    device: Device,
    *,
    clips: bool = True,
    ranks: int = 1,
) -> Cost:
    """The cost of a step of ``shape.micro_batches`` micro-batches; ``clips`` forbids updates during backward.

    With several ``ranks``, which share weights, gradients and moments, ``shape`` is one rank's.
    """
    link_seconds = _link_seconds(config, shape, counts, device, ranks)
    device_seconds, launches = _device_seconds(strategy, config, shape, device)
    bus_seconds = _bus_seconds(strategy, config, shape, counts, device)
    host_seconds = _host_seconds(strategy, config.num_layers, shape, counts, device)
    if not strategy.offload_optimizer:
        device_seconds += _update_seconds(counts, device) / ranks
        seconds = _side_by_side(device_seconds, link_seconds) + bus_seconds
    elif device.machine.kind == "cpu":
        seconds = device_seconds + bus_seconds + host_seconds  # one processor does all of it
    elif clips:
        # The update begins when the norm is known; weights return under the next forward pass.
        seconds = _side_by_side(device_seconds + max(0.0, host_seconds - FORWARD_SHARE * device_seconds), bus_seconds)
    elif strategy.goes_by_block:
        # The next forward pass begins with the block that is updated last.
        forward = FORWARD_SHARE * device_seconds
        seconds = forward + _side_by_side(device_seconds - forward, bus_seconds, host_seconds)
    else:
        # Who launches kernels and who has each parameter updated take turns with Python.
        seconds = _side_by_side(device_seconds, bus_seconds, host_seconds + launches)
    return Cost(
        device_seconds=device_seconds,
        bus_seconds=bus_seconds,
        host_seconds=host_seconds,
        seconds=seconds,
        tokens_per_second=ranks * shape.tokens * shape.micro_batches / seconds,
        link_seconds=link_seconds,
    )


def _device_seconds(
    strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape, device: Device
) -> tuple[float, float]:
    """Of a step, and what of it Python needs to launch kernels."""
    rates, half = device.rates, strategy.half
    again = {"none": 0.0, "selective": SELECTIVE_SHARE}.get(strategy.checkpointing, 1.0)
    parts = formula_flops(config, shape.batch_size, shape.sequence_length)
    flops = sum((1 + (0 if part.component == "head" else again)) * part.forward + part.backward for part in parts)
    moved_for_logits = _chunk_bytes(config, shape, half=half)
    kept = sum(
        number * part.num_bytes
        for alike, number in config.alike()
        for part in block_activations(alike, shape, half=half)
    )
    # A second forward pass is a third of what there is besides.
    moved = BYTES_FACTOR * kept * (1 + (again / 2 if again == 1 else again))
    computing = FLOPS_FACTOR * flops / (rates.half_flops if half else rates.single_flops)
    computing += (moved + moved_for_logits) / rates.memory
    passes = 2 * REPLAY_SECONDS if strategy.replayed else LAUNCH_SECONDS * (2 + again)
    is_piece_alone = strategy.goes_by_block and not strategy.replayed
    if is_piece_alone:
        passes += PIECE_SECONDS
    computing, launches = shape.micro_batches * computing, shape.micro_batches * config.num_layers * passes
    if is_piece_alone or device.machine.kind == "cpu":
        return computing + launches, launches
    return _side_by_side(computing, launches), launches  # kernels are launched while others run


def _chunk_bytes(config: ResNetBKConfig, shape: TrainingShape, *, half: bool) -> int:
    """What more chunks of logits move than the loss's rule would have: each reads and writes the head's gradient in
    float32 once more."""
    rule = tokens_with_logits(config, replace(shape, loss_chunk_tokens=None), half=half)
    chunk = tokens_with_logits(config, shape, half=half)
    more = -(-shape.tokens // chunk) - -(-shape.tokens // rule)
    return max(0, more) * 8 * config.vocab_size * config.hidden_size


def _side_by_side(*seconds: float) -> float:
    """The longest, and a little of the others: nothing overlaps for nothing."""
    longest = max(seconds)
    return longest + OVERLAP_LOSS * (sum(seconds) - longest)


def _bus_seconds(
    strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape, counts: ParameterCounts, device: Device
) -> float:
    """The longer of both ways."""
    inputs = 4 * shape.tokens * config.hidden_size * (config.num_layers + 2) * shape.micro_batches
    waiting = inputs if strategy.checkpointing == "offload" else 0
    if not strategy.offload_optimizer:
        return waiting / device.rates.bus
    times = 1 if strategy.goes_by_block else shape.micro_batches
    gradients = (4 if strategy.goes_by_block else strategy.weight_bytes) * counts.total * times
    fetches = 2 * times if strategy.stream_weights else 0
    weights = strategy.weight_bytes * counts.total * (1 + fetches)
    return (max(gradients, weights) + waiting) / device.rates.bus


def _link_seconds(
    config: ResNetBKConfig, shape: TrainingShape, counts: ParameterCounts, device: Device, ranks: int
) -> float:
    """Of every micro-batch blocks are gathered twice, what is outside of them once, and all gradients added up: of each
    a rank receives the others' shares, in float32."""
    if ranks == 1:
        return 0.0
    blocks = sum(number * counts.blocks[mixer].total for mixer, number in config.mixer_numbers().items())
    numbers = 2 * blocks + counts.outside.total + counts.total
    return shape.micro_batches * 4 * numbers * (ranks - 1) / ranks / device.link


def _host_seconds(
    strategy: Strategy, num_layers: int, shape: TrainingShape, counts: ParameterCounts, device: Device
) -> float:
    """The update, and adding up gradients that cross with every micro-batch, which takes as long."""
    if not strategy.offload_optimizer:
        return 0.0
    rate, in_python = device.rates.host_updates, num_layers * UPDATE_SECONDS
    updating = counts.total / rate / (HALF_MOMENTS_SPEEDUP if strategy.half_moments else 1) + in_python
    if strategy.goes_by_block:  # gradients are added up on the device, in float32
        return updating
    adding = counts.total / rate + in_python
    factor = HALF_GRADIENTS_FACTOR if strategy.half_weights else 1
    return factor * (updating + (shape.micro_batches - 1) * adding)


def _update_seconds(counts: ParameterCounts, device: Device) -> float:
    """On the device: weights, gradients and moments are read and written once, 28 bytes a parameter."""
    if device.machine.kind == "cpu":
        return counts.total / device.rates.host_updates
    return 28 * counts.total / device.rates.memory
