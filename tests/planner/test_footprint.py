"""From a step's tensors to what the allocator says: rounding, workspaces, and copies that take their time."""

from dataclasses import replace

import pytest

from resnet_bk.imagined import Machine
from resnet_bk.planner.footprint import SMALL_CHANGE, Footprint, footprint, larger, workspace_bytes
from resnet_bk.planner.recorder import GRAPHS, Event, Origin
from resnet_bk.planner.trace import Trace, live_bytes

MIB = 2**20
HOPPER, TURING, CPU = (
    Machine(kind="cuda", capability=(9, 0)),
    Machine(kind="cuda", capability=(7, 5)),
    Machine(kind="cpu"),
)


def trace_of(resident, events, *, machine=HOPPER, copied_away=()):
    numbers = {event.tensor for event in (*resident, *events)}
    return Trace(
        machine=machine,
        origins=[Origin("forward", "", None)] * (max(numbers, default=0) + 1),
        resident=list(resident),
        events=list(events),
        kinds={},
        copied_away=frozenset(copied_away),
        host_bytes=0,
    )


def test_on_a_cpu_all_figures_are_the_tensors_own():
    found = footprint(trace_of([Event(0, 1000)], [Event(1, 500), Event(1, -500), Event(2, 300)], machine=CPU))
    assert found == Footprint(tensor_bytes=1500, allocated_bytes=1500, reserved_bytes=1500, most_reserved_bytes=1500)


@pytest.mark.parametrize(("machine", "workspaces"), [(HOPPER, 64 * MIB), (TURING, 2 * 8_519_680)])
def test_rounding_and_workspaces_are_added(machine, workspaces):
    assert workspace_bytes(machine) == workspaces
    found = footprint(trace_of([Event(0, 1000)], [Event(1, 100)], machine=machine))
    assert found.tensor_bytes == 1100
    assert found.allocated_bytes == 1024 + 512 + SMALL_CHANGE + workspaces
    assert found.reserved_bytes >= found.allocated_bytes
    assert found.reserved_bytes % (2 * MIB) == 0


@pytest.mark.parametrize(("machine", "less"), [(HOPPER, 64 * MIB - 2 * 8_519_680), (TURING, 0)])
def test_small_workspaces_are_those_of_older_cards(machine, less):
    trace = trace_of([Event(0, 1000)], [Event(1, 100)], machine=machine)
    usual, small = footprint(trace), footprint(trace, small_workspaces=True)
    assert usual.allocated_bytes - small.allocated_bytes == less
    assert usual.tensor_bytes == small.tensor_bytes


def test_a_peak_before_the_step_does_not_count_but_what_is_left_of_it_does():
    trace = trace_of([Event(0, 100 * MIB)], [Event(0, -100 * MIB), Event(1, 10 * MIB)])
    assert trace.peak_bytes == 100 * MIB
    found = footprint(trace)
    assert found.allocated_bytes == 100 * MIB + SMALL_CHANGE + workspace_bytes(HOPPER)


def test_what_ranks_exchange_has_a_margin():
    alone = trace_of([Event(0, 100 * MIB)], [Event(1, 50 * MIB), Event(1, -50 * MIB)])
    exchanged = replace(alone, origins=[alone.origins[0], replace(alone.origins[1], stream=1)])
    assert footprint(exchanged).allocated_bytes == round(1.001 * footprint(alone).allocated_bytes)
    assert footprint(exchanged).tensor_bytes == footprint(alone).tensor_bytes


def test_graphs_have_memory_of_their_own_with_workspaces():
    """What is freed there nobody else gets, and what is freed elsewhere is not theirs."""
    events = [Event(0, 100 * MIB), Event(0, -100 * MIB), Event(1, 80 * MIB), Event(1, -80 * MIB)]
    alone = trace_of([], events)
    replayed = replace(alone, origins=[alone.origins[0], replace(alone.origins[1], stream=GRAPHS)])
    libraries = workspace_bytes(HOPPER) + SMALL_CHANGE
    assert footprint(replayed).tensor_bytes == footprint(alone).tensor_bytes
    assert footprint(replayed).allocated_bytes == footprint(alone).allocated_bytes + libraries
    more = footprint(replayed).most_reserved_bytes - footprint(alone).most_reserved_bytes
    assert 80 * MIB + libraries <= more <= 80 * MIB + libraries + 24 * MIB


