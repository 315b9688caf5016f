"""One HTML page about one job, which needs nothing but itself: pictures are SVG, figures stand in it as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from flexrun.core import format_bytes
from flexrun.report.plot import CURVE_COLOURS, curves_svg
from flexrun.report.samples import Point

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: flex; width: 24rem; height: 1.1rem; background: #eee; } .bar span { height: 100%; }
.warning { color: #a0453c; } svg { max-width: 100%; height: auto; } pre { overflow-x: auto; background: #f6f6f6; }
"""
Row = Sequence[str]


def report_page(
    summary: Mapping[str, Any], points: Sequence[Point], errors: Iterable[tuple[int, str, str]], trace: str | None
) -> str:
    """The page of a job.

    summary: as ``run_job`` returns it. points: of the run, see Samples. errors: (line, code, message) of some requests
    that failed. trace: name of the Chrome trace beside the page.
    """
    engine = summary.get("engine") or {}
    parts = [
        f"<h1>{escape(str(summary['model']))}: {summary['generated_tokens_per_second']:,.1f} generated tokens/s</h1>",
        *([_stopped(summary)] if summary["interrupted"] or summary["error"] else []),
        _section("Job", _table(_job_rows(summary))),
    ]
    if points:
        parts.append(_section("Throughput over time", _throughput(points)))
    if engine:
        parts.append(_section("Lanes", _lanes(engine, points)))
        parts.append(_section("Memory", _tiers(engine)))
        parts.append(_section("Forecast and measurement", _forecast(engine)))
    parts.append(_section("Errors", _errors(summary, errors)))
    if engine:
        parts.append(_section("Policy", f"<pre>{escape(json.dumps(engine['policy'], indent=2))}</pre>"))
    if trace is not None:
        parts.append(
            f'<p>Every step: <a href="{escape(trace, quote=True)}">{escape(trace)}</a>, for chrome://tracing.</p>'
        )
    figures = json.dumps(summary, default=str).replace("</", "<\\/")
    title = escape(f"flexrun: {summary['model']}")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f'\n<script type="application/json" id="summary">{figures}</script>\n</body>\n</html>\n'
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>"


def _table(rows: Sequence[Row], heads: Row = ()) -> str:
    """Rows of text; all but the first column are numbers where there are heads."""
    kind = ' class="number"' if heads else ""

    def cells(row: Row, tag: str) -> str:
        return "".join(f"<{tag}{kind if place else ''}>{escape(cell)}</{tag}>" for place, cell in enumerate(row))

    head = f"<tr>{cells(heads, 'th')}</tr>\n" if heads else ""
    return f"<table>\n{head}" + "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows) + "\n</table>\n"


def _stopped(summary: Mapping[str, Any]) -> str:
    left, error = summary["requests"]["left"], summary["error"]
    ending = f"ended in an error: {error}" if error else "was stopped"
    text = f"The job {ending}\n{left:,} requests are left; once nothing is in their way, --resume goes on with them."
    return f'<p class="warning" style="white-space: pre-line">{escape(text)}</p>'


def _job_rows(summary: Mapping[str, Any]) -> list[Row]:
    requests = summary["requests"]
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in requests.items() if count)
    phases = ", ".join(f"{name} {summary[f'{name}_seconds']:,.1f} s" for name in ("check", "load", "run"))
    reasons = ", ".join(f"{name} {count:,}" for name, count in summary["finish_reasons"].items())
    return [
        ("requests", counts),
        ("prompt tokens", f"{summary['prompt_tokens']:,}"),
        ("generated tokens", f"{summary['generated_tokens']:,}"),
        ("tokens a second", f"{summary['total_tokens_per_second']:,.1f} with prompts"),
        ("answers ended by", reasons or "none"),
        ("time", f"{summary['job_seconds']:,.1f} s: {phases}"),
        ("output", str(summary["output_file"])),
    ]


def _throughput(points: Sequence[Point]) -> str:
    generated, everything = [], []
    before = 0.0
    for point in points:
        seconds = max(point.end_seconds - before, 1e-9)
        generated.append((point.end_seconds, point.generated_tokens / seconds))
        everything.append((point.end_seconds, (point.generated_tokens + point.prompt_tokens) / seconds))
        before = point.end_seconds
    finished = sum(point.finished_requests for point in points)
    curves = {"all tokens": everything, "generated tokens": generated}
    return curves_svg(curves, "seconds", "tokens a second") + f"<p>{finished:,} requests ended in this time.</p>\n"


