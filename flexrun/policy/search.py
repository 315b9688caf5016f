"""Finds the policy that ends a job soonest: enumerate the discrete choices, solve each placement, round, simulate.

A linear program (lp.py) gives each choice of sequences in flight and pass size its best placement and a time that no
rounding can beat by much. The best few are rounded to whole tensors and micro-batches, checked against the exact memory
account, and scored by the simulated job; the winner is improved by small moves while that pays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flexrun.config import Placement, Policy
from flexrun.core import Tier
from flexrun.errors import ConfigError
from flexrun.hardware import Hardware
from flexrun.models.spec import ModelSpec
from flexrun.placement import WeightPlacement, kv_micro_batches, place_weights
from flexrun.policy.features import RUNNABLE, Features
from flexrun.policy.fill import fill_weights, refuse
from flexrun.policy.forecast import FULL, QUICK, Forecast, drawn, forecast, passes_guess
from flexrun.policy.kinds import PassKind, pass_kinds
from flexrun.policy.layout import Budgets, Layout, room_for
from flexrun.policy.lp import Solution, solve_placement
from flexrun.policy.passes import job_passes
from flexrun.workload import Workload

MAX_SEQUENCES = 8192
PASS_TOKENS = (512, 2048, 8192, 32768, 131072)
MICRO_BATCHES = (1, 2, 4, 8, 16)  # of attention, beside a device
LP_MICRO_BATCHES = 4  # assumed while only fractions are solved
KIND_PASSES = 120  # passes looked at to see what kinds a job has
ROUNDED = 3  # best programs that are rounded and simulated
WORTH = 0.005  # a move must save this share of the time


@dataclass(frozen=True, eq=False)
class Plan:
    """The policy found, what it holds where, its forecast, and the linear program it came from."""

    policy: Policy
    layout: Layout
    forecast: Forecast
    solution: Solution | None
    programs: int
    simulations: int


def search_policy(
    spec: ModelSpec,
    hardware: Hardware,
    workload: Workload,
    budgets: Budgets,
    *,
    fixed: Mapping[str, Any] | None = None,
    features: Features = RUNNABLE,
) -> Policy:
    """The policy of ``search``."""
    return search(spec, hardware, workload, budgets, fixed=fixed, features=features).policy


def search(
    spec: ModelSpec,
    hardware: Hardware,
    workload: Workload,
    budgets: Budgets,
    *,
    fixed: Mapping[str, Any] | None = None,
    features: Features = RUNNABLE,
) -> Plan:
    """The best plan for a job.

    fixed: Policy fields that the user decided; only the others are chosen. features: what the plan may use.
    Raises NoFit where no policy fits the budgets, naming the one that is short, and ConfigError for a fixed field
    that is none.
    """
    unknown = set(fixed or {}) - {each.name for each in dataclasses.fields(Policy)}
    if unknown:
        raise ConfigError(f"unknown policy field {sorted(unknown)[0]!r}", "see flexrun.Policy")
    return _Search(spec, hardware, workload, budgets, dict(fixed or {}), features).run()


@dataclass(frozen=True)
class _Choice:
    """A solved program: lower ``seconds`` first."""

    seconds: float
    policy: Policy
    solution: Solution


class _Search:
    def __init__(self, spec, hardware, workload, budgets, fixed, features):
        self.spec: ModelSpec = spec
        self.hardware: Hardware = hardware
        self.workload: Workload = workload
        self.budgets: Budgets = budgets
        self.fixed: dict[str, Any] = fixed
        self.features: Features = features
        self._choices: dict[tuple, _Choice | None] = {}
        self._scores: dict[Policy, tuple[float, Layout] | None] = {}
        self._streamed: dict[int, WeightPlacement] = {}

    def run(self) -> Plan:
        choices = self._solve_all()
        for choice in choices[:ROUNDED]:
            for policy in self._rounded(choice):
                self._score(policy)
        best = self._best()
        if best is None:  # fractions fitted, or nothing did: whole tensors and micro-batches of fewer sequences may
            for policy in self._smaller():
                if self._score(policy):
                    break
            best = self._best()
        if best is None:
            refuse(self.spec, self._first_policy(1, 1), self.workload, self.budgets)
        best = self._improved(best)
        _, layout = self._scores[best]
        solution = next((choice.solution for choice in choices), None)
        job = forecast(layout, self.workload, self.hardware, FULL)
        simulations = sum(1 for score in self._scores.values() if score)
        return Plan(best, layout, job, solution, len(self._choices), simulations)

    # Programs -----------------------------------------------------------------------------------------

    def _solve_all(self) -> list[_Choice]:
        """Solved programs, best first: a coarse grid, then the neighbourhood of the best."""
        for sequences in self._sequence_counts():
            self._solve(sequences, self._pass_tokens(sequences)[0])
        for _ in range(2):
            best = self._solved()[:2]
            for choice in best:
                sequences = choice.policy.sequences_in_flight
                for tokens in self._pass_tokens(sequences):
                    self._solve(sequences, tokens)
                if "sequences_in_flight" not in self.fixed:
                    for near in (sequences * 3 // 4, sequences * 5 // 4, sequences * 3 // 2):
                        if 1 <= near <= self._most_sequences:
                            self._solve(near, max(choice.policy.tokens_per_pass, near))
        return self._solved()

    def _solved(self) -> list[_Choice]:
        return sorted((choice for choice in self._choices.values() if choice), key=lambda choice: choice.seconds)

    @cached_property
    def _most_sequences(self) -> int:
        return max(min(len(self.workload), MAX_SEQUENCES), 1)

    def _sequence_counts(self) -> list[int]:
        if "sequences_in_flight" in self.fixed:
            return [self.fixed["sequences_in_flight"]]
        counts, count = [], self._most_sequences
        while count >= 1:
            counts.append(count)
            count //= 2
        return counts

    def _pass_tokens(self, sequences: int) -> list[int]:
        """Pass sizes worth trying, the usual one first."""
        if "tokens_per_pass" in self.fixed:
            return [self.fixed["tokens_per_pass"]]
        total = int(self.workload.prompt_tokens.sum())
        most = max(min(total, sequences * int(self.workload.prompt_tokens.max(initial=1))), sequences, PASS_TOKENS[0])
        sizes = {max(min(tokens, most), sequences) for tokens in PASS_TOKENS}
        return sorted(sizes, key=lambda tokens: abs(tokens - max(PASS_TOKENS[1], sequences)))

    def _solve(self, sequences: int, tokens: int) -> None:
        for weight_bits in self._bits("weight_bits"):
            for kv_bits in self._bits("kv_bits"):
                key = (sequences, tokens, weight_bits, kv_bits)
                if key not in self._choices:
                    policy = self._first_policy(sequences, tokens, weight_bits=weight_bits, kv_bits=kv_bits)
                    self._choices[key] = self._program(policy)

    def _bits(self, name: str) -> tuple[int, ...]:
        return (self.fixed[name],) if name in self.fixed else getattr(self.features, name)

    def _first_policy(self, sequences: int, tokens: int, **bits) -> Policy:
        """The discrete part of a policy; what the user fixed wins."""
        micro_batches = min(LP_MICRO_BATCHES, sequences) if self.budgets.on_device else 1
        rows = 2048 if self.budgets.on_device and self.hardware.gpu else 512
        fields = {
            "sequences_in_flight": sequences,
            "tokens_per_pass": tokens,
            "token_micro_batch": min(rows, tokens),
            "attention_micro_batch": -(-sequences // micro_batches),
            **bits,
            **self.fixed,
        }
        return Policy(**fields)

    def _program(self, policy: Policy) -> _Choice | None:
        if policy.weight_bits not in self._streamed:
            all_streamed = dataclasses.replace(policy, weights=Placement(0.0, 0.0, 1.0))
            self._streamed[policy.weight_bits] = place_weights(
                self.spec, all_streamed, on_device=self.budgets.on_device
            )
        solution = solve_placement(
            self.spec,
            policy,
            self._kinds(policy),
            policy.kv_tokens or room_for(policy, self.workload),
            self.hardware,
            self.budgets,
            self._streamed[policy.weight_bits],
            self.features,
            self.fixed,
        )
        return solution and _Choice(solution.seconds, policy, solution)

    def _kinds(self, policy: Policy) -> list[PassKind]:
        rows = len(self.workload)
        shrink = passes_guess(policy, self.workload) / KIND_PASSES
        sample = self.workload
        if shrink > 1:
            sample = drawn(sample, min(max(int(rows / shrink), 2 * policy.sequences_in_flight, 2), rows))
        one_place = dataclasses.replace(policy, attention_micro_batch=policy.sequences_in_flight)
        room = max(sample.kv_tokens_of(policy.sequences_in_flight), policy.kv_tokens, sample.longest_tokens)
        homes = kv_micro_batches(one_place, room, on_device=False)
        return pass_kinds(job_passes(sample, one_place, homes), rows / max(len(sample), 1))

    # Whole tensors and micro-batches ------------------------------------------------------------------

    def _rounded(self, choice: _Choice) -> Iterator[Policy]:
        """The solution as policies of several micro-batch counts."""
        sequences = choice.policy.sequences_in_flight
        counts = {min(count, sequences) for count in MICRO_BATCHES} if self.budgets.on_device else {1}
        if choice.solution.kv_placement.disk > 0:
            counts = {min(count, sequences) for count in MICRO_BATCHES[1:]}
        if "attention_micro_batch" in self.fixed:
            counts = {-(-sequences // self.fixed["attention_micro_batch"])}
        for count in sorted(counts):
            yield from self._as_policies(choice, -(-sequences // count))

    def _as_policies(self, choice: _Choice, attention_micro_batch: int) -> Iterator[Policy]:
        solution, policy = choice.solution, choice.policy
        count = -(-policy.sequences_in_flight // attention_micro_batch)
        kv = solution.kv_placement
        for on_gpu in sorted({int(kv.gpu * count + 1e-6), round(kv.gpu * count)}):
            on_disk = min(round(kv.disk * count), count - on_gpu)
            rounded = Placement(on_gpu / count, (count - on_gpu - on_disk) / count, on_disk / count)
            yield dataclasses.replace(
                policy,
                attention_micro_batch=attention_micro_batch,
                kv=self.fixed.get("kv", rounded),
                cpu_attention_share=self.fixed.get("cpu_attention_share", round(solution.cpu_attention_share, 4)),
                hidden=self.fixed.get("hidden", solution.hidden),
            )

    def _smaller(self) -> Iterator[Policy]:
        """Ever more modest policies, down to one sequence and one token a pass."""
        sequences = self.fixed.get("sequences_in_flight", self._most_sequences)
        tokens = self.fixed.get("tokens_per_pass", max(PASS_TOKENS[1], sequences))
        while True:
            policy = self._first_policy(sequences, tokens)
            yield policy
            if self.budgets.on_device and "kv" not in self.fixed:
                yield dataclasses.replace(policy, kv=Placement(1.0, 0.0))
            if sequences > 1 and "sequences_in_flight" not in self.fixed:
                sequences //= 2
            elif tokens > 1 and "tokens_per_pass" not in self.fixed:
                tokens //= 2
            else:
                return

    def _score(self, policy: Policy) -> float | None:
        """Forecast seconds of a policy with its weights placed, or None where it does not fit."""
        key = policy
        if key not in self._scores:
            layout = fill_weights(self.spec, policy, self.workload, self.budgets, keep="weights" in self.fixed)
            self._scores[key] = None
            if layout is not None:
                policy = layout.policy
                score = forecast(layout, self.workload, self.hardware, QUICK).seconds, layout
                self._scores[key] = self._scores[policy] = score
        score = self._scores[key]
        return score and score[0]

    def _best(self) -> Policy | None:
        fitting = [(score[0], score[1].policy) for score in self._scores.values() if score]
        return min(fitting, key=lambda pair: pair[0])[1] if fitting else None

    # Small moves --------------------------------------------------------------------------------------

    def _improved(self, policy: Policy) -> Policy:
        """Hill climbing over neighbouring policies, each kind of move while it pays."""
        for _ in range(3):
            before = self._scores[policy][0]
            for field, values in self._moves(policy):
                for value in values:
                    moved = dataclasses.replace(policy, **value)
                    score = self._score(moved)
                    if score is not None and score < self._scores[policy][0] * (1 - WORTH):
                        policy = self._scores[moved][1].policy
                        break
            if self._scores[policy][0] > before * (1 - WORTH):
                break
        return policy

    def _moves(self, policy: Policy) -> Iterator[tuple[str, list[dict]]]:
        """Alternatives for each field that is not fixed."""
        sequences, count = policy.sequences_in_flight, -(-policy.sequences_in_flight // policy.attention_micro_batch)
        free = {each.name for each in dataclasses.fields(Policy)} - set(self.fixed)
        if {"sequences_in_flight", "attention_micro_batch"} <= free:
            near = [sequences * 9 // 8, sequences * 7 // 8, sequences * 3 // 4]
            yield (
                "sequences_in_flight",
                [
                    {
                        "sequences_in_flight": near_count,
                        "attention_micro_batch": -(-near_count // count),
                        "tokens_per_pass": max(policy.tokens_per_pass, near_count),
                    }
                    for near_count in near
                    if 1 <= near_count <= self._most_sequences and near_count != sequences
                ],
            )
        if "tokens_per_pass" in free:
            sizes = [policy.tokens_per_pass * 2, max(policy.tokens_per_pass // 2, sequences)]
            yield "tokens_per_pass", [{"tokens_per_pass": size} for size in sizes]
        if "token_micro_batch" in free:
            rows = [size for size in (256, 512, 1024) if size <= policy.tokens_per_pass]
            yield "token_micro_batch", [{"token_micro_batch": size} for size in rows]
        if not self.budgets.on_device:
            return
        if "cpu_attention_share" in free and policy.kv.gpu < 1:
            shares = [min(max(policy.cpu_attention_share + step / count, 0.0), 1.0) for step in (1, -1)]
            yield "cpu_attention_share", [{"cpu_attention_share": round(share, 4)} for share in shares]
        if "kv" in free:
            steps = [policy.kv.gpu + step / count for step in (1, -1)]
            yield (
                "kv",
                [
                    {"kv": Placement(share, 1.0 - share - policy.kv.disk, policy.kv.disk)}
                    for share in (round(step, 6) for step in steps)
                    if 0 <= share <= 1 - policy.kv.disk
                ],
            )
