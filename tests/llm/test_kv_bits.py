"""A KV cache in 8 and 4 bits: the tokens of a model that sees exactly these keys and values, wherever they are."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import Counter

import pytest
import torch
from tiny_families import prompts

from flexrun import SamplingParams
from flexrun.compress import GROUP_TOKENS, KVFormat, dequantise_kv, quantise_kv
from flexrun.config import KV_BITS, Placement, Policy
from flexrun.core import Tier
from flexrun.errors import ConfigError, UnsupportedError
from flexrun.offload.device import EmulatedDevice
from flexrun.placement import build_scheduler, kv_token_bytes
from flexrun.policy.passes import job_passes
from flexrun.steps import STREAMING
from flexrun.workload import Workload

pytestmark = pytest.mark.usefixtures("matrices_move")
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
IN_RAM = Policy(sequences_in_flight=16, tokens_per_pass=1024)
LENGTHS = (150, 61, 3, 128, 118)
BITS = {8: (8, 8), 4: (4, 4), "k8v4": (8, 4)}
OTHERS = {
    "chunks of prompts": Policy(sequences_in_flight=3, tokens_per_pass=37, attention_micro_batch=2),
    "alone": Policy(sequences_in_flight=1, tokens_per_pass=9),
    "on disk": Policy(sequences_in_flight=4, tokens_per_pass=90, attention_micro_batch=2, kv=Placement(0, 0, 1)),
    "on a device": Policy(sequences_in_flight=5, tokens_per_pass=64, attention_micro_batch=2, kv=Placement(1, 0, 0)),
    **{
        f"{home} of a device, attended by {lane}{how}": Policy(
            sequences_in_flight=5,
            tokens_per_pass=tokens,
            attention_micro_batch=size,
            kv=kv,
            cpu_attention_share=share,
            half_batches=halves,
        )
        for home, lane, how, kv, share, tokens, size, halves in (
            ("beside", "it", "", Placement(0, 1, 0), 0.0, 64, 2, False),
            ("beside", "the CPU", "", Placement(0, 1, 0), 1.0, 64, 2, False),
            ("on the disk", "it", "", Placement(0, 0, 1), 0.0, 200, 5, False),
            ("on the disk", "the CPU", "", Placement(0, 0, 1), 1.0, 200, 2, False),
            ("all around", "both", "", Placement(0.4, 0.2, 0.4), 0.5, 37, 1, False),
            ("all around", "both", ", halves", Placement(0.2, 0.4, 0.4), 0.5, 300, 1, True),
        )
    },
    "both": Policy(sequences_in_flight=5, tokens_per_pass=64, attention_micro_batch=1, kv=Placement(0, 0.5, 0.5)),
}


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def as_it_is_said(bits):
    """Attention over keys and values as they are, row by row, of what each query is said to see: the oracle."""

    def attend(query, keys, values, segments, *, scale, window, softcap, sinks, out, lse=None):
        _, heads, head_dim = keys.shape
        form, group = KVFormat(*bits, heads, head_dim), query.shape[1] // heads
        for row, count, start, length in segments.rows:
            planes = [plane[start : start + length] for plane in (keys, values)]
            whole = length // GROUP_TOKENS
            records = torch.empty(whole, form.record_bytes, dtype=torch.uint8)
            parts = (plane[: whole * GROUP_TOKENS].unflatten(0, (whole, GROUP_TOKENS)) for plane in planes)
            if whole:
                quantise_kv(*parts, form, records)
            back = dequantise_kv(records, form, torch.float64)
            for place in range(count):
                position = length - count + place
                old = position // GROUP_TOKENS * GROUP_TOKENS
                seen = [torch.cat((rounded[:old], plane[old : position + 1])) for rounded, plane in zip(back, planes)]
                seen = [plane[max(len(plane) - window, 0) if window else 0 :] for plane in seen]
                k, v = (plane.repeat_interleave(group, 1).transpose(0, 1).double() for plane in seen)
                scores = (k @ query[row + place].double()[:, :, None]).squeeze(-1) * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks.double()[:, None]), 1)
                weights = scores.softmax(1)[:, : k.shape[1]]
                out[row + place] = (weights[:, None] @ v).squeeze(1).float()
        return out

    return attend


@pytest.mark.parametrize(("name", "bits"), [("llama", 4), ("llama", 8), ("gemma2_untied", "k8v4"), ("gpt_oss", 4)])
def test_tokens_are_those_of_attention_over_what_is_stored(run, monkeypatch, name, bits):
    asked = prompts(LENGTHS, 2)
    found = tokens_of(run(name, asked, GREEDY, policy=IN_RAM, kv_bits=bits))
    monkeypatch.setattr("flexrun.offload.modules.attend", as_it_is_said(BITS[bits]))
    assert tokens_of(run(name, asked, GREEDY, policy=IN_RAM)) == found


@pytest.mark.parametrize(("name", "bits"), [("llama", 4), ("llama", 8), ("gemma2_untied", "k8v4"), ("gpt_oss", 4)])
def test_tokens_are_the_same_under_any_policy(run, name, bits):
    asked = prompts(LENGTHS, 2)
    expected = tokens_of(run(name, asked, GREEDY, policy=IN_RAM, kv_bits=bits))
    for how, policy in OTHERS.items():
        gpu = "64MiB" if "device" in how else 0
        assert tokens_of(run(name, asked, GREEDY, policy=policy, kv_bits=bits, gpu_memory=gpu)) == expected, how


def test_four_bits_show(run):
    asked = prompts(LENGTHS, 2)
    assert tokens_of(run("llama", asked, GREEDY, kv_bits=4)) != tokens_of(run("llama", asked, GREEDY))


def test_a_prompt_is_scored_by_what_decoding_sees(open_llm):
    """So a perplexity tells what answers are made with."""
    llm = open_llm("llama", policy=IN_RAM, kv_bits=4)
    (prompt,) = prompts((100,), 3)
    params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True, logprobs=0)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    (score,) = llm.score([prompt], [output.outputs[0].token_ids], use_tqdm=False)
    assert score.logprob == pytest.approx(output.outputs[0].cumulative_logprob, rel=1e-5)
    with_all = open_llm("llama", policy=IN_RAM)
    (other,) = with_all.score([prompt], [output.outputs[0].token_ids], use_tqdm=False)
    assert not math.isclose(other.logprob, score.logprob, rel_tol=1e-3), "the cache is not compressed"


@pytest.mark.parametrize("bits", [8, 4, "k8v4"])
@pytest.mark.parametrize("kv", [Placement(), Placement(0, 0.5, 0.5), Placement(1, 0, 0)])
def test_bytes_held_are_those_planned(open_llm, bits, kv):
    policy = Policy(sequences_in_flight=4, tokens_per_pass=90, attention_micro_batch=2, kv=kv)
    llm = open_llm("llama", policy=policy, kv_bits=bits, gpu_memory="64MiB" if kv.gpu else 0)
    llm.generate(prompts((150,) * 6, 1), GREEDY, use_tqdm=False)
    layout = llm.plan.layout
    for tier, told in llm.summary()["tiers"].items():
        assert told["peak_bytes"] == layout.account.total(Tier(tier))
    tokens = sum(place.capacity_tokens for place in layout.micro_batches)
    held = sum(layout.account.bytes_by_kind[tier].get("kv", 0) for tier in Tier)
    form = KVFormat(*BITS[bits], llm.spec.num_kv_heads, llm.spec.head_dim)
    assert kv_token_bytes(llm.spec, layout.policy) == form.record_bytes / GROUP_TOKENS
    assert held == pytest.approx(tokens * llm.spec.num_layers * form.token_bytes, abs=4096 * (1 + llm.spec.num_layers))


def test_a_disk_gets_compressed_groups_and_nothing_else(open_llm):
    policy = Policy(sequences_in_flight=2, tokens_per_pass=500, attention_micro_batch=2, kv=Placement(0, 0, 1))
    llm = open_llm("llama", policy=policy, kv_bits=4)
    llm.generate(prompts((200, 190), 1), GREEDY, use_tqdm=False)
    file, spec = llm._engine.kv.file, llm.spec
    assert 0 < file.written_bytes <= spec.num_layers * 2 * 3 * KVFormat(4, 4, 2, 10).record_bytes


def test_a_search_takes_the_bits_that_are_given(open_llm):
    for gpu_memory in (0, "64MiB"):
        llm = open_llm("llama", kv_bits="k8v4", gpu_memory=gpu_memory)
        llm.generate(prompts((20,) * 3, 1), GREEDY, use_tqdm=False)
        assert llm.plan.policy.kv_bits == "k8v4"
        assert llm.plan.policy.kv.gpu == bool(gpu_memory)


def test_bits_left_to_the_search_hold_for_all_later_calls(open_llm, run, monkeypatch):
    asked = prompts((150,) * 3, 1)
    with pytest.raises(ConfigError, match="kv_bits 'auto' are found with the policy"):
        open_llm("llama", policy=IN_RAM, kv_bits="auto")
    for cheap, bits in ((16, 16), ("k8v4", "k8v4")):
        monkeypatch.setattr("flexrun.policy.programs.KV_BITS_COST", {each: 9.0 * (each != cheap) for each in KV_BITS})
        llm = open_llm("llama", kv_bits="auto")
        found = tokens_of(llm.generate(asked, GREEDY, use_tqdm=False))
        assert llm.plan.policy.kv_bits == bits and llm.chosen == {"kv_bits": bits}
        assert found == tokens_of(run("llama", asked, GREEDY, kv_bits=bits))
        monkeypatch.setattr("flexrun.policy.programs.KV_BITS_COST", {each: 9.0 * (each != 4) for each in KV_BITS})
        llm.generate(prompts((60,) * 12, 1), GREEDY, use_tqdm=False)
        assert llm.plan.policy.kv_bits == bits


def test_a_plan_keeps_a_compressed_cache_off_a_device_that_is_too_small_for_it(open_llm, run):
    asked = prompts((200,) * 6, 2)
    expected = tokens_of(run("llama", asked, GREEDY, policy=IN_RAM, kv_bits=4))
    roomy = open_llm("llama", max_num_seqs=6, kv_bits=4, gpu_memory="64MiB")
    roomy.generate(asked[:1], GREEDY, use_tqdm=False)
    held = roomy.plan.layout.account.bytes_by_kind[Tier.GPU]
    small = sum(held.values()) - held["weights"]
    llm = open_llm("llama", max_num_seqs=6, kv_bits=4, gpu_memory=small)
    assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == expected
    assert llm.plan.policy.kv.gpu < 1
    assert llm.summary()["tiers"]["gpu"]["peak_bytes"] == llm.plan.layout.account.total(Tier.GPU) <= small


@pytest.mark.parametrize(
    ("name", "fields", "said", "remedy"),
    [
        ("deepseek_v2", {}, "compresses latent KV", "kv_bits to 16"),
        ("llama", {"kv_device_tokens_share": 0.5}, "KV that is split by token", "kv_device_tokens_share to 0"),
    ],
)
def test_what_is_not_compressed_yet_is_refused_by_name(open_llm, name, fields, said, remedy):
    policy = Policy(sequences_in_flight=2, cpu_attention_share=float(bool(fields)), **fields)
    llm = open_llm(name, policy=policy, kv_bits=4, gpu_memory="192MiB")
    with pytest.raises(UnsupportedError, match=said) as caught:
        llm.generate(prompts((9,)), GREEDY, use_tqdm=False)
    assert remedy in caught.value.hint


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_prompts_that_begin_alike_share_whole_groups_of_it(open_llm, name):
    """Two headers in one another: of 100 tokens 64 are shared, of 60 more 64 others. Tokens are those of each alone."""
    header, more = prompts((100, 60), 4)
    asked = [header + tail for tail in prompts((30, 90, 9), 5)]
    asked += [header + more + tail for tail in prompts((40, 5, 60), 6)]
    apart = open_llm(name, policy=IN_RAM, kv_bits=4, shared_prefixes=False)
    expected = tokens_of(apart.generate(asked, GREEDY, use_tqdm=False))
    for how in ("chunks of prompts", "on disk", "on a device", *(how for how in OTHERS if "all around" in how)):
        llm = open_llm(name, policy=OTHERS[how], kv_bits=4, gpu_memory="64MiB" if "device" in how else 0)
        assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == expected, how
        assert llm._engine.totals.spared_tokens == 5 * 64 + 2 * 64
        for tier, told in llm.summary()["tiers"].items():
            assert told["peak_bytes"] == llm.plan.layout.account.total(Tier(tier))


@pytest.mark.parametrize(
    ("kv", "share", "size", "halves"),
    [
        (None, 1.0, 2, False),
        (Placement(0, 1, 0), 0.0, 2, False),
        (Placement(0, 1, 0), 1.0, 2, False),
        (Placement(0.25, 0.25, 0.5), 0.5, 1, True),
        (Placement(0, 0, 1), 0.0, 2, False),
    ],
)
def test_every_lane_moves_groups_as_was_planned(open_llm, monkeypatch, kv, share, size, halves):
    """What the schedule says, what the forecast says, and what copies really move."""
    monkeypatch.setattr("flexrun.offload.kv_store.GAP_BYTES", 0)
    moved = Counter()

    def copy(self, target, source):
        moved[threading.current_thread().name.split("-")[1]] += source.nbytes * (source.dim() > 1)  # weights are bytes
        target.copy_(source)

    monkeypatch.setattr(EmulatedDevice, "copy", copy)
    policy = Policy(
        sequences_in_flight=4,
        tokens_per_pass=90,
        attention_micro_batch=size,
        kv=kv or Placement(0, 0.5, 0.5),
        cpu_attention_share=share,
        half_batches=halves,
    )
    llm = open_llm("llama", policy=policy, kv_bits="k8v4", gpu_memory="64MiB" if kv else 0)
    llm.generate(prompts((150,) * 6, 1), dataclasses.replace(GREEDY, max_tokens=60), use_tqdm=False)
    layout, lanes = llm.plan.layout, llm.summary()["lanes"]
    for tier, told in llm.summary()["tiers"].items():
        assert told["peak_bytes"] == layout.account.total(Tier(tier))
    passes = job_passes(Workload.uniform(6, 150, 60), layout.policy, layout.micro_batches)
    scheduler = build_scheduler(
        layout.spec, layout.placement, layout.account, on_device=kv is not None, policy=layout.policy
    )
    planned, of_kv = Counter(), Counter()
    for step in (step for shape in passes for step in scheduler.pass_steps(shape)):
        planned[step.lane.value] += step.bytes
        of_kv[step.lane.value] += step.bytes * (step.kind not in STREAMING)
    for lane in ("h2d", "d2h", "disk_read", "disk_write"):
        assert lanes.get(lane, {"bytes": 0})["bytes"] == planned[lane], lane
    if kv:
        assert (moved["h2d"], moved["d2h"]) == (of_kv["h2d"], of_kv["d2h"]), "copies move something else"
        assert moved["h2d"] and moved["d2h"]
