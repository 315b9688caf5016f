"""What a run came to, as one document: totals, lanes, tiers, and the forecast beside what the answers took."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from flexrun.hardware import Hardware
from flexrun.machine import peak_resident_bytes
from flexrun.offload.engine import Engine
from flexrun.policy.explain import forecast_document
from flexrun.policy.forecast import Forecast, forecast
from flexrun.policy.layout import Layout
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


SUMS = (
    "passes",
    "seconds",
    "prompt_tokens",
    "generated_tokens",
    "paused_sequences",
    "prefill_seconds",
    "decode_seconds",
)


def joined_documents(documents: Sequence[dict]) -> dict:
    """Documents of engines that ran one after the other as one: sums, the last one's policy, the highest peaks."""
    first, last = documents[0], documents[-1]
    if first is last:
        return last
    total = {**last, **{name: sum(document[name] for document in documents) for name in SUMS}}
    shared = [document["shared_prefixes"] for document in documents]
    total["shared_prefixes"] = {name: sum(each[name] for each in shared) for name in shared[0]}
    seconds, generated = total["seconds"], total["generated_tokens"]
    total["generated_tokens_per_second"] = generated / seconds if seconds else 0.0
    total["total_tokens_per_second"] = (generated + total["prompt_tokens"]) / seconds if seconds else 0.0
    total["lanes"] = {}
    for lane in {**first["lanes"], **last["lanes"]}:
        found = [document["lanes"][lane] for document in documents if lane in document["lanes"]]
        lanes = {name: sum(each.get(name, 0) for each in found) for name in found[-1]}
        total["lanes"][lane] = {**lanes, "utilisation": lanes["busy_seconds"] / seconds if seconds else 0.0}
    for tier, account in total["tiers"].items():
        peaks = [document["tiers"].get(tier, account)["peak_bytes"] for document in documents]
        total["tiers"][tier] = {**account, "peak_bytes": max(peaks)}
    return total


def busy_seconds(lanes: Sequence[dict]) -> dict[str, float]:
    """Of each lane, over engines that ran one after the other. lanes: of each of them, as Engine.lane_statistics."""
    names = [name for each in lanes for name in each]
    return {name: sum(each[name]["busy_seconds"] for each in lanes if name in each) for name in dict.fromkeys(names)}


def forecasts_document(
    first: Forecast, layout: Layout, came: Workload | None, seconds: float, hardware: Hardware
) -> dict:
    """What was forecast at ``first``, beside what answers of the lengths that ``came`` should have taken with the
    latest ``layout``; both against ``seconds``. Answers may end before what was planned for them."""
    planned = forecast_document(first)
    if came is None or not seconds:
        return {"planned": planned}
    as_it_came = forecast(layout, came, hardware)
    return {
        "planned": planned,
        "as_it_came": forecast_document(as_it_came),
        "error": as_it_came.seconds / seconds - 1.0,
        "share_of_bound": as_it_came.bound_seconds / seconds,
    }
