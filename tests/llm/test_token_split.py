"""KV split by token, the oldest on the host and the newest on the device: tokens stay, every byte is counted."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tiny_families import prompts

from flexrun import SamplingParams
from flexrun.config import Placement, Policy
from flexrun.core import Tier
from flexrun.errors import UnsupportedError
from flexrun.outputs import RequestOutput
from flexrun.steps import MicroBatchShape

pytestmark = pytest.mark.usefixtures("matrices_move")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LENGTHS = (1, 5, 40, 17, 60, 2, 33, 9)  # room of 12 to 71 tokens: some prompts end below their borders, some above
SPLIT = Policy(
    sequences_in_flight=5,  # the other three take the room of those that end
    tokens_per_pass=23,  # the longer prompts come in chunks, some of which span a border
    attention_micro_batch=2,
    token_micro_batch=7,
    weights=Placement(0.3, 0.4, 0.3),
    kv=Placement(0.0, 1.0),
)
FORMS = {
    "whole": {},
    "in halves": {"half_batches": True, "cpu_attention_share": 0.67},
    "beside KV on the device and on disk": {"kv": Placement(0.34, 0.33, 0.33)},
    "in parts": {"hidden": Placement(0.0, 1.0), "token_micro_batch": 4},
}


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected():
    """Tokens of each family with everything in RAM, once they were asked for."""
    return {}


@pytest.mark.parametrize(
    ("name", "share", "form"),
    [
        *(("llama", share, form) for share in (0.25, 0.5, 1.0) for form in FORMS),
        ("opt", 0.25, "whole"),
        ("opt", 0.5, "in parts"),
        ("gemma2_untied", 0.25, "whole"),
        ("gemma2_untied", 0.5, "in halves"),
        ("gemma2_untied", 1.0, "in parts"),
        ("gpt_oss", 0.25, "in halves"),
        ("gpt_oss", 0.5, "whole"),
        ("gpt_oss", 1.0, "whole"),
    ],
)
def test_tokens_are_the_same_and_tiers_hold_what_is_planned(open_llm, run, expected, name, share, form):
    asked = prompts(LENGTHS, 3)
    if name not in expected:
        expected[name] = tokens_of(run(name, asked, GREEDY))
    policy = dataclasses.replace(SPLIT, kv_device_tokens_share=share, **FORMS[form])
    llm = open_llm(name, policy=policy, gpu_memory="64MiB")
    assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == expected[name]
    account, tiers = llm._plan.layout.account, llm.summary()["tiers"]
    for tier in (Tier.GPU, Tier.CPU):
        assert tiers[tier.value]["peak_bytes"] == account.total(tier)
        assert tiers[tier.value]["by_kind"]["kv_merge"] > 0
    assert tiers["gpu"]["by_kind"]["kv"] > 0


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_lanes_do_what_the_batcher_says_of_either_side(open_llm, monkeypatch, tmp_path, share):
    """By the trace of a run: what is attended where, what crosses the link, and merges where both attend."""
    shapes: list[MicroBatchShape] = []
    plan = "flexrun.offload.batcher.MicroBatchShape"
    monkeypatch.setattr(plan, lambda *fields, **more: shapes.append(MicroBatchShape(*fields, **more)) or shapes[-1])
    policy = dataclasses.replace(SPLIT, kv_device_tokens_share=share, weights=Placement(1.0, 0.0))
    llm = open_llm("llama", policy=policy, gpu_memory="64MiB", trace=tmp_path / "trace.json")
    llm.generate(prompts(LENGTHS, 3), GREEDY, use_tqdm=False)
    llm.close()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    moved: dict[tuple[str, str], list[int]] = {}
    for event in events:
        if event["ph"] == "X":
            moved.setdefault((event["name"], lanes[event["tid"]]), []).append(event["args"].get("bytes", 0))
    spec, layers = llm.spec, llm.spec.num_layers
    below = [shape for shape in shapes if shape.below.query_tokens]
    both = [shape for shape in below if shape.above.query_tokens]
    assert bool(both) == bool(below) == (share < 1)
    assert 0 < sum(shape.above.kv_tokens for shape in shapes) < sum(shape.kv_tokens for shape in shapes)
    told = {
        ("attend", "cpu"): [shape.below.kv_tokens * spec.kv_bytes_per_token for shape in below],
        ("attend", "gpu"): [shape.above.kv_tokens * spec.kv_bytes_per_token for shape in shapes],
        ("return_attended", "h2d"): [
            shape.cached.query_tokens * (spec.query_size * 4 + 4 * spec.num_heads * (shape in both)) for shape in below
        ],
    }
    for key, sums in told.items():
        assert sum(moved.get(key, [])) == layers * sum(sums), key
    down = sum(shape.query_tokens - shape.above_new_tokens for shape in shapes) * spec.kv_bytes_per_token
    down += sum(shape.cached.query_tokens * spec.query_size * 4 for shape in below)
    assert sum(sum(values) for (_, lane), values in moved.items() if lane == "d2h") == layers * down
    assert len(moved.get(("merge", "gpu"), [])) == layers * len(both)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [("llama", {}, "a device, and there is none"), ("deepseek_v2", {"gpu_memory": "192MiB"}, "latent KV by token")],
)
def test_what_cannot_be_split_is_refused_by_name(open_llm, name, options, named):
    policy = Policy(kv_device_tokens_share=0.5, cpu_attention_share=0.0)
    with pytest.raises(UnsupportedError, match=named):
        open_llm(name, policy=policy, **options).generate(prompts((5,)), GREEDY, use_tqdm=False)
