"""Says in plain words what a plan does, what it will take, and what would make it faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from flexrun.core import Lane, Tier, format_bytes
from flexrun.placement import kv_bytes_per_token, weight_bits_of
from flexrun.policy.forecast import Forecast
from flexrun.policy.layout import Layout
from flexrun.policy.programs import PRICED_BYTES
from flexrun.policy.search import Plan

LANE_WORDS = {
    Lane.GPU: "GPU compute",
    Lane.CPU: "CPU compute",
    Lane.H2D: "copies to the GPU",
    Lane.D2H: "copies from the GPU",
    Lane.DISK_READ: "disk reads",
    Lane.DISK_WRITE: "disk writes",
}
KIND_ORDER = ("weights", "kv", "hidden", "workspace")


def forecast_document(forecast: Forecast) -> dict:
    """A forecast as JSON values."""
    return {
        "seconds": forecast.seconds,
        "prefill_seconds": forecast.prefill_seconds,
        "decode_seconds": forecast.decode_seconds,
        "passes": round(forecast.passes),
        "prompt_tokens": forecast.prompt_tokens,
        "generated_tokens": forecast.generated_tokens,
        "generated_tokens_per_second": forecast.generated_tokens_per_second,
        "total_tokens_per_second": forecast.total_tokens_per_second,
        "binding_lane": forecast.binding_lane.value,
        "bound_seconds": forecast.bound_seconds,
        "lanes": {
            lane.value: {"seconds": seconds, "utilisation": forecast.utilisation(lane)}
            for lane, seconds in forecast.lane_seconds.items()
        },
    }


def plan_document(plan: Plan) -> dict:
    """Everything a plan says, as JSON values."""
    layout = plan.layout
    return {
        "model": {
            "architecture": layout.spec.architecture,
            "dtype": layout.spec.dtype,
            "weight_bytes": layout.spec.weight_bytes,
            "kv_bytes_per_token": kv_bytes_per_token(layout.spec),
        },
        "policy": dataclasses.asdict(plan.policy),
        "budgets": dataclasses.asdict(layout.budgets),
        "bytes": {tier.value: dict(kinds) for tier, kinds in layout.account.bytes_by_kind.items()},
        "kv_room_tokens": layout.kv_tokens,
        "forecast": forecast_document(plan.forecast),
        "gains": {tier.value: {"more_bytes": PRICED_BYTES, "throughput": gain} for tier, gain in plan.gains.items()},
        "shadow_prices_seconds_per_byte": {
            tier.value: price for tier, price in (plan.solution.prices.items() if plan.solution else ())
        },
        "search": {"programs": plan.programs, "simulations": plan.simulations},
    }


def format_plan(plan: Plan) -> str:
    """A page of text: bytes by kind and tier, the policy, the forecast, the lanes, and what more memory would bring."""
    layout, forecast = plan.layout, plan.forecast
    lines = [
        *_memory_lines(layout),
        "",
        *_named("policy", _policy_words(layout)),
        *_named("forecast", _forecast_words(forecast)),
        *_named("lanes", _lane_words(layout, forecast)),
        *_named("more memory", [_gain_words(tier, gain) for tier, gain in plan.gains.items()]),
    ]
    return "\n".join(lines)


def forecast_line(layout: Layout, forecast: Forecast) -> str:
    """One line before a run."""
    return (
        f"plan: {_policy_words(layout)[0]}; forecast {forecast.generated_tokens_per_second:,.1f} tokens/s, "
        f"{format_seconds(forecast.seconds)} ({LANE_WORDS[forecast.binding_lane]} busiest)"
    )


def format_seconds(seconds: float) -> str:
    """``5403`` -> ``"1 h 30 min"``."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _named(name: str, words: list[str]) -> Iterator[str]:
    for number, text in enumerate(words):
        yield f"{name if number == 0 else '':<12} {text}"


