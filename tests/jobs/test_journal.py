"""The journal alone: locks, durability, torn lines, manifests."""

import json
import multiprocessing
import os
import time
from contextlib import closing

import pytest

from flexrun.errors import ConfigError, ExecutionError
from flexrun.jobs import journal as journal_module
from flexrun.jobs.files import FileLock, read_records
from flexrun.jobs.journal import Journal

MANIFEST = {"model": "m", "sampling": {"stop": ("a",), "temperature": 0.0}, "flexrun_version": "1"}


def answer(line):
    return {"id": f"batch_req_j_{line}", "custom_id": f"line-{line}", "response": {"status_code": 200}, "error": None}


def failure(line):
    return {"id": f"batch_req_j_{line}", "custom_id": f"line-{line}", "response": None, "error": {"code": "x"}}


def write(path, *records, error_file=None, **settings):
    journal = Journal(path, error_file, **settings)
    try:
        recovered = journal.recover(MANIFEST)
        journal.start(MANIFEST)
        for record in records:
            journal.append(record)
        journal.finish()
    finally:
        journal.close()
    return recovered


def lines_in(path):
    return [int(json.loads(line)["id"].rsplit("_", 1)[1]) for line in path.read_text().splitlines()]


def test_existing_output_needs_resume_or_overwrite(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, answer(1))
    with pytest.raises(ConfigError, match="already exists") as caught:
        Journal(path)
    assert "--resume" in caught.value.hint
    write(path, answer(2), overwrite=True)
    assert lines_in(path) == [2]
    with pytest.raises(ConfigError, match="contradict"):
        Journal(path, resume=True, overwrite=True)


def test_nothing_is_touched_before_start(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, answer(1))
    journal = Journal(path, overwrite=True)
    journal.recover(MANIFEST)
    journal.close()
    assert lines_in(path) == [1]
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "out.jsonl.manifest.json"]  # and the lock is gone


def test_resume_of_nothing_starts_afresh(tmp_path):
    recovered = write(tmp_path / "out.jsonl", answer(1), resume=True)
    assert recovered.lines.tolist() == [] and lines_in(tmp_path / "out.jsonl") == [1]


@pytest.mark.parametrize("torn", [b'{"id": "batch_req_j_3", "cust', b"\0\0\0\0", b"{}\n", b'{"id": 5}\n'])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    path = tmp_path / "out.jsonl"
    write(path, answer(1), failure(2))
    with open(path, "ab") as file:
        file.write(torn)
    recovered = write(path, answer(3), resume=True)
    assert (recovered.lines.tolist(), recovered.answered_count, recovered.failed_count) == ([1, 2], 1, 1)
    assert 2 in recovered and 3 not in recovered
    assert lines_in(path) == [1, 2, 3]


def test_every_cut_of_a_file_resumes_to_its_whole_records(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, answer(1), failure(2), answer(3))
    whole = path.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(1, len(whole), 7):
        path.write_bytes(whole[:cut])
        recovered = write(path, resume=True)
        assert len(recovered.lines) == sum(end <= cut for end in ends)
        assert path.read_bytes() == whole[: max([0, *(end for end in ends if end <= cut)])]


def test_damage_before_whole_records_is_not_repaired(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, answer(1), answer(2))
    path.write_bytes(b"garbage\n" + path.read_bytes())
    with pytest.raises(ConfigError, match="line 1: no record"):
        write(path, resume=True)
    assert path.read_bytes().startswith(b"garbage")


@pytest.mark.parametrize(
    "change, named",
    [({"model": "other"}, "model"), ({"sampling": {"stop": ["a"], "temperature": 1.0}}, "sampling.temperature")],
)
def test_resume_of_another_job_is_refused_by_the_key(tmp_path, change, named):
    path = tmp_path / "out.jsonl"
    write(path, answer(1))
    journal = Journal(path, resume=True)
    with pytest.raises(ConfigError, match=named):
        journal.recover({**MANIFEST, **change})
    journal.recover({**MANIFEST, "flexrun_version": "2"})  # a newer program may go on
    journal.close()


@pytest.mark.parametrize("content", [None, "{"])
def test_resume_without_a_readable_manifest_is_refused(tmp_path, content):
    path = tmp_path / "out.jsonl"
    write(path, answer(1))
    manifest = tmp_path / "out.jsonl.manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        write(path, resume=True)


def test_retry_errors_takes_failures_out_of_both_files(tmp_path):
    path, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    write(path, answer(1), failure(2), answer(3))
    write(path, failure(4), error_file=errors, resume=True)
    journal = Journal(path, errors, resume=True)
    recovered = journal.recover(MANIFEST, retry_errors=True)
    journal.close()
    assert (recovered.lines.tolist(), recovered.answered_count, recovered.failed_count) == ([1, 3], 2, 0)
    assert lines_in(path) == [1, 3] and errors.read_bytes() == b""


