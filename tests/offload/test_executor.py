"""A run that fails ends with a clear error, hangs nobody, and can still be closed."""

from __future__ import annotations

import os
import shutil
import threading

import pytest

from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier
from flexrun.disk_io import DirectFile
from flexrun.errors import ExecutionError
from flexrun.offload.engine import Engine
from flexrun.placement import memory_account, place_weights
from flexrun.steps import StepKind
from flexrun.weights.packed import PackedWeights

pytestmark = pytest.mark.usefixtures("matrices_move")
WAIT_SECONDS = 60
ON_DISK = Placement(0, 0, 1)


@pytest.fixture
def open_engine(packed, tmp_path):
    """open_engine(gpu=..., **policy) -> Engine of the tiny llama over its own copy of the packed cache."""
    opened = []

    def build(gpu: bool = False, **settings) -> Engine:
        spec, cache = packed("llama")
        folder = shutil.copytree(cache.folder, tmp_path / f"packed-{len(opened)}")
        own = PackedWeights(folder, cache.entries, cache.dtype)
        policy = Policy(
            **{"sequences_in_flight": 4, "tokens_per_pass": 20, "attention_micro_batch": 2, "weights": ON_DISK}
            | settings
        )
        placed = place_weights(spec, policy, on_device=gpu)
        account = memory_account(spec, policy, placed, 400, on_device=gpu)
        gpu_budget = account.total(Tier.GPU) if gpu else 0
        engine = Engine(
            spec,
            own,
            policy,
            placed,
            account,
            400,
            cpu_budget_bytes=account.total(Tier.CPU),
            gpu_budget_bytes=gpu_budget,
            trace=True,
        )
        opened.append(engine)
        return engine

    yield build
    for engine in opened:
        engine.close()


def outcome(call):
    """The call's result or error, on a thread of its own: a hang fails the test."""
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


def tokens_of(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in sorted(outputs, key=lambda output: output.request_id)]


def groups_of(make_group, count: int = 5, tokens: int = 6):
    return [
        make_group([3 + number, 50, 7], temperature=0, max_tokens=tokens, ignore_eos=True) for number in range(count)
    ]


@pytest.mark.parametrize("gpu", [False, True])
def test_runs_follow_each_other_on_one_engine(open_engine, make_group, gpu):
    engine = open_engine(gpu)
    first = outcome(lambda: tokens_of(engine.run(iter(groups_of(make_group)))))
    second = outcome(lambda: tokens_of(engine.run(iter(groups_of(make_group)))))
    assert first == second
    assert [len(tokens) for tokens in first] == [6] * 5
    assert engine.totals.generated_tokens == 2 * 5 * 6
    assert engine.totals.prompt_tokens == 2 * 5 * 3
    assert not engine.failed


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("at", [0, 11])
def test_a_failing_read_ends_the_run_with_its_own_error(open_engine, make_group, monkeypatch, gpu, at):
    engine = open_engine(gpu)
    whole, count = DirectFile.read_into, 0
    original = ExecutionError("layer-0001.bin: read failed: Input/output error", "check the disk")

    def failing(self, *arguments):
        nonlocal count
        count += 1
        if count > at:
            raise original
        whole(self, *arguments)

    monkeypatch.setattr(DirectFile, "read_into", failing)
    assert outcome(lambda: list(engine.run(iter(groups_of(make_group))))) is original
    assert engine.failed
    monkeypatch.undo()
    again = outcome(lambda: list(engine.run(iter(groups_of(make_group)))))
    assert again is original, "a broken-off engine does not go on with rows of another pass"
    assert outcome(engine.close) is None
    assert all(tier.used_bytes == 0 for tier in engine.tiers.values())


@pytest.mark.parametrize("gpu", [False, True])
def test_a_file_truncated_under_the_run_is_named(open_engine, make_group, gpu):
    engine = open_engine(gpu)
    os.truncate(engine.weights.packed.folder / "layer-0002.bin", 4096)
    error = outcome(lambda: list(engine.run(iter(groups_of(make_group)))))
    assert isinstance(error, ExecutionError)
    assert "layer-0002.bin: short read" in error.message
    assert "packed cache" in error.hint


def test_an_embedding_truncated_under_the_run_is_named(open_engine, make_group):
    engine = open_engine()
    os.truncate(engine.weights.packed.folder / "embedding.bin", 0)
    error = outcome(lambda: list(engine.run(iter(groups_of(make_group)))))
    assert isinstance(error, ExecutionError)
    assert "embedding.bin: short read of row" in error.message


@pytest.mark.parametrize("lane", ["cpu", "h2d", "d2h"])
def test_a_failure_in_any_lane_ends_the_run(open_engine, make_group, lane):
    """The emulated accelerator's copies and the host's attention fail as clearly as a read."""
    share = {"cpu": 1.0, "h2d": 0.0, "d2h": 0.0}[lane]
    engine = open_engine(True, cpu_attention_share=share)
    kind = {"cpu": StepKind.ATTEND, "h2d": StepKind.LOAD_KV, "d2h": StepKind.SAVE_KV}[lane]

    def fail(step):
        raise ZeroDivisionError(f"injected in {step.lane.value}")

    engine._executor._transfers._whole[kind] = fail
    error = outcome(lambda: list(engine.run(iter(groups_of(make_group)))))
    assert isinstance(error, ExecutionError)
    assert f"injected in {lane}" in str(error)
    assert outcome(engine.close) is None


def test_an_interrupted_pass_does_not_go_on(open_engine, make_group, monkeypatch):
    engine = open_engine()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._executor._modules, "run", interrupt)
    assert isinstance(outcome(lambda: list(engine.run(iter(groups_of(make_group))))), KeyboardInterrupt)
    assert engine.failed
    assert isinstance(outcome(lambda: list(engine.run(iter(groups_of(make_group))))), ExecutionError)


def test_leaving_a_run_between_passes_gives_its_room_back(open_engine, make_group):
    engine = open_engine()
    expected = tokens_of(engine.run(iter(groups_of(make_group))))
    outputs = engine.run(iter(groups_of(make_group, count=50)))
    next(outputs)
    outputs.close()
    assert engine._batcher.in_flight == 0
    assert not engine.failed
    assert tokens_of(engine.run(iter(groups_of(make_group)))) == expected


@pytest.mark.parametrize("gpu", [False, True])
def test_events_say_what_the_lanes_did(open_engine, make_group, gpu):
    engine = open_engine(gpu, cpu_attention_share=0.5)
    list(engine.run(iter(groups_of(make_group))))
    lanes = {event.lane for event in engine.events}
    assert lanes == ({Lane.GPU, Lane.CPU, Lane.H2D, Lane.D2H, Lane.DISK_READ} if gpu else {Lane.CPU, Lane.DISK_READ})
    assert all(event.start_seconds <= event.end_seconds for event in engine.events)
    reads = [event for event in engine.events if event.name == "read_weights"]
    streamed = [unit.disk_bytes for unit in engine.weights.placement.units]
    assert sum(event.bytes for event in reads) == engine.totals.passes * sum(streamed)
    statistics = engine.lane_statistics()
    rows = [event.bytes for event in engine.events if event.name == "read_rows"]
    assert statistics["disk_read"]["bytes"] == sum(event.bytes for event in reads) + sum(rows)
    assert statistics["gpu" if gpu else "cpu"]["flops"] > 0


def test_activations_are_freed_on_close(open_engine):
    engine = open_engine(True)
    engine.close()
    assert all(tier.used_bytes == 0 and tier.peak_bytes > 0 for tier in engine.tiers.values())
