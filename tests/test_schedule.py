"""Every list of steps runs to its end on lanes that keep their order, and no byte is overwritten while it is needed."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_machine import (
    COMPUTE_WITH_WEIGHTS,
    DEVICE,
    HOST,
    WORK,
    Machine,
    make_units,
    unit_keys,
)

from flexrun.core import Lane, Tier
from flexrun.schedule import Scheduler
from flexrun.steps import ATTENDS, STREAMING, KVBytes, MicroBatchShape, PassShape, Step, StepKind, WeightUnit


def stream_sizes(units: list[WeightUnit]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((largest unit, largest layer) from disk, the same from disk and host)."""
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for unit in units:
        sums[unit.layer][0] += unit.disk_bytes
        sums[unit.layer][1] += unit.disk_bytes + unit.host_bytes
    return (
        (max(unit.disk_bytes for unit in units), max(disk for disk, _ in sums.values())),
        (max(unit.disk_bytes + unit.host_bytes for unit in units), max(both for _, both in sums.values())),
    )


@st.composite
def micro_batch_shapes(draw, number: int, home: Tier, lane: Lane, splits: bool) -> MicroBatchShape:
    """Rows with something cached, or nothing, beside rows of prompts that start; what the CPU attends, perhaps with
    some, or all, of its KV on the device."""
    tokens, fresh = draw(st.tuples(st.integers(0, 5), st.sampled_from([0, 0, 2, 3])).filter(any))
    there = draw(st.sampled_from([0, 2])) if tokens else 0
    pairs, fresh_pairs = 3 * tokens, fresh * (fresh + 1) // 2
    kv_tokens = tokens + there + fresh
    above = {}
    if splits and home is Tier.CPU and lane is Lane.CPU and draw(st.booleans()):
        kv_above = draw(st.integers(0, tokens + there))
        new = draw(st.integers(0, tokens + fresh))
        above = {
            "above_new_tokens": new,
            "above_kv_tokens": kv_above,
            "above_pairs": pairs * kv_above // (tokens + there or 1),
        }
    counts = (tokens + fresh, kv_tokens, pairs + fresh_pairs, home, lane, 0, 0, fresh, fresh_pairs)
    groups = {"there_groups": draw(st.integers(0, there // 2)), "fresh_groups": fresh // 2}
    new_groups = fresh // 2 + (draw(st.integers(0, 2)) if tokens else 0)
    return MicroBatchShape(number, *counts, **above, **groups, new_groups=new_groups)


@st.composite
def machines(draw, roomy: bool = False, halves: bool = True, choosy: bool = True):
    on_device = draw(st.booleans())
    layers, groups = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    size, count = st.one_of(st.just(0), st.integers(1, 9)), len(unit_keys(layers, groups))
    sizes = draw(st.lists(st.tuples(size, size), min_size=count, max_size=count))
    units = make_units(layers, sizes, on_device, groups, draw(st.integers(0, 2)))
    part_tokens = draw(st.sampled_from([0, 8, 9])) if halves else 0  # no micro-batch has more than 8 rows
    rings = {}
    for name, (unit_bytes, layer_bytes) in zip((HOST, DEVICE), stream_sizes(units)):
        two_layers = 2 * layer_bytes + unit_bytes
        least = layer_bytes + unit_bytes if part_tokens and name == DEVICE else unit_bytes
        rings[name] = two_layers if roomy else draw(st.integers(least, max(least, two_layers + 5)))
    share = draw(st.sampled_from([1.0, 1.0, 0.3, 0.02])) if choosy else 1.0
    kv = draw(st.sampled_from([WORK.kv, WORK.kv, KVBytes(13, 39, 26)]))  # perhaps compressed, in groups of 2 tokens
    scheduler = Scheduler(
        units,
        dataclasses.replace(WORK, experts_share_per_token=share, kv=kv),
        layers,
        compute_lane=Lane.GPU if on_device else Lane.CPU,
        host_ring_bytes=rings[HOST],
        device_ring_bytes=rings[DEVICE] if on_device else 0,
        read_embedding_rows=draw(st.booleans()),
        kv_slots=draw(st.integers(1, 3)),
        host_kv_slots=draw(st.integers(1, 4)),
        half_batches=halves and draw(st.booleans()),
        part_tokens=part_tokens,
    )
    homes = [(Tier.CPU, Lane.CPU), (Tier.CPU, Lane.CPU), (Tier.DISK, Lane.CPU)]
    if on_device:
        homes += [(Tier.GPU, Lane.GPU), (Tier.CPU, Lane.GPU), (Tier.DISK, Lane.GPU)]
    places = draw(st.lists(st.sampled_from(homes), min_size=1, max_size=8 if part_tokens else 4))
    shapes = []
    passes = draw(st.integers(1, 5))
    for index in range(passes):
        present = draw(st.sets(st.integers(0, len(places) - 1), min_size=1))
        micro_batches = tuple(
            draw(micro_batch_shapes(number, *places[number], on_device and not kv.record)) for number in sorted(present)
        )
        tokens = sum(micro_batch.query_tokens for micro_batch in micro_batches)
        more = index + 1 < passes and draw(st.booleans())
        shapes.append(PassShape(index, tokens, 1, micro_batches, more))
    return scheduler, units, rings, shapes, random.Random(draw(st.integers(0, 1 << 32)))


@settings(deadline=None, derandomize=True, max_examples=400)
@given(machines())
def test_any_schedule_runs_to_its_end_and_never_overwrites_what_is_needed(drawn):
    scheduler, units, rings, shapes, chooser = drawn
    machine = Machine(scheduler, units, rings, chooser)
    steps = [step for shape in shapes for step in machine.run_pass(shape)]
    machine.drain()
    reads = [step.unit for step in steps if step.kind is StepKind.READ_WEIGHTS]
    assert reads == [unit.index for unit in units if unit.disk_bytes] * len(shapes), "each unit once a pass, in order"
    copies = [step for step in steps if step.kind is StepKind.COPY_WEIGHTS]
    moved = [unit.index for unit in units if unit.disk_bytes + unit.host_bytes] * len(shapes)
    assert [step.unit for step in copies] == (moved if scheduler.on_device else [])
    for step in steps:
        if step.kind in STREAMING:
            unit = units[step.unit]
            whole = unit.disk_bytes + (unit.host_bytes if step.kind is StepKind.COPY_WEIGHTS else 0)
            assert step.bytes == whole if not step.chosen else step.bytes <= 0.9 * whole
            assert bool(unit.experts) >= step.chosen
    routers = {(step.pass_index, step.layer): step for step in steps if step.kind is StepKind.MLP}
    for step in (step for step in steps if step.chosen):
        router = routers[step.pass_index, step.layer]
        after = [order for lane, order in step.depends_on if lane is router.lane]
        assert after and after[0] >= router.order, "what is moved depends on what the router chose"
    for step in (step for step in steps if step.kind in (StepKind.READ_KV, StepKind.WRITE_KV)):
        (part,) = [part for part in shapes[step.pass_index].micro_batches if part.index == step.micro_batch]
        assert part.home is Tier.DISK
        read = step.kind is StepKind.READ_KV
        if scheduler.work.kv.record:
            assert step.bytes == 26 * (part.there_groups if read else part.new_groups) > 0
        else:
            assert step.bytes == 13 * (part.kv_tokens - part.query_tokens if read else part.query_tokens)
    slabs = [part for shape in shapes for part in shape.micro_batches if part.home is Tier.DISK]
    cached = [part for part in slabs if part.kv_tokens > part.query_tokens]
    if scheduler.work.kv.record:
        slabs, cached = ([part for part in slabs if part.new_groups], [part for part in slabs if part.there_groups])
    for kind, moved in ((StepKind.READ_KV, cached), (StepKind.WRITE_KV, slabs)):
        assert sum(step.kind is kind for step in steps) == scheduler.num_layers * len(moved)
    for shape in shapes:
        moved = sum(
            step.bytes for step in steps if step.pass_index == shape.index and step.kind is StepKind.SAVE_HIDDEN
        )
        loaded = sum(
            step.bytes for step in steps if step.pass_index == shape.index and step.kind is StepKind.LOAD_HIDDEN
        )
        in_parts = 0 < 2 * scheduler.part_tokens < shape.tokens
        assert moved == loaded == (in_parts and 19 * shape.tokens * (scheduler.num_layers - 1))
        for layer in range(scheduler.num_layers):
            mine = [step for step in steps if (step.pass_index, step.layer) == (shape.index, layer)]
            merged = covered(mine, (StepKind.MERGE,))
            assert covered(mine, ATTENDS) == sorted([*range(shape.tokens), *merged]), "in one place, or merged"
            for kind in COMPUTE_WITH_WEIGHTS[:3]:
                assert covered(mine, (kind,)) == list(range(shape.tokens)), f"{kind} takes every row once"
            for part in shape.micro_batches:
                steps_of = [step for step in mine if step.micro_batch == part.index]
                if part.attend_lane is Lane.CPU and scheduler.on_device:
                    check_split(part, steps_of, bool(scheduler.work.kv.record))
            for unit in (unit for unit in units if unit.experts and unit.layer == layer):
                assert covered([step for step in mine if step.unit == unit.index], (StepKind.EXPERTS,)) == list(
                    range(shape.tokens)
                )


def check_split(part: MicroBatchShape, steps: list[Step], compressed: bool) -> None:
    """What the CPU and the device attend of a micro-batch, and what moves for it (13 bytes a KV token, 17 a query)."""
    by_kind = {(step.kind, step.lane): step for step in steps}
    below, above = part.below, part.above
    cached = part.query_tokens - part.fresh_tokens
    assert below.kv_tokens + above.kv_tokens == part.cached.kv_tokens
    for lane, side in ((Lane.CPU, below), (Lane.GPU, above)):
        attend = by_kind.get((StepKind.ATTEND, lane))
        assert (attend is not None) == (side.kv_tokens > 0)
        assert attend is None or (attend.bytes, attend.rows) == (13 * side.kv_tokens, cached)
    down = sum(step.bytes for step in steps if step.lane is Lane.D2H)
    new = 13 * (part.query_tokens - part.above_new_tokens)
    if compressed:  # rows, but of prompts that start whole groups
        new = 39 * (part.query_tokens - 2 * part.fresh_groups) + 26 * part.fresh_groups
    assert down == new + 17 * cached * (below.kv_tokens > 0)
    both = below.kv_tokens > 0 < above.kv_tokens
    back = sum(step.bytes for step in steps if step.lane is Lane.H2D)
    assert back == (17 + 31 * both) * cached * (below.kv_tokens > 0)
    assert ((StepKind.MERGE, Lane.GPU) in by_kind) == both


def covered(steps: list[Step], kinds: tuple[StepKind, ...]) -> list[int]:
    """The token rows that steps of these kinds work on."""
    return sorted(row for step in steps if step.kind in kinds for row in range(step.start, step.stop))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(machines())
def test_steps_of_a_pass_ask_for_what_its_rows_ask_for(drawn):
    """Whatever the order: FLOPs of all its steps, and bytes of what is attended."""
    scheduler, _, _, shapes, _ = drawn
    for shape in shapes:
        steps = scheduler.pass_steps(shape)
        pairs = sum(part.query_kv_pairs for part in shape.micro_batches)
        assert sum(step.flops for step in steps if step.kind in ATTENDS) == scheduler.num_layers * pairs * 3
        kv_tokens = sum(part.kv_tokens for part in shape.micro_batches)
        assert sum(step.bytes for step in steps if step.kind in ATTENDS) == scheduler.num_layers * kv_tokens * 13
        per_token = {StepKind.ATTENTION_INPUTS: 2, StepKind.ATTENTION_OUTPUT: 5, StepKind.MLP: 7}
        for kind, flops in per_token.items():
            found = sum(step.flops for step in steps if step.kind is kind)
            assert found == scheduler.num_layers * shape.tokens * flops


@settings(deadline=None, derandomize=True, max_examples=60)
@given(machines())
def test_nothing_is_read_ahead_of_a_pass_that_does_not_follow(drawn):
    scheduler, units, _, shapes, _ = drawn
    streamed = sum(unit.disk_bytes > 0 for unit in units)
    reads = 0
    for number, shape in enumerate(shapes):
        reads += sum(step.kind is StepKind.READ_WEIGHTS for step in scheduler.pass_steps(shape))
        if shape.more:
            assert reads >= streamed * (number + 1)
        else:
            assert reads == streamed * (number + 1)


@settings(deadline=None, derandomize=True, max_examples=120)
@given(machines(roomy=True, halves=False, choosy=False))
def test_two_layers_are_in_flight_where_the_ring_has_room(drawn):
    """Before a layer's first step, its weights and all of the next layer's are under way, also across passes."""
    scheduler, units, _, shapes, _ = drawn
    kind = StepKind.COPY_WEIGHTS if scheduler.on_device else StepKind.READ_WEIGHTS
    moved = [unit for unit in units if unit.disk_bytes + unit.host_bytes and (scheduler.on_device or unit.disk_bytes)]
    layers = scheduler.num_layers + 1  # the head counts as one
    emitted = 0
    for number, shape in enumerate(shapes):
        for step in scheduler.pass_steps(shape):
            emitted += step.kind is kind
            if step.kind not in (StepKind.ATTENTION_INPUTS, StepKind.LOGITS):
                continue
            next_pass, next_layer = divmod(number * layers + step.layer + 1, layers)
            if next_pass > number and not shape.more:
                continue
            needed = next_pass * len(moved) + sum(unit.layer <= next_layer for unit in moved)
            assert emitted >= needed, f"at {step.kind} of layer {step.layer}, pass {number}"


def test_weights_cross_the_pass_border():
    units = make_units(3, [(4, 0)] * 7, False)
    scheduler = Scheduler(units, WORK, 3, compute_lane=Lane.CPU, host_ring_bytes=20)
    micro_batches = (MicroBatchShape(0, 1, 1, 1, Tier.CPU, Lane.CPU),)
    steps = scheduler.pass_steps(PassShape(0, 1, 1, micro_batches, True))
    reads = [step.unit for step in steps if step.kind is StepKind.READ_WEIGHTS]
    assert reads[:7] == list(range(7))
    assert reads[7:11] == [0, 1, 2, 3], "two layers of the next pass are read before this one ends"


@settings(deadline=None, derandomize=True, max_examples=60)
@given(machines())
def test_experts_on_the_cpu_get_all_rows_once_a_layer_and_the_last_step_waits_for_them(drawn):
    scheduler, units, _, shapes, _ = drawn
    steps = [step for shape in shapes for step in scheduler.pass_steps(shape)]
    by_order = {(step.lane, step.order): step for step in steps}
    beside = [step for step in steps if step.kind is StepKind.EXPERTS and step.lane is not scheduler.compute_lane]
    there = {unit.layer: 0 for unit in units} | {unit.layer: unit.cpu_experts for unit in units if unit.experts}
    groups = sum(unit.layer == 1 and unit.experts > 0 for unit in units)
    for shape in shapes:
        for layer in range(scheduler.num_layers):
            mine = [step for step in beside if (step.pass_index, step.layer) == (shape.index, layer)]
            assert covered(mine, (StepKind.EXPERTS,)) == (list(range(shape.tokens)) if there[layer] else [])
            assert sum(step.flops for step in mine) == shape.tokens * there[layer] * groups * 29
    for step in beside:
        (down,) = (by_order[each] for each in step.depends_on)
        assert (down.kind, down.bytes) == (StepKind.OFFLOAD_NORMED, 37 * step.rows)
        key = (step.pass_index, step.layer, step.start, step.stop)
        (back,) = (
            each for each in steps if each.kind is StepKind.RETURN_ROUTED and (step.lane, step.order) in each.depends_on
        )
        assert (back.pass_index, back.layer, back.start, back.stop, back.bytes) == (*key, 41 * step.rows)
        last = [each for each in steps if each.kind is StepKind.EXPERTS and each.lane is Lane.GPU]
        last = [each for each in last if (each.pass_index, each.layer, each.start, each.stop) == key][-1]
        assert (back.lane, back.order) in last.depends_on


@pytest.mark.parametrize("turn", [1, -1])
def test_weights_and_rows_of_one_lane_are_waited_for_both(turn):
    """They are queues of their own: the later step may be over while the earlier one is under way."""
    units = make_units(1, [(0, 4)] * 3, True)
    scheduler = Scheduler(units, WORK, 1, compute_lane=Lane.GPU, host_ring_bytes=0, device_ring_bytes=12)
    scheduler.pass_steps(PassShape(0, 1, 1, (MicroBatchShape(0, 1, 1, 1, Tier.GPU, Lane.GPU),), False))
    emitted = [scheduler._emit(kind, Lane.H2D) for kind in (StepKind.COPY_WEIGHTS, StepKind.LOAD_KV) * 2]
    step = scheduler._emit(StepKind.MLP, Lane.GPU, emitted[::turn])
    assert set(scheduler._steps[-1].depends_on) == set(emitted[2:]), "the latest of either queue"
    scheduler._emit(StepKind.LOAD_KV, Lane.H2D, emitted)
    assert scheduler._steps[-1].depends_on == (emitted[2],), "rows keep their own order, and wait for weights"
    scheduler._emit(StepKind.COPY_WEIGHTS, Lane.H2D, [*emitted, step])
    assert set(scheduler._steps[-1].depends_on) == {emitted[3], step}


def test_flops_and_bytes_of_the_steps():
    scheduler = Scheduler(make_units(1, [(0, 0)] * 3, False), WORK, 1, compute_lane=Lane.CPU, host_ring_bytes=0)
    steps = scheduler.pass_steps(PassShape(0, 6, 2, (MicroBatchShape(0, 6, 9, 30, Tier.CPU, Lane.CPU),), False))
    flops = {step.kind: step.flops for step in steps}
    assert flops[StepKind.ATTENTION_INPUTS] == 6 * 2
    assert flops[StepKind.ATTEND] == 30 * 3
    assert flops[StepKind.ATTENTION_OUTPUT] == 6 * 5
    assert (flops[StepKind.MLP], flops[StepKind.LOGITS]) == (6 * 7, 2 * 11)
    assert next(step.bytes for step in steps if step.kind is StepKind.ATTEND) == 9 * 13
