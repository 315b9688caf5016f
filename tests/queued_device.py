"""An accelerator with real queues on the host: a thread each, which does what is put on it when it gets to it.

It shows what a GPU would show of the waiting between lanes: a copy that is read before its mark, or memory that is
used again too early, gives other tokens. Every piece of work may be held up for a moment.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from functools import partial

import torch

from flexrun.core import Lane
from flexrun.offload.device import EmulatedDevice
from flexrun.steps import StepKind

_active = threading.local()


class HostMark:
    def __init__(self):
        self._passed = threading.Event()

    def query(self) -> bool:
        return self._passed.is_set()

    def synchronize(self) -> None:
        assert self._passed.wait(60), "the queue stands still"

    def pass_it(self) -> None:
        self.seconds = time.perf_counter()
        self._passed.set()


class HostQueue:
    """longest_delay_seconds: every piece of work starts up to so much late. enqueued: pieces put on it so far."""

    def __init__(self, longest_delay_seconds: float, seed: int):
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._delay, self._random = longest_delay_seconds, random.Random(seed)
        self.enqueued = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @torch.inference_mode()
    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if self.error is None:
                    work()
            except BaseException as error:
                self.error = error

    def put(self, work) -> None:
        self.enqueued += 1
        if self._delay:
            self._work.put(partial(time.sleep, self._random.uniform(0, self._delay)))
        self._work.put(work)

    @contextlib.contextmanager
    def active(self):
        before, _active.queue = getattr(_active, "queue", None), self
        yield
        _active.queue = before

    def mark(self) -> HostMark:
        mark = HostMark()
        self._work.put(mark.pass_it)
        return mark

    def wait(self, mark: HostMark) -> None:
        self._work.put(mark.synchronize)

    def bound(self) -> None:
        pass

    def seconds_of(self, mark: HostMark) -> float:
        return mark.seconds

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(60)


class QueuedDevice(EmulatedDevice):
    """Copies and uploads go on the calling thread's queue, and so do compute steps after ``queue_compute``."""

    is_separate = True

    def __init__(self, longest_delay_seconds: float = 0.0):
        super().__init__()
        self._delay = longest_delay_seconds
        self.queues: dict[tuple[Lane, bool], HostQueue] = {}
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def queue(self, lane: Lane, *, bulk: bool = False) -> HostQueue | None:
        if lane not in (Lane.GPU, Lane.H2D, Lane.D2H):
            return None
        if (lane, bulk) not in self.queues:
            self.queues[lane, bulk] = HostQueue(self._delay, len(self.queues))
        return self.queues[lane, bulk]

    def queue_compute(self, engine) -> None:
        """Compute steps of an engine run on the queue of the compute lane; only sampled tokens are waited for, and the
        choices of a router, which the host reads before it goes on."""
        modules = engine._executor._modules
        run, spec = modules.run, modules._spec

        def enqueue(step) -> None:
            _active.queue.put(partial(run, step))
            if step.kind is StepKind.LOGITS or (step.kind is StepKind.MLP and spec.is_sparse(step.layer)):
                _active.queue.mark().synchronize()
                if _active.queue.error is not None:
                    raise _active.queue.error

        modules.run = enqueue

    def copy(self, target, source) -> None:
        active = getattr(_active, "queue", None)
        if active is None:  # while weights load
            target.copy_(source)
        else:
            active.put(partial(target.copy_, source))

    def upload(self, name, values):
        """Overwrites what the last pass uploaded, pinned and on the device, as a GPU's tables do."""
        if name not in self._tables or len(self._tables[name][0]) < values.numel() * values.itemsize:
            nbytes = max(2 * values.numel() * values.itemsize, 8)
            self._tables[name] = torch.empty(2, nbytes, dtype=torch.uint8).unbind()
        pinned, device = (
            table[: values.numel() * values.itemsize].view(values.dtype).view(values.shape)
            for table in self._tables[name]
        )
        pinned.copy_(values)
        _active.queue.put(partial(device.copy_, pinned))
        return device

    def landed(self) -> None:
        _active.queue.mark().synchronize()

    def rows_on_host(self, *tensors):
        for start in range(0, len(tensors[0]), 3):
            rows = slice(start, min(start + 3, len(tensors[0])))
            copies = [torch.full_like(tensor[rows], float("nan")) for tensor in tensors]
            for copy, tensor in zip(copies, tensors):
                self.copy(copy, tensor[rows])
            _active.queue.mark().synchronize()
            yield rows, copies

    def settle(self) -> None:
        for each in self.queues.values():
            each.mark().synchronize()

    def close(self) -> None:
        for each in self.queues.values():
            each.close()
