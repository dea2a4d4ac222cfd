"""Strategies, budgets, and which one to take."""

from dataclasses import replace

import pytest

from resnet_bk.memory.activations import TrainingShape
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.memory.plan import PROCESS_BYTES, Budget, make_plan, plan_strategy
from resnet_bk.memory.strategy import STRATEGIES
from resnet_bk.models import ResNetBKConfig

# Enough tokens that activations outweigh gradients: only then does each strategy save something.
SHAPE = TrainingShape(batch_size=8, sequence_length=1024)
MANY = TrainingShape(batch_size=64, sequence_length=1024)


def planned(preset="1b", shape=SHAPE, gpu=None, host=None, **overrides):
    return make_plan(ResNetBKConfig.from_preset(preset, **overrides), shape, Budget(gpu_bytes=gpu, host_bytes=host))


def test_weights_alone_are_their_number_times_their_size():
    plan = planned("seed")
    assert plan.weight_bytes == {
        "fp32": 4 * plan.counts.total,
        "fp16": 2 * plan.counts.total,
        "int8": plan.counts.total,
    }


def sizes(plan):
    return {part.name: part.num_bytes for part in plan.gpu_parts}


def test_adamw_in_fp32_keeps_sixteen_bytes_for_each_weight():
    # With so few tokens that gradients outweigh activations, and so many experts that they outweigh the embedding.
    plan = planned("1b", TrainingShape(batch_size=1, sequence_length=64), tie_word_embeddings=False)
    parts, total, largest = sizes(plan.strategies[0]), plan.counts.total, plan.strategies[0]
    assert largest.moment == "at the embedding's gradient"
    assert (parts["weights"], parts["optimizer"]) == (4 * total, 8 * total)
    assert parts["gradients"] == 4 * total


def test_the_moment_goes_with_what_there_is_most_of():
    few = TrainingShape(batch_size=1, sequence_length=64)
    assert planned(shape=MANY).strategies[1].moment == "where backward begins"
    in_large_chunks = replace(MANY, loss_chunk_tokens=16_384)
    assert planned(shape=in_large_chunks).strategies[1].moment == "at the loss"
    assert by_name(planned(shape=MANY), "full checkpointing").moment.startswith("in the last block")
    assert by_name(planned(shape=few), "full checkpointing").moment == "at the embedding's gradient"
    assert by_name(planned(shape=MANY), "offloaded activations").moment.startswith("in a block")


def test_several_micro_batches_keep_gradients_and_no_more_activations():
    several = TrainingShape(batch_size=8, sequence_length=1024, micro_batches=4)
    one, more = (planned(shape=shape).strategies[1] for shape in (SHAPE, several))
    assert one.moment == more.moment == "at the loss"
    gradients = sizes(more)["gradients"]
    assert "gradients" not in sizes(one) and gradients == 4 * planned().counts.total
    others = 3 * 16 * SHAPE.tokens  # token ids and targets
    assert more.gpu_bytes - one.gpu_bytes == gradients + others


def test_each_strategy_needs_less_of_the_gpu_than_the_one_before():
    # With so many tokens that activations outweigh what the optimizer has.
    needs = [strategy.gpu_bytes for strategy in planned(shape=MANY).strategies]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(STRATEGIES)


def by_name(plan, name):
    return next(strategy for strategy in plan.strategies if strategy.strategy.name == name)


def test_offloading_moves_the_optimizer_to_the_host():
    plan = planned()
    without, offloaded = by_name(plan, "full checkpointing"), by_name(plan, "offloaded optimizer")
    assert "optimizer" in sizes(without) and "optimizer" not in sizes(offloaded)
    assert without.host_bytes == PROCESS_BYTES
    on_their_way = offloaded.host_parts["gradients and weights on their way"]
    assert offloaded.host_bytes == PROCESS_BYTES + (4 + 8 + 4) * plan.counts.total + on_their_way
    assert on_their_way < 2 * plan.counts.total


