"""The last words of a job: what it came to, counted while it runs, and the same for people."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from flexrun.core import format_bytes


class Tally:
    """Counts for the summary of one run, which can be had at any time. total: lines of the job.

    seconds: of each phase. engine: the engine's own summary.
    """

    def __init__(self, model_name: str, output_file: str):
        self._names = {"model": model_name, "output_file": output_file}
        self._started = time.perf_counter()
        self._finish_reasons: Counter[str] = Counter()
        self._answered_before = self._failed_before = 0
        self._prompt_tokens = self._generated_tokens = 0
        self.errors: Counter[str] = Counter()
        self.total = self.answered = 0
        self.seconds = {"check": 0.0, "load": 0.0, "run": 0.0}
        self.interrupted = False
        self.engine: dict[str, Any] | None = None

    def before(self, answered: int, failed: int) -> None:
        """What an earlier run has recorded; a refused line that it has is in ``failed``, and not among the errors."""
        self._answered_before, self._failed_before = answered, failed

    def add_answer(self, usage: Mapping[str, int], finish_reasons: Iterable[str]) -> None:
        self.answered += 1
        self._prompt_tokens += usage["prompt_tokens"]
        self._generated_tokens += usage["completion_tokens"]
        self._finish_reasons.update(finish_reasons)

    def summary(self, error: BaseException | None = None) -> dict[str, Any]:
        """See run_job. error: what ended the run."""
        run_seconds, failed = self.seconds["run"], sum(self.errors.values())
        done = self.answered + failed + self._answered_before + self._failed_before
        generated, tokens = self._generated_tokens, self._prompt_tokens + self._generated_tokens
        return {
            "requests": {
                "total": self.total,
                "answered": self.answered,
                "failed": failed,
                "answered_before": self._answered_before,
                "failed_before": self._failed_before,
                "left": max(self.total - done, 0),
            },
            "finish_reasons": dict(self._finish_reasons),
            "errors": dict(self.errors),
            "prompt_tokens": self._prompt_tokens,
            "generated_tokens": generated,
            "generated_tokens_per_second": generated / run_seconds if run_seconds else 0.0,
            "total_tokens_per_second": tokens / run_seconds if run_seconds else 0.0,
            **{f"{phase}_seconds": seconds for phase, seconds in self.seconds.items()},
            "job_seconds": time.perf_counter() - self._started,
            **self._names,
            "interrupted": self.interrupted,
            "error": None if error is None or self.interrupted else str(error) or type(error).__name__,
            "engine": self.engine,
        }


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
    if planned["generated_tokens"] != came["generated_tokens"]:
        text += f"; planned {planned['seconds']:,.1f} s for {planned['generated_tokens']:,} tokens of answers"
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
