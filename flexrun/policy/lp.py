"""The placement as a linear program: fractions of weights, KV cache and hidden states that end the job soonest.

For each kind of pass k a job has, T_k is at least the time of every lane, and each lane's time is linear in the
fractions; the peak of each tier stays under its budget; the sum of count_k * T_k is minimal. FlexGen's program
(arXiv 2303.06865, section 4.3) with KV attended on either processor, and passes that mix prefill and decode.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pulp
from pulp.apis.coin_api import pulp_cbc_path

from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier
from flexrun.hardware import Hardware
from flexrun.models.spec import ModelSpec
from flexrun.placement import (
    KV_SLOTS,
    WeightPlacement,
    dense_slot_bytes,
    device_row_bytes,
    host_kv_slots,
    kv_block_bytes,
    kv_scratch_bytes,
    kv_token_bytes,
    merge_bytes,
    micro_batch_sequences,
    new_groups_bytes,
    offloaded_query_bytes,
    recent_kv_bytes,
    workspace_bytes,
)
from flexrun.policy.cost import StepCosts
from flexrun.policy.features import Features
from flexrun.policy.kinds import PassKind
from flexrun.policy.kv_writes import row_write_seconds
from flexrun.policy.layout import Budgets

GIB = 1 << 30
KV_HOMES = ("gpu", "cpu_to_gpu", "cpu_on_cpu", "disk_to_gpu", "disk_on_cpu")  # home and where it is attended


@dataclass(frozen=True)
class Solution:
    """Best fractions of one program. kv: by KV_HOMES. prices: seconds of the job saved by one more byte of a tier."""

    seconds: float
    weights: Placement
    kv: Mapping[str, float]
    hidden: Placement
    prices: Mapping[Tier, float]

    @property
    def kv_placement(self) -> Placement:
        return placement_of(
            self.kv["gpu"],
            self.kv["cpu_to_gpu"] + self.kv["cpu_on_cpu"],
            self.kv["disk_to_gpu"] + self.kv["disk_on_cpu"],
        )

    @property
    def cpu_attention_share(self) -> float:
        off_device = 1.0 - self.kv["gpu"]
        return (self.kv["cpu_on_cpu"] + self.kv["disk_on_cpu"]) / off_device if off_device > 1e-9 else 1.0


def placement_of(gpu: float, cpu: float, disk: float) -> Placement:
    """Fractions that sum to 1 exactly, whatever the solver's rounding left."""
    parts = [max(part, 0.0) for part in (gpu, cpu, disk)]
    total = sum(parts)
    return Placement(*(part / total for part in parts))


def solve_placement(
    spec: ModelSpec,
    policy: Policy,
    kinds: Sequence[PassKind],
    kv_room_tokens: int,
    hardware: Hardware,
    budgets: Budgets,
    streamed: WeightPlacement,
    features: Features,
    fixed: Mapping[str, object],
    kv_home: str | None = None,
) -> Solution | None:
    """Best placement for a policy's discrete part, or None where no placement fits.

    streamed: the weights with all of them on the slowest tier, for their sizes. fixed: policy fields to keep.
    kv_home: one of KV_HOMES that all KV cache must take.
    """
    program = _Program(spec, policy, kinds, kv_room_tokens, hardware, budgets, streamed)
    program.restrict(features, fixed)
    if kv_home is not None:
        program.problem += program.kv[kv_home] == 1
    return program.solve()


