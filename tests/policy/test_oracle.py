"""The search against brute force: no policy of a whole grid, scored the same way, ends the job much sooner."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy
import pytest
from planned_models import LAPTOP, NO_GPU, T4, planned

from flexrun.config import Placement, Policy
from flexrun.hardware import Hardware
from flexrun.models.spec import ModelSpec
from flexrun.placement import WeightPlacement, kv_micro_batches, place_weights
from flexrun.policy.cost import StepCosts
from flexrun.policy.forecast import FULL, QUICK, Effort, forecast
from flexrun.policy.layout import Budgets, Layout, room_for
from flexrun.policy.moves import can_halve
from flexrun.policy.passes import job_passes
from flexrun.policy.programs import size_cost
from flexrun.policy.search import search
from flexrun.workload import Workload

EIGHTHS = 8
NEAR = 1.02
QUICK_ERROR = 1.12  # what a quick forecast may be off


Sizes = tuple[tuple[int, ...], tuple[int, ...]]


class Grid:
    """Every policy of a small space, with a bound that its forecast cannot beat."""

    def __init__(self, spec: ModelSpec, machine: Hardware, job: Workload, budgets: Budgets, sizes: Sizes):
        self.spec, self.machine, self.job, self.budgets, self.sizes = spec, machine, job, budgets, sizes
        on_device = budgets.on_device
        fractions = [
            Placement(gpu / EIGHTHS, cpu / EIGHTHS, (EIGHTHS - gpu - cpu) / EIGHTHS)
            for gpu in (range(EIGHTHS + 1) if on_device else (0,))
            for cpu in range(EIGHTHS + 1 - gpu)
        ]
        self.placed: dict[Placement, WeightPlacement] = {
            weights: place_weights(spec, Policy(weights=weights), on_device=on_device) for weights in fractions
        }

    def policies(self) -> Iterator[Policy]:
        """All but the weights."""
        on_device = self.budgets.on_device
        counts = (1, 4, 8) if on_device else (1,)
        for sequences, tokens, count in itertools.product(*self.sizes, counts):
            if not count <= sequences <= min(len(self.job), tokens):
                continue
            for on_gpu in sorted({0, count // 2, count}) if on_device else (0,):
                for share in (0.0, 0.5, 1.0) if on_device and on_gpu < count else (1.0,):
                    policy = Policy(
                        sequences_in_flight=sequences,
                        tokens_per_pass=tokens,
                        attention_micro_batch=-(-sequences // count),
                        token_micro_batch=min(tokens, 2048 if on_device and self.machine.gpu else 512),
                        kv=Placement(on_gpu / count, 1 - on_gpu / count),
                        cpu_attention_share=share,
                    )
                    yield policy
                    if on_device and can_halve(policy):
                        yield dataclasses.replace(policy, half_batches=True)

    def bounded(self) -> Iterator[tuple[float, Policy]]:
        """(score that the policy cannot beat, policy)."""
        for policy in self.policies():
            places = kv_micro_batches(policy, room_for(policy, self.job), on_device=self.budgets.on_device)
            shapes = list(job_passes(self.job, policy, places))
            lanes = None
            for weights, placement in self.placed.items():
                costs = StepCosts(self.spec, policy, placement, self.machine, on_device=self.budgets.on_device)
                first = numpy.array(list(costs.lane_seconds(shapes[0]).values()))
                if lanes is None or not self.budgets.on_device:  # beside a device, weights take each pass the same
                    lanes = numpy.array([list(costs.lane_seconds(shape).values()) for shape in shapes])
                seconds = float((lanes + (first - lanes[0])).max(axis=1).sum())
                whole = dataclasses.replace(policy, weights=weights)
                yield seconds * size_cost(whole), whole

    def better_than(self, score: float) -> tuple[float, Policy] | None:
        """A policy that scores better than ``score``, if there is one."""
        for bound, policy in sorted(self.bounded(), key=lambda pair: pair[0]):
            if bound >= score:
                return None
            layout = Layout.of(self.spec, policy, self.job, self.budgets)
            if layout.fits and self._score(layout, QUICK) < QUICK_ERROR * score:
                told = self._score(layout, FULL)
                if told < score:
                    return told, policy
        return None

    def _score(self, layout: Layout, effort: Effort) -> float:
        return forecast(layout, self.job, self.machine, effort).seconds * size_cost(layout.policy)


MODEL = planned(
    "llama",
    num_hidden_layers=8,
    hidden_size=2048,
    intermediate_size=5632,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=32000,
)
TINY = planned("gqa", num_hidden_layers=12, hidden_size=768, intermediate_size=2048)
TINIER = planned("gqa", num_hidden_layers=5, hidden_size=768, intermediate_size=2048)
UNIFORM = Workload.uniform
LENGTHS = numpy.random.RandomState(1)
RAGGED = Workload.of(numpy.sort(LENGTHS.randint(16, 600, 64))[::-1].tolist(), LENGTHS.randint(4, 48, 64).tolist())
MB, GB = 10**6, 10**9

LARGE = ((16, 32, 64, 128), (512, 2048, 8192))  # sequences in flight, tokens a pass
SMALL = ((16, 32, 64), (512, 2048))
CASES = {
    "some weights stay": (MODEL, T4, UNIFORM(128, 256, 16), Budgets(4 * GB, 8 * GB // 10), LARGE),
    "weights or KV": (MODEL, T4, UNIFORM(128, 256, 16), Budgets(4 * GB, 12 * GB // 10), LARGE),
    "weights and some KV": (MODEL, T4, UNIFORM(128, 256, 16), Budgets(4 * GB, 2 * GB), LARGE),
    "all fits": (MODEL, T4, UNIFORM(128, 256, 16), Budgets(4 * GB, 5 * GB), LARGE),
    "GPU and disk": (MODEL, T4, UNIFORM(64, 256, 16), Budgets(9 * GB // 10, 6 * GB // 10), SMALL),
    "ragged": (MODEL, T4, RAGGED, Budgets(4 * GB, GB), SMALL),
    "scoring": (MODEL, T4, UNIFORM(64, 512, 1), Budgets(2 * GB, GB // 2), LARGE),
    "in RAM": (TINY, LAPTOP, UNIFORM(64, 128, 16), Budgets(2 * GB), LARGE),
    "half on disk": (TINY, LAPTOP, UNIFORM(64, 128, 16), Budgets(TINY.weight_bytes * 3 // 4), LARGE),
    "most on disk": (TINY, LAPTOP, UNIFORM(64, 128, 16), Budgets(TINY.weight_bytes // 2), LARGE),
    "ragged on disk": (TINY, LAPTOP, RAGGED, Budgets(TINY.weight_bytes * 3 // 4), LARGE),
    "large CPU, disk": (MODEL, NO_GPU, UNIFORM(64, 256, 16), Budgets(MODEL.weight_bytes * 3 // 4), LARGE),
    "emulated": (TINIER, LAPTOP, UNIFORM(32, 128, 8), Budgets(GB, 85 * MB), ((32,), (512,))),
}


SLOW = {"some weights stay", "weights or KV", "weights and some KV", "ragged", "emulated"}  # more than a few seconds


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_no_policy_of_a_grid_is_better(case):
    spec, machine, job, budgets, sizes = CASES[case]
    plan = search(spec, machine, job, budgets)
    score = plan.forecast.seconds * size_cost(plan.policy)
    better = Grid(spec, machine, job, budgets, sizes).better_than(score / NEAR)
    assert better is None, f"{score / better[0] - 1:.1%} slower than {better[1]}: {plan.policy}"
