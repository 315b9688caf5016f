"""KV cache on disk in whole runs: the same tokens, the bytes of the plan, and a clear end where the disk fails."""

from __future__ import annotations

import errno
import itertools

import pytest
from tiny_families import prompts

from flexrun import SamplingParams, disk_io
from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier
from flexrun.errors import BudgetError
from flexrun.placement import build_scheduler, kv_block_bytes
from flexrun.policy.passes import job_passes
from flexrun.workload import Workload

pytestmark = pytest.mark.usefixtures("matrices_move")
IN_RAM = Policy(sequences_in_flight=16, tokens_per_pass=1024, attention_micro_batch=16, token_micro_batch=1024)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ON_DISK = Policy(
    sequences_in_flight=4,
    tokens_per_pass=30,
    attention_micro_batch=2,
    kv=Placement(0, 0, 1),
    weights=Placement(0, 0, 1),
)
WAYS = [(False, 1.0, False), *itertools.product([True], [0.0, 0.5, 1.0], [False, True])]
ASKED = prompts((40, 3, 17, 28, 9, 31, 1, 22), 3)  # more than run at once: slabs are used again


def tokens_of(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected():
    return {}


@pytest.mark.parametrize(("gpu", "share", "half_batches"), WAYS)
@pytest.mark.parametrize("on_disk", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["llama", "opt_350m"])
def test_tokens_are_those_of_a_run_in_ram(
    run, assert_same_but_for_ties, expected, name, gpu, on_disk, share, half_batches
):
    """llama shares KV heads among query heads, opt_350m does not."""
    if name not in expected:
        expected[name] = tokens_of(run(name, ASKED, GREEDY, policy=IN_RAM))
    on_gpu = 0.25 if gpu and on_disk < 1 else 0.0
    policy = Policy(
        sequences_in_flight=4,
        tokens_per_pass=37,
        attention_micro_batch=1,
        token_micro_batch=11,
        weights=Placement(on_gpu, 0.5 - on_gpu, 0.5),
        kv=Placement(on_gpu, 1.0 - on_gpu - on_disk, on_disk),
        cpu_attention_share=share,
        half_batches=half_batches,
    )
    found = tokens_of(run(name, ASKED, GREEDY, policy=policy, gpu_memory="64MiB" if gpu else 0))
    for prompt, tokens, other in zip(ASKED, expected[name], found, strict=True):
        assert_same_but_for_ties(name, prompt, tokens, other)


# Accounts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "share", "half_batches"), [(False, 1.0, False), (True, 0.0, False), (True, 1.0, False), (True, 0.5, True)]
)
def test_bytes_held_and_bytes_moved_are_those_planned(open_llm, gpu, share, half_batches):
    policy = Policy(
        sequences_in_flight=4,
        tokens_per_pass=30,
        attention_micro_batch=1,
        weights=Placement(0, 0.5, 0.5),
        kv=Placement(0, 0.5, 0.5),
        cpu_attention_share=share,
        half_batches=half_batches,
    )
    asked = prompts((20,) * 6, 1)
    llm = open_llm("llama", policy=policy, gpu_memory="64MiB" if gpu else 0)
    llm.generate(asked, GREEDY, use_tqdm=False)
    layout, summary = llm.plan.layout, llm.summary()
    for tier, told in summary["tiers"].items():
        assert told["peak_bytes"] == layout.account.total(Tier(tier))
    assert set(summary["tiers"]) == {"cpu", "disk"} | ({"gpu"} if gpu else set())

    passes = job_passes(Workload.uniform(6, 20, 12), layout.policy, layout.micro_batches)
    scheduler = build_scheduler(layout.spec, layout.placement, layout.account, on_device=gpu, policy=layout.policy)
    steps = [step for shape in passes for step in scheduler.pass_steps(shape)]
    assert len(passes) == summary["passes"]
    for lane in (Lane.DISK_READ, Lane.DISK_WRITE):
        assert summary["lanes"][lane.value]["bytes"] == sum(step.bytes for step in steps if step.lane is lane)

    file, layers, block = llm._engine.kv.file, layout.spec.num_layers, kv_block_bytes(layout.spec)
    read = written = 0  # of one layer: full blocks, for each micro-batch has one sequence
    for part in (part for shape in passes for part in shape.micro_batches if part.home is Tier.DISK):
        counts = (part.kv_tokens - part.query_tokens, part.kv_tokens)
        before, after = (tokens * layout.spec.kv_bytes_per_token // block * block for tokens in counts)
        read, written = read + before, written + after - before
    assert 0 < written < read
    assert (file.read_bytes, file.written_bytes) == (layers * read, layers * written)


def test_a_plan_uses_the_disk_where_ram_is_short(open_llm, run):
    """Nothing is fixed but the slots: the search itself sends KV to disk, and the run does as planned."""
    asked = prompts((200,) * 6, 2)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    free = open_llm("llama", max_num_seqs=6)
    expected = tokens_of(free.generate(asked, params, use_tqdm=False))
    held = free.plan.layout.account.bytes_by_kind[Tier.CPU]
    budget = held["rotary"] + held["kv"]
    llm = open_llm("llama", max_num_seqs=6, cpu_memory=budget)
    assert tokens_of(llm.generate(asked, params, use_tqdm=False)) == expected
    assert llm.plan.policy.kv.disk > 0
    told = llm.summary()["tiers"]
    assert told["cpu"]["peak_bytes"] <= budget
    assert told["disk"]["peak_bytes"] == llm.plan.layout.account.total(Tier.DISK)


# What can go wrong -----------------------------------------------------------------------------------------


def test_a_disk_without_room_is_told_before_the_run(open_llm, packed_cache, monkeypatch):
    llm = open_llm("llama", policy=ON_DISK, disk_memory="150KiB")
    with pytest.raises(BudgetError, match=r"needs .* of disk memory \(weights .*kv .*\); the budget is 150.0 KiB"):
        llm.generate(ASKED, GREEDY, use_tqdm=False)
    monkeypatch.setattr(disk_io.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    llm = open_llm("llama", policy=ON_DISK)
    with pytest.raises(BudgetError, match=f"KV cache needs .* in {packed_cache}"):
        llm.generate(ASKED, GREEDY, use_tqdm=False)
    monkeypatch.undo()