def test_streaming_leaves_two_blocks_and_what_is_outside_of_blocks_on_the_gpu():
    for layers in (4, 16):
        plan = planned(num_layers=layers)
        weights = sizes(by_name(plan, "streamed weights"))["weights"]
        half = 2 * (plan.counts.outside.total + 2 * plan.counts.block.total)
        assert half <= weights <= 1.01 * half


def test_moments_in_bfloat16_take_half_the_memory():
    config = ResNetBKConfig.from_preset("1b")
    counts = count_parameters(config)
    plans = [
        plan_strategy(replace(STRATEGIES[-1], half_moments=half), config, SHAPE, counts, Budget())
        for half in (False, True)
    ]
    assert plans[0].host_bytes - plans[1].host_bytes == 4 * counts.total
    assert plans[0].gpu_bytes == plans[1].gpu_bytes


@pytest.mark.parametrize("preset", ["seed", "tiny", "100m", "1b"])
@pytest.mark.parametrize("tokens", [1, 128])
def test_a_plan_is_the_sum_of_its_parts(preset, tokens):
    shape = TrainingShape(batch_size=1, sequence_length=tokens)
    for strategy in make_plan(ResNetBKConfig.from_preset(preset), shape, Budget()).strategies:
        assert strategy.gpu_bytes == sum(sizes(strategy).values())
        assert strategy.host_bytes == sum(strategy.host_parts.values())


def test_a_plan_adds_what_cudas_libraries_and_copies_take():
    for strategy in planned().strategies:
        parts = sizes(strategy)
        assert parts["cuBLAS"] > 0
        on_their_way = parts.get("copies on their way", 0)
        assert strategy.gpu_bytes == strategy.tensor_bytes + parts["cuBLAS"] + on_their_way
        # Step by block they are among the inputs.
        assert (on_their_way > 0) == (strategy.strategy.offload_optimizer and not strategy.strategy.goes_by_block)


def test_without_a_budget_nothing_is_said_to_fit():
    plan = planned()
    assert [strategy.fits for strategy in plan.strategies] == [None] * len(STRATEGIES)
    assert all(s.gpu_headroom is None and s.host_headroom is None for s in plan.strategies)
    assert plan.fastest_that_fits is None


def test_a_budget_of_exactly_what_is_needed_fits_and_a_byte_less_does_not():
    for index, strategy in enumerate(planned().strategies):
        enough = planned(gpu=strategy.gpu_bytes, host=strategy.host_bytes).strategies[index]
        assert (enough.fits, enough.gpu_headroom, enough.host_headroom) == (True, 0, 0)
        for scarce in ({"gpu": strategy.gpu_bytes - 1}, {"host": strategy.host_bytes - 1}):
            missing = planned(**{"gpu": 10**15, "host": 10**15, **scarce}).strategies[index]
            assert missing.fits is False
            assert min(missing.gpu_headroom, missing.host_headroom) == -1


def test_one_budget_alone_is_enough_to_say_whether_it_fits():
    needs = planned().strategies[0]
    assert planned(gpu=needs.gpu_bytes).strategies[0].fits is True
    assert planned(gpu=needs.gpu_bytes).strategies[0].host_headroom is None
    assert planned(host=needs.host_bytes - 1).strategies[0].fits is False


@pytest.mark.parametrize("index", range(len(STRATEGIES)))
def test_the_first_strategy_that_fits_is_the_one_to_take(index):
    needs = planned(shape=MANY).strategies[index].gpu_bytes
    best = planned(gpu=needs, shape=MANY).fastest_that_fits
    assert best.strategy.name == STRATEGIES[index].name


def test_the_host_can_rule_out_what_fits_the_gpu():
    needs = planned().strategies[-1].gpu_bytes
    assert planned(gpu=needs, host=PROCESS_BYTES).fastest_that_fits is None
    assert planned(gpu=1).fastest_that_fits is None
