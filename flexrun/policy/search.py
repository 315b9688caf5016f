"""Finds the policy that ends a job soonest: enumerate the discrete choices, solve each placement, round, simulate.

A linear program (lp.py) gives each choice of sequences in flight and pass size its best placement and a time that no
rounding can beat by much. The best few are rounded to whole tensors and micro-batches, checked against the exact memory
account, and scored by the simulated job; the winner is improved by small moves while that pays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flexrun.config import Placement, Policy
from flexrun.core import Tier
from flexrun.errors import ConfigError
from flexrun.hardware import Hardware
from flexrun.models.spec import ModelSpec
from flexrun.policy.compressed import priced
from flexrun.policy.features import RUNNABLE, Features
from flexrun.policy.fill import fill_weights, refuse
from flexrun.policy.forecast import CLOSE, FULL, QUICK, Effort, Forecast, forecast
from flexrun.policy.layout import Budgets, Layout
from flexrun.policy.lp import Solution
from flexrun.policy.moves import can_halve, micro_batches, moves, whole
from flexrun.policy.passes import Passes
from flexrun.policy.programs import USUAL_PASS_TOKENS, Choice, Programs, size_cost
from flexrun.workload import Workload

MICRO_BATCHES = (1, 4, 16)  # of attention, beside a device
MOST_FINALISTS, NEAR = 8, 1.1  # policies looked at again, within this factor of the best
NO_HOPE = 1.4  # a program that takes so much longer than a rounded policy will not be rounded to a better one
WORTH = 0.005  # a move must save this share of the time
ROUNDED_STEPS, QUICK_STEPS, CLOSE_STEPS = 60_000, 70_000, 70_000  # simulated before climbing, and while
AGAIN_STEPS = {CLOSE: 30_000, FULL: 30_000}
LOOK_STEPS, UNIT_STEPS = 400, 7  # that the rest of a look at a policy, and of each of its units, takes as long as
SEARCH_SHARE, SEARCH_SECONDS, MOST_EFFORT = 0.005, 3.0, 4.0  # of a job's time; of a usual search
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


class _Score(NamedTuple):
    """seconds: forecast, times size_cost."""

    seconds: float
    layout: Layout
    forecast: Forecast


def search(
    spec: ModelSpec,
    hardware: Hardware,
    workload: Workload,
    budgets: Budgets,
    *,
    fixed: Mapping[str, Any] | None = None,
    features: Features = RUNNABLE,
    effort: float = 1.0,
) -> Plan:
    """The best plan for a job.

    effort: how many times as long as usual to look; more finds better plans for some jobs, and takes as much longer.
    fixed: Policy fields that the user decided; only the others are chosen. features: what the plan may use.
    Raises NoFit where no policy fits the budgets, naming the one that is short, and ConfigError for a fixed field
    that is none.
    """
    if spec.latent is not None and budgets.on_device:  # compute-bound, and not run: see Policy.check_runnable
        fixed = {"cpu_attention_share": 0.0, **(fixed or {})}
    unknown = set(fixed or {}) - {each.name for each in dataclasses.fields(Policy)}
    if unknown:
        raise ConfigError(f"unknown policy field {sorted(unknown)[0]!r}", "see flexrun.Policy")
    with _without_collector():
        return _Search(spec, hardware, workload, budgets, dict(fixed or {}), features, effort).run()


def search_worth(
    spec: ModelSpec,
    hardware: Hardware,
    workload: Workload,
    budgets: Budgets,
    *,
    fixed: Mapping[str, Any] | None = None,
    features: Features = RUNNABLE,
) -> Plan:
    """The best plan that is found in seconds or, for a longer job, in SEARCH_SHARE of its time."""
    plan = search(spec, hardware, workload, budgets, fixed=fixed, features=features)
    effort = min(plan.forecast.seconds * SEARCH_SHARE / SEARCH_SECONDS, MOST_EFFORT)
    if effort < 2:
        return plan
    longer = search(spec, hardware, workload, budgets, fixed=fixed, features=features, effort=effort)
    return min(plan, longer, key=lambda each: each.forecast.seconds)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Simulated steps are no cycles, but so many that looking for some takes a quarter of a search's time.

    What is left at the end counts as old, so that it is not all looked through at once.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            if not frozen:
                gc.unfreeze()
            gc.enable()


class _Search:
    def __init__(self, spec, hardware, workload, budgets, fixed, features, effort):
        self.spec: ModelSpec = spec
        self.hardware: Hardware = hardware
        self.workload: Workload = workload
        self.budgets: Budgets = budgets
        self.fixed: dict[str, Any] = fixed
        self.programs = Programs(spec, hardware, workload, budgets, fixed, priced(features, spec, hardware, budgets))
        self._times = effort
        self._effort = QUICK
        self._scores: dict[Policy, _Score | None] = {}  # by what was asked, and by what it became
        self._simulations = 0
        self._steps_left = 0.0
        self._passes: dict[tuple, Passes] = {}
        self._best_score = float("inf")  # whose bound is above it need not be simulated

    def run(self) -> Plan:
        choices = self.programs.solve_all()
        self._steps_left = self._times * ROUNDED_STEPS
        for choice in sorted(choices, key=lambda choice: choice.seconds):
            if choice.seconds > NO_HOPE * self._best_score:
                break
            for place, policy in enumerate(self._rounded(choice)):
                if place == 0 or self._steps_left > 0:
                    self._score(policy)
        if not self._layouts():  # fractions fitted, or nothing did: whole tensors and slabs of fewer sequences may
            for policy in self._smaller():
                if self._score(policy):
                    break
        if not self._layouts():
            refuse(self.spec, self._smallest(), self.workload, self.budgets)
        self._improve()
        best = self._chosen()
        solution, gains = None, {}
        if choices:
            solution = choices[0].solution
            tiers = [tier for tier in (Tier.GPU, Tier.CPU) if self.budgets.of(tier)]
            gains = {tier: self.programs.gain(tier, choices[0]) for tier in tiers}
        return Plan(
            best.layout.policy, best.layout, best.forecast, solution, gains, len(self.programs), self._simulations
        )

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
            for whole_ones in sorted({int(on_gpu + 1e-6), math.ceil(on_gpu - 1e-6)}):
                policy = self._as_policy(choice, size, share, whole_ones)
                yield policy
                if can_halve(policy) and "half_batches" not in self.fixed and self.programs.features.half_batches:
                    yield dataclasses.replace(policy, half_batches=True)

    def _as_policy(self, choice: Choice, attention_micro_batch: int, share: float, on_gpu: int) -> Policy:
        """on_gpu: micro-batches whose KV lives on the device."""
        solution, policy = choice.solution, choice.policy
        count = -(-policy.sequences_in_flight // attention_micro_batch)
        on_disk = min(math.ceil(solution.kv_placement.disk * count - 1e-6), count - on_gpu)  # what is over fits no RAM
        rounded = Placement(on_gpu / count, (count - on_gpu - on_disk) / count, on_disk / count)
        return dataclasses.replace(
            policy,
            attention_micro_batch=attention_micro_batch,
            kv=self.fixed.get("kv", rounded),
            cpu_attention_share=share if "cpu_attention_share" in self.fixed else whole(share, count - on_gpu),
            hidden=self.fixed.get("hidden", solution.hidden),
            half_batches=self.fixed.get("half_batches", False),
        )

    def _smaller(self) -> Iterator[Policy]:
        """Ever more modest policies, down to one sequence and one token a pass."""
        sequences = self.fixed.get("sequences_in_flight", self.programs.most_sequences)
        tokens = self.fixed.get("tokens_per_pass", max(USUAL_PASS_TOKENS, sequences))
        while True:
            for weight_bits, kv_bits in itertools.product(*map(self.programs.bits, ("weight_bits", "kv_bits"))):
                policy = self.programs.discrete(sequences, tokens, weight_bits=weight_bits, kv_bits=kv_bits)
                yield policy
                if self.budgets.on_device and "kv" not in self.fixed:
                    yield dataclasses.replace(policy, kv=Placement(1.0, 0.0))
                if self.programs.features.kv_on_disk and "kv" not in self.fixed:
                    alone = self.fixed.get("attention_micro_batch", 1)  # least staging
                    yield dataclasses.replace(policy, kv=Placement(0.0, 0.0, 1.0), attention_micro_batch=alone)
            if sequences > 1 and "sequences_in_flight" not in self.fixed:
                sequences //= 2
            elif tokens > 1 and "tokens_per_pass" not in self.fixed:
                tokens //= 2
            else:
                return

    def _smallest(self) -> Policy:
        *_, smallest = self._smaller()
        return smallest

    def _score(self, policy: Policy) -> _Score | None:
        """Of a policy with its weights placed; None where it does not fit."""
        if policy not in self._scores:
            scores = [self._scored(layout) for layout in self._filled(policy)]
            best = min(scores, key=lambda score: score.seconds) if scores else None
            self._scores[policy] = best
            if best:
                self._scores[best.layout.policy] = best
        return self._scores[policy]

    def _scored(self, layout: Layout) -> _Score:
        cost = size_cost(layout.policy)
        job = forecast(layout, self.workload, self.hardware, self._effort, self._best_score / cost, self._passes)
        self._simulations += 1
        self._steps_left -= job.simulated_steps + LOOK_STEPS + UNIT_STEPS * len(layout.placement.units)
        self._best_score = min(self._best_score, job.seconds * cost)
        return _Score(job.seconds * cost, layout, job)

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

    def _layouts(self) -> list[_Score]:
        """Scored layouts, best first."""
        fitting = {score.layout.policy: score for score in self._scores.values() if score}
        return sorted(fitting.values(), key=lambda score: score.seconds)

    # Small moves --------------------------------------------------------------------------------------

    def _improve(self) -> None:
        """Climb by quick looks from the best policy of each form, then by closer ones from what those find near."""
        self._steps_left = self._times * QUICK_STEPS
        for policy in _best_of_forms(self._layouts()):
            self._climb(policy, leave=self._steps_left // 2)  # for the other forms
        self._look_again(CLOSE, lambda scores: [*_best_of_counts(scores), *_best_of_forms(scores)])
        self._steps_left = self._times * CLOSE_STEPS
        self._climb(self._layouts()[0].layout.policy)

    def _chosen(self) -> _Score:
        """The best by a full look at those that a closer one cannot tell apart: it sees least of many micro-batches."""
        self._look_again(FULL, _best_of_counts)
        return self._layouts()[0]

    def _look_again(self, effort: Effort, first: Callable[[list[_Score]], list[Policy]]) -> None:
        """Score anew, with more effort, what is near the best: what ``first`` picks out of it, then others."""
        layouts = self._layouts()
        close = {score.layout.policy: score.layout for score in layouts if score.seconds <= layouts[0].seconds * NEAR}
        picked = [policy for policy in first(layouts) if policy in close]
        self._effort, self._best_score, self._scores = effort, float("inf"), {}
        self._steps_left = self._times * AGAIN_STEPS[effort]
        for place, policy in enumerate(list(dict.fromkeys([*picked, *close]))[:MOST_FINALISTS]):
            if place == 0 or self._steps_left > 0:
                self._scores[policy] = self._scored(close[policy])

    def _climb(self, policy: Policy, leave: int = 0) -> None:
        """From one policy to its neighbours: the first move that pays is made, until none does or steps run out."""
        improved = True
        while improved:
            improved = False
            for changes in moves(policy, self.programs, closely=self._effort is CLOSE):
                moved = dataclasses.replace(policy, **{"weights": Placement(), **self.fixed, **changes})
                if moved.half_batches and "half_batches" not in self.fixed and not can_halve(moved):
                    moved = dataclasses.replace(moved, half_batches=False)
                if self._steps_left <= leave:
                    return
                score = self._score(moved)
                if score is not None and score.seconds < self._scores[policy].seconds * (1 - WORTH):
                    policy = score.layout.policy
                    improved = True


def _best_of_forms(scores: list[_Score]) -> list[Policy]:
    """Of scores, best first, the best of each form: where KV lives and is attended, how large a pass is."""
    best: dict[tuple, Policy] = {}
    for score in scores:
        policy = score.layout.policy
        bits = policy.weight_bits, policy.kv_bits
        form = (policy.kv.gpu > 0.5, policy.cpu_attention_share > 0.5, policy.half_batches, *bits)
        best.setdefault(form, policy)
        best.setdefault((*form, policy.tokens_per_pass), policy)
    order = {score.layout.policy: place for place, score in enumerate(scores)}
    return sorted(dict.fromkeys(best.values()), key=order.__getitem__)


def _best_of_counts(scores: list[_Score]) -> list[Policy]:
    """Of scores, best first, the best of each number of micro-batches."""
    best: dict[int, Policy] = {}
    for score in scores:
        best.setdefault(micro_batches(score.layout.policy), score.layout.policy)
    return list(best.values())


def _resident(layout: Layout) -> float:
    """Shares of the weights on the faster tiers, the fastest counted twice."""
    weights = layout.policy.weights
    return 2 * weights.gpu + weights.cpu
