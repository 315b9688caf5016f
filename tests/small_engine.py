"""A tiny model's engine on a given device, under every kind of placement."""

from __future__ import annotations

from flexrun.config import Placement, Policy
from flexrun.core import Tier
from flexrun.offload.engine import Engine
from flexrun.placement import memory_account, place_weights

KV_TOKENS = 300
POLICIES = {
    "all on the GPU": {"weights": Placement(1, 0, 0), "kv": Placement(1, 0, 0)},
    "weights in RAM": {"weights": Placement(0, 1, 0), "kv": Placement(1, 0, 0)},
    "weights on disk, KV copied": {
        "weights": Placement(0, 0, 1),
        "kv": Placement(0, 1, 0),
        "cpu_attention_share": 0.0,
        "token_micro_batch": 5,
    },
    "weights on all tiers, KV attended on the CPU": {
        "weights": Placement(0.3, 0.3, 0.4),
        "kv": Placement(0, 1, 0),
        "cpu_attention_share": 1.0,
    },
    "KV in two places, half attended on the CPU": {
        "weights": Placement(0.5, 0.2, 0.3),
        "kv": Placement(0.34, 0.66, 0),
        "cpu_attention_share": 0.5,
    },
    "half-batches": {
        "weights": Placement(0.3, 0.7, 0),
        "kv": Placement(0, 1, 0),
        "cpu_attention_share": 0.5,
        "half_batches": True,
    },
    "KV split by token": {
        "weights": Placement(0.3, 0.7, 0),
        "kv": Placement(0.34, 0.66, 0),
        "kv_device_tokens_share": 0.5,
    },
    "KV split by token, in half-batches": {
        "weights": Placement(0.3, 0.7, 0),
        "kv": Placement(0, 1, 0),
        "cpu_attention_share": 0.67,
        "kv_device_tokens_share": 0.7,
        "half_batches": True,
        "token_micro_batch": 5,
    },
    "KV on disk": {"weights": Placement(0, 1, 0), "kv": Placement(0.34, 0, 0.66), "cpu_attention_share": 0.5},
    "groups of KV copied": {
        "weights": Placement(0, 1, 0),
        "kv": Placement(0, 1, 0),
        "cpu_attention_share": 0.0,
        "kv_bits": 8,
        "tokens_per_pass": 80,
        "lengths": (58, 110, 64),
    },
    "groups of KV on all tiers, half attended on the CPU": {
        "weights": Placement(0, 1, 0),
        "kv": Placement(0.34, 0.33, 0.33),
        "cpu_attention_share": 0.5,
        "half_batches": True,
        "kv_bits": 8,
        "tokens_per_pass": 80,
        "lengths": (58, 110, 64),
    },
}


def run_engine(packed, make_group, device, device_waits=lambda: 0, lengths=(5, 14, 23), **settings):
    """(tokens by request, the closed engine) of a tiny model on ``device``. device_waits: how often the host waited
    for the whole device so far; it must not while passes run. lengths: of prompts."""
    spec, cache = packed("llama")
    policy = Policy(**{"sequences_in_flight": 6, "tokens_per_pass": 16, "attention_micro_batch": 2} | settings)
    placed = place_weights(spec, policy, on_device=True)
    account = memory_account(spec, policy, placed, KV_TOKENS, on_device=True)
    engine = Engine(
        spec,
        cache,
        policy,
        placed,
        account,
        KV_TOKENS,
        cpu_budget_bytes=account.total(Tier.CPU),
        gpu_budget_bytes=account.total(Tier.GPU),
        accelerator=device,
        trace=True,
    )
    groups = [
        make_group([3 + number] * lengths[number % 3], temperature=0, max_tokens=4 + number, ignore_eos=True)
        for number in range(8)
    ]
    before = device_waits()
    try:
        outputs = list(engine.run(iter(groups)))
        assert device_waits() == before
    finally:
        engine.close()
    assert all(tier.used_bytes == 0 for tier in engine.tiers.values())
    numbers = {group.request.request_id: number for number, (group, _) in enumerate(groups)}
    return {numbers[output.request_id]: output.outputs[0].token_ids for output in outputs}, engine
