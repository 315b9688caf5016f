"""Lanes that only enqueue: whatever the queues' pace, every wait is on the mark it needs, and tokens stay the same."""

from __future__ import annotations

import threading

import pytest
from queued_device import QueuedDevice

from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier
from flexrun.offload.device import EmulatedDevice
from flexrun.offload.engine import Engine
from flexrun.offload.lanes import LaneMeter, LaneWorker, Progress
from flexrun.placement import memory_account, place_weights
from flexrun.steps import Step, StepKind

pytestmark = pytest.mark.usefixtures("matrices_move")
KV_TOKENS = 300


def parts(*calls):
    """What a lane splits a step into."""
    return lambda step: list(calls)


@pytest.fixture
def tokens_with(packed, make_group):
    """tokens_with(device, name of a model, prompt lengths, **policy) -> (tokens of each request, engine, closed)."""

    def run(device, name="llama", lengths=(5, 14, 23), **settings):
        spec, cache = packed(name)
        policy = Policy(**{"sequences_in_flight": 6, "tokens_per_pass": 16, "attention_micro_batch": 2} | settings)
        placed = place_weights(spec, policy, on_device=True)
        account = memory_account(spec, policy, placed, KV_TOKENS, on_device=True)
        engine = Engine(
            spec,
            cache,
            policy,
            placed,
            account,
            KV_TOKENS,
            cpu_budget_bytes=account.total(Tier.CPU),
            gpu_budget_bytes=account.total(Tier.GPU),
            accelerator=device,
            trace=True,
        )
        if isinstance(device, QueuedDevice):
            device.queue_compute(engine)
        groups = [
            make_group([3 + number] * lengths[number % 3], temperature=0, max_tokens=4 + number, ignore_eos=True)
            for number in range(8)
        ]
        try:
            outputs = list(engine.run(iter(groups)))
        finally:
            engine.close()
        assert all(tier.used_bytes == 0 for tier in engine.tiers.values())
        found = {group.request.request_id: number for number, (group, _) in enumerate(groups)}
        return {found[output.request_id]: output.outputs[0].token_ids for output in outputs}, engine

    return run


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": Placement(0, 1, 0), "kv": Placement(1, 0, 0)},
        {
            "weights": Placement(0, 0, 1),
            "kv": Placement(0.4, 0.6, 0),
            "token_micro_batch": 5,
            "cpu_attention_share": 0.0,
        },
        {"weights": Placement(0.3, 0.3, 0.4), "kv": Placement(0, 1, 0), "cpu_attention_share": 1.0},
        {"weights": Placement(0.5, 0.2, 0.3), "kv": Placement(0.34, 0.66, 0), "cpu_attention_share": 0.5},
        {"weights": Placement(0, 1, 0), "kv": Placement(0, 1, 0), "kv_device_tokens_share": 0.5},
        {
            "weights": Placement(0, 1, 0),
            "kv": Placement(0, 1, 0),
            "kv_device_tokens_share": 0.7,
            "half_batches": True,
            "token_micro_batch": 5,
        },
        *(
            {"weights": Placement(0, 1, 0), "kv_bits": 4, "tokens_per_pass": 80, "lengths": (58, 110, 64)} | more
            for more in (
                {"kv": Placement(0, 1, 0), "cpu_attention_share": 0.0},
                {"kv": Placement(0, 1, 0), "token_micro_batch": 5},
                {"kv": Placement(0.34, 0.33, 0.33), "cpu_attention_share": 0.5, "half_batches": True},
            )
        ),
        {"name": "mixtral", "weights": Placement(0.2, 0.6, 0.2), "kv": Placement(0, 1, 0), "cpu_experts_share": 0.6},
    ],
    ids=[
        "weights in RAM",
        "weights on disk, KV loaded",
        "KV attended on the host",
        "everything at once",
        "KV split",
        "KV split, halves",
        "groups of KV loaded",
        "groups of KV attended on the host",
        "groups of KV everywhere, halves",
        "experts and attention on the host",
    ],
)
def test_slow_queues_change_no_token(tokens_with, settings):
    expected, _ = tokens_with(EmulatedDevice(), **settings)
    device = QueuedDevice(longest_delay_seconds=0.0004)
    found, engine = tokens_with(device, **settings)
    assert found == expected
    assert device.queues[Lane.GPU, False].enqueued > 100 and device.queues[Lane.H2D, True].enqueued > 100
    lanes = {event.lane for event in engine.events}
    assert {Lane.GPU, Lane.H2D} <= lanes
    assert all(event.start_seconds <= event.end_seconds for event in engine.events)
    statistics = engine.lane_statistics()
    copied = [event.bytes for event in engine.events if event.name == "copy_weights"]
    assert statistics["h2d"]["bytes"] >= sum(copied) > 0
    assert statistics["gpu"]["busy_seconds"] > 0


