"""Runs the steps of a pass: reads and copies on their lanes' threads, compute on the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType

import numpy
import torch
from torch import Tensor

from flexrun.config import Policy
from flexrun.core import Event, EventLog, Lane
from flexrun.errors import ExecutionError
from flexrun.models.rope import RopeTables
from flexrun.models.spec import ModelSpec
from flexrun.offload.activations import Activations
from flexrun.offload.batcher import PassPlan
from flexrun.offload.device import EmulatedDevice
from flexrun.offload.failures import failure_of
from flexrun.offload.kv_store import KVStore
from flexrun.offload.lanes import LaneMeter, LaneWorker, Progress, QueuedSteps, Throttle
from flexrun.offload.modules import Modules
from flexrun.offload.tiers import MemoryTier
from flexrun.offload.transfers import Transfers
from flexrun.offload.weight_store import WeightStore
from flexrun.schedule import Scheduler
from flexrun.steps import Step, StepKind

# Requests in flight. Three reads fill an idle machine's disk; beside busy cores, where a thread takes a while to come
# to the next one, only more of them do. Writes are small and wait behind all reads that the disk has accepted.
THREADS = {Lane.DISK_READ: 8, Lane.DISK_WRITE: 8}
THROTTLED_THREADS = 3  # those that only sleep are in each other's way
WEIGHTS = (StepKind.READ_WEIGHTS, StepKind.COPY_WEIGHTS)


class Executor:
    """Owns the lanes and the activations of a run.

    Weights have a worker of their own in each lane: they are read and copied far ahead, and the rows of the pass at
    hand must not wait behind them. Either of the two keeps to the order of the schedule.
    bytes_per_second: of lanes that are held to a bandwidth. ``events`` collects what every step took, with ``trace``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        policy: Policy,
        scheduler: Scheduler,
        weights: WeightStore,
        kv: KVStore,
        rope: RopeTables,
        host: MemoryTier,
        device: MemoryTier | None,
        *,
        accelerator: EmulatedDevice,
        bytes_per_second: Mapping[Lane, float] = MappingProxyType({}),
        trace: bool = False,
    ):
        self._scheduler = scheduler
        self._compute_lane = scheduler.compute_lane
        self._activations = Activations(spec, policy, weights, kv, rope, host, device, accelerator)
        self._modules = Modules(spec, weights, kv, self._activations)
        self._transfers = Transfers(spec, weights, kv, self._activations, accelerator)
        self._accelerator = accelerator
        self.events: list[Event] | None = EventLog() if trace else None
        self._record = self.events.append if trace else None
        self._progress = Progress()
        lanes = [Lane.DISK_READ] + ([Lane.H2D, Lane.D2H, Lane.CPU] if device is not None else [])
        self._meters = {lane: LaneMeter(self._record) for lane in (*lanes, self._compute_lane)}
        # What is on its way takes room in the ring and is of no use yet: half of the ring is left to what is there.
        self._read_at_once_bytes = len(weights.host_ring.data) // 2 if weights.host_ring else None
        self._throttles = {lane: Throttle(rate) for lane, rate in bytes_per_second.items()}
        self._step: Step | None = None  # the one that is computed
        self._workers: dict[tuple[Lane, bool], LaneWorker] = {}
        self._queue = accelerator.queue(self._compute_lane)
        meter = self._meters[self._compute_lane]
        self._queued = None if self._queue is None else QueuedSteps(self._queue, meter)

    @torch.inference_mode()
    def run(self, plan: PassPlan, consume: Callable[[int, Tensor], None]) -> None:
        """Run one pass. ``consume(start, logits)`` gets float32 [rows, vocab] for ``plan.logits_rows[start:]``.

        Raises ExecutionError (or the lane's own error) where a lane failed. An error or an interrupt in the middle
        of a pass leaves the lanes with steps of that pass, so no further pass will run: see ``failed``. A failure of
        what is loaded ahead is raised by the pass that needs it: this one is whole, and its answers stand.
        """
        self._progress.check()
        try:
            self._run(plan, consume)
        except BaseException as error:
            failure = failure_of(error, self._step)
            self._progress.fail(failure)
            raise failure from failure.__cause__

    @property
    def failed(self) -> bool:
        return self._progress.failure is not None

    def _run(self, plan: PassPlan, consume: Callable[[int, Tensor], None]) -> None:
        with nullcontext() if self._queue is None else self._queue.active():
            self._step = None
            steps = self._scheduler.pass_steps(plan.shape)
            self._activations.begin(plan, self._scheduler.part_starts)
            self._modules.consume = consume
            compute = []
            for step in steps:
                if step.lane is self._compute_lane:
                    compute.append(step)
                else:
                    settle = self._transfers.settle if step.chosen else None
                    self._worker(step).submit(step, self._transfers.parts, settle)
            for step in compute:
                self._compute(step)
            if self._queued is not None:  # the tables of this pass are overwritten by the next one
                self._queued.drain()

    def _compute(self, step: Step) -> None:
        self._step = step
        self._progress.wait(step, self._queue)
        if self._queued is None:
            start_seconds = time.perf_counter()
            self._modules.run(step)
            self._meters[step.lane].add(step, start_seconds, time.perf_counter())
            self._progress.finish(step)
        else:
            start = self._queue.mark()
            self._modules.run(step)
            end = self._queue.mark()
            self._progress.finish(step, end)
            self._queued.add(step, start, end)

    def _worker(self, step: Step) -> LaneWorker:
        lane, bulk = step.lane, step.kind in WEIGHTS
        throttle = self._throttles.get(step.lane)
        if (lane, bulk) not in self._workers:
            self._workers[lane, bulk] = LaneWorker(
                lane,
                self._progress,
                self._meters.setdefault(lane, LaneMeter(self._record)),
                THREADS.get(lane, 1) if throttle is None else min(THREADS.get(lane, 1), THROTTLED_THREADS),
                throttle=throttle,
                feeds=self._accelerator.queue(lane, bulk=bulk),
                ends_on_host=lane is not Lane.H2D,  # rows that come down are put in their places by the host
                at_once_bytes=self._read_at_once_bytes if lane is Lane.DISK_READ and bulk and not throttle else None,
            )
        return self._workers[lane, bulk]

    def lane_statistics(self) -> dict[str, dict[str, float]]:
        """Busy seconds, and bytes or FLOPs, of each lane so far."""
        statistics = {}
        for lane, meter in self._meters.items():
            amount = {"flops": meter.flops} if lane is self._compute_lane else {"bytes": meter.moved_bytes}
            statistics[lane.value] = {"busy_seconds": meter.busy_seconds, **amount}
        return statistics

    @property
    def expert_counts(self) -> numpy.ndarray | None:
        """int64 [layers, experts]: how many tokens each routed expert got so far; None for a dense model."""
        sparse = self._activations.sparse
        return sparse.totals.copy() if sparse else None

    def close(self) -> None:
        """Stop the lanes (whatever is queued is dropped) and give the activations back."""
        self._progress.fail(ExecutionError("the executor is closed"))
        for worker in self._workers.values():
            worker.close()
        self._activations.close()