def test_preserve_order_sorts_by_input_line(tmp_path):
    path, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    journal = Journal(path, errors)
    journal.start(MANIFEST)
    for record in (answer(11), failure(4), answer(2), answer(7), failure(3)):
        journal.append(record)
    journal.finish(preserve_order=True)
    assert lines_in(path) == [2, 7, 11] and lines_in(errors) == [3, 4]


def hold(path, ready, done):
    lock = FileLock(path, "out.jsonl")
    ready.set()
    done.wait(20)
    lock.close()


def test_two_processes_cannot_write_one_output(tmp_path):
    path = tmp_path / "out.jsonl"
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out.jsonl.lock", ready, done))
    process.start()
    try:
        assert ready.wait(20)
        with pytest.raises(ConfigError, match="another flexrun is writing"):
            Journal(path)
    finally:
        done.set()
        process.join(20)
    Journal(path).close()


def test_a_killed_process_leaves_no_lock_behind(tmp_path):
    (tmp_path / "out.jsonl.lock").write_text("")  # the file stays, the kernel's lock does not
    Journal(tmp_path / "out.jsonl").close()


def test_records_reach_the_disk_while_the_job_runs(tmp_path, monkeypatch):
    synced = []
    real_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), real_fsync(descriptor)))
    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 0.02)
    journal = Journal(tmp_path / "out.jsonl")
    journal.start(MANIFEST)
    synced.clear()
    journal.append(answer(1))
    assert lines_in(tmp_path / "out.jsonl") == [1]  # visible at once
    deadline = time.monotonic() + 10
    while not synced and time.monotonic() < deadline:
        time.sleep(0.01)
    assert synced
    journal.close()


def test_many_records_are_synced_before_the_time_is_up(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 3600)
    monkeypatch.setattr(journal_module, "SYNC_RECORDS", 4)
    journal = Journal(tmp_path / "out.jsonl")
    journal.start(MANIFEST)
    monkeypatch.setattr(os, "fsync", synced.append)
    for line in range(4):
        journal.append(answer(line + 1))
    deadline = time.monotonic() + 10
    while not synced and time.monotonic() < deadline:
        time.sleep(0.01)
    assert synced
    journal.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error_with_a_remedy():
    journal = Journal("/dev/full")
    journal.start(MANIFEST)
    with pytest.raises(ExecutionError, match="No space left") as caught:
        journal.append(answer(1))
    assert "--resume" in caught.value.hint


def test_unusable_paths_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="is a directory"):
        Journal(tmp_path)
    with pytest.raises(ConfigError, match=r"folder of .* does not exist"):
        Journal(tmp_path / "none" / "out.jsonl")
    with pytest.raises(ConfigError, match="name too long"):
        Journal(tmp_path / ("x" * 300))
    with pytest.raises(ConfigError, match="are the same"):
        Journal(tmp_path / "out.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="cannot be resumed"):
        Journal("-", resume=True)


@pytest.mark.parametrize(
    "content", [b"hello\n", b'{"prompt": "a"}\n{"prompt": "b"}\n', b'{"id": "x", "response": null}\n']
)
def test_a_file_of_something_else_is_not_taken_for_a_torn_output(tmp_path, content):
    output = tmp_path / "notes.jsonl"
    output.write_bytes(content)
    for errors in (None, output):
        paths = (output, None) if errors is None else (tmp_path / "out.jsonl", errors)
        with (
            closing(Journal(*paths, resume=True)) as journal,
            pytest.raises(ConfigError, match="no answers of flexrun"),
        ):
            (tmp_path / "out.jsonl.manifest.json").write_text(json.dumps(MANIFEST))
            journal.recover(MANIFEST)
    assert output.read_bytes() == content


@pytest.mark.parametrize("torn", [b"\0" * 40, b'{"id": "batch_req_1', b'{"i'])
def test_a_torn_first_record_is_cut_off(tmp_path, torn):
    output = tmp_path / "out.jsonl"
    output.write_bytes(torn)
    (tmp_path / "out.jsonl.manifest.json").write_text(json.dumps(MANIFEST))
    with closing(Journal(output, resume=True)) as journal:
        assert journal.recover(MANIFEST).answered_count == 0
    assert output.read_bytes() == b""


def test_devices_are_written_without_lock_or_manifest():
    journal = Journal("/dev/null")
    journal.start(MANIFEST)
    journal.append(answer(1))
    journal.finish()
    assert not os.path.exists("/dev/null.manifest.json") and not os.path.exists("/dev/null.lock")


def test_read_records_tells_where_each_record_is(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, answer(5), failure(2))
    records = read_records(path)
    assert records.lines.tolist() == [5, 2] and records.answered.tolist() == [True, False]
    assert records.end == path.stat().st_size == records.sizes.sum()


def test_a_file_system_that_cannot_tell_files_apart_stops_no_job(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "is_in_place", lambda file, path: False)  # from the first moment on
    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 0.001)
    journal = Journal(tmp_path / "out.jsonl")
    journal.start(MANIFEST)
    for line in range(20):
        journal.append(answer(line + 1))
        time.sleep(0.001)
    journal.finish()
    assert len(lines_in(tmp_path / "out.jsonl")) == 20
