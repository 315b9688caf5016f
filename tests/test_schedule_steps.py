"""Passes of a few steps, one by one: experts behind their router, KV on disk, and passes larger than the device."""

from __future__ import annotations

import dataclasses

import pytest
from step_machine import (
    WORK,
    make_units,
    unit_keys,
)

from flexrun.core import Lane, Tier
from flexrun.schedule import Scheduler, cut_rows
from flexrun.steps import STREAMING, MicroBatchShape, PassShape, StepKind

PART = MicroBatchShape(0, 4, 4, 10, Tier.CPU, Lane.CPU)


@pytest.mark.parametrize(("share", "waits"), [(0.1, True), (0.43, True), (0.44, False), (1.0, False)])
def test_experts_wait_for_the_router_where_it_spares_much(share, waits):
    """4 tokens: 0.9 of the experts are expected to be chosen where each token chooses 0.438 of them."""
    units = make_units(2, [(100, 0)] * len(unit_keys(2, 2)), False, groups=2)
    work = dataclasses.replace(WORK, experts_share_per_token=share)
    scheduler = Scheduler(units, work, 2, compute_lane=Lane.CPU, host_ring_bytes=4000)
    steps = [step for index in range(2) for step in scheduler.pass_steps(PassShape(index, 4, 1, (PART,), index == 0))]
    routers = {(step.pass_index, step.layer): step for step in steps if step.kind is StepKind.MLP}
    seen = 0
    for step in steps:
        if step.kind is StepKind.READ_WEIGHTS and units[step.unit].experts:
            router = routers[seen // 2, step.layer]
            assert step.chosen is waits
            assert ((router.lane, router.order) in step.depends_on) is waits
            assert step.bytes == (int(100 * (1 - (1 - share) ** 4)) if waits else 100)
            assert step.pass_index == seen // 2 or not waits
            seen += 1
    assert seen == 4


def test_halves_read_experts_ahead_whatever_they_choose():
    units = make_units(2, [(0, 9)] * len(unit_keys(2, 2)), True, groups=2)
    work = dataclasses.replace(WORK, experts_share_per_token=0.01)
    scheduler = Scheduler(
        units, work, 2, compute_lane=Lane.GPU, host_ring_bytes=0, device_ring_bytes=200, half_batches=True
    )
    parts = tuple(MicroBatchShape(number, 4, 4, 10, Tier.CPU, Lane.CPU) for number in range(2))
    steps = scheduler.pass_steps(PassShape(0, 8, 1, parts, False))
    assert sum(step.kind is StepKind.EXPERTS for step in steps) == 2 * 2
    assert not any(step.chosen for step in steps)


def test_groups_of_experts_run_one_after_another_behind_the_router():
    units = make_units(2, [(2, 0)] * len(unit_keys(2, 3)), False, groups=3)
    scheduler = Scheduler(units, WORK, 2, compute_lane=Lane.CPU, host_ring_bytes=40)
    part = MicroBatchShape(0, 4, 4, 10, Tier.CPU, Lane.CPU)
    steps = [step for step in scheduler.pass_steps(PassShape(0, 4, 1, (part,), False)) if step.layer == 1]
    compute = [(step.kind, step.unit) for step in steps if step.kind not in STREAMING]
    inputs, router, first = (
        unit.index for unit in units if unit.layer == 1 and unit.module in ("attention", "mlp", "experts.0")
    )
    assert compute == [
        (StepKind.ATTENTION_INPUTS, inputs),
        (StepKind.ATTEND, -1),
        (StepKind.ATTENTION_OUTPUT, inputs),
        (StepKind.MLP, router),
        *((StepKind.EXPERTS, first + group) for group in range(3)),
    ]
    assert [step.flops for step in steps if step.kind is StepKind.EXPERTS] == [4 * 2 * 29] * 3


@pytest.mark.parametrize("on_device, lane", [(False, Lane.CPU), (True, Lane.CPU), (True, Lane.GPU)])
def test_kv_on_disk_is_read_before_it_is_attended_and_written_after_it_is_made(on_device, lane):
    compute = Lane.GPU if on_device else Lane.CPU
    units = make_units(1, [(0, 0)] * 3, on_device)
    scheduler = Scheduler(units, WORK, 1, compute_lane=compute, host_ring_bytes=0, kv_slots=2)
    parts = tuple(MicroBatchShape(index, 1, 9, 9, Tier.DISK, lane) for index in range(3))
    first = scheduler.pass_steps(PassShape(0, 3, 3, parts, True))
    reads = [step for step in first if step.kind is StepKind.READ_KV]
    assert [(step.bytes, step.offset) for step in reads] == [(8 * 13, 0), (8 * 13, 1), (8 * 13, 0)]
    users = [step for step in first if step.kind is (StepKind.LOAD_KV if lane is Lane.GPU else StepKind.ATTEND)]
    stores = [step for step in first if step.kind in (StepKind.OFFLOAD_QUERY, StepKind.SAVE_KV)] or users
    writes = [step for step in first if step.kind is StepKind.WRITE_KV]
    for store in (stores, users) if lane is Lane.GPU else (stores,):
        assert all((Lane.DISK_READ, read.order) in user.depends_on for read, user in zip(reads, store))
    freed = {(writes[0].lane, writes[0].order)} | ({(users[0].lane, users[0].order)} if on_device else set())
    assert set(reads[2].depends_on) == freed, "a slot waits for who copies or attends it, and for its writer"
    assert [(step.bytes, step.offset) for step in writes] == [(13, 0), (13, 1), (13, 0)]
    assert [step.depends_on for step in writes] == [((step.lane, step.order),) for step in stores]
    assert [user.source_offset if lane is Lane.GPU else user.offset for user in users] == [0, 1, 0]
    assert [step.offset for step in stores] == [0, 1, 0]
    (logits,) = [step for step in first if step.kind is StepKind.LOGITS]
    assert (Lane.DISK_WRITE, writes[-1].order) in logits.depends_on, "a pass ends when its rows are on disk"
    again = [step for step in scheduler.pass_steps(PassShape(1, 3, 3, parts, False)) if step.kind is StepKind.READ_KV]
    assert all(
        any(on is Lane.DISK_WRITE and order >= write.order for on, order in read.depends_on)
        for read, write in zip(again, writes)
    )


@pytest.mark.parametrize("on_device, lane", [(False, Lane.CPU), (True, Lane.CPU), (True, Lane.GPU)])
def test_nothing_is_read_where_nothing_is_cached(on_device, lane):
    """What first stores into the slot waits in the reader's place."""
    units = make_units(1, [(0, 0)] * 3, on_device)
    compute = Lane.GPU if on_device else Lane.CPU
    scheduler = Scheduler(units, WORK, 1, compute_lane=compute, host_ring_bytes=0, kv_slots=1)
    parts = tuple(MicroBatchShape(index, 4, 4, 10, Tier.DISK, lane) for index in range(2))
    steps = scheduler.pass_steps(PassShape(0, 8, 2, parts, False))
    assert StepKind.READ_KV not in {step.kind for step in steps}
    stores = [step for step in steps if step.kind in (StepKind.OFFLOAD_QUERY, StepKind.SAVE_KV)]
    stores = stores or [step for step in steps if step.kind is StepKind.ATTEND]
    write, _ = [step for step in steps if step.kind is StepKind.WRITE_KV]
    assert (write.lane, write.order) in stores[1].depends_on


def test_a_pass_larger_than_the_device_goes_through_it_part_by_part():
    """One part comes while another is computed, in the other place, and weights move once."""
    units = make_units(2, [(0, 4)] * 5, True)
    scheduler = Scheduler(units, WORK, 2, compute_lane=Lane.GPU, host_ring_bytes=0, device_ring_bytes=12, part_tokens=5)
    parts = tuple(MicroBatchShape(index, 2, 2, 3, Tier.GPU, Lane.GPU) for index in range(7))
    steps = scheduler.pass_steps(PassShape(0, 14, 1, parts, False))
    assert scheduler.part_starts == [0, 4, 8, 12]
    assert [step.unit for step in steps if step.kind is StepKind.COPY_WEIGHTS] == [0, 1, 2, 3, 4]
    kinds = [StepKind.EMBED, StepKind.ATTENTION_INPUTS, StepKind.LOAD_HIDDEN, StepKind.SAVE_HIDDEN]
    found = [(step.kind, step.layer, step.start) for step in steps if step.kind in kinds]
    embed, inputs, load, save = kinds
    assert found == [
        *((embed, -1, 0), (inputs, 0, 0), (save, 0, 0), (embed, -1, 4), (inputs, 0, 4), (save, 0, 4)),
        *((embed, -1, 8), (inputs, 0, 8), (save, 0, 8), (embed, -1, 12), (inputs, 0, 12), (load, 1, 0), (save, 0, 12)),
        *((inputs, 1, 0), (load, 1, 4), (inputs, 1, 4), (load, 1, 8), (inputs, 1, 8), (load, 1, 12), (inputs, 1, 12)),
    ]
    assert [(step.start, step.stop) for step in steps if step.kind is StepKind.KEEP_SAMPLED] == [
        *((0, 4), (4, 8), (8, 12), (12, 14))
    ]
    small = scheduler.pass_steps(PassShape(1, 10, 1, parts[:5], False))
    assert scheduler.part_starts == [] and load not in {step.kind for step in small}, "what fits does not leave"


@pytest.mark.parametrize("rows, parts", [([5], [1]), ([3, 3, 3], [1, 1, 1]), ([1, 2, 3, 4, 1], [2, 1, 2])])
def test_rows_are_cut_into_few_parts_of_whole_micro_batches(rows, parts):
    assert cut_rows(rows, 5) == (parts if len(parts) % 2 == 0 or max(parts) == 1 else [1, 1, 1, 2])