def step(lane: Lane, order: int, *depends_on) -> Step:
    return Step(StepKind.COPY_WEIGHTS, lane, order, 0, depends_on)


@pytest.fixture
def device():
    device = QueuedDevice()
    yield device
    device.close()


def test_a_queue_waits_on_the_device_and_the_host_does_not(device):
    progress = Progress()
    first, second = device.queue(Lane.H2D), device.queue(Lane.GPU)
    held = HeldWork(first)
    progress.finish(step(Lane.H2D, 0), first.mark())
    progress.wait(step(Lane.GPU, 0, (Lane.H2D, 0)), second)  # returns at once: only the queue waits
    behind = second.mark()
    assert not behind.query()
    held.let_go()
    behind.synchronize()


def test_the_host_waits_for_the_mark(device):
    progress = Progress()
    queue = device.queue(Lane.H2D)
    held = HeldWork(queue)
    mark = queue.mark()
    progress.finish(step(Lane.H2D, 0), mark)
    reads = []
    worker = LaneWorker(Lane.DISK_READ, progress, LaneMeter())
    worker.submit(step(Lane.DISK_READ, 0, (Lane.H2D, 0)), parts(lambda: reads.append(mark.query())))
    assert reads == []
    held.let_go()
    worker.close()
    assert reads == [True]


def test_marks_that_were_passed_are_forgotten(device):
    progress, queue = Progress(), device.queue(Lane.H2D)
    for order in range(20):
        mark = queue.mark()
        mark.synchronize()
        progress.finish(step(Lane.H2D, order), mark)
    assert len(progress._marks[Lane.H2D]) == 1
    progress.wait(step(Lane.GPU, 0, (Lane.H2D, 3), (Lane.H2D, 19)), device.queue(Lane.GPU))


def test_two_workers_of_a_lane_finish_in_any_order(device):
    """Weights wait for room while the rows of the pass go by; whoever needs the rows does not wait for the weights."""
    progress = Progress()
    weights, rows = (LaneWorker(Lane.H2D, progress, LaneMeter()) for _ in range(2))
    done = []
    weights.submit(step(Lane.H2D, 0, (Lane.GPU, 0)), parts(lambda: done.append("weights")))
    rows.submit(step(Lane.H2D, 1), parts(lambda: done.append("rows")))
    progress.wait(step(Lane.GPU, 0, (Lane.H2D, 1)))
    assert done == ["rows"] and not progress.is_finished(Lane.H2D, 0)
    progress.finish(step(Lane.GPU, 0))
    progress.wait(step(Lane.GPU, 1, (Lane.H2D, 0)))
    assert done == ["rows", "weights"]
    for worker in (weights, rows):
        worker.close()


class HeldWork:
    """A piece of work that keeps a queue busy until it is let go."""

    def __init__(self, queue):
        self._gate = threading.Event()
        queue.put(lambda: self._gate.wait(60))

    def let_go(self) -> None:
        self._gate.set()
