"""A hard memory limit around one process and its page cache, so that "does not fit in RAM" is true on any machine.

Linux only, and only where control groups may be made (root, or a delegated subtree). The group is a child of the
benchmark's own, so limits that already hold go on holding.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PREFIX = "flexrun-benchmark-"
# Enters the group named by its first argument, then becomes the command: all of its memory is charged there.
_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class ControlGroupError(Exception):
    """No memory group can be made here; the message says why and what helps."""


class MemoryGroup:
    """A control group limited to ``limit_bytes`` of RAM (no swap), removed when the context ends.

    with MemoryGroup(2_000_000_000) as group:
        subprocess.run(group.wrap(command))
        group.statistics()

    Raises ControlGroupError where groups are not available or not permitted.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.version, parent = _parent()
        self.folder = parent / f"{PREFIX}{os.getpid()}"

    def __enter__(self) -> MemoryGroup:
        _remove_leftovers(self.folder.parent)
        try:
            self.folder.mkdir()
        except OSError as error:
            raise ControlGroupError(
                f"cannot make a control group in {self.folder.parent}: {error.strerror}; run as root, or leave out "
                "the cases that need a memory limit"
            ) from error
        try:
            if self.version == 1:
                self._write("memory.limit_in_bytes", self.limit_bytes)
                with contextlib.suppress(OSError):  # absent where swap is not accounted
                    self._write("memory.memsw.limit_in_bytes", self.limit_bytes)
            else:
                self._write("memory.max", self.limit_bytes)
                with contextlib.suppress(OSError):
                    self._write("memory.swap.max", 0)
        except OSError as error:
            self._remove()
            raise ControlGroupError(f"cannot limit {self.folder}: {error.strerror}; run as root") from error
        return self

    def __exit__(self, *exception) -> None:
        self._remove()

    def wrap(self, command: list[str]) -> list[str]:
        """The command line that runs ``command`` inside the group."""
        return ["sh", "-c", _ENTER, str(self.folder), *command]

    def statistics(self) -> dict:
        """limit_bytes; max_usage_bytes (with page cache; None where the kernel does not say); oom_kills."""
        peak_file, event_file = (
            ("memory.max_usage_in_bytes", "memory.oom_control")
            if self.version == 1
            else ("memory.peak", "memory.events")
        )
        try:
            peak = int((self.folder / peak_file).read_text())
        except (OSError, ValueError):
            peak = None
        events = dict(line.split() for line in (self.folder / event_file).read_text().splitlines())
        return {
            "limit_bytes": self.limit_bytes,
            "max_usage_bytes": peak,
            "oom_kills": int(events.get("oom_kill", 0)),
            "version": self.version,
        }

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))

    def _remove(self) -> None:
        for _ in range(100):  # the kernel takes a moment to forget the last process
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.05)
        raise ControlGroupError(f"{self.folder} still holds processes; end them and remove the folder")


def _parent() -> tuple[int, Path]:
    """(version, folder) under which a memory group can be made."""
    own = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    first = ROOT / "memory"
    if (first / "memory.limit_in_bytes").exists():
        folder = first / own.get("memory", "")
        return 1, folder if folder.is_dir() else first
    if "memory" in _words(ROOT / "cgroup.controllers"):
        # A group with processes of its own cannot hand the controller on: the nearest ancestor that does.
        folder = ROOT / own.get("", "")
        while folder != ROOT and "memory" not in _words(folder / "cgroup.subtree_control"):
            folder = folder.parent
        if "memory" in _words(folder / "cgroup.subtree_control"):
            return 2, folder
    raise ControlGroupError(
        f"no memory controller is open under {ROOT}; run on Linux with control groups, as root, "
        "or leave out the cases that need a memory limit"
    )


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _remove_leftovers(parent: Path) -> None:
    """Groups of benchmarks that were killed before they could clean up."""
    for folder in parent.glob(f"{PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(PREFIX)).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()
