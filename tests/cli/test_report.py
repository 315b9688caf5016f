"""``flexrun run --report DIR`` over a real engine: a page and a timeline that hold the run's figures."""

from __future__ import annotations

import errno
import json
import os
import re
import signal

import pytest

from flexrun.cli import main
from flexrun.jobs import journal
from flexrun.llm import LLM


@pytest.fixture
def command(tmp_path, checkpoint):
    lines = [{"prompt": [number % 50 + 3] * (number % 7 + 1), "max_tokens": 5} for number in range(20)]
    lines.append({"prompt": [10**6]})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["run", "--model", str(checkpoint("llama")), "-i", str(tmp_path / "in.jsonl"), "--ignore-eos"]
    words += ["-o", str(tmp_path / "out.jsonl"), "--cache-dir", str(tmp_path / "cache"), "--threads", "1"]
    return [*words, "--cpu-memory", "256MiB", "--output-json", str(tmp_path / "summary.json")]


def test_a_page_and_a_timeline(command, tmp_path):
    folder = tmp_path / "deep" / "report"
    assert main([*command, "--report", str(folder)]) == 1  # one line was refused
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "trace.json"]
    page = (folder / "index.html").read_text()
    text = re.search(r'id="summary">(.*?)</script>', page, re.DOTALL).group(1)
    summary = json.loads(text)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["generated_tokens"] == 100 and "20 requests ended" in page
    assert "invalid_token_id" in page and "line 21" in page and 'href="trace.json"' in page
    steps = [event for event in json.loads((folder / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert {event["args"]["pass"] for event in steps} == set(range(summary["engine"]["passes"]))


def test_a_resume_with_nothing_to_do_leaves_no_timeline_of_before(command, tmp_path):
    folder = tmp_path / "report"
    main([*command, "--report", str(folder)])
    assert main([*command, "--report", str(folder), "--resume"]) == 1
    assert [path.name for path in folder.iterdir()] == ["index.html"]
    page = (folder / "index.html").read_text()
    assert "20 answered before" in page and "trace.json" not in page


def full_after(records):
    """A disk that has room for so many records."""
    left = iter(range(records))

    def write_all(file, data):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(data)

    return write_all


def test_a_run_that_ends_in_an_error_says_how_far_it_came(command, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "report"
    monkeypatch.setattr(journal, "write_all", full_after(8))
    assert main([*command, "--report", str(folder)]) == 1
    assert "No space left" in capsys.readouterr().err
    page = (folder / "index.html").read_text()
    assert "ended in an error: cannot write" in page and "No space left" in page and "13 requests are left" in page
    summary = json.loads(re.search(r'id="summary">(.*?)</script>', page, re.DOTALL).group(1))
    assert summary["requests"]["answered"] == 7 and summary["engine"]["generated_tokens"] >= 35
    assert "Throughput over time" in page and (folder / "trace.json").exists()


def test_an_interrupted_run_too(command, tmp_path, monkeypatch):
    folder = tmp_path / "report"
    monkeypatch.setattr(LLM, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGINT))  # before anything runs
    assert main([*command, "--report", str(folder)]) == 130
    page = (folder / "index.html").read_text()
    assert "The job was stopped" in page and "21 requests are left" in page


def test_a_command_that_is_refused_leaves_the_page_of_before(command, tmp_path):
    folder = tmp_path / "report"
    main([*command, "--report", str(folder)])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main([*command, "--report", str(folder)]) == 2  # the output is there already
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_told_before_the_run(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*command, "--report", str(tmp_path / "file" / "report")]) == 2
    assert "cannot be made" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()