def test_of_two_steps_each_figure_is_the_larger():
    one = Footprint(tensor_bytes=1, allocated_bytes=6, reserved_bytes=7, most_reserved_bytes=12)
    other = Footprint(tensor_bytes=2, allocated_bytes=5, reserved_bytes=9, most_reserved_bytes=11)
    assert larger(one, other) == larger(other, one)
    assert larger(one, other) == Footprint(tensor_bytes=2, allocated_bytes=6, reserved_bytes=9, most_reserved_bytes=12)


def step_of_blocks(count, size):
    """Of each block a gradient is made and goes, while the next block's is made."""
    events = []
    for block in range(count):
        events += [Event(2 * block, size), Event(2 * block, -size), Event(2 * block + 1, 1000)]
    return events


def test_memory_that_is_copied_from_is_not_free_yet():
    events = step_of_blocks(4, 64 * MIB)
    gone_at_once = footprint(trace_of([], events))
    copied = footprint(trace_of([], events, copied_away=range(0, 8, 2)))
    # To the allocator it is free already, and so it is no longer allocated; its room is another's only later.
    assert copied.allocated_bytes == gone_at_once.allocated_bytes
    assert copied.most_reserved_bytes == gone_at_once.most_reserved_bytes + 64 * MIB
    # Nobody can say beforehand when copies end: what is expected is in between.
    assert gone_at_once.reserved_bytes == gone_at_once.most_reserved_bytes
    assert gone_at_once.reserved_bytes <= copied.reserved_bytes == round(0.975 * copied.most_reserved_bytes)


def test_a_crowd_that_leaves_together_is_there_together():
    size = 32 * MIB
    crowd = [Event(number, size) for number in range(3)] + [Event(number, -size) for number in range(3)]
    following = [Event(3, 3 * size), Event(3, -3 * size), Event(4, 3 * size)]
    found = footprint(trace_of([], [*crowd, *following], copied_away=[0, 1, 2, 3]), expandable=True)
    assert found.most_reserved_bytes >= 6 * size
    at_once = footprint(trace_of([], [*crowd, *following]), expandable=True)
    assert at_once.most_reserved_bytes < 3 * size + workspace_bytes(HOPPER) + 20 * MIB


def test_what_lives_is_what_came_less_what_went():
    events = [Event(0, 10), Event(1, 20), Event(0, -10), Event(2, 5), Event(1, 4)]
    assert live_bytes(events) == {1: 24, 2: 5}
    trace = trace_of(events, [])
    assert trace.peak_bytes == 29
    assert replace(trace, resident=[]).peak_bytes == 0


def test_the_first_step_has_no_moments_yet_and_its_segments_stay():
    """Both steps need 30 MiB for a moment; in the second the moments lie where the first had found room."""
    weights, gradient, moment = Event(0, 12 * MIB), Event(1, 12 * MIB), Event(2, 12 * MIB)
    passing = [Event(1, -12 * MIB), Event(3, 30 * MIB), Event(3, -30 * MIB), Event(4, 12 * MIB)]
    trace = trace_of([weights, gradient, moment], passing)
    alone = footprint(trace)
    both = footprint(replace(trace, kinds={2: "optimizer", 4: "gradients"}))
    assert both.allocated_bytes == alone.allocated_bytes
    # The first step's gradient took a part of the segment of 30 MiB, and so a second one is needed.
    assert both.reserved_bytes > alone.reserved_bytes


def test_products_with_a_bias_have_a_workspace_in_each_thread():
    plain = trace_of([Event(0, 1000)], [Event(1, 100)])
    biased = replace(plain, threads_of_biased_products=2)
    assert footprint(biased).allocated_bytes - footprint(plain).allocated_bytes == 2 * MIB
