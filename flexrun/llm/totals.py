"""What a run came to, as one document: totals, lanes, tiers, and the forecast beside what the answers took."""

from __future__ import annotations

import dataclasses

from flexrun.hardware import Hardware
from flexrun.machine import peak_resident_bytes
from flexrun.offload.engine import Engine
from flexrun.policy.explain import forecast_document
from flexrun.policy.forecast import forecast
from flexrun.policy.search import Plan
from flexrun.workload import Workload


def run_document(engine: Engine, seconds: float, forecasts: dict) -> dict:
    """Totals of an engine that ran for ``seconds``: tokens, phases, lanes, and the peak bytes of each tier."""
    totals, lanes = engine.totals, engine.lane_statistics()
    for lane in lanes.values():
        lane["utilisation"] = lane["busy_seconds"] / seconds if seconds else 0.0
    return {
        "passes": totals.passes,
        "seconds": seconds,
        "prompt_tokens": totals.prompt_tokens,
        "shared_prefixes": {"prefixes": totals.prefixes, "spared_prompt_tokens": totals.spared_tokens},
        "generated_tokens": totals.generated_tokens,
        "generated_tokens_per_second": totals.generated_tokens / seconds if seconds else 0.0,
        "total_tokens_per_second": (totals.generated_tokens + totals.prompt_tokens) / seconds if seconds else 0.0,
        "paused_sequences": engine.paused_sequences,
        "prefill_seconds": totals.prefill_seconds,
        "decode_seconds": totals.decode_seconds,
        "tiers": {
            tier.value: {
                "budget_bytes": memory.limit_bytes,
                "peak_bytes": memory.peak_bytes,
                "by_kind": dict(memory.used_by_kind),
            }
            for tier, memory in engine.tiers.items()
        },
        "process_peak_bytes": peak_resident_bytes(),
        "lanes": lanes,
        "policy": dataclasses.asdict(engine.policy),
        "forecast": forecasts,
    }


def forecasts_document(plan: Plan, came: Workload | None, seconds: float, hardware: Hardware) -> dict:
    """What was forecast, beside what the answers' real lengths (``came``) should have taken; both against ``seconds``.

    Answers may end before their limit, so the plan's forecast is the most a job can take.
    """
    planned = forecast_document(plan.forecast)
    if came is None or not seconds:
        return {"planned": planned}
    as_it_came = forecast(plan.layout, came, hardware)
    return {
        "planned": planned,
        "as_it_came": forecast_document(as_it_came),
        "error": as_it_came.seconds / seconds - 1.0,
        "share_of_bound": as_it_came.bound_seconds / seconds,
    }
