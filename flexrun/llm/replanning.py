"""Looks for a better plan in the middle of a job, once its answers have told how long they get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexrun.hardware import Hardware
from flexrun.placement import kv_format
from flexrun.policy.features import Features
from flexrun.policy.forecast import forecast
from flexrun.policy.layout import Budgets
from flexrun.policy.search import Plan, search
from flexrun.workload import Workload

LEAST_SECONDS = 120.0  # of work left, below which a search is not worth its seconds
WORTH = 0.8  # of the time left, that another plan must stay below


def better_plan(
    plan: Plan,
    workload: Workload,
    hardware: Hardware,
    budgets: Budgets,
    fixed: Mapping[str, Any],
    features: Features,
    open_seconds: float,
) -> Plan | None:
    """Another plan for ``workload``, what is left of a job, if it pays to open it; None if it does not.

    open_seconds: what it takes to load the weights once more; what is under way counts as prompts of the workload. A
    compressed KV cache is never left: what it holds depends on when it was filled.
    """
    layout = plan.layout
    if plan.policy.sequences_in_flight >= len(workload) or kv_format(layout.spec, plan.policy) is not None:
        return None
    left_seconds = forecast(layout, workload, hardware).seconds
    if left_seconds < LEAST_SECONDS:
        return None
    found = search(layout.spec, hardware, workload, budgets, fixed=fixed, features=features)
    return found if found.forecast.seconds + open_seconds < WORTH * left_seconds else None
