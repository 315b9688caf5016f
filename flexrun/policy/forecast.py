"""How long a whole job takes under a policy: its passes, a simulated timeline of some of them, and the sum.

A job has up to millions of passes that change slowly. Long jobs are forecast from evenly drawn rows: the start and
the tail of a job once, its steady middle as often as it comes. Of the passes looked at, some of each kind are simulated
step by step; the others follow from those: a fit of how their lanes take turns, and what it misses on the nearest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import scipy.optimize

from flexrun.config import Policy
from flexrun.core import Lane, Tier
from flexrun.hardware import Hardware
from flexrun.placement import part_tokens
from flexrun.policy.cost import StepCosts
from flexrun.policy.layout import Layout
from flexrun.policy.passes import Passes, job_passes
from flexrun.policy.simulator import simulate_layout
from flexrun.workload import Workload


@dataclass(frozen=True)
class Effort:
    """How much of a job is looked at.

    passes: planned in full, fewer where sequences end within SHORT of them, for what is planned is each one's coming
    and going. steps: simulated. layers, units: most layers of a deep model that are simulated for all,
    and most weight units in them (but never fewer than MIN_LAYERS).
    """

    passes: int
    steps: int
    layers: int
    units: int

    def layers_of(self, layout: Layout) -> int:
        units_a_layer = len(layout.placement.units) / layout.spec.num_layers
        many_steps = any(place.home is Tier.DISK for place in layout.micro_batches)  # each is read and written as well
        most = self.layers // 2 if many_steps else self.layers
        return min(max(min(most, int(self.units / units_a_layer)), MIN_LAYERS), layout.spec.num_layers)


MIN_LAYERS = 4
SHORT = 10  # passes
GROUPS_DRAWN = 4  # at least, where some of the groups that share a prefix are drawn
NEAR = 0.08  # of the longest pass: passes that differ less are alike
QUICK = Effort(passes=240, steps=3_000, layers=8, units=64)  # for ranking many policies
CLOSE = Effort(passes=480, steps=6_000, layers=16, units=64)  # for those that are near the best
FULL = Effort(passes=1000, steps=10_000, layers=40, units=128)


@dataclass(frozen=True)
class Forecast:
    """Seconds and tokens of a whole job. lane_seconds: what each lane works, waiting left out.

    prompt_tokens: those that are run; of what prompts share, each once.
    prefill_seconds and decode_seconds split each pass by its tokens, as a run's summary does. simulated_steps: how many
    it took to tell.
    """

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    passes: float
    prompt_tokens: int
    generated_tokens: int
    lane_seconds: dict[Lane, float]
    simulated_steps: int = 0

    @property
    def generated_tokens_per_second(self) -> float:
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    @property
    def total_tokens_per_second(self) -> float:
        return (self.generated_tokens + self.prompt_tokens) / self.seconds if self.seconds else 0.0

    @property
    def binding_lane(self) -> Lane:
        return max(self.lane_seconds, key=self.lane_seconds.__getitem__)

    @property
    def bound_seconds(self) -> float:
        """Ideal time of the busiest lane: no schedule of the same policy can be faster."""
        return self.lane_seconds[self.binding_lane]

    def utilisation(self, lane: Lane) -> float:
        return self.lane_seconds[lane] / self.seconds if self.seconds else 0.0


def forecast(
    layout: Layout,
    workload: Workload,
    hardware: Hardware,
    effort: Effort = FULL,
    limit_seconds: float = float("inf"),
    known: dict[tuple, Passes] | None = None,
) -> Forecast:
    """Time of a job whose sequences all run to ``likely_tokens``. Raises nothing of its own: check the layout first.

    limit_seconds: where the busiest lanes alone take longer, their time is the answer and nothing is simulated.
    known: passes of this workload that other policies had; filled here.
    """
    known = {} if known is None else known
    workload = workload if layout.prefix_tokens else workload.apart()
    rows = len(workload)
    costs = StepCosts(layout.spec, layout.policy, layout.placement, hardware, on_device=layout.on_device)
    shrink = passes_guess(layout.policy, workload) / effort.passes
    slots = layout.policy.sequences_in_flight
    steady_rows = min(int(rows / max(shrink, 1.0)), slots * effort.passes // SHORT)
    large_rows = min(max(steady_rows, 3 * slots, 2), rows)  # a start, a steady middle and a tail
    parts = [_Part.of(drawn(workload, large_rows), layout, costs, known)]
    if large_rows < rows and len(parts[0].passes):
        # T(small) holds start and tail; T(large) - T(small) is the steady middle of the rows between. Rows of the one
        # are among those of the other, so that it matters little which are drawn.
        parts.append(_Part.of(drawn(parts[0].workload, max(large_rows // 2, 1)), layout, costs, known))
    bound = _whole(workload, [part.forecast(_no_waiting) for part in parts])
    if bound.seconds > limit_seconds or not len(parts[0].passes):
        return bound
    seconds_of, steps = _simulated(layout, hardware, parts[0].passes, parts[0].lanes, effort)
    job = _whole(workload, [part.forecast(seconds_of) for part in parts])
    return dataclasses.replace(job, simulated_steps=steps)


def _whole(workload: Workload, parts: Sequence[Forecast]) -> Forecast:
    return parts[0] if len(parts) == 1 else _combine(workload, *parts)


def drawn(workload: Workload, count: int) -> Workload:
    """``count`` rows at even distances, in order. Groups that share a prefix are drawn whole, unless they are large, so
    that as much is shared of the part as of the whole; the rows may then be a few more or less."""
    if count == len(workload):
        return workload
    if workload.shares:
        rows = _drawn_groups(workload.groups, count)
        if 0 < len(rows) < len(workload):
            return workload.rows(rows)
    rows = ((numpy.arange(count) + 0.5) * len(workload) / count).astype(numpy.int64)
    return workload.rows(rows)


def _drawn_groups(groups: numpy.ndarray, count: int) -> numpy.ndarray:
    """groups: int64 [rows], of each row the number of its group, from 0, in order. Returns rows, int64."""
    rows, sizes = len(groups), numpy.bincount(groups)
    large = sizes[groups] > max(count // GROUPS_DRAWN, 1)
    units = numpy.cumsum(numpy.diff(groups, prepend=-1).astype(bool) | large) - 1  # rows of large ones by themselves
    sizes = numpy.bincount(units)
    _, kinds = numpy.unique(sizes, return_inverse=True)
    by_kind = numpy.argsort(kinds, kind="stable")
    starts = numpy.concatenate([[0], numpy.cumsum(numpy.bincount(kinds))])[:-1]
    place = numpy.empty(len(sizes), dtype=numpy.int64)  # of a unit among those of its size
    place[by_kind] = numpy.arange(len(sizes)) - starts[kinds[by_kind]]
    share = count / rows
    chosen = numpy.floor((place + 1.5) * share) > numpy.floor((place + 0.5) * share)
    return numpy.flatnonzero(chosen[units])


def _combine(workload: Workload, large: Forecast, small: Forecast) -> Forecast:
    """What a part takes more than a smaller one, as often as the job has tokens more, of prompts and of answers."""
    prompt_tokens, generated_tokens = workload.prefill_tokens, int(workload.likely_tokens.sum())
    prompts = (prompt_tokens - large.prompt_tokens) / (large.prompt_tokens - small.prompt_tokens)
    answers = (generated_tokens - large.generated_tokens) / (large.generated_tokens - small.generated_tokens)
    prefill = large.prefill_seconds + prompts * (large.prefill_seconds - small.prefill_seconds)
    decode = large.decode_seconds + answers * (large.decode_seconds - small.decode_seconds)
    times = (prefill + decode - large.seconds) / (large.seconds - small.seconds)
    lanes = {
        lane: seconds + times * (seconds - small.lane_seconds[lane]) for lane, seconds in large.lane_seconds.items()
    }
    passes = large.passes + answers * (large.passes - small.passes)
    return Forecast(prefill + decode, prefill, decode, passes, prompt_tokens, generated_tokens, lanes)


def passes_guess(policy: Policy, workload: Workload) -> float:
    """Passes of a job, roughly: limited by slots or by the tokens of a pass, whichever is slower."""
    generated, prompts = float(workload.likely_tokens.sum()), float(workload.prefill_tokens)
    slots = min(policy.sequences_in_flight, max(len(workload), 1))
    return max(generated / slots, (prompts + generated) / policy.tokens_per_pass)


PassSeconds = Callable[[numpy.ndarray], numpy.ndarray]  # lane seconds [passes, lanes] -> seconds with all waiting


@dataclass(frozen=True, eq=False)
class _Part:
    """Some rows of a job, their passes, and what each pass asks of each lane: seconds [passes, lanes]."""

    workload: Workload
    passes: Passes
    lanes: numpy.ndarray

    @classmethod
    def of(cls, workload: Workload, layout: Layout, costs: StepCosts, known: dict[tuple, Passes]) -> _Part:
        policy, places = layout.policy, layout.micro_batches
        key = (len(workload), policy.sequences_in_flight, policy.tokens_per_pass, policy.attention_micro_batch)
        key += (part_tokens(policy), policy.key_value_bits is not None)
        key += tuple((place.capacity_tokens, place.device_share, place.shared) for place in places)
        if key not in known:
            known[key] = job_passes(workload, policy, places)
        passes = known[key].at(places)
        return cls(workload, passes, costs.lane_seconds_of(passes))

    def forecast(self, seconds_of: PassSeconds) -> Forecast:
        """Of exactly these rows, given how long passes take."""
        if not len(self.passes):  # no row fits the cache: a run refuses them all
            return Forecast(0.0, 0.0, 0.0, 0, 0, 0, dict.fromkeys(Lane, 0.0))
        pass_seconds = numpy.maximum(seconds_of(self.lanes), self.lanes.max(axis=1))  # no lane ends before its work
        shares = self.passes.decode_tokens / self.passes.tokens
        decode, total = float((pass_seconds * shares).sum()), float(pass_seconds.sum())
        return Forecast(
            total,
            total - decode,
            decode,
            len(self.passes),
            self.workload.prefill_tokens,
            int(self.workload.likely_tokens.sum()),
            dict(zip(Lane, self.lanes.sum(axis=0).tolist())),
        )


def _no_waiting(lanes: numpy.ndarray) -> numpy.ndarray:
    return lanes.max(axis=1)


def _simulated(
    layout: Layout, hardware: Hardware, passes: Passes, lanes: numpy.ndarray, effort: Effort
) -> tuple[PassSeconds, int]:
    """Simulate all passes, or some that differ as much as possible; how long passes take, and the steps simulated.

    Each runs behind the pass before it, which fills the pipeline, and twice, as neighbours in a job are alike.
    """
    units = sum(1 for unit in layout.placement.units if unit.disk_bytes + unit.host_bytes)
    on_disk = sum(place.home is Tier.DISK for place in layout.micro_batches)
    split = sum(place.device_share > 0 for place in layout.micro_batches)
    steps_a_layer = 3 + 3 * len(layout.micro_batches) + 2 * on_disk + 2 * split
    steps_a_layer += 3 * (layout.placement.cpu_experts > 0)
    steps_a_pass = layout.spec.num_layers * steps_a_layer + 2 * units
    if steps_a_pass * len(passes) <= effort.steps:
        timeline = simulate_layout(layout, hardware, passes)
        seconds = numpy.array(timeline.pass_seconds)
        ratios = seconds / lanes.max(axis=1)
        return (
            lambda asked: seconds if asked is lanes else asked.max(axis=1) * _of_nearest(asked, lanes, ratios)
        ), timeline.steps
    layers = effort.layers_of(layout)
    if layers < layout.spec.num_layers:
        steps_a_pass = steps_a_pass * layers // layout.spec.num_layers
        layout = layout.shallow(layers)
    costs = StepCosts(layout.spec, layout.policy, layout.placement, hardware, on_device=layout.on_device)
    chosen = _most_different(lanes, max(effort.steps // (3 * steps_a_pass), 4))
    seconds, steps = [], 0
    for place in chosen:
        window = [passes.shape(number) for number in (max(place - 1, 0), place, place)]
        timeline = simulate_layout(layout, hardware, window)
        seconds.append(sum(timeline.pass_seconds[1:]) / 2)
        steps += timeline.steps
    known = lanes[chosen]
    # Of a model of which some layers are simulated, the ratio to the busiest lane holds for all of them.
    seconds = known.max(axis=1) * numpy.array(seconds) / costs.lane_seconds_of(passes.chosen(chosen)).max(axis=1)
    weights, _ = scipy.optimize.nnls(known, seconds)
    ratios = seconds / _taking_turns(known, weights)
    return (lambda asked: _taking_turns(asked, weights) * _of_nearest(asked, known, ratios)), steps


def _taking_turns(lanes: numpy.ndarray, weights: numpy.ndarray) -> numpy.ndarray:
    """Seconds of passes whose lanes partly wait for each other, but never less than the busiest lane's."""
    return numpy.maximum(lanes @ weights, lanes.max(axis=1))


def _most_different(lanes: numpy.ndarray, count: int) -> list[int]:
    """Passes that leave no other far away: each next one is the farthest from those chosen (Gonzalez 1985)."""
    chosen = [int(lanes.max(axis=1).argmax())]
    distances = numpy.abs(lanes - lanes[chosen[0]]).sum(axis=1)
    while len(chosen) < min(count, len(lanes)) and distances.max() > NEAR * lanes[chosen[0]].max():
        chosen.append(int(distances.argmax()))
        distances = numpy.minimum(distances, numpy.abs(lanes - lanes[chosen[-1]]).sum(axis=1))
    return chosen


def _of_nearest(lanes: numpy.ndarray, known: numpy.ndarray, ratios: numpy.ndarray) -> numpy.ndarray:
    """For each pass the ratio of the known ones, weighted by how near their lanes' times are (Shepard 1968)."""
    distances = numpy.abs(lanes[:, None, :] - known[None, :, :]).sum(axis=2)
    weights = 1.0 / (distances + 1e-6 * lanes.max()) ** 3
    return (weights * ratios).sum(axis=1) / weights.sum(axis=1)
