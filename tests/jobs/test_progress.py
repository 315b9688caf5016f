"""What is drawn on a terminal, and what goes to a log file instead."""

import io

import pytest

from flexrun.jobs import progress as progress_module
from flexrun.jobs.progress import Progress
from flexrun.jobs.summary import format_summary


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def run(stream, count=4, **settings):
    bar = Progress(count + 1, 100, done=1, stream=stream, **settings)
    for _ in range(count):
        bar.advance(20, 10)
        bar.finish(25, 20)
    bar.close()
    return stream.getvalue()


def test_a_terminal_gets_a_bar_with_rate_and_eta():
    text = run(Terminal())
    assert "5/5 requests" in text and "generated tok/s" in text and "ETA" in text
    assert "\x1b[3" not in text  # no colour, so NO_COLOR holds


def test_a_log_file_gets_plain_lines_now_and_then(monkeypatch):
    assert run(io.StringIO()) == ""
    monkeypatch.setattr(progress_module, "PLAIN_SECONDS", 0.0)
    lines = run(io.StringIO()).splitlines()
    assert len(lines) == 8 and lines[1].startswith("2/5 requests, ") and "\r" not in "".join(lines)


@pytest.mark.parametrize("enabled, drawn", [(True, True), (False, False)])
def test_flags_win_over_what_the_stream_is(enabled, drawn, monkeypatch):
    monkeypatch.setattr(progress_module, "PLAIN_SECONDS", 0.0)
    assert ("requests" in run(io.StringIO(), enabled=enabled)) is drawn
    assert ("requests" in run(Terminal(), enabled=enabled)) is drawn


def test_eta_follows_work_not_requests(monkeypatch):
    clock = iter([0.0, 30.0, 30.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    bar = Progress(2, 100, enabled=False, stream=io.StringIO())
    bar.advance(60, 50)
    bar.finish(70, 50)  # 60 of what are now 80 are done after 30 s
    assert bar._rates() == "1.7 generated tok/s, ETA 00:10"
    bar.expect(40)  # of the other request 10 are done
    assert bar._rates() == "1.7 generated tok/s, ETA 00:15"


def test_summary_for_people():
    text = format_summary(
        {
            "requests": {
                "total": 1200,
                "answered": 1000,
                "failed": 50,
                "answered_before": 100,
                "failed_before": 0,
                "left": 50,
            },
            "finish_reasons": {"stop": 900, "length": 100},
            "errors": {"invalid_json": 50},
            "prompt_tokens": 3000,
            "generated_tokens": 2000,
            "generated_tokens_per_second": 20.0,
            "total_tokens_per_second": 50.0,
            "check_seconds": 1.0,
            "load_seconds": 2.0,
            "run_seconds": 100.0,
            "job_seconds": 103.5,
            "output_file": "out.jsonl",
            "engine": {
                "prompt_tokens": 3000,
                "generated_tokens": 2000,
                "prefill_seconds": 40.0,
                "decode_seconds": 60.0,
                "tiers": {"cpu": {"peak_bytes": 1 << 30}},
                "process_peak_bytes": 3 << 30,
            },
        }
    )
    for part in (
        "1,200: 1,000 answered, 50 failed, 100 done before, 50 left",
        "stop 900, length 100",
        "invalid_json 50",
        "2,000 generated (20.0/s), 5,000 with prompts (50.0/s)",
        "3,000 tokens in 40.0 s",
        "2,000 tokens in 60.0 s",
        "cpu 1.0 GiB; whole process 3.0 GiB",
        "103.5 s",
    ):
        assert part in text
