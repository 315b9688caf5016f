"""Finds the policy that ends a job soonest: enumerate the discrete choices, solve each placement, round, simulate.

A linear program (lp.py) gives each choice of sequences in flight and pass size its best placement and a time that no
rounding can beat by much. The best few are rounded to whole tensors and micro-batches, checked against the exact memory
account, and scored by the simulated job; the winner is improved by small moves while that pays.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexrun.config import Placement, Policy
from flexrun.core import Tier
from flexrun.errors import ConfigError
from flexrun.hardware import Hardware
from flexrun.models.spec import ModelSpec
from flexrun.policy.features import RUNNABLE, Features
from flexrun.policy.fill import fill_weights, refuse
from flexrun.policy.forecast import FULL, QUICK, Forecast, forecast
from flexrun.policy.layout import Budgets, Layout
from flexrun.policy.lp import Solution
from flexrun.policy.programs import USUAL_PASS_TOKENS, Choice, Programs, size_cost
from flexrun.workload import Workload

MICRO_BATCHES = (1, 4, 16)  # of attention, beside a device
ROUNDED = 2  # best programs that are rounded and simulated
FINALISTS, CLOSE = 2, 1.05  # policies looked at in full, within this factor of the best
WORTH = 0.005  # a move must save this share of the time
MOVES_TRIED = 40


@dataclass(frozen=True, eq=False)
class Plan:
    """The policy found, what it holds where, its forecast, and the linear program it came from."""

    policy: Policy
    layout: Layout
    forecast: Forecast
    solution: Solution | None = None
    gains: Mapping[Tier, float] = field(default_factory=dict)  # more throughput from PRICED_BYTES more of a tier
    programs: int = 0
    simulations: int = 0


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


class _Search:
    def __init__(self, spec, hardware, workload, budgets, fixed, features):
        self.spec: ModelSpec = spec
        self.hardware: Hardware = hardware
        self.workload: Workload = workload
        self.budgets: Budgets = budgets
        self.fixed: dict[str, Any] = fixed
        self.programs = Programs(spec, hardware, workload, budgets, fixed, features)
        self._scores: dict[Policy, tuple[float, Layout] | None] = {}

    def run(self) -> Plan:
        choices = self.programs.solve_all()
        pure = [self.programs.solved(kv_home)[:1] for kv_home in self.programs.kv_homes if kv_home]
        rounded = ROUNDED if self.budgets.on_device else 2 * ROUNDED  # a CPU alone has no micro-batch counts to try
        for choice in [*choices[:rounded], *itertools.chain(*pure)]:
            for policy in self._rounded(choice):
                self._score(policy)
        if not self._layouts():  # fractions fitted, or nothing did: whole tensors and slabs of fewer sequences may
            for policy in self._smaller():
                if self._score(policy):
                    break
        if not self._layouts():
            refuse(self.spec, self._smallest(), self.workload, self.budgets)
        self._improve(self._layouts()[0][1].policy)
        job, layout = self._finalist()
        solution, gains = None, {}
        if choices:
            solution = choices[0].solution
            tiers = [tier for tier in (Tier.GPU, Tier.CPU) if self.budgets.of(tier)]
            gains = {tier: self.programs.gain(tier, choices[0]) for tier in tiers}
        return Plan(layout.policy, layout, job, solution, gains, len(self.programs), len(self._layouts()))

    # Whole tensors and micro-batches ------------------------------------------------------------------

    def _rounded(self, choice: Choice) -> Iterator[Policy]:
        """The solution as policies of several micro-batch counts and CPU shares."""
        sequences, solution = choice.policy.sequences_in_flight, choice.solution
        counts = MICRO_BATCHES if self.budgets.on_device or solution.kv_placement.disk > 0 else (1,)
        sizes = {-(-sequences // min(count, sequences)) for count in counts}
        if "attention_micro_batch" in self.fixed:
            sizes = {self.fixed["attention_micro_batch"]}
        share = self.fixed.get("cpu_attention_share", round(solution.cpu_attention_share, 4))
        for size in sorted(sizes):
            count = -(-sequences // size)
            on_gpu = solution.kv_placement.gpu * count
            for whole in sorted({int(on_gpu + 1e-6), math.ceil(on_gpu - 1e-6)}):
                yield self._as_policy(choice, size, share, whole)

    def _as_policy(self, choice: Choice, attention_micro_batch: int, share: float, on_gpu: int) -> Policy:
        """on_gpu: micro-batches whose KV lives on the device."""
        solution, policy = choice.solution, choice.policy
        count = -(-policy.sequences_in_flight // attention_micro_batch)
        on_disk = min(round(solution.kv_placement.disk * count), count - on_gpu)
        rounded = Placement(on_gpu / count, (count - on_gpu - on_disk) / count, on_disk / count)
        return dataclasses.replace(
            policy,
            attention_micro_batch=attention_micro_batch,
            kv=self.fixed.get("kv", rounded),
            cpu_attention_share=share,
            hidden=self.fixed.get("hidden", solution.hidden),
        )

    def _smaller(self) -> Iterator[Policy]:
        """Ever more modest policies, down to one sequence and one token a pass."""
        sequences = self.fixed.get("sequences_in_flight", self.programs.most_sequences)
        tokens = self.fixed.get("tokens_per_pass", max(USUAL_PASS_TOKENS, sequences))
        while True:
            policy = self.programs.discrete(sequences, tokens)
            yield policy
            if self.budgets.on_device and "kv" not in self.fixed:
                yield dataclasses.replace(policy, kv=Placement(1.0, 0.0))
            if sequences > 1 and "sequences_in_flight" not in self.fixed:
                sequences //= 2
            elif tokens > 1 and "tokens_per_pass" not in self.fixed:
                tokens //= 2
            else:
                return

    def _smallest(self) -> Policy:
        *_, smallest = self._smaller()
        return smallest

    def _score(self, policy: Policy) -> float | None:
        """Forecast seconds of a policy with its weights placed, times its size_cost; None where it does not fit."""
        key = policy
        if key not in self._scores:
            layout = fill_weights(self.spec, policy, self.workload, self.budgets, keep="weights" in self.fixed)
            self._scores[key] = None
            if layout is not None:
                policy = layout.policy
                seconds = forecast(layout, self.workload, self.hardware, QUICK).seconds
                self._scores[key] = self._scores[policy] = seconds * size_cost(policy), layout
        score = self._scores[key]
        return score and score[0]

    def _layouts(self) -> list[tuple[float, Layout]]:
        """Scored layouts, best first."""
        fitting = {score[1].policy: score for score in self._scores.values() if score}
        return sorted(fitting.values(), key=lambda score: score[0])

    def _finalist(self) -> tuple[Forecast, Layout]:
        """The best layout by a full look at those that a quick look cannot tell apart."""
        layouts = self._layouts()
        close = [layout for seconds, layout in layouts[:FINALISTS] if seconds <= layouts[0][0] * CLOSE]
        jobs = [(forecast(layout, self.workload, self.hardware, FULL), layout) for layout in close]
        return min(jobs, key=lambda pair: pair[0].seconds * size_cost(pair[1].policy))

    # Small moves --------------------------------------------------------------------------------------

    def _improve(self, policy: Policy) -> None:
        """Hill climbing over neighbouring policies: the first move that pays is made, until none does."""
        left = MOVES_TRIED
        improved = True
        while improved:
            improved = False
            for changes in self._moves(policy):
                moved = dataclasses.replace(policy, **changes)
                left -= moved not in self._scores
                if left < 0:
                    return
                score = self._score(moved)
                if score is not None and score < self._scores[policy][0] * (1 - WORTH):
                    policy = self._scores[moved][1].policy
                    improved = True

    def _moves(self, policy: Policy) -> Iterator[dict]:
        """Changes of what is not fixed, those that tend to matter most first."""
        sequences, tokens = policy.sequences_in_flight, policy.tokens_per_pass
        count = -(-sequences // policy.attention_micro_batch)
        free = {each.name for each in dataclasses.fields(Policy)} - set(self.fixed)
        many = {"sequences_in_flight", "attention_micro_batch", "tokens_per_pass"} <= free
        for factor in (2, 0.5, 1.5, 0.75) if many else ():
            near = min(round(sequences * factor), self.programs.most_sequences)
            if 1 <= near != sequences:
                change = {"sequences_in_flight": near, "attention_micro_batch": -(-near // count)}
                yield {**change, "tokens_per_pass": max(tokens, near)}
                if factor == 2:
                    yield {**change, "tokens_per_pass": 2 * tokens}
        if "tokens_per_pass" in free:
            yield {"tokens_per_pass": 2 * tokens}
            yield {"tokens_per_pass": max(tokens // 2, sequences)}
        if self.budgets.on_device:
            if "attention_micro_batch" in free:
                for size in {-(-sequences // (2 * count)), -(-sequences // max(count // 2, 1))}:
                    yield {"attention_micro_batch": size}
            if "cpu_attention_share" in free and policy.kv.gpu < 1:
                for step in (1, -1):
                    share = min(max(policy.cpu_attention_share + step / count, 0.0), 1.0)
                    yield {"cpu_attention_share": round(share, 4)}
            if "kv" in free:
                most = 1.0 - policy.kv.disk
                for share in {round(min(max(policy.kv.gpu + step / count, 0.0), most), 6) for step in (1, -1)}:
                    yield {"kv": Placement(share, most - share, policy.kv.disk)}
        if "token_micro_batch" in free:
            for rows in (256, 512, 1024, 2048):
                if rows <= tokens:
                    yield {"token_micro_batch": rows}
        for factor in (1.125, 0.875) if many else ():
            near = min(round(sequences * factor), self.programs.most_sequences)
            if 1 <= near != sequences:
                yield {"sequences_in_flight": near, "attention_micro_batch": -(-near // count)}
