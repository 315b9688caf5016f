"""Small changes of a policy, for hill climbing: what a linear program cannot see, as whole tensors and even rounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from flexrun.config import Placement, Policy
from flexrun.policy.programs import CPU_ROWS, GPU_ROWS, Programs

MANY_ROUNDS = 12
SIMPLE_PARTS = (8, 4, 2, 6, 3, 5, 7, 12, 16)


def moves(policy: Policy, programs: Programs, *, closely: bool = False) -> Iterator[dict]:
    """Changes of what is not fixed, those that tend to matter most first. Some lead nowhere: score them.

    closely: also those that are worth little, and that only a long look can tell apart.
    """
    free = {each.name for each in dataclasses.fields(Policy)} - set(programs.fixed)
    if closely and "weights" in free:
        for weights in _near(policy.weights):
            yield {"weights": weights}
    if "cpu_experts_share" in free and _has_experts_for_cpu(policy, programs):
        yield from ({"cpu_experts_share": share} for share in _other_shares(policy.cpu_experts_share))
    if {"sequences_in_flight", "attention_micro_batch", "tokens_per_pass"} <= free:
        if "kv" in free and 0 < policy.kv.disk < 1:
            yield _off_disk(policy)
        yield from _other_sequences(policy, programs)
    yield from _other_passes(policy, programs, free)
    for name in sorted({"weight_bits", "kv_bits"} & free):
        yield from ({name: bits} for bits in programs.bits(name) if bits != getattr(policy, name))
    if programs.budgets.on_device:
        yield from _other_attention(policy, programs, free)
    if "kv" in free and policy.kv.disk > 0:
        most, step = 1.0 - policy.kv.gpu, 1 / micro_batches(policy)
        for share in {round(min(max(policy.kv.disk + change, 0.0), most), 6) for change in (-step, step)}:
            yield {"kv": Placement(policy.kv.gpu, max(most - share, 0.0), share)}
    if "token_micro_batch" in free:
        most = GPU_ROWS if programs.budgets.on_device and programs.hardware.gpu else 2 * CPU_ROWS
        for rows in (256, 512, 1024, 2048):
            if rows <= min(policy.tokens_per_pass, most):
                yield {"token_micro_batch": rows}


def _has_experts_for_cpu(policy: Policy, programs: Programs) -> bool:
    """Whether a device has experts beside it, and the profile says what they take on the CPU."""
    if not (programs.budgets.on_device and programs.spec.experts and policy.weights.cpu > 0):
        return False
    cpu = programs.hardware.cpu
    straight = cpu.rates_of(programs.spec.dtype).compressed
    return (policy.weight_bits == 16 and not policy.keep) or bool(cpu.dequantise_bytes_per_second or straight)


def _other_shares(share: float) -> list[float]:
    """All or nothing, and more or less of it."""
    near = {1.0, 0.0, share + 0.5, share - 0.5, share + 0.125, share - 0.125}
    return sorted((each for each in near if 0.0 <= each <= 1.0 and each != share), reverse=True)


def whole(share: float, count: int) -> float:
    """A share of ``count`` micro-batches as it will be: of whole ones."""
    return round(min(max(round(share * count), 0), count) / count, 4) if count else 1.0


def micro_batches(policy: Policy) -> int:
    return -(-policy.sequences_in_flight // policy.attention_micro_batch)


def can_halve(policy: Policy) -> bool:
    """Whether its passes have two halves at all, one of which the CPU may attend."""
    return micro_batches(policy) > 1 and policy.kv.gpu < 1 and policy.cpu_attention_share > 0


def _other_sequences(policy: Policy, programs: Programs) -> Iterator[dict]:
    sequences, tokens, count = policy.sequences_in_flight, policy.tokens_per_pass, micro_batches(policy)
    rows, most = len(programs.workload), programs.most_sequences

    def change(near: int) -> dict:
        return {
            "sequences_in_flight": near,
            "attention_micro_batch": -(-near // count),
            "tokens_per_pass": max(tokens, near),
        }

    rounds = -(-rows // sequences)
    for round_count in (rounds - 1, rounds, rounds + 1):  # even rounds leave no slot empty at the end
        near = -(-rows // round_count) if 0 < round_count <= MANY_ROUNDS else sequences
        if sequences != near <= most:
            yield change(near)
    for factor in (2, 0.5, 1.5, 0.75, 1.125, 0.875):
        near = min(round(sequences * factor), most)
        if 1 <= near != sequences:
            yield change(near)
            if factor == 2:
                yield {**change(near), "tokens_per_pass": 2 * tokens}


def _off_disk(policy: Policy) -> dict:
    """As many sequences fewer as have their KV on disk: moves of one thing at a time do not lead there."""
    kept = 1.0 - policy.kv.disk
    sequences = max(int(policy.sequences_in_flight * kept), 1)
    gpu = policy.kv.gpu / kept
    return {
        "sequences_in_flight": sequences,
        "attention_micro_batch": -(-sequences // micro_batches(policy)),
        "kv": Placement(gpu, 1.0 - gpu),
    }


def _other_passes(policy: Policy, programs: Programs, free: set[str]) -> Iterator[dict]:
    tokens = policy.tokens_per_pass
    if "tokens_per_pass" in free:
        yield {"tokens_per_pass": 2 * tokens}
        if "token_micro_batch" in free:
            rows = GPU_ROWS if programs.hardware.gpu else CPU_ROWS
            yield {"tokens_per_pass": 4 * tokens, "token_micro_batch": min(4 * policy.token_micro_batch, rows)}
        yield {"tokens_per_pass": max(tokens // 2, policy.sequences_in_flight)}


def _other_attention(policy: Policy, programs: Programs, free: set[str]) -> Iterator[dict]:
    sequences, count = policy.sequences_in_flight, micro_batches(policy)
    if "half_batches" in free and programs.features.half_batches and can_halve(policy):
        yield {"half_batches": not policy.half_batches}
    if "attention_micro_batch" in free:
        for size in {-(-sequences // (2 * count)), -(-sequences // max(count // 2, 1))}:
            yield {"attention_micro_batch": size}
    if "cpu_attention_share" in free and policy.kv.gpu < 1:
        away = count - int(count * policy.kv.gpu + 1e-9)
        for step in (1, -1):
            yield {"cpu_attention_share": whole(policy.cpu_attention_share + step / away, away)}
    if "kv" in free:
        most = 1.0 - policy.kv.disk
        for share in {round(min(max(policy.kv.gpu + step / count, 0.0), most), 6) for step in (1, -1)}:
            yield {"kv": Placement(share, max(most - share, 0.0), policy.kv.disk)}


def _near(weights: Placement) -> Iterator[Placement]:
    """Fewer weights on the fastest tier in use, and a little more: which tensors move changes how evenly they move.

    In simple fractions every so many tensors are alike, and the lanes fall into step; the next one up may fit with a
    shorter ring.
    """
    faster = weights.gpu if weights.gpu else weights.cpu
    if not 0 < faster < 1:
        return
    shares = [math.floor(faster * parts - 1e-9) / parts for parts in SIMPLE_PARTS]
    shares += [faster + step for step in (-0.02, -0.04, -0.06, -0.1, 0.02)]
    shares += [math.ceil(faster * parts + 1e-9) / parts for parts in SIMPLE_PARTS[:2]]
    for share in dict.fromkeys(round(min(max(share, 0.0), 1.0), 4) for share in shares):
        if weights.gpu:
            cpu = min(weights.cpu, 1.0 - share) if weights.disk else 1.0 - share
            yield Placement(share, max(cpu, 0.0), max(1.0 - share - cpu, 0.0))
        else:
            yield Placement(0.0, share, 1.0 - share)
