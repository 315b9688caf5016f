"""Runs one measurement in a fresh process and says what else kept the machine busy meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from control_group import MemoryGroup

HERE = Path(__file__).resolve().parent
STDERR_LINES = 12  # of a failed worker that are worth showing


class RunFailed(Exception):
    """A worker ended without its JSON line; the message holds the end of its stderr."""


@dataclass(frozen=True)
class MachineTimes:
    """CPU seconds since boot: all busy time, time stolen by a hypervisor, and that of our ended children."""

    busy_seconds: float
    stolen_seconds: float
    own_seconds: float
    wall_seconds: float

    @classmethod
    def now(cls) -> MachineTimes:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        user, nice, system, _idle, _iowait, interrupt, soft_interrupt, stolen = ticks
        scale = 1 / os.sysconf("SC_CLK_TCK")
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return cls(
            (user + nice + system + interrupt + soft_interrupt) * scale,
            stolen * scale,
            sum(usage.ru_utime + usage.ru_stime for usage in own),
            time.perf_counter(),
        )


def outside_use(before: MachineTimes, after: MachineTimes) -> dict:
    """Shares of all cores, over a whole run with its loading: work that is not ours, and time never given to us.

    The kernel's own threads (disk, network) count as outside.
    """
    capacity = (after.wall_seconds - before.wall_seconds) * (os.cpu_count() or 1)
    outside = (after.busy_seconds - before.busy_seconds) - (after.own_seconds - before.own_seconds)
    return {
        "outside_cpu_share": max(outside, 0.0) / capacity,
        "stolen_cpu_share": (after.stolen_seconds - before.stolen_seconds) / capacity,
    }


def run_json(command: list[str], *, limit_bytes: int | None = None, timeout_seconds: float = 7200) -> dict:
    """Run ``command`` (in a memory group if limited); the last JSON line of its stdout, with CPU use of outsiders.

    Raises RunFailed with the worker's last words, ControlGroupError where no limit can be set.
    """
    with MemoryGroup(limit_bytes) if limit_bytes else nullcontext() as group, tempfile.TemporaryFile("w+") as errors:
        before = MachineTimes.now()
        process = subprocess.Popen(
            group.wrap(command) if group else command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise RunFailed(f"no result after {timeout_seconds:.0f} s") from error
        finally:
            _end(process)
        outside = outside_use(before, MachineTimes.now())
        statistics = group.statistics() if group else None
        errors.seek(0)
        last_words = errors.read().splitlines()[-STDERR_LINES:]
    result = _last_json(output)
    if process.returncode or result is None:
        killed = f", {statistics['oom_kills']} killed for memory" if statistics and statistics["oom_kills"] else ""
        raise RunFailed("\n  ".join([f"exit code {process.returncode}{killed}", *last_words]))
    return result | outside | ({"control_group": statistics} if statistics else {})


def _end(process: subprocess.Popen) -> None:
    """End the worker and whatever it started (its own session), in any case."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_json(text: str) -> dict | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                return json.loads(line)
    return None


def worker_command(python: str, script: str, *arguments: str) -> list[str]:
    return [python, str(HERE / script), *arguments]


def flags(settings: dict) -> list[str]:
    """``{"batch_size": 16, "policy": None}`` as ``["--batch-size", "16"]``."""
    named = ((f"--{name.replace('_', '-')}", value) for name, value in settings.items() if value is not None)
    return [word for name, value in named for word in (name, str(value))]


def drop_page_cache(places: Iterable[Path]) -> None:
    """Make the files under ``places`` cold: what is in RAM of them is written out and forgotten."""
    for place in places:
        for file in [place, *place.rglob("*")]:
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def end_on_terminate() -> None:
    """Let SIGTERM unwind like Ctrl-C, so that control groups and temporary folders are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
