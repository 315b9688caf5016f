"""Writes a timeline for chrome://tracing or Perfetto: what each lane did, step by step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from flexrun.core import Event, Lane

_LANE_ROWS = {lane: row for row, lane in enumerate(Lane)}


def write_chrome_trace(events: Iterable[Event], path: str | Path) -> None:
    """One complete event ("X") a step, one row a lane; times are microseconds from the first step."""
    events = sorted(events, key=lambda event: event.start_seconds)
    origin = events[0].start_seconds if events else 0.0
    rows = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": lane.value}}
        for lane, row in _LANE_ROWS.items()
    ]
    for event in events:
        duration = event.end_seconds - event.start_seconds
        details = {"pass": event.pass_index, "layer": event.layer}
        if event.bytes:
            details["bytes"] = event.bytes
            details["gigabytes_per_second"] = round(event.bytes / max(duration, 1e-9) / 1e9, 3)
        if event.flops:
            details["gigaflops_per_second"] = round(event.flops / max(duration, 1e-9) / 1e9, 1)
        rows.append(
            {
                "name": event.name,
                "ph": "X",
                "pid": 1,
                "tid": _LANE_ROWS[event.lane],
                "ts": (event.start_seconds - origin) * 1e6,
                "dur": duration * 1e6,
                "args": details,
            }
        )
    Path(path).write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}))