class _Program:
    def __init__(self, spec, policy, kinds, kv_room_tokens, hardware, budgets, streamed):
        self.spec, self.policy, self.hardware, self.budgets = spec, policy, hardware, budgets
        self.kinds = kinds
        self.costs = StepCosts(spec, policy, streamed, hardware, on_device=budgets.on_device)
        self.problem = pulp.LpProblem("placement", pulp.LpMinimize)
        self.limits: dict[Tier, pulp.LpConstraint] = {}
        self.weights = self._fractions("weights", ("gpu", "cpu", "disk"))
        self.kv = self._fractions("kv", KV_HOMES)
        self.hidden = self._fractions("hidden", ("gpu", "cpu", "disk"))
        self.times = [self.problem.add_variable(f"seconds_{number}", 0) for number in range(len(kinds))]
        self.problem += pulp.lpSum(kind.count * time for kind, time in zip(kinds, self.times))
        self._add_memory(kv_room_tokens, streamed)
        self._add_lanes(streamed)

    def _fractions(self, kind: str, places: Sequence[str]) -> dict[str, pulp.LpVariable]:
        variables = {place: self.problem.add_variable(f"{kind}_{place}", 0, 1) for place in places}
        self.problem += pulp.lpSum(variables.values()) == 1, f"{kind}_total"
        return variables

    def restrict(self, features: Features, fixed: Mapping[str, object]) -> None:
        """Switch off what the machine or the version has not, and keep what the user decided."""
        off = []
        if not self.budgets.on_device:
            off += [self.weights["gpu"], self.kv["gpu"], self.kv["cpu_to_gpu"], self.kv["disk_to_gpu"]]
        if not features.kv_on_disk and "kv" not in fixed:
            off += [self.kv["disk_to_gpu"], self.kv["disk_on_cpu"]]
        if (not features.hidden_off_device and "hidden" not in fixed) or not self.budgets.on_device:
            off += [self.hidden["cpu"], self.hidden["disk"]]
        for variable in off:
            self.problem += variable == 0
        kv, share = self.kv, fixed.get("cpu_attention_share")
        if share is not None and self.budgets.on_device:
            on_cpu = kv["cpu_on_cpu"] + kv["disk_on_cpu"]
            self.problem += on_cpu == share * (on_cpu + kv["cpu_to_gpu"] + kv["disk_to_gpu"])
        for name, variables in (("weights", self.weights), ("hidden", self.hidden)):
            for tier in ("gpu", "cpu", "disk") if name in fixed else ():
                self.problem += variables[tier] == getattr(fixed[name], tier)
        if "kv" in fixed:
            self.problem += kv["gpu"] == fixed["kv"].gpu
            self.problem += kv["disk_to_gpu"] + kv["disk_on_cpu"] == fixed["kv"].disk

    # Memory -------------------------------------------------------------------------------------------

    def _add_memory(self, kv_room_tokens: int, streamed: WeightPlacement) -> None:
        spec, policy, budgets, weights, kv = self.spec, self.policy, self.budgets, self.weights, self.kv
        weight_bytes = streamed.stored_bytes
        kv_bytes = kv_room_tokens * spec.num_layers * kv_token_bytes(spec, policy)
        host_ring, device_ring = streamed.max_unit_stream_bytes  # what a ring must have; it is given more if there is
        slot = kv_bytes / (max(self.micro_batches, 1) * spec.num_layers)
        at_work = 2 * min(policy.token_micro_batch, policy.tokens_per_pass)
        rows = (policy.tokens_per_pass - at_work) * device_row_bytes(spec)  # that may wait elsewhere
        waiting = policy.tokens_per_pass * spec.hidden_size * spec.dtype_bytes
        fixed_work = max(workspace_bytes(spec, dataclasses.replace(policy, hidden=Placement(1.0, 0.0))) - rows, 0)
        recent, scratch = recent_kv_bytes(spec, policy, self.micro_batches), kv_scratch_bytes(spec, policy)
        fixed_work += recent + scratch
        host_kv = kv["cpu_to_gpu"] + kv["cpu_on_cpu"]
        disk_kv = kv["disk_to_gpu"] + kv["disk_on_cpu"]
        above = policy.kv_device_tokens_share * kv_bytes  # of KV that is split by token
        host = weight_bytes * weights["cpu"] + kv_bytes * host_kv + host_ring * weights["disk"]
        tails = self.micro_batches * micro_batch_sequences(policy) * spec.num_layers * kv_block_bytes(spec)
        slots = host_kv_slots(int(slot), self.micro_batches * spec.num_layers)
        host += (slots * slot + tails) * disk_kv
        if budgets.on_device:
            streams = weights["cpu"] + weights["disk"]
            device = weight_bytes * weights["gpu"] + kv_bytes * kv["gpu"] + device_ring * streams + fixed_work
            device += KV_SLOTS * slot * (kv["cpu_to_gpu"] + kv["disk_to_gpu"]) + rows * self.hidden["gpu"]
            merge = merge_bytes(spec, policy) if above else (0, 0)
            device += (above + merge[1]) * kv["cpu_on_cpu"] + dense_slot_bytes(spec, policy)
            on_cpu = kv["cpu_on_cpu"] + kv["disk_on_cpu"]
            device += new_groups_bytes(spec, policy) * (1 - kv["gpu"]) - recent * on_cpu
            self._limit(Tier.GPU, device)
            queries = offloaded_query_bytes(spec, policy) + merge[0]
            host += waiting * self.hidden["cpu"] + (queries - above) * kv["cpu_on_cpu"] + (recent + scratch) * on_cpu
        else:
            host += fixed_work + rows
        self._limit(Tier.CPU, host)
        if budgets.disk_bytes is not None:
            disk = weight_bytes + kv_bytes * disk_kv  # every packed weight stays on disk, wherever it runs from
            self._limit(Tier.DISK, disk)

    def _limit(self, tier: Tier, nbytes: pulp.LpAffineExpression) -> None:
        self.limits[tier] = nbytes * (1 / GIB) <= self.budgets.of(tier) / GIB
        self.problem += self.limits[tier], f"{tier.value}_memory"

    @property
    def micro_batches(self) -> int:
        return math.ceil(self.policy.sequences_in_flight / self.policy.attention_micro_batch)

    # Lanes --------------------------------------------------------------------------------------------

    def _add_lanes(self, streamed: WeightPlacement) -> None:
        moved = sum(max(unit.disk_bytes, unit.host_bytes) for unit in streamed.units)
        for number, (kind, time) in enumerate(zip(self.kinds, self.times)):
            for name, seconds in self._lanes(kind, moved).items():
                self.problem += time >= seconds, f"{name}_{number}"

    def _lanes(self, kind: PassKind, moved_bytes: float) -> dict[str, pulp.LpAffineExpression]:
        spec, costs, kv, weights = self.spec, self.costs, self.kv, self.weights
        shape, whole = kind.shape, kind.shape.micro_batches[0]
        layers = spec.num_layers
        new_bytes = layers * costs.kv.added(whole.query_tokens, whole.new_groups)
        there_bytes = layers * costs.kv.there(whole.query_tokens, whole.kv_tokens, whole.there_groups)
        cached = whole.cached
        query_bytes = layers * cached.query_tokens * spec.query_size * spec.dtype_bytes
        disk_read, disk_write = self.hardware.disk_read.bytes_per_second, self.hardware.disk_write.bytes_per_second
        on_cpu = kv["cpu_on_cpu"] + kv["disk_on_cpu"]
        on_disk = kv["disk_to_gpu"] + kv["disk_on_cpu"]
        read = moved_bytes * weights["disk"] + there_bytes * on_disk
        written_seconds = new_bytes / disk_write
        written_seconds += layers * whole.decode_tokens * row_write_seconds(spec, costs.kv_bytes)
        lanes = {
            Lane.DISK_READ.value: read * (1 / disk_read),
            Lane.DISK_WRITE.value: written_seconds * on_disk,
        }
        compute = costs.compute_seconds(shape, self.policy.half_batches)
        if not self.budgets.on_device:
            lanes[Lane.CPU.value] = pulp.LpAffineExpression(
                constant=compute + costs.attend_pass_seconds(self.hardware.cpu, whole)
            )
            return lanes
        to_gpu = kv["cpu_to_gpu"] + kv["disk_to_gpu"]
        hidden_bytes = costs.hidden_bytes(shape.tokens) * (self.hidden["cpu"] + self.hidden["disk"])
        h2d = moved_bytes * (weights["cpu"] + weights["disk"]) + there_bytes * to_gpu + query_bytes * on_cpu
        leaving_bytes = layers * costs.kv.to_host(whole.query_tokens, whole.fresh_groups)
        staying_bytes = layers * whole.above_new_tokens * costs.kv_bytes
        d2h = (
            new_bytes * to_gpu
            + (leaving_bytes + query_bytes) * on_cpu
            - staying_bytes * kv["cpu_on_cpu"]
            + hidden_bytes
        )
        fresh = costs.attend_pass_seconds(costs.device, whole.fresh) * on_cpu  # prompts that start need no KV cache
        in_one_place = dataclasses.replace(whole, above_kv_tokens=0)
        attended = costs.attend_pass_seconds(costs.device, in_one_place) * (kv["gpu"] + to_gpu)
        on_cpu_seconds = costs.attend_pass_seconds(self.hardware.cpu, cached) * kv["cpu_on_cpu"]
        on_cpu_seconds += costs.attend_pass_seconds(self.hardware.cpu, in_one_place.cached) * kv["disk_on_cpu"]
        if whole.above_kv_tokens:
            merged = layers * costs.merge_seconds(cached.query_tokens)
            attended += (costs.attend_pass_seconds(costs.device, whole.above) + merged) * kv["cpu_on_cpu"]
        lanes[Lane.GPU.value] = compute + fresh + attended
        if self.policy.half_batches:  # the CPU attends one half beside the matmuls of the other
            lanes[Lane.CPU.value] = on_cpu_seconds
        else:  # a layer's output projection waits for all its attention: the CPU and the GPU's matmuls take turns
            lanes["gpu_and_cpu"] = compute + fresh + on_cpu_seconds
        lanes[Lane.H2D.value] = (h2d + hidden_bytes) * (1 / costs.h2d.bytes_per_second)
        lanes[Lane.D2H.value] = d2h * (1 / costs.d2h.bytes_per_second)
        return lanes

    def solve(self) -> Solution | None:
        status = self.problem.solve(pulp.COIN_CMD(path=pulp_cbc_path, msg=False))  # the CBC that PuLP brings along
        if pulp.LpStatus[status] != "Optimal":
            return None
        prices = {tier: -(limit.pi or 0.0) / GIB for tier, limit in self.limits.items()}

        def found(variables: Mapping[str, pulp.LpVariable]) -> list[float]:
            return [min(max(variable.value() or 0.0, 0.0), 1.0) for variable in variables.values()]

        return Solution(
            pulp.value(self.problem.objective),
            placement_of(*found(self.weights)),
            dict(zip(KV_HOMES, found(self.kv))),
            placement_of(*found(self.hidden)),
            prices,
        )