def _lanes(engine: Mapping[str, Any], points: Sequence[Point]) -> str:
    forecast = engine.get("forecast", {})
    expected = forecast.get("as_it_came", forecast.get("planned", {})).get("lanes", {})
    rows = []
    for lane, found in engine["lanes"].items():
        amount = f"{found['flops'] / 1e12:,.2f} TFLOP" if "flops" in found else format_bytes(found["bytes"])
        planned = f"{expected[lane]['utilisation']:.0%}" if lane in expected else "-"
        rows.append(
            (lane.replace("_", " "), f"{found['utilisation']:.0%}", planned, f"{found['busy_seconds']:,.2f}", amount)
        )
    table = _table(rows, ("lane", "busy", "forecast", "busy seconds", "work"))
    if not points:
        return table
    curves: dict[str, list[tuple[float, float]]] = {}
    before = 0.0
    for point in points:
        span = max(point.end_seconds - before, 1e-9)
        for lane, seconds in point.lane_seconds.items():
            curves.setdefault(lane.replace("_", " "), []).append((point.end_seconds, 100 * seconds / span))
        before = point.end_seconds
    return table + curves_svg(
        {lane: curve for lane, curve in curves.items() if any(y for _, y in curve)}, "seconds", "% busy"
    )


def _tiers(engine: Mapping[str, Any]) -> str:
    rows = []
    for tier, account in engine["tiers"].items():
        budget, peak = account["budget_bytes"], account["peak_bytes"]
        whole = max(budget or 0, peak, 1)
        kinds = sorted(account["by_kind"].items(), key=lambda item: -item[1])
        bars = "".join(
            f'<span style="width:{100 * size / whole:.2f}%;background:{CURVE_COLOURS[place % len(CURVE_COLOURS)]}" '
            f'title="{escape(kind)} {format_bytes(size)}"></span>'
            for place, (kind, size) in enumerate(kinds)
        )
        held = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in kinds if size)
        of = f"of {format_bytes(budget)}" if budget is not None else "without a limit"
        rows.append(
            f'<tr><td>{escape(tier)}</td><td><div class="bar">{bars}</div>{escape(held)}</td>'
            f"<td>peak {format_bytes(peak)} {of}</td></tr>"
        )
    process = f"<p>Whole process: {format_bytes(engine['process_peak_bytes'])} at its peak.</p>\n"
    return "<table>\n" + "\n".join(rows) + "\n</table>\n" + process


def _forecast(engine: Mapping[str, Any]) -> str:
    found = engine.get("forecast", {})
    columns = {"planned": found.get("planned"), "for the lengths that came": found.get("as_it_came")}
    measured = {
        "seconds": engine["seconds"],
        "prefill_seconds": engine["prefill_seconds"],
        "decode_seconds": engine["decode_seconds"],
        "passes": engine["passes"],
        "generated_tokens": engine["generated_tokens"],
        "generated_tokens_per_second": engine["generated_tokens_per_second"],
    }
    columns = {name: values for name, values in {**columns, "measured": measured}.items() if values}
    rows = [
        (
            name.replace("_", " "),
            *(f"{values[name]:,.5g}" if values[name] < 1e5 else f"{values[name]:,.0f}" for values in columns.values()),
        )
        for name in measured
    ]
    text = _table(rows, ("", *columns))
    if "error" in found:
        lane = found["as_it_came"]["binding_lane"].replace("_", " ")
        text += (
            f"<p>Forecast for these lengths against measurement: {found['error']:+.0%}. "
            f"{found['share_of_bound']:.0%} of the rate of the busiest lane, {escape(lane)}.</p>\n"
        )
    return text


def _errors(summary: Mapping[str, Any], errors: Iterable[tuple[int, str, str]]) -> str:
    if not summary["errors"]:
        return "<p>None.</p>\n"
    counts = _table([(code, f"{count:,}") for code, count in summary["errors"].items()], ("code", "requests"))
    shown = [(f"line {line}", code, message) for line, code, message in errors]
    more = sum(summary["errors"].values()) - len(shown)
    rest = f"<p>... and {more:,} more; all stand in the output.</p>\n" if more > 0 else ""
    return counts + _table(shown) + rest
