"""How long a whole job takes under a policy: its passes, a simulated timeline of some of them, and the sum.

A job has up to millions of passes that change slowly. Long jobs are forecast from evenly drawn rows: the start and
the tail of a job once, its steady middle as often as it comes. Of the passes looked at, windows are simulated step by
step; between windows the ratio of simulated time to the busiest lane's time is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from flexrun.config import Policy
from flexrun.core import Lane
from flexrun.hardware import Hardware
from flexrun.policy.cost import StepCosts
from flexrun.policy.layout import Layout
from flexrun.policy.passes import job_passes
from flexrun.policy.simulator import simulate_layout
from flexrun.steps import PassShape
from flexrun.workload import Workload

WINDOW_PASSES = 3  # simulated together; the first only fills the pipeline


@dataclass(frozen=True)
class Effort:
    """How much of a job is looked at: passes planned in full, and steps simulated."""

    passes: int = 1200
    steps: int = 40_000


QUICK = Effort(passes=250, steps=4_000)  # for ranking many policies
FULL = Effort()


@dataclass(frozen=True)
class Forecast:
    """Seconds and tokens of a whole job. lane_seconds: what each lane works, waiting left out.

    prefill_seconds and decode_seconds split each pass by its tokens, as a run's summary does.
    """

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    passes: float
    prompt_tokens: int
    generated_tokens: int
    lane_seconds: dict[Lane, float]

    @property
    def generated_tokens_per_second(self) -> float:
        return self.generated_tokens / self.seconds

    @property
    def total_tokens_per_second(self) -> float:
        return (self.generated_tokens + self.prompt_tokens) / self.seconds

    @property
    def binding_lane(self) -> Lane:
        return max(self.lane_seconds, key=self.lane_seconds.__getitem__)

    @property
    def bound_seconds(self) -> float:
        """Ideal time of the busiest lane: no schedule of the same policy can be faster."""
        return self.lane_seconds[self.binding_lane]

    def utilisation(self, lane: Lane) -> float:
        return self.lane_seconds[lane] / self.seconds


def forecast(layout: Layout, workload: Workload, hardware: Hardware, effort: Effort = FULL) -> Forecast:
    """Time of a job whose sequences all run to ``max_tokens``. Raises nothing of its own: check the layout first."""
    rows = len(workload)
    costs = StepCosts(layout.spec, layout.policy, layout.placement, hardware, on_device=layout.on_device)
    shrink = passes_guess(layout.policy, workload) / effort.passes
    if shrink <= 1 or rows < 4:
        return _forecast_rows(layout, workload, costs, hardware, effort)
    # T(small) holds start and tail; T(large) - T(small) is the steady middle of the rows between.
    large_rows = max(int(rows / shrink), min(rows, 3 * layout.policy.sequences_in_flight), 2)
    small_rows = max(large_rows // 2, 1)
    if large_rows >= rows:
        return _forecast_rows(layout, workload, costs, hardware, effort)
    large = _forecast_rows(layout, drawn(workload, large_rows), costs, hardware, effort)
    small = _forecast_rows(layout, drawn(workload, small_rows), costs, hardware, effort)
    times = (rows - large_rows) / (large_rows - small_rows)
    return _combine(workload, large, small, times)


def drawn(workload: Workload, count: int) -> Workload:
    """``count`` rows at even distances, in order."""
    rows = ((numpy.arange(count) + 0.5) * len(workload) / count).astype(numpy.int64)
    return Workload(workload.prompt_tokens[rows], workload.max_tokens[rows])


def _combine(workload: Workload, large: Forecast, small: Forecast, times: float) -> Forecast:
    def grown(name: str) -> float:
        return getattr(large, name) + times * (getattr(large, name) - getattr(small, name))

    lanes = {
        lane: seconds + times * (seconds - small.lane_seconds[lane]) for lane, seconds in large.lane_seconds.items()
    }
    return Forecast(
        grown("seconds"),
        grown("prefill_seconds"),
        grown("decode_seconds"),
        grown("passes"),
        int(workload.prompt_tokens.sum()),
        int(workload.max_tokens.sum()),
        lanes,
    )


def passes_guess(policy: Policy, workload: Workload) -> float:
    """Passes of a job, roughly: limited by slots or by the tokens of a pass, whichever is slower."""
    generated, prompts = float(workload.max_tokens.sum()), float(workload.prompt_tokens.sum())
    slots = min(policy.sequences_in_flight, max(len(workload), 1))
    return max(generated / slots, (prompts + generated) / policy.tokens_per_pass)


def _forecast_rows(
    layout: Layout, workload: Workload, costs: StepCosts, hardware: Hardware, effort: Effort
) -> Forecast:
    """Forecast of exactly these rows."""
    passes = list(job_passes(workload, layout.policy, layout.micro_batches))
    lanes = [costs.lane_seconds(shape) for shape in passes]
    pass_seconds = _pass_seconds(layout, hardware, passes, lanes, effort)
    prefill = decode = 0.0
    for shape, seconds in zip(passes, pass_seconds):
        share = sum(micro_batch.decode_tokens for micro_batch in shape.micro_batches) / shape.tokens
        decode += seconds * share
        prefill += seconds * (1 - share)
    return Forecast(
        prefill + decode,
        prefill,
        decode,
        len(passes),
        int(workload.prompt_tokens.sum()),
        int(workload.max_tokens.sum()),
        {lane: sum(each[lane] for each in lanes) for lane in Lane},
    )


def _pass_seconds(
    layout: Layout, hardware: Hardware, passes: Sequence[PassShape], lanes: list[dict[Lane, float]], effort: Effort
) -> numpy.ndarray:
    """Seconds of each pass, simulated or interpolated."""
    busiest = numpy.array([max(each.values()) for each in lanes])
    units = sum(1 for unit in layout.placement.units if unit.disk_bytes + unit.host_bytes)
    steps_a_pass = layout.spec.num_layers * (3 + 3 * len(layout.micro_batches)) + 2 * units
    affordable = max(effort.steps // steps_a_pass, 2 * WINDOW_PASSES)
    if affordable >= len(passes):
        # Moving hidden states is not scheduled yet: it counts where its lane alone would take longer.
        return numpy.maximum(simulate_layout(layout, hardware, passes).pass_seconds, busiest)
    windows = max(affordable // WINDOW_PASSES, 2)
    starts = numpy.unique(numpy.linspace(0, len(passes) - WINDOW_PASSES, windows).astype(int))
    ratios = []
    for start in starts:
        window = slice(start, start + WINDOW_PASSES)
        simulated = simulate_layout(layout, hardware, passes[window]).pass_seconds
        warm = slice(start + 1, start + WINDOW_PASSES)
        ratios.append(sum(simulated[1:]) / busiest[warm].sum())
    places = starts + WINDOW_PASSES / 2
    return busiest * numpy.maximum(numpy.interp(numpy.arange(len(passes)), places, ratios), 1.0)
