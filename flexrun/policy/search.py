"""Finds the policy that ends a job soonest: enumerate the discrete choices, solve each placement, round, simulate.

A linear program (lp.py) gives each choice of sequences in flight and pass size its best placement and a time that no
rounding can beat by much. The best few are rounded to whole tensors and micro-batches, checked against the exact memory
account, and scored by the simulated job; the winner is improved by small moves while that pays.
"""

from __future__ import annotations

import dataclasses
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
from flexrun.policy.passes import Passes
from flexrun.policy.programs import CPU_ROWS, GPU_ROWS, USUAL_PASS_TOKENS, Choice, Programs, size_cost
from flexrun.workload import Workload

MICRO_BATCHES = (1, 4, 16)  # of attention, beside a device
FINALISTS, MOST_FINALISTS, CLOSE = 2, 8, 1.05  # policies looked at in full, within this factor of the best
WORTH = 0.005  # a move must save this share of the time
MOVES_TRIED = 36
MANY_ROUNDS = 12
DEEP_UNITS, SHALLOW_MORE = 200, 6
SIMPLE_PARTS = (8, 4, 2, 6, 3, 5, 7, 12, 16)
MANY_MORE = 0.1  # share of the weights, those on the device counted twice


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
        self._passes: dict[tuple, Passes] = {}
        self._best_score = float("inf")  # whose bound is above it need not be simulated

    def run(self) -> Plan:
        choices = self.programs.solve_all()
        for choice in choices:
            for policy in self._rounded(choice):
                self._score(policy)
        if not self._layouts():  # fractions fitted, or nothing did: whole tensors and slabs of fewer sequences may
            for policy in self._smaller():
                if self._score(policy):
                    break
        if not self._layouts():
            refuse(self.spec, self._smallest(), self.workload, self.budgets)
        self._improve()
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
        off_device = self.budgets.on_device and solution.kv_placement.gpu < 1 - 1e-6
        counts = MICRO_BATCHES if off_device or solution.kv_placement.disk > 0 else (1,)
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
            cpu_attention_share=share if "cpu_attention_share" in self.fixed else _whole(share, count - on_gpu),
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
            if self.programs.features.kv_on_disk and "kv" not in self.fixed:
                yield dataclasses.replace(policy, kv=Placement(0.0, 0.0, 1.0))
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
            scored = [self._scored(layout) for layout in self._filled(policy)]
            self._scores[key] = min(scored, key=lambda score: score[0]) if scored else None
            if scored:
                self._scores[self._scores[key][1].policy] = self._scores[key]
        score = self._scores[key]
        return score and score[0]

    def _scored(self, layout: Layout) -> tuple[float, Layout]:
        cost = size_cost(layout.policy)
        job = forecast(layout, self.workload, self.hardware, QUICK, self._best_score / cost, self._passes)
        self._best_score = min(self._best_score, job.seconds * cost)
        return job.seconds * cost, layout

    def _filled(self, policy: Policy) -> Iterator[Layout]:
        """The policy with its weights placed: beside whole rings, and beside the least if that keeps many more."""
        keep = "weights" in self.fixed or policy.weights != Placement()  # a move may say where they are
        layout = fill_weights(self.spec, policy, self.workload, self.budgets, keep=keep)
        if layout is None:
            return
        yield layout
        if keep:
            return
        if layout.policy.weights.disk + (layout.policy.weights.cpu if self.budgets.on_device else 0) > 0:
            least = fill_weights(self.spec, policy, self.workload, self.budgets, least_rings=True)
            if _resident(least) > _resident(layout) + MANY_MORE:
                yield least

    def _layouts(self) -> list[tuple[float, Layout]]:
        """Scored layouts, best first."""
        fitting = {score[1].policy: score for score in self._scores.values() if score}
        return sorted(fitting.values(), key=lambda score: score[0])

    def _finalist(self) -> tuple[Forecast, Layout]:
        """The best layout by a full look at those that a quick look cannot tell apart."""
        layouts = self._layouts()
        count = min(max(FINALISTS * DEEP_UNITS // len(layouts[0][1].placement.units), FINALISTS), MOST_FINALISTS)
        close = [layout for seconds, layout in layouts[:count] if seconds <= layouts[0][0] * CLOSE]
        jobs = [(forecast(layout, self.workload, self.hardware, FULL), layout) for layout in close]
        return min(jobs, key=lambda pair: pair[0].seconds * size_cost(pair[1].policy))

    # Small moves --------------------------------------------------------------------------------------

    def _improve(self) -> None:
        """Hill climbing from the best policy of each form: where KV lives and is attended, how large a pass is."""
        starts: dict[tuple, Policy] = {}
        for _, layout in self._layouts():
            policy = layout.policy
            form = (policy.kv.gpu > 0.5, policy.cpu_attention_share > 0.5)
            starts.setdefault(form, policy)
            starts.setdefault((*form, policy.tokens_per_pass), policy)
        units = len(self._layouts()[0][1].placement.units)  # the more, the more a look at a policy costs
        left = max(min(MOVES_TRIED * DEEP_UNITS // units, SHALLOW_MORE * MOVES_TRIED), MOVES_TRIED // 2)
        for policy in dict.fromkeys(sorted(starts.values(), key=lambda start: self._scores[start][0])):
            left = self._climb(policy, left)

    def _climb(self, policy: Policy, left: int) -> int:
        """From one policy to its neighbours: the first move that pays is made, until none does. Returns moves left."""
        improved = True
        while improved:
            improved = False
            for changes in self._moves(policy):
                moved = dataclasses.replace(policy, **{"weights": Placement(), **self.fixed, **changes})
                left -= moved not in self._scores
                if left < 0:
                    return 0
                score = self._score(moved)
                if score is not None and score < self._scores[policy][0] * (1 - WORTH):
                    policy = self._scores[moved][1].policy
                    improved = True
        return left

    def _moves(self, policy: Policy) -> Iterator[dict]:
        """Changes of what is not fixed, those that tend to matter most first."""
        sequences, tokens = policy.sequences_in_flight, policy.tokens_per_pass
        count = -(-sequences // policy.attention_micro_batch)
        free = {each.name for each in dataclasses.fields(Policy)} - set(self.fixed)
        many = {"sequences_in_flight", "attention_micro_batch", "tokens_per_pass"} <= free
        rounds = -(-len(self.workload) // sequences)
        for round_count in (
            (rounds - 1, rounds, rounds + 1) if many else ()
        ):  # even rounds leave no slot empty at the end
            near = -(-len(self.workload) // round_count) if 0 < round_count <= MANY_ROUNDS else sequences
            if near != sequences and near <= self.programs.most_sequences:
                yield {
                    "sequences_in_flight": near,
                    "attention_micro_batch": -(-near // count),
                    "tokens_per_pass": max(tokens, near),
                }
        for factor in (2, 0.5, 1.5, 0.75) if many else ():
            near = min(round(sequences * factor), self.programs.most_sequences)
            if 1 <= near != sequences:
                change = {"sequences_in_flight": near, "attention_micro_batch": -(-near // count)}
                yield {**change, "tokens_per_pass": max(tokens, near)}
                if factor == 2:
                    yield {**change, "tokens_per_pass": 2 * tokens}
        if "tokens_per_pass" in free:
            yield {"tokens_per_pass": 2 * tokens}
            if "token_micro_batch" in free:
                rows = GPU_ROWS if self.hardware.gpu else CPU_ROWS
                yield {"tokens_per_pass": 4 * tokens, "token_micro_batch": min(4 * policy.token_micro_batch, rows)}
            yield {"tokens_per_pass": max(tokens // 2, sequences)}
        if self.budgets.on_device:
            if "attention_micro_batch" in free:
                for size in {-(-sequences // (2 * count)), -(-sequences // max(count // 2, 1))}:
                    yield {"attention_micro_batch": size}
            if "cpu_attention_share" in free and policy.kv.gpu < 1:
                away = count - int(count * policy.kv.gpu + 1e-9)
                for step in (1, -1):
                    yield {"cpu_attention_share": _whole(policy.cpu_attention_share + step / away, away)}
            if "kv" in free:
                most = 1.0 - policy.kv.disk
                for share in {round(min(max(policy.kv.gpu + step / count, 0.0), most), 6) for step in (1, -1)}:
                    yield {"kv": Placement(share, most - share, policy.kv.disk)}
        if "token_micro_batch" in free:
            most = GPU_ROWS if self.budgets.on_device and self.hardware.gpu else 2 * CPU_ROWS
            for rows in (256, 512, 1024, 2048):
                if rows <= min(tokens, most):
                    yield {"token_micro_batch": rows}
        if "weights" in free:
            for weights in _near(policy.weights):
                yield {"weights": weights}
        for factor in (1.125, 0.875) if many else ():
            near = min(round(sequences * factor), self.programs.most_sequences)
            if 1 <= near != sequences:
                yield {"sequences_in_flight": near, "attention_micro_batch": -(-near // count)}


def _whole(share: float, count: int) -> float:
    """A share of ``count`` micro-batches as it will be: of whole ones."""
    return round(min(max(round(share * count), 0), count) / count, 4) if count else 1.0


def _near(weights: Placement) -> Iterator[Placement]:
    """Fewer weights on the fastest tier in use, and a little more: which tensors move changes how evenly they move.

    In simple fractions every so many tensors are alike, and the lanes fall into step.
    """
    faster = weights.gpu if weights.gpu else weights.cpu
    if not 0 < faster < 1:
        return
    shares = [math.floor(faster * parts - 1e-9) / parts for parts in SIMPLE_PARTS]
    shares += [faster + step for step in (-0.02, -0.04, -0.06, -0.1, 0.02)]
    for share in dict.fromkeys(round(min(max(share, 0.0), 1.0), 4) for share in shares):
        if weights.gpu:
            cpu = min(weights.cpu, 1.0 - share) if weights.disk else 1.0 - share
            yield Placement(share, cpu, max(1.0 - share - cpu, 0.0))
        else:
            yield Placement(0.0, share, 1.0 - share)


def _resident(layout: Layout) -> float:
    """Shares of the weights on the faster tiers, the fastest counted twice."""
    weights = layout.policy.weights
    return 2 * weights.gpu + weights.cpu
