"""The last words of a job, for people: the machine-readable form is the summary itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexrun.core import format_bytes


def format_summary(summary: Mapping[str, Any]) -> str:
    """A few lines of text about a summary of ``run_job``."""
    requests = summary["requests"]
    counts = [f"{requests['answered']:,} answered", f"{requests['failed']:,} failed"]
    if requests["answered_before"] or requests["failed_before"]:
        counts.append(f"{requests['answered_before'] + requests['failed_before']:,} done before")
    if requests["left"]:
        counts.append(f"{requests['left']:,} left")
    lines = [
        ("requests", f"{requests['total']:,}: {', '.join(counts)}"),
        ("finish reasons", _counts(summary["finish_reasons"])),
        ("errors", _counts(summary["errors"])),
        (
            "tokens",
            f"{summary['generated_tokens']:,} generated ({summary['generated_tokens_per_second']:,.1f}/s), "
            f"{summary['prompt_tokens'] + summary['generated_tokens']:,} with prompts "
            f"({summary['total_tokens_per_second']:,.1f}/s)",
        ),
        *_engine_lines(summary["engine"] or {}),
        (
            "time",
            f"{summary['job_seconds']:,.1f} s: check {summary['check_seconds']:.1f} s, "
            f"load {summary['load_seconds']:.1f} s, run {summary['run_seconds']:,.1f} s",
        ),
        ("output", summary["output_file"]),
    ]
    return "\n".join(f"{name:<15} {text}" for name, text in lines if text)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _forecast_lines(engine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Forecast beside measurement. A job whose answers ended early is judged by the lengths that came."""
    forecast = engine.get("forecast", {})
    if "as_it_came" not in forecast:
        return []
    came, planned = forecast["as_it_came"], forecast["planned"]
    text = f"{came['seconds']:,.1f} s for these lengths, {engine['seconds']:,.1f} s measured ({forecast['error']:+.0%})"
    if planned["generated_tokens"] > came["generated_tokens"]:
        text += f"; {planned['seconds']:,.1f} s had every answer gone to its limit"
    bound = f"{forecast['share_of_bound']:.0%} of the busiest lane's rate ({came['binding_lane'].replace('_', ' ')})"
    return [("forecast", text), ("bound", bound)]


def _prefix_words(engine: Mapping[str, Any]) -> str:
    """What need not be run, for another prompt began with it."""
    shared = engine.get("shared_prefixes") or {"prefixes": 0}
    if not shared["prefixes"]:
        return ""
    spared = shared["spared_prompt_tokens"]
    total = spared + engine["prompt_tokens"]
    had = f"{shared['prefixes']:,} prefix{'es' if shared['prefixes'] > 1 else ''} had them"
    return f"{spared:,} of {total:,} prompt tokens not prefilled ({spared / total:.0%}): {had}"


def _engine_lines(engine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The lines of ``LLM.summary()``."""
    if not engine:
        return []
    paused = engine.get("paused_sequences", 0)
    peaks = [f"{tier} {format_bytes(account['peak_bytes'])}" for tier, account in engine["tiers"].items()]
    return [
        ("prefill", f"{engine['prompt_tokens']:,} tokens in {engine['prefill_seconds']:,.1f} s"),
        ("shared prefixes", _prefix_words(engine)),
        ("decode", f"{engine['generated_tokens']:,} tokens in {engine['decode_seconds']:,.1f} s"),
        *([("paused", f"{paused:,} times an answer outgrew its cache room and was prefilled again")] if paused else []),
        *_forecast_lines(engine),
        ("peak memory", f"{', '.join(peaks)}; whole process {format_bytes(engine['process_peak_bytes'])}"),
    ]
