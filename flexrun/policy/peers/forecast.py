"""Forecasts of other engines on our cost model: what their papers published tests its rates and byte counts.

Two schedules, FlexGen's blocks and MoE-Gen's module-based batching: prefill of a block, then one pass a token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy
from scipy.optimize import least_squares

from flexrun.config import Policy
from flexrun.core import Lane
from flexrun.hardware import Hardware
from flexrun.models.spec import ModelSpec
from flexrun.placement import kv_bytes_per_token
from flexrun.policy.peers.cost import ATTENTION, MLP, PeerCosts, Work
from flexrun.policy.peers.traits import EngineTraits, PeerRun

PARTS = ("compute", "weights", "load_cache", "store_cache", "hidden")


@dataclass(frozen=True)
class Phase:
    """Prefill, or all decoding passes. lane_seconds: what each lane works, waiting left out.

    part_seconds: by PARTS, the busiest lane of each part alone (computing: GPU and CPU one after the other).
    """

    seconds: float
    lane_seconds: Mapping[Lane, float]
    part_seconds: Mapping[str, float]

    @property
    def binding_lane(self) -> Lane:
        return max(self.lane_seconds, key=self.lane_seconds.__getitem__)

    def times(self, count: float) -> Phase:
        return Phase(
            self.seconds * count,
            {lane: seconds * count for lane, seconds in self.lane_seconds.items()},
            {part: seconds * count for part, seconds in self.part_seconds.items()},
        )

    def then(self, other: Phase) -> Phase:
        return Phase(
            self.seconds + other.seconds,
            {lane: seconds + other.lane_seconds[lane] for lane, seconds in self.lane_seconds.items()},
            {part: seconds + other.part_seconds[part] for part, seconds in self.part_seconds.items()},
        )


@dataclass(frozen=True)
class PeerForecast:
    """Of one block from its first to its last token."""

    run: PeerRun
    prefill: Phase
    decode: Phase

    @property
    def whole(self) -> Phase:
        return self.prefill.then(self.decode)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over prefill and decode, as FlexGen counts."""
        return self.run.sequences * self.run.generated_tokens / self.whole.seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.run.sequences * self.run.prompt_tokens / self.prefill.seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the tokens after the first; needs a run that generates more than one."""
        return self.run.sequences * (self.run.generated_tokens - 1) / self.decode.seconds


def peer_forecast(traits: EngineTraits, spec: ModelSpec, hardware: Hardware, run: PeerRun) -> PeerForecast:
    """Raises ConfigError where the machine has no rates for the model's dtype."""
    run = filled(run, spec, hardware)
    costs = PeerCosts(traits, spec, hardware, run)
    one_pass = _module_pass if traits.module_batching else _block_pass
    decode = one_pass(costs, decode=True).times(run.generated_tokens - 1)
    return PeerForecast(run, one_pass(costs, decode=False), decode)


def filled(run: PeerRun, spec: ModelSpec, hardware: Hardware) -> PeerRun:
    """The run with its number of sequences, where that is what host memory holds."""
    return run if run.sequences else dataclasses.replace(run, sequences=sequences_held(spec, hardware, run))


def policy_of(run: PeerRun) -> Policy:
    """The same choices as a policy of ours, for a run that is filled: what flexrun would make of them."""
    return Policy(
        sequences_in_flight=run.sequences,
        tokens_per_pass=(run.prefill_sequences or run.sequences) * run.prompt_tokens,
        attention_micro_batch=run.micro_batch,
        token_micro_batch=run.micro_batch * run.prompt_tokens,
        weights=run.weights,
        kv=run.kv,
        hidden=run.hidden,
        cpu_attention_share=run.cpu_attention,
        weight_bits=run.weight_bits,
        kv_bits=run.kv_bits,
    )


def sequences_held(spec: ModelSpec, hardware: Hardware, run: PeerRun) -> int:
    """How many caches fit in host memory beside all weights."""
    tokens = run.prompt_tokens + run.generated_tokens
    free_bytes = hardware.cpu_memory_bytes - spec.weight_bytes
    return max(int(free_bytes / (kv_bytes_per_token(spec, run.kv_bits) * tokens)), 1)


def calibrate(
    traits: EngineTraits, names: Sequence[str], ratios: Callable[[EngineTraits], Sequence[float]]
) -> EngineTraits:
    """The traits with those rates at which every ratio of forecast to published is as near to 1 as can be.

    names: fields to find, from their present values on. ratios: as many as names, of an engine with given traits.
    """
    start = numpy.log([getattr(traits, name) for name in names])

    def at(point: numpy.ndarray) -> EngineTraits:
        return dataclasses.replace(traits, **{name: math.exp(value) for name, value in zip(names, point)})

    return at(least_squares(lambda point: numpy.log(ratios(at(point))), start).x)


