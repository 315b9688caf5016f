"""A fault in any lane ends the run with its cause and a remedy: nobody hangs, every thread ends, what is done stays."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import threading

import pytest
from tiny_families import prompts

from flexrun import LLM, SamplingParams
from flexrun.cli import main
from flexrun.config import Placement, Policy
from flexrun.errors import BudgetError, ExecutionError
from flexrun.jobs.journal import Journal
from flexrun.offload.device import EmulatedDevice
from flexrun.offload.modules import Modules
from flexrun.offload.transfers import Transfers
from flexrun.outputs import Request
from flexrun.steps import StepKind

pytestmark = pytest.mark.usefixtures("matrices_move")
WAIT_SECONDS = 60
SPLIT = Policy(
    sequences_in_flight=4,
    tokens_per_pass=24,
    attention_micro_batch=2,
    weights=Placement(0.2, 0.3, 0.5),
    kv=Placement(0, 1, 0),
    cpu_attention_share=0.5,
)


@pytest.fixture
def model(checkpoint, packed_cache, tmp_path, packed):
    """Options of an LLM whose packed cache is its own, so that a test may damage it."""
    packed("llama")
    return {
        "model": checkpoint("llama"),
        "dtype": "float32",
        "threads": 1,
        "cpu_memory": "64MiB",
        "gpu_memory": "64MiB",
        "disk_dir": tmp_path / "packed",
        "policy": SPLIT,
    }


def requests(count: int = 8) -> list[Request]:
    """Their answers are of rising lengths, so that they end one after the other; all fill blocks of KV on disk."""
    return [
        Request(f"request-{number}", token_ids=ids, params=SamplingParams(temperature=0, max_tokens=2 + 2 * number))
        for number, ids in enumerate(prompts((25, 29, 23, 27, 24, 26, 28, 25)[:count]))
    ]


def outcome(call):
    """(what the call returned or raised), on a thread of its own: a hang fails the test."""
    found = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT_SECONDS)
    assert found, "it hangs"
    return found[0]


def lane_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("flexrun-")]


def open_files() -> list[str]:
    """Of models and packed caches; libraries open files of their own whenever they like."""
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of the listing itself
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(target for target in targets if "/pytest-" in target and "/packed" in target)


def run_into(model, fault, after_outputs: int = 1) -> tuple[list, BaseException]:
    """(outputs before the error, the error) of a run into which ``fault(engine)`` is put after some outputs."""
    llm, outputs = LLM(**model), []

    def run() -> None:
        for output in llm.generate_iter(requests()):
            outputs.append(output)
            if len(outputs) == after_outputs:
                fault(llm._engine)

    error = outcome(run)
    assert outcome(llm.close) is None
    assert lane_threads() == []
    return outputs, error


def failing(error: Exception, after: int = 0):
    """A function that works ``after`` times and then raises, when it stands before another."""
    count = 0

    def call(*arguments, **options):
        nonlocal count
        count += 1
        if count > after:
            raise error

    return call


ON_DISK = Policy(
    sequences_in_flight=4,
    tokens_per_pass=24,
    attention_micro_batch=1,
    weights=Placement(0.2, 0.8, 0),
    kv=Placement(0, 0.25, 0.75),
    cpu_attention_share=0.5,
)


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


STEPS = {
    "cpu": StepKind.ATTEND,
    "d2h": StepKind.OFFLOAD_QUERY,
    "d2h save": StepKind.SAVE_KV,
    "h2d": StepKind.LOAD_KV,
    "h2d back": StepKind.RETURN_ATTENDED,
}


@pytest.fixture
def whole(model):
    """Outputs by request of an undisturbed run."""
    with LLM(**model) as llm:
        return {output.request_id: output.outputs[0].token_ids for output in llm.generate_iter(requests())}


@pytest.mark.parametrize("kind", STEPS.values(), ids=STEPS)
def test_a_step_that_fails_is_named_and_what_was_answered_is_right(model, whole, kind):
    def fault(engine):
        engine._executor._transfers._whole[kind] = failing(ZeroDivisionError("injected"), after=3)

    outputs, error = run_into(model, fault, after_outputs=2)
    assert isinstance(error, ExecutionError)
    assert f"{kind.value} of layer" in error.message and "injected" in error.message
    assert "report it" in error.hint
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert {output.request_id: output.outputs[0].token_ids for output in outputs}.items() <= whole.items()


def test_a_copy_of_weights_that_fails_is_named(model, monkeypatch):
    def fault(engine):
        monkeypatch.setattr(EmulatedDevice, "copy", failing(RuntimeError("the link is down"), after=5))

    outputs, error = run_into(model, fault)
    assert outputs and isinstance(error, ExecutionError)
    assert "h2d lane" in error.message or "d2h lane" in error.message
    assert "the link is down" in error.message


def test_a_read_error_names_the_file_and_the_cause(model, monkeypatch):
    def fault(engine):
        monkeypatch.setattr(os, "preadv", failing(OSError(errno.EIO, "Input/output error")))

    outputs, error = run_into(model, fault)
    assert outputs and isinstance(error, ExecutionError)
    assert ".bin: read of" in error.message and "Input/output error" in error.message
    assert error.hint == "check the disk"


def test_a_file_that_ends_early_is_named(model):
    def fault(engine):
        for layer in range(3):
            os.truncate(engine.weights.packed.folder / f"layer-{layer:04}.bin", 4096)

    outputs, error = run_into(model, fault)
    assert outputs and isinstance(error, ExecutionError)
    assert "short read" in error.message and "packed cache is damaged" in error.hint


@pytest.mark.parametrize("lane", ["a lane", "compute"])
def test_memory_refused_in_a_pass_names_the_budget(model, monkeypatch, lane):
    refusal = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    def fault(engine):
        if lane == "compute":
            engine._executor._modules.run = failing(refusal, after=10)
        else:
            engine._executor._transfers._whole[StepKind.ATTEND] = failing(MemoryError("no room"), after=2)

    outputs, error = run_into(model, fault)
    assert outputs and isinstance(error, BudgetError)
    assert "memory ran out in" in error.message and "--max-num-seqs" in error.hint


@pytest.mark.parametrize("allocations", [0, 1, 3, 5])
def test_memory_refused_before_the_run_leaves_nothing_behind(model, monkeypatch, allocations):
    """However far the engine got: no thread, no open file, and a second attempt works."""
    with LLM(**model) as llm:
        llm.prepare()  # packs the weights
    real, count = mmap.mmap, 0

    def refuse(*arguments, **options):
        nonlocal count
        count += 1
        if count > allocations and arguments[1] > 1 << 12:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(*arguments, **options)

    llm = LLM(**model)
    before = open_files()
    monkeypatch.setattr(mmap, "mmap", refuse)
    error = outcome(lambda: list(llm.generate_iter(requests(2))))
    assert isinstance(error, BudgetError)
    assert "the machine refuses" in error.message and "memory to what is free" in error.hint
    monkeypatch.undo()
    assert lane_threads() == []
    assert open_files() == before
    assert len(outcome(lambda: list(llm.generate_iter(requests(2))))) == 2
    llm.close()


def test_answers_of_a_pass_stand_where_only_the_next_one_cannot_run(model, whole):
    """A read ahead that fails while the last token of an answer is drawn: the answer comes first, then the error."""
    llm, outputs = LLM(**model), []

    def run() -> None:
        for output in llm.generate_iter(requests()):
            outputs.append(output)

    llm.prepare()
    engine = llm._engine
    sample = engine._sample

    def sample_and_fail(plan, finished, *arguments):
        sample(plan, finished, *arguments)
        if finished:
            engine._executor._progress.fail(ExecutionError("injected"))

    engine._sample = sample_and_fail
    error = outcome(run)
    assert isinstance(error, ExecutionError) and error.message == "injected"
    assert [output.request_id for output in outputs] == ["request-0"]
    assert outputs[0].outputs[0].token_ids == whole["request-0"]
    llm.close()


def test_after_a_failure_the_same_llm_runs_again(model, whole, monkeypatch):
    llm = LLM(**model)
    iterator = llm.generate_iter(requests())
    next(iterator)
    llm._engine._executor._transfers._whole[StepKind.LOAD_KV] = failing(ValueError("injected"))
    assert isinstance(outcome(lambda: list(iterator)), ExecutionError)
    again = outcome(
        lambda: {output.request_id: output.outputs[0].token_ids for output in llm.generate_iter(requests())}
    )
    assert again == whole
    llm.close()


@pytest.fixture
def job(checkpoint, tmp_path):
    """job(policy, *flags) -> exit code of ``flexrun run`` over a few prompts."""
    source = tmp_path / "in.jsonl"
    rows = [
        {"custom_id": request.request_id, "prompt": request.token_ids, "max_tokens": request.params.max_tokens}
        for request in requests()
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(policy: Policy, *flags) -> int:
        (tmp_path / "policy.json").write_text(policy.to_json())
        return main(
            [
                *("run", "--model", str(checkpoint("llama")), "-i", str(source), "-o", str(tmp_path / "out.jsonl")),
                *(
                    "--dtype",
                    "float32",
                    "--policy",
                    str(tmp_path / "policy.json"),
                    "--cpu-memory",
                    "64MiB",
                    "--gpu-memory",
                    "64MiB",
                ),
                *("--disk-dir", str(tmp_path / "packed"), "--threads", "1", "--no-progress", "--order", "input"),
                *flags,
            ]
        )

    return run


def refuse_memory(*_):
    raise MemoryError("no room")


def fail_the_disk(*_):
    raise OSError(errno.EIO, "Input/output error")


def break_a_lane(*_):
    raise RuntimeError("the lane is broken")


JOB_FAULTS = {  # the policy, where the fault is put, what it does, words of the message, exit code
    "disk_read": (SPLIT, os, "preadv", fail_the_disk, "Input/output error", 1),
    "disk_read kv": (ON_DISK, os, "preadv", fail_the_disk, "packed: read of", 1),
    "short read": (SPLIT, os, "preadv", lambda *_: 0, "short read", 1),
    "disk_write": (ON_DISK, os, "pwritev", fail_the_disk, "packed: write of", 1),
    "disk full": (ON_DISK, os, "pwritev", no_room, "free some space, or give --disk-dir", 1),
    "h2d": (SPLIT, Transfers, "_return_attended", break_a_lane, "(h2d lane)", 1),
    "h2d kv": (ON_DISK, Transfers, "_load_kv", break_a_lane, "(h2d lane)", 1),
    "h2d weights": (SPLIT, EmulatedDevice, "copy", break_a_lane, "the lane is broken", 1),
    "d2h": (SPLIT, Transfers, "_offload_query", break_a_lane, "(d2h lane)", 1),
    "d2h kv": (ON_DISK, Transfers, "_save_kv", refuse_memory, "memory ran out in save_kv", 2),
    "cpu": (SPLIT, Transfers, "_attend_on_host", refuse_memory, "memory ran out in attend", 2),
    "gpu": (SPLIT, Modules, "_mlp", refuse_memory, "memory ran out in mlp", 2),
}


@pytest.mark.parametrize("policy, where, name, fault, words, code", JOB_FAULTS.values(), ids=JOB_FAULTS)
def test_a_job_keeps_its_answers_and_goes_on_later(
    job, tmp_path, monkeypatch, capsys, policy, where, name, fault, words, code
):
    """The fault comes once two answers are written."""
    written, real, append = 0, getattr(where, name), Journal.append

    def count_answers(self, record):
        nonlocal written
        append(self, record)
        written += 1

    def fail_later(*arguments, **options):
        return (real if written < 2 else fault)(*arguments, **options)

    monkeypatch.setattr(Journal, "append", count_answers)
    monkeypatch.setattr(where, name, fail_later)
    assert outcome(lambda: job(policy)) == code
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert words in said and "hint:" in said
    assert lane_threads() == [] and open_files() == []
    before = answers(tmp_path / "out.jsonl")
    assert 2 <= len(before) < 8 and f"{len(before)} answers of this run are safe" in said
    assert outcome(lambda: job(policy, "--resume")) == 0
    after = answers(tmp_path / "out.jsonl")
    assert len(after) == 8 and before.items() <= after.items()


def answers(path) -> dict[str, str]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["custom_id"]: record["response"]["body"]["choices"][0]["text"] for record in records}
