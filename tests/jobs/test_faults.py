"""Jobs that the file system fails: each ends with an error that says what to do, and --resume ends it all the same.

Disks are full or read-only for real, on a small tmpfs in a mount namespace of a child process; where the kernel allows
none these are skipped, and a limit on the size of files (RLIMIT_FSIZE) alone stands in for a full disk.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest
from mounted import run_mounted, set_read_only

from flexrun.errors import BudgetError, ConfigError, ExecutionError
from flexrun.jobs import journal as journal_module
from flexrun.jobs.journal import Journal
from flexrun.jobs.runner import JobConfig, run_job
from flexrun.jobs.token_log import BLOCK, KEY_BYTES, MAGIC

COUNT = 80


@pytest.fixture
def job(tmp_path, model, make_llm):
    """job(output, **fields, on_pass=...) -> the summary of a job of COUNT lines; job.log: what it said."""
    source = tmp_path / "in.jsonl"
    lines = [{"prompt": "w " * (number % 9 + 1), "custom_id": f"id-{number}"} for number in range(COUNT)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def job(output, on_pass=None, llm=None, **fields):
        config = JobConfig(str(source), str(output), "counting", progress=False, **fields)
        llm = llm or make_llm(slots=8, on_pass=on_pass)
        return run_job(config, lambda: model, lambda files: llm, job.log)

    job.log = io.StringIO()
    return job


@pytest.fixture
def texts(job, tmp_path):
    """What an undisturbed run answers, by id."""
    job(tmp_path / "undisturbed.jsonl")
    return texts_of(tmp_path / "undisturbed.jsonl")


def texts_of(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = {record["custom_id"]: record["response"]["body"]["choices"][0]["text"] for record in records}
    assert len(found) == len(records), "a line was answered twice"
    return found


def at_pass(number, act):
    """An on_pass that calls ``act`` at one pass."""

    def on_pass(llm):
        on_pass.passes += 1
        if on_pass.passes == number:
            act()

    on_pass.passes = 0
    return on_pass


@pytest.mark.parametrize("spare_bytes", [0, 1000, 20_000])
def test_a_full_disk_stops_the_job_and_room_lets_it_go_on(job, texts, tmp_path, spare_bytes):
    folder = tmp_path / "small"
    folder.mkdir()

    def work():
        output, ballast = folder / "out.jsonl", folder / "ballast"

        def fill():
            room = os.statvfs(folder)
            with open(ballast, "wb") as file:
                file.write(b"x" * (room.f_bavail * room.f_bsize - spare_bytes // 4096 * 4096))

        with pytest.raises(ExecutionError, match=r"cannot write .*/out.jsonl.*: No space left") as caught:
            job(output, at_pass(5, fill))
        assert "free some space" in caught.value.hint and "--resume" in caught.value.hint
        assert not (folder / "out.jsonl.lock").exists()
        with pytest.raises(ExecutionError, match="No space left"):  # still full: nothing gets worse
            job(output, resume=True)
        ballast.unlink()
        before = output.read_bytes().count(b"\n")
        summary = job(output, resume=True, preserve_order=True)
        return before, summary["requests"], texts_of(output)

    before, requests, found = run_mounted(folder, 192 << 10, work)
    assert 0 < before < COUNT and requests["answered_before"] == before and found == texts


def test_a_disk_that_is_full_at_the_start_or_at_the_end(job, texts, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()

    def work():
        output, ballast = folder / "out.jsonl", folder / "ballast"
        ballast.write_bytes(b"x" * (80 << 10))
        with pytest.raises(ExecutionError, match="No space left"):
            job(output)
        ballast.unlink()
        summary = job(output, resume=True)
        assert summary["requests"]["answered"] == COUNT
        room = os.statvfs(folder)
        ballast.write_bytes(b"x" * (room.f_bavail * room.f_bsize - (8 << 10)))  # the sorted copy does not fit
        with pytest.raises(ExecutionError, match="No space left") as caught:
            job(output, resume=True, preserve_order=True)
        assert "--resume" in caught.value.hint
        ballast.unlink()
        job(output, resume=True, preserve_order=True)
        return texts_of(output)

    found = run_mounted(folder, 80 << 10, work)
    assert found == texts and list(found) == [f"id-{number}" for number in range(COUNT)]


def test_a_limit_on_file_sizes_stops_the_job_and_resume_ends_it(job, texts, tmp_path):
    output = tmp_path / "out.jsonl"

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        with pytest.raises(ExecutionError, match="File too large") as caught:
            job(output)
        assert "free some space" in caught.value.hint

    child = multiprocessing.get_context("fork").Process(target=limited)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert output.stat().st_size == 10_000 and not output.read_bytes().endswith(b"\n")  # torn by the limit
    job(output, resume=True)
    assert texts_of(output) == texts


def test_a_folder_that_cannot_be_written(job, texts, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()

    def work():
        output = folder / "out.jsonl"
        set_read_only(folder, True)
        with pytest.raises(ConfigError, match=r"small cannot be written"):
            job(output)
        set_read_only(folder, False)
        with pytest.raises(SystemExit):
            job(output, at_pass(5, sys.exit))
        set_read_only(folder, True)
        with pytest.raises(ConfigError, match="cannot be written"):
            job(output, resume=True)
        set_read_only(folder, False)
        job(output, resume=True)
        return texts_of(output)

    assert run_mounted(folder, 1 << 20, work) == texts


def removed(folder):
    shutil.rmtree(folder)


def moved(folder):
    folder.rename(folder.with_name("elsewhere"))


def replaced(folder):
    other = folder / "other"
    other.write_text("of somebody else\n")
    other.replace(folder / "out.jsonl")


@pytest.mark.parametrize("at", [3, 10**9])
@pytest.mark.parametrize("act", [removed, moved, replaced])
def test_what_is_taken_away_under_a_job_is_put_back(job, texts, tmp_path, monkeypatch, act, at):
    """At the third pass, or when all is answered and nothing but the end is left."""
    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 0.001)
    folder = tmp_path / "results"
    folder.mkdir()
    output = folder / "out.jsonl"

    def disturb():
        act(folder)
        time.sleep(0.1)  # until it is noticed

    on_pass = at_pass(at, disturb)
    if at > COUNT:
        finish = Journal.finish
        monkeypatch.setattr(Journal, "finish", lambda self, *a, **b: (act(folder), finish(self, *a, **b)))
    with pytest.raises(ExecutionError, match=r"out.jsonl was removed, moved or replaced") as caught:
        job(output, on_pass)
    monkeypatch.undo()
    assert "--resume" in caught.value.hint
    if act is replaced:
        assert output.read_text() == "of somebody else\n"
        command = f"mv {output}.rescued {output}"
        assert command in caught.value.hint
        os.replace(f"{output}.rescued", output)
    summary = job(output, resume=True)
    assert texts_of(output) == texts
    answered_before = summary["requests"]["answered_before"]
    assert answered_before == COUNT if at > COUNT else 0 < answered_before < COUNT


def interrupted(job, output):
    """Leaves a job in the middle, with answers under way."""

    with pytest.raises(SystemExit):
        job(output, at_pass(9, sys.exit))


def test_an_output_cut_anywhere_is_gone_on_with(job, texts, tmp_path):
    output, cut = tmp_path / "out.jsonl", tmp_path / "cut.jsonl"
    interrupted(job, output)
    data, draw = output.read_bytes(), random.Random(1)
    for end in [0, 1, len(data) - 1, *(draw.randrange(len(data)) for _ in range(6))]:
        for ending in ("manifest.json", "tokens"):
            shutil.copy(f"{output}.{ending}", f"{cut}.{ending}")
        cut.write_bytes(data[:end])
        job(cut, resume=True)
        assert texts_of(cut) == texts


def test_a_damaged_record_is_named_and_taking_it_out_is_enough(job, texts, tmp_path):
    output = tmp_path / "out.jsonl"
    interrupted(job, output)
    lines = output.read_bytes().split(b"\n")
    lines[1], lines[4] = lines[1][:40], b"\0" * 50
    output.write_bytes(b"\n".join(lines))
    with pytest.raises(ConfigError, match="line 2, 5: no record of this job") as caught:
        job(output, resume=True)
    command = caught.value.hint.split(": ", 1)[1]
    assert command == f"sed -i '2d;5d' {output}"
    assert os.system(command) == 0
    job(output, resume=True)
    assert texts_of(output) == texts


@pytest.mark.parametrize("damage", [None, b"{", b"\xff\xfe", b"[]"])
def test_a_manifest_that_is_lost_is_made_again_from_the_records(job, texts, tmp_path, damage):
    output = tmp_path / "out.jsonl"
    interrupted(job, output)
    manifest = tmp_path / "out.jsonl.manifest.json"
    whole = manifest.read_bytes()
    manifest.unlink()
    if damage is not None:
        manifest.write_bytes(damage)
    with pytest.raises(ConfigError, match="another job"):
        job(output, resume=True, identity={"seed": 1})
    assert job(output, resume=True)["requests"]["answered_before"] > 0
    assert texts_of(output) == texts and manifest.read_bytes() == whole


def test_damaged_tokens_under_way_cost_time_only(job, texts, tmp_path, make_llm):
    output = tmp_path / "out.jsonl"
    interrupted(job, output)
    log = tmp_path / "out.jsonl.tokens"
    whole, draw = log.read_bytes(), random.Random(2)
    assert len(whole) > len(MAGIC) + KEY_BYTES + 3 * BLOCK.size
    kept = {name: (tmp_path / name).read_bytes() for name in ("out.jsonl", "out.jsonl.manifest.json")}
    generated = set()
    for place in [None, 3, len(MAGIC) + 2, *(draw.randrange(len(MAGIC), len(whole)) for _ in range(5))]:
        for name, content in kept.items():
            (tmp_path / name).write_bytes(content)
        damaged = bytearray(whole)
        if place is not None:
            damaged[place] ^= 255
        log.write_bytes(damaged)
        llm = make_llm(slots=8)
        job(output, llm=llm, resume=True)
        assert texts_of(output) == texts
        generated.add(llm.generated)
    assert len(generated) > 1, "damage cost nothing, so nothing was damaged"


def test_two_jobs_cannot_write_one_file_whatever_they_call_it(job, tmp_path):
    output, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    errors = tmp_path / "errors.jsonl"
    (tmp_path / "link.jsonl").symlink_to(output)

    def second():
        for path, fields in ((output, {}), (tmp_path / "link.jsonl", {}), (other, {"error_file": str(errors)})):
            with pytest.raises(ConfigError, match="another flexrun is writing") as caught:
                job(path, resume=True, **fields)
            assert "wait for it to end" in caught.value.hint

    job(output, at_pass(4, second), error_file=str(errors))
    assert len(texts_of(output)) == COUNT


@pytest.mark.parametrize("slots", [8, 2 * COUNT])
def test_a_stopped_stream_gets_the_answers_of_its_last_pass(job, make_llm, slots):
    passes = []

    def interrupt(llm):
        passes.append(llm)
        if len(passes) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    reader, pipe = os.pipe()
    summary = job(f"/dev/fd/{pipe}", llm=make_llm(slots=slots, on_pass=interrupt))
    os.close(pipe)
    with open(reader) as file:
        written = file.read().splitlines()
    assert summary["interrupted"] and summary["requests"]["answered"] == len(written)
    assert 3 < len(written) < COUNT and len(passes) <= 4
    assert "stopping after this pass; the output is a stream, so answers under way will be lost" in job.log.getvalue()


def test_a_tier_that_runs_out_in_the_middle_leaves_a_job_to_go_on_with(job, texts, tmp_path):
    def run_out():
        raise BudgetError("memory ran out in mlp of layer 3 (cpu lane)", "lower --max-num-seqs")

    output = tmp_path / "out.jsonl"
    with pytest.raises(BudgetError, match="ran out"):
        job(output, at_pass(6, run_out))
    answered = output.read_bytes().count(b"\n")
    assert f"{answered} answers of this run are safe in {output}; go on with --resume" in job.log.getvalue()
    assert job(output, resume=True)["requests"]["answered_before"] == answered > 0
    assert texts_of(output) == texts