# Schedules --------------------------------------------------------------------------------------------

Step = dict[str, Work]  # by PARTS


def _block_pass(costs: PeerCosts, *, decode: bool) -> Phase:
    """One pass of the block schedule: a step is one micro-batch in one half layer."""
    steps = [(step, count) for layer, count in costs.layer_kinds for step in _layer_steps(costs, layer, decode=decode)]
    if not (decode and costs.run.projected):  # a projection multiplies layers only
        micro_batches = costs.run.sequences / costs.run.micro_batch
        steps.append(({"compute": costs.ends(costs.run.micro_batch, decode=decode)}, micro_batches))
        steps.append(({"weights": costs.load_ends()}, 1))
    return _phase(steps, _beside if costs.run.overlap else _in_turns)


def _layer_steps(costs: PeerCosts, layer: int, *, decode: bool) -> list[Step]:
    """A step computes a micro-batch, loads the cache of the next one and stores that of the one before."""
    size, micro_batches = costs.run.micro_batch, math.ceil(costs.run.sequences / costs.run.micro_batch)
    compute = {ATTENTION: costs.attention(layer, size, decode=decode), MLP: costs.mlp(layer, size, decode=decode)}
    next_weights = {ATTENTION: costs.load_weights(MLP, layer), MLP: costs.load_weights(ATTENTION, layer)}
    hidden = costs.move_hidden(size, decode=decode)
    load = costs.load_cache(size) if decode else Work()
    store = costs.store_cache(size, decode=decode)
    steps = []
    for half in (ATTENTION, MLP):
        for number in range(micro_batches):
            first, last = number == 0, number == micro_batches - 1
            step = {"compute": compute[half], "hidden": hidden}
            if first:
                step["weights"] = next_weights[half]
            if last == (half == MLP):
                step["load_cache"] = load
            if first == (half == MLP):
                step["store_cache"] = store
            steps.append(step)
    return steps


def _module_pass(costs: PeerCosts, *, decode: bool) -> Phase:
    """One pass of module-based batching. In prefill the weights stream once for each group that fits the GPU."""
    run, size = costs.run, costs.run.micro_batch
    group = run.sequences if decode or not run.prefill_sequences else run.prefill_sequences
    steps = []
    for layer, count in costs.layer_kinds:
        sweeps = count * run.sequences / group
        micro_batches = sweeps * group / size
        steps.append(({"weights": costs.load_weights(ATTENTION, layer)}, sweeps))
        steps.append(({"weights": costs.load_weights(MLP, layer)}, sweeps))
        steps.append(({"compute": costs.mlp(layer, group, decode=decode)}, sweeps))
        attention = {"compute": costs.attention(layer, size, decode=decode)}
        attention["store_cache"] = costs.store_cache(size, decode=decode)
        if decode:
            attention["load_cache"] = costs.load_cache(size)
        steps.append((attention, micro_batches))
    steps.append(({"compute": costs.ends(group, decode=decode)}, run.sequences / group))
    phase = _phase(steps, _beside)
    return dataclasses.replace(phase, seconds=max(phase.lane_seconds.values()))


def _phase(steps: Sequence[tuple[Step, float]], seconds_of: Callable[[Step], float]) -> Phase:
    lanes, parts = dict.fromkeys(Lane, 0.0), dict.fromkeys(PARTS, 0.0)
    for step, count in steps:
        for part, work in step.items():
            parts[part] += count * _part_seconds(part, work)
            for lane, seconds in work.items():
                lanes[lane] += count * seconds
    return Phase(sum(count * seconds_of(step) for step, count in steps), lanes, parts)


def _beside(step: Step) -> float:
    """A step whose transfers run beside its computing; what the CPU does keeps the GPU waiting."""
    total = Work()
    for work in step.values():
        total.update(work)
    transfers = [seconds for lane, seconds in total.items() if lane not in (Lane.CPU, Lane.GPU)]
    return max([total[Lane.CPU] + total[Lane.GPU], *transfers])


def _in_turns(step: Step) -> float:
    return sum(_part_seconds(part, work) for part, work in step.items())


def _part_seconds(part: str, work: Work) -> float:
    return sum(work.values()) if part == "compute" else max(work.values(), default=0.0)
