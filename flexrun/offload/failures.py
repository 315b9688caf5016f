"""What goes wrong in a lane, as an error that says where it happened and what to do about it."""

from __future__ import annotations

import errno

import torch

from flexrun.errors import BudgetError, ExecutionError, FlexrunError
from flexrun.steps import Step

_HOST_ALLOCATOR = "DefaultCPUAllocator"  # torch reports host memory that is refused as a plain RuntimeError


def failure_of(error: BaseException, step: Step | None) -> BaseException:
    """The error to end a run with. FlexrunErrors and what is no Exception (an interrupt) are passed on as they are."""
    if isinstance(error, FlexrunError) or not isinstance(error, Exception):
        return error
    where = "between two steps"
    if step is not None:
        layer = f" of layer {step.layer}" if step.layer >= 0 else ""
        where = f"in {step.kind.value}{layer} ({step.lane.value} lane)"
    failure = _explained(error, where)
    failure.__cause__ = error
    return failure


def _explained(error: Exception, where: str) -> FlexrunError:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _HOST_ALLOCATOR in str(error):
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        memory, flag = ("GPU memory", "--gpu-memory") if on_gpu else ("memory", "--cpu-memory")
        return BudgetError(
            f"{memory} ran out {where}: {error}",
            f"lower --max-num-seqs; or, where other programs use this memory too, lower {flag} to leave them more",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ExecutionError(f"the disk is full, {where}: {error}", "free some space, or name another --disk-dir")
    if isinstance(error, OSError):
        return ExecutionError(f"the disk or a file failed {where}: {error}", "check the disk and the path")
    return ExecutionError(
        f"a lane failed {where}: {error!r}",
        "this is a fault of flexrun or of the machine: report it with the command and this message",
    )
