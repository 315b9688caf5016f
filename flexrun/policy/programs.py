"""The discrete half of the search: for each choice of sequences in flight and pass size, its best placement."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flexrun.config import Placement, Policy
from flexrun.core import Tier
from flexrun.hardware import Hardware
from flexrun.models.spec import ModelSpec
from flexrun.placement import CPU_EXPERT_ROWS, WeightPlacement, kv_micro_batches, place_weights, why_not_shared
from flexrun.policy.features import Features
from flexrun.policy.forecast import drawn, passes_guess
from flexrun.policy.kinds import PassKind, pass_kinds
from flexrun.policy.layout import Budgets, room_for
from flexrun.policy.lp import Solution, solve_placement
from flexrun.policy.passes import job_passes
from flexrun.workload import Workload

MAX_SEQUENCES = 8192
USUAL_PASS_TOKENS = 2048
PASS_TOKENS = (512, USUAL_PASS_TOKENS, 8192, 32768, 131072)
LP_MICRO_BATCHES = 4  # assumed beside a device while only fractions are solved
KIND_PASSES = 60  # passes looked at to see what kinds a job has
CPU_ROWS, GPU_ROWS = 512, 2048  # of one linear-layer call: enough to reach the matmul rate
PRICED_BYTES = 8 << 30
DOUBLING_COST, AWAY_COST, FEWER_SLOTS_COST = 0.004, 0.0005, 0.0001
PURE_TRIED, PURE_WITHIN = 8, 3.0  # free programs, within this factor of the best, whose pure forms are solved
SIZES_ROUNDED = 4
HALVES = "halves"
BITS_COST = {16: 0.0, 8: 0.02, 4: 0.1}  # what accuracy is worth: 4 bits must save a tenth of the time
KV_BITS_COST = {16: 0.0, 8: 0.02, "k8v4": 0.05, 4: 0.1}


def size_cost(policy: Policy) -> float:
    """Factor on a policy's time that settles what a forecast cannot tell apart.

    A pass twice as large must be worth it: it shows its first answers late, loses more when a run is interrupted, and
    takes more memory. So must moving what could stay, and fewer bits of weights or KV cache.
    """
    doublings = math.log2(max(policy.tokens_per_pass / PASS_TOKENS[0], 1.0))
    away = (1.0 - policy.kv.gpu) + (1.0 - policy.weights.gpu) + policy.kv.disk + policy.weights.disk
    bits = BITS_COST[policy.weight_bits] + KV_BITS_COST[policy.kv_bits]
    return 1.0 + DOUBLING_COST * doublings + AWAY_COST * away + bits


@dataclass(frozen=True)
class Choice:
    """A solved program; the fewer ``seconds`` (times size_cost), the better."""

    seconds: float
    policy: Policy
    solution: Solution


class Programs:
    """Solves programs for one job and remembers them. ``fixed``: policy fields the user decided."""

    def __init__(
        self,
        spec: ModelSpec,
        hardware: Hardware,
        workload: Workload,
        budgets: Budgets,
        fixed: Mapping[str, Any],
        features: Features,
    ):
        in_place = Policy(kv=Placement(1.0, 0.0) if budgets.on_device else Placement())
        shares = why_not_shared(spec, in_place, on_device=budgets.on_device) is None
        # Programs know of prefixes only that they need not be run or kept again; forecasts know what they cost.
        workload = workload.own() if shares else workload.apart()
        self.spec, self.hardware, self.workload, self.budgets = spec, hardware, workload, budgets
        self.fixed, self.features = fixed, features
        self._choices: dict[tuple, Choice | None] = {}
        self._streamed: dict[int, WeightPlacement] = {}
        self._kinds: dict[tuple, list[PassKind]] = {}

    def __len__(self) -> int:
        return len(self._choices)

    def solve_all(self) -> list[Choice]:
        """Programs worth rounding: the best of each pass size with the KV cache placed freely, and of each form.

        A coarse grid comes first, then the neighbourhood of its best, then the forms where the free ones do well.
        """
        for sequences in self.sequence_counts():
            for tokens in self.pass_tokens(sequences)[:2]:
                self.solve(sequences, tokens)
        for _ in range(2):
            for choice in self.solved()[:2]:
                sequences = choice.policy.sequences_in_flight
                for tokens in self.pass_tokens(sequences):
                    self.solve(sequences, tokens)
                if "sequences_in_flight" not in self.fixed:
                    for near in (sequences * 3 // 4, sequences * 5 // 4, sequences * 3 // 2):
                        if 1 <= near <= self.most_sequences:
                            self.solve(near, max(choice.policy.tokens_per_pass, near))
        for choice in self.solved()[:PURE_TRIED]:
            if choice.seconds <= PURE_WITHIN * self.solved()[0].seconds:
                for form in self.forms:
                    self.solve(choice.policy.sequences_in_flight, choice.policy.tokens_per_pass, form)
        by_size: dict[tuple[int, int, int], Choice] = {}
        for choice in self.solved():
            policy = choice.policy
            by_size.setdefault((policy.tokens_per_pass, policy.weight_bits, policy.kv_bits), choice)
        kinds = len(self.bits("weight_bits")) * len(self.bits("kv_bits"))
        others = [choice for form in self.forms for choice in self.solved(form)[:1]]
        return [*list(by_size.values())[: SIZES_ROUNDED * kinds], *others]

    def solved(self, form: str | None = None) -> list[Choice]:
        """Solved programs, best first: those with the KV cache placed freely, or of one of the ``forms``."""
        solved = (choice for key, choice in self._choices.items() if choice and key[-1] == form)
        return sorted(solved, key=lambda choice: choice.seconds)

    @property
    def forms(self) -> tuple[str, ...]:
        """Pure homes of the KV cache to solve for, and passes in two halves.

        A program lets all lanes overlap; where the schedule does not, a pure form may be the better one.
        """
        if not self.budgets.on_device:
            return ()
        alone = not {"kv", "cpu_attention_share"} & set(self.fixed)
        halves = self.features.half_batches and "half_batches" not in self.fixed
        return (("gpu", "cpu_to_gpu", "cpu_on_cpu") if alone else ()) + ((HALVES,) if halves else ())

    @cached_property
    def most_sequences(self) -> int:
        return max(min(len(self.workload), MAX_SEQUENCES), 1)

    def sequence_counts(self) -> list[int]:
        if "sequences_in_flight" in self.fixed:
            return [self.fixed["sequences_in_flight"]]
        counts, count = [], self.most_sequences
        while count >= 1:
            counts.append(count)
            count //= 2
        return counts

    def pass_tokens(self, sequences: int) -> list[int]:
        """Pass sizes worth trying, the usual one first."""
        if "tokens_per_pass" in self.fixed:
            return [self.fixed["tokens_per_pass"]]
        longest = int(self.workload.prompt_tokens.max(initial=1))
        most = max(min(int(self.workload.prompt_tokens.sum()), sequences * longest), sequences, PASS_TOKENS[0])
        sizes = {max(min(tokens, most), sequences) for tokens in PASS_TOKENS}
        return sorted(sizes, key=lambda tokens: abs(math.log(tokens / max(USUAL_PASS_TOKENS - 1, sequences))))

    def solve(self, sequences: int, tokens: int, form: str | None = None) -> None:
        for weight_bits in self.bits("weight_bits"):
            for kv_bits in self.bits("kv_bits"):
                key = (sequences, tokens, weight_bits, kv_bits, form)
                if key not in self._choices:
                    policy = self.discrete(sequences, tokens, weight_bits=weight_bits, kv_bits=kv_bits)
                    if form == HALVES:
                        self._choices[key] = self._program(dataclasses.replace(policy, half_batches=True), None)
                    else:
                        self._choices[key] = self._program(policy, form)

    def bits(self, name: str) -> tuple[int | str, ...]:
        """To choose among, of weights or KV cache, most first."""
        return (self.fixed[name],) if name in self.fixed else getattr(self.features, name)

    def discrete(self, sequences: int, tokens: int, **bits: int | str) -> Policy:
        """The discrete part of a policy; what the user fixed wins."""
        micro_batches = min(LP_MICRO_BATCHES, sequences) if self.budgets.on_device else 1
        on_gpu = self.budgets.on_device and self.hardware.gpu
        rows = GPU_ROWS if on_gpu else CPU_ROWS
        fields = {
            "sequences_in_flight": sequences,
            "tokens_per_pass": tokens,
            "token_micro_batch": min(rows, tokens),
            **({} if on_gpu else {"expert_batch": CPU_EXPERT_ROWS}),
            "attention_micro_batch": -(-sequences // micro_batches),
            **bits,
            **self.fixed,
        }
        return Policy(**fields)

    def _program(self, policy: Policy, kv_home: str | None) -> Choice | None:
        if policy.weight_bits not in self._streamed:
            all_streamed = dataclasses.replace(policy, weights=Placement(0.0, 0.0, 1.0))
            self._streamed[policy.weight_bits] = place_weights(
                self.spec, all_streamed, on_device=self.budgets.on_device
            )
        solution = solve_placement(
            self.spec,
            policy,
            self._pass_kinds(policy),
            policy.kv_tokens or room_for(policy, self.workload),
            self.hardware,
            self.budgets,
            self._streamed[policy.weight_bits],
            self.features,
            self.fixed,
            kv_home,
        )
        # Programs that tie are told apart by their slots: more of them let a pass fill up.
        slots = 1.0 + FEWER_SLOTS_COST * math.log2(self.most_sequences / policy.sequences_in_flight)
        return solution and Choice(solution.seconds * size_cost(policy) * slots, policy, solution)

    def _pass_kinds(self, policy: Policy) -> list[PassKind]:
        coded = policy.key_value_bits is not None
        key = (policy.sequences_in_flight, policy.tokens_per_pass, policy.kv_device_tokens_share, coded)
        if key not in self._kinds:
            rows = len(self.workload)
            shrink = passes_guess(policy, self.workload) / KIND_PASSES
            sample = self.workload
            if shrink > 1:
                sample = drawn(sample, min(max(int(rows / shrink), 2 * policy.sequences_in_flight, 2), rows))
            one_place = dataclasses.replace(policy, attention_micro_batch=policy.sequences_in_flight)
            room = max(sample.kv_tokens_of(policy.sequences_in_flight), policy.kv_tokens, sample.longest_tokens)
            homes = kv_micro_batches(one_place, room, on_device=False)
            share = policy.kv_device_tokens_share if self.budgets.on_device else 0.0
            homes = [dataclasses.replace(home, device_share=share) for home in homes]
            self._kinds[key] = pass_kinds(job_passes(sample, one_place, homes), rows / max(len(sample), 1))
        return self._kinds[key]

    def gain(self, tier: Tier, choice: Choice, more_bytes: int = PRICED_BYTES) -> float:
        """Share by which the job's throughput grows with ``more_bytes`` on a tier, more sequences in flight included.

        By the programs, so before rounding: 0.31 is a third more tokens a second.
        """
        sizes = dataclasses.asdict(self.budgets)
        name = f"{tier.value}_bytes"
        sizes[name] = (sizes[name] or 0) + more_bytes
        richer = Programs(self.spec, self.hardware, self.workload, Budgets(**sizes), self.fixed, self.features)
        richer._streamed, richer._kinds = self._streamed, self._kinds
        now = choice.policy
        for sequences in {now.sequences_in_flight, *(now.sequences_in_flight * step // 4 for step in (5, 6, 8))}:
            if sequences <= self.most_sequences and (
                sequences == now.sequences_in_flight or "sequences_in_flight" not in self.fixed
            ):
                for programs in (self, richer):
                    programs.solve(sequences, max(now.tokens_per_pass, sequences))
        best = [programs.solved()[0].seconds for programs in (self, richer) if programs.solved()]
        return best[0] / best[1] - 1.0 if len(best) == 2 else 0.0
