"""Runs the steps of a pass: reads and copies on their lanes' threads, compute on the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from flexrun.config import Policy
from flexrun.core import Event, Lane
from flexrun.errors import ExecutionError
from flexrun.models.rope import RopeTables
from flexrun.models.spec import ModelSpec
from flexrun.offload.batcher import PassPlan
from flexrun.offload.kv_store import KVStore
from flexrun.offload.lanes import LaneWorker, Progress, event_of
from flexrun.offload.modules import Activations, Modules
from flexrun.offload.tiers import MemoryTier
from flexrun.offload.transfers import Transfers
from flexrun.offload.weight_store import WeightStore
from flexrun.schedule import Scheduler

READ_THREADS = 3  # enough requests in flight to fill one SSD; each costs little CPU


class Executor:
    """Owns the lanes and the activations of a run.

    ``events`` collects what every step took when ``trace`` is set.
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
        trace: bool = False,
    ):
        self._scheduler = scheduler
        self._compute_lane = scheduler.compute_lane
        self._activations = Activations(spec, policy, weights, kv, rope, host, device)
        self._modules = Modules(spec, weights, kv, self._activations)
        self._transfers = Transfers(spec, weights, kv, self._activations)
        self.events: list[Event] | None = [] if trace else None
        record = self.events.append if trace else None
        self._progress = Progress()
        self._lanes = {Lane.DISK_READ: LaneWorker(Lane.DISK_READ, self._progress, record, READ_THREADS)}
        if device is not None:
            for lane in (Lane.H2D, Lane.D2H, Lane.CPU):
                self._lanes[lane] = LaneWorker(lane, self._progress, record)
        self.compute_busy_seconds = 0.0
        self.compute_flops = 0

    @torch.inference_mode()
    def run(self, plan: PassPlan, consume: Callable[[int, Tensor], None]) -> None:
        """Run one pass. ``consume(start, logits)`` gets float32 [rows, vocab] for ``plan.sampled[start:]``.

        Raises ExecutionError (or the lane's own error) where a lane failed. An error or an interrupt in the middle
        of a pass leaves the lanes with steps of that pass, so no further pass will run: see ``failed``.
        """
        self._progress.check()
        try:
            self._run(plan, consume)
        except BaseException as error:
            self._progress.fail(error)
            raise

    @property
    def failed(self) -> bool:
        return self._progress.failure is not None

    def _run(self, plan: PassPlan, consume: Callable[[int, Tensor], None]) -> None:
        self._activations.begin(plan)
        self._modules.consume = consume
        compute = []
        for step in self._scheduler.pass_steps(plan.shape):
            if step.lane is self._compute_lane:
                compute.append(step)
            else:
                self._lanes[step.lane].submit(step, self._transfers.parts(step))
        for step in compute:
            self._progress.wait(step)
            start_seconds = time.perf_counter()
            self._modules.run(step)
            end_seconds = time.perf_counter()
            self._progress.finish(step.lane, step.order + 1)
            self.compute_busy_seconds += end_seconds - start_seconds
            self.compute_flops += step.flops
            if self.events is not None:
                self.events.append(event_of(step, start_seconds, end_seconds))
        self._progress.check()

    def lane_statistics(self) -> dict[str, dict[str, float]]:
        """Busy seconds, and bytes or FLOPs, of each lane so far."""
        statistics = {
            lane.value: {"busy_seconds": worker.busy_seconds, "bytes": worker.moved_bytes}
            for lane, worker in self._lanes.items()
        }
        statistics[self._compute_lane.value] = {
            "busy_seconds": self.compute_busy_seconds,
            "flops": self.compute_flops,
        }
        return statistics

    def close(self) -> None:
        """Stop the lanes (whatever is queued is dropped) and give the activations back."""
        self._progress.fail(ExecutionError("the executor is closed"))
        for worker in self._lanes.values():
            worker.close()
        self._activations.close()
