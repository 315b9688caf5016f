"""The page of a report: whole HTML that needs nothing from elsewhere, and holds the run's figures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from flexrun.report.page import report_page
from flexrun.report.samples import Point

VOID = {"meta", "br"}
SELF_CLOSED = {"rect", "polyline"}
FORECAST = {
    "seconds": 8.5,
    "prefill_seconds": 2.0,
    "decode_seconds": 6.5,
    "passes": 40,
    "prompt_tokens": 1000,
    "generated_tokens": 900,
    "generated_tokens_per_second": 105.9,
    "binding_lane": "disk_read",
    "lanes": {"cpu": {"seconds": 4.0, "utilisation": 0.47}},
}
SUMMARY = {
    "requests": {"total": 12, "answered": 10, "failed": 2, "answered_before": 0, "failed_before": 0, "left": 0},
    "finish_reasons": {"stop": 4, "length": 6},
    "errors": {"invalid_json": 1, "kv_cache_too_small": 1},
    "prompt_tokens": 1234,
    "generated_tokens": 5678,
    "generated_tokens_per_second": 567.8,
    "total_tokens_per_second": 691.2,
    "check_seconds": 0.5,
    "load_seconds": 1.5,
    "run_seconds": 10.0,
    "job_seconds": 12.0,
    "model": "<script>alert(1)</script>",
    "output_file": "a & b.jsonl",
    "interrupted": False,
    "error": None,
    "engine": {
        "seconds": 10.0,
        "passes": 41,
        "generated_tokens": 5678,
        "generated_tokens_per_second": 567.8,
        "prefill_seconds": 3.0,
        "decode_seconds": 7.0,
        "lanes": {
            "cpu": {"busy_seconds": 6.0, "utilisation": 0.6, "flops": 3e12},
            "disk_read": {"busy_seconds": 9.0, "utilisation": 0.9, "bytes": 5 << 30},
        },
        "tiers": {
            "cpu": {"budget_bytes": 8 << 30, "peak_bytes": 3 << 30, "by_kind": {"weights": 2 << 30, "kv": 1 << 30}},
            "disk": {"budget_bytes": None, "peak_bytes": 1 << 30, "by_kind": {"weights": 1 << 30}},
        },
        "process_peak_bytes": 4 << 30,
        "policy": {"sequences_in_flight": 64},
        "forecast": {"planned": FORECAST, "as_it_came": FORECAST, "error": -0.15, "share_of_bound": 0.83},
    },
}
POINTS = [
    Point(1.0, 800, 100, 0, {"cpu": 0.5, "disk_read": 0.9}),
    Point(3.0, 434, 5578, 10, {"cpu": 1.0, "disk_read": 1.8}),
]
ERRORS = [(3, "invalid_json", "Expecting ',' <b>"), (9, "kv_cache_too_small", "no room")]


class Checker(HTMLParser):
    """Raises where tags do not match; gathers text, ids and whatever could be fetched from elsewhere."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.links, self.scripts, self.drawn = [], "", [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src", "data", "action", "srcset")]
        if tag == "script":
            self.scripts.append(dict(attributes))

    def handle_startendtag(self, tag, attributes):
        if tag == "polyline":
            self.drawn.append(dict(attributes)["points"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data + " "


def test_the_page_is_whole_and_needs_nothing_else():
    page = report_page(SUMMARY, POINTS, ERRORS, "trace.json")
    found = Checker(page)
    assert page.startswith("<!DOCTYPE html>") and found.links == ["trace.json"]
    assert found.scripts == [{"type": "application/json", "id": "summary"}]
    assert "url(" not in page and "@import" not in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    for figure in (
        "567.8 generated tokens/s",
        "1,234",
        "5,678",
        "12.0 s: check 0.5 s, load 1.5 s, run 10.0 s",
        "stop 4, length 6",
        "60%",
        "90%",
        "47%",
        "3.00 TFLOP",
        "5.0 GiB",
        "peak 3.0 GiB of 8.0 GiB",
        "-15%",
        "83%",
        "disk read",
        "line 3",
        "Expecting ',' <b>",
        "kv_cache_too_small",
        "a & b.jsonl",
        '"sequences_in_flight": 64',
        "10 requests ended",
    ):
        assert figure in found.text, figure


def test_the_summary_can_be_read_back_from_the_page():
    page = report_page(SUMMARY, POINTS, ERRORS, None)
    text = re.search(r'<script type="application/json" id="summary">(.*?)</script>', page, re.DOTALL).group(1)
    assert json.loads(text) == SUMMARY
    assert Checker(page).links == []


def test_curves_show_each_stretch_by_its_own_rate():
    drawn = Checker(report_page(SUMMARY, POINTS, (), None)).drawn
    assert len(drawn) == 2 + 2 + 2  # two pictures: axes, then two tokens' and two lanes' curves
    first, second = (tuple(map(float, point.split(","))) for point in drawn[2].split())  # generated tokens
    assert first[0] < second[0]
    heights = [330 - first[1], 330 - second[1]]  # above the axis
    assert heights[1] / heights[0] == pytest.approx((5578 / 2) / 100, rel=0.05)


@pytest.mark.parametrize(
    "change", [{"engine": None}, {"engine": {}}, {"interrupted": True, "errors": {}}, {"error": "<b>"}]
)
def test_jobs_that_ran_nothing_or_not_to_the_end(change):
    found = Checker(report_page({**SUMMARY, **change}, [], [], None))
    assert ("was stopped" in found.text) == bool(change.get("interrupted"))
    assert ("ended in an error: <b>" in found.text) == bool(change.get("error"))
    if change.get("errors") == {}:
        assert "None." in found.text


def test_more_errors_than_are_shown_are_counted():
    summary = {**SUMMARY, "errors": {"invalid_json": 5000}}
    assert "4,998 more" in Checker(report_page(summary, POINTS, ERRORS, None)).text