def _memory_lines(layout: Layout) -> Iterator[str]:
    """A table: a row a kind, a column a tier."""
    tiers = [tier for tier in Tier if tier is not Tier.GPU or layout.on_device]
    kinds = layout.account.bytes_by_kind
    names = list(dict.fromkeys([*KIND_ORDER, *(name for tier in tiers for name in kinds.get(tier, {}))]))
    yield f"{'bytes':<16}" + "".join(f"{tier.value:>14}" for tier in tiers)
    for name in names:
        sizes = [kinds.get(tier, {}).get(name, 0) for tier in tiers]
        if any(sizes):
            yield f"{name.replace('_', ' '):<16}" + "".join(
                f"{format_bytes(size) if size else '-':>14}" for size in sizes
            )
    yield f"{'total':<16}" + "".join(f"{format_bytes(layout.account.total(tier)):>14}" for tier in tiers)
    limits = [layout.budgets.of(tier) for tier in tiers]
    yield f"{'budget':<16}" + "".join(f"{format_bytes(limit) if limit else '-':>14}" for limit in limits)


def _policy_words(layout: Layout) -> list[str]:
    policy, micro_batches = layout.policy, layout.micro_batches
    words = [f"{policy.sequences_in_flight:,} sequences in flight"]
    if len(micro_batches) > 1:
        words.append(f"{len(micro_batches)} attention micro-batches")
    words.append(f"passes of up to {policy.tokens_per_pass:,} tokens")
    places = [_fractions("weights", policy.weights, layout.on_device)]
    if layout.on_device or policy.kv.disk:
        places.append(_fractions("KV", policy.kv, layout.on_device))
    away = [place.attend_lane for place in micro_batches if place.home is not Tier.GPU]
    if layout.on_device and away:
        places.append(f"{away.count(Lane.CPU) / len(away):.0%} of the KV off the GPU attended on the CPU")
    if any(place.device_share for place in micro_batches):
        places.append(f"of which the newest {policy.kv_device_tokens_share:.0%} of each sequence on the GPU")
    if layout.placement.cpu_experts:
        places.append(f"{policy.cpu_experts_share:.0%} of the experts in RAM run by the CPU")
    if policy.weight_bits < 16 or policy.key_value_bits or policy.keep:
        places.append(f"weights in {weight_bits_of(policy)} bits, KV in {policy.kv_bits} bits")
    if policy.activation_bits < 16:
        places.append(f"activations rounded to {policy.activation_bits} bits")
    return [", ".join(words), "; ".join(places)]


def _fractions(kind: str, placement, on_device: bool) -> str:
    shares = {"on the GPU": placement.gpu, "in RAM": placement.cpu, "on disk": placement.disk}
    return f"{kind} " + ", ".join(f"{share:.0%} {place}" for place, share in shares.items() if share > 0.001)


def _forecast_words(forecast: Forecast) -> list[str]:
    prefill_rate = forecast.prompt_tokens / forecast.prefill_seconds if forecast.prefill_seconds else 0.0
    decode_rate = forecast.generated_tokens / forecast.decode_seconds if forecast.decode_seconds else 0.0
    return [
        f"{format_seconds(forecast.seconds)}: {forecast.generated_tokens_per_second:,.2f} generated tokens/s, "
        f"{forecast.total_tokens_per_second:,.1f} with prompts",
        f"prefill {format_seconds(forecast.prefill_seconds)} ({prefill_rate:,.1f} prompt tokens/s), "
        f"decode {format_seconds(forecast.decode_seconds)} ({decode_rate:,.1f} tokens/s), "
        f"{round(forecast.passes):,} passes",
    ]


def _lane_words(layout: Layout, forecast: Forecast) -> list[str]:
    words = [
        f"{LANE_WORDS[lane]:<20} {forecast.utilisation(lane):>4.0%}"
        for lane in Lane
        if forecast.lane_seconds[lane] > 0 and (layout.on_device or lane is not Lane.GPU)
    ]
    bound = f"bound: {LANE_WORDS[forecast.binding_lane]}, {format_seconds(forecast.bound_seconds)} without any waiting"
    return [*words, bound]


def _gain_words(tier: Tier, gain: float) -> str:
    name = {Tier.GPU: "GPU memory", Tier.CPU: "RAM"}.get(tier, tier.value)
    change = f"{gain:+.0%}" if gain >= 0.005 else "no faster"
    return f"{format_bytes(PRICED_BYTES)} more {name}: {change}"
