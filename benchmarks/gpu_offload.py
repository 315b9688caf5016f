"""Models larger than the GPU's budget, run by the planner's own policy: tokens a second and the share of the bound."""

from __future__ import annotations

import dataclasses
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy

from flexrun import LLM, Hardware, SamplingParams
from flexrun.core import Lane
from flexrun.llm import open_model
from flexrun.llm.accelerator import Accelerator
from flexrun.llm.planning import search_plan
from flexrun.policy.layout import Budgets
from flexrun.policy.search import Plan
from flexrun.workload import Workload

FEWEST_SEQUENCES = 8
WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Work:
    """Prompts of random tokens, all of one length, and how many tokens each is to generate."""

    sequences: int
    prompt_tokens: int
    output_tokens: int

    @property
    def workload(self) -> Workload:
        return Workload.uniform(self.sequences, self.prompt_tokens, self.output_tokens)

    def prompts(self, vocab_size: int) -> list[list[int]]:
        generator = numpy.random.default_rng(0)
        shape = (self.sequences, self.prompt_tokens)
        return generator.integers(10, min(vocab_size, 30_000), shape).tolist()


@dataclass(frozen=True)
class Case:
    """One model with its weights offloaded to RAM, or partly to disk. cpu_memory_bytes: the budget of the run."""

    model: str
    place: str
    folder: Path
    dtype: str
    cpu_memory_bytes: int
    work: Work

    @property
    def name(self) -> str:
        return f"{self.model}, weights offloaded to {self.place}"


@dataclass(frozen=True)
class Settings:
    """What every run of ours is given. gpu_memory: bytes, the budget of the GPU or of the emulated accelerator."""

    device: str
    gpu_memory_bytes: int
    cache_dir: Path
    hardware: Hardware


def sized(case: Case, settings: Settings, limit_seconds: float) -> tuple[Case, Plan]:
    """The case with as many sequences as the forecast fits into ``limit_seconds``, and the plan for them.

    Sequences go first: the passes of a job cost the same however few rows they carry, so tokens go where even
    FEWEST_SEQUENCES take too long.
    """
    with closing(open_model(case.folder, dtype=case.dtype)) as files:
        spec = files.spec
    device_bytes = Accelerator.of(settings.device, settings.gpu_memory_bytes).planned_bytes
    budgets = Budgets(case.cpu_memory_bytes, device_bytes)
    hardware = settings.hardware
    if settings.device == "cpu" and hardware.gpu is not None:
        hardware = dataclasses.replace(hardware, gpu=None, h2d=None, d2h=None)
    plan = search_plan(spec, hardware, case.work.workload, budgets)
    for _ in range(2):
        over = plan.forecast.seconds / limit_seconds
        if over <= 1.1:
            break
        work = case.work
        if work.sequences > FEWEST_SEQUENCES:
            sequences = max(int(work.sequences / over) // 8 * 8, FEWEST_SEQUENCES)
            work = dataclasses.replace(work, sequences=sequences)
        else:
            work = dataclasses.replace(work, output_tokens=max(int(work.output_tokens / over), 2))
        case = dataclasses.replace(case, work=work)
        plan = search_plan(spec, hardware, work.workload, budgets)
    return case, plan


def run(case: Case, settings: Settings, plan: Plan) -> dict:
    """Run a case under its plan. Loading, packing and one short warm-up are outside the measured seconds."""
    start = time.perf_counter()
    with LLM(
        case.folder,
        dtype=case.dtype,
        policy=plan.policy,
        device=settings.device,
        gpu_memory=settings.gpu_memory_bytes,
        cpu_memory=case.cpu_memory_bytes,
        cache_dir=settings.cache_dir,
        hardware=settings.hardware,
    ) as llm:
        llm.prepare(case.work.workload)
        prompts = case.work.prompts(llm.spec.vocab_size)
        _generate(llm, [prompts[0][::-1]], WARM_UP_TOKENS)
        load_seconds = time.perf_counter() - start
        before = llm.summary()
        _generate(llm, prompts, case.work.output_tokens)
        after, spec = llm.summary(), llm.spec
    seconds = after["seconds"] - before["seconds"]
    lanes = {
        lane: {key: value - before["lanes"][lane][key] for key, value in numbers.items() if key != "utilisation"}
        for lane, numbers in after["lanes"].items()
    }
    generated = after["generated_tokens"] - before["generated_tokens"]
    if generated != case.work.sequences * case.work.output_tokens:
        raise RuntimeError(f"{case.name}: {generated} tokens came, not {case.work.sequences * case.work.output_tokens}")
    bounds = bound_seconds(lanes, settings.hardware, plan)
    lane = max(bounds, key=bounds.__getitem__)
    return {
        "case": case.name,
        "work": dataclasses.asdict(case.work),
        "weight_bytes": spec.weight_bytes,
        "cpu_memory_bytes": case.cpu_memory_bytes,
        "gpu_memory_bytes": settings.gpu_memory_bytes,
        "policy": after["policy"],
        "load_seconds": load_seconds,
        "seconds": seconds,
        "passes": after["passes"] - before["passes"],
        "tokens_per_second": generated / seconds,
        "forecast_seconds": plan.forecast.seconds,
        "forecast_tokens_per_second": plan.forecast.generated_tokens_per_second,
        "lanes": lanes,
        "bound_seconds": bounds,
        "busiest_lane": lane,
        "share_of_bound": bounds[lane] / seconds,
        "tiers": after["tiers"],
    }


def bound_seconds(lanes: dict, hardware: Hardware, plan: Plan) -> dict[str, float]:
    """Seconds that each lane needs at least: bytes moved at the bandwidth measured, compute as the profile has it."""
    host_copy = hardware.host_copy
    transfers = {
        Lane.H2D: hardware.h2d or host_copy,
        Lane.D2H: hardware.d2h or host_copy,
        Lane.DISK_READ: hardware.disk_read,
        Lane.DISK_WRITE: hardware.disk_write,
    }
    bounds = {}
    for lane, seconds in plan.forecast.lane_seconds.items():
        moved = lanes.get(lane.value, {}).get("bytes")
        of_bytes = lane in transfers and moved is not None
        bounds[lane.value] = moved / transfers[lane].bytes_per_second if of_bytes else seconds
    return bounds


def _generate(llm: LLM, prompts: list[list[int]], tokens: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for output in llm.generate(prompts, params, use_tqdm=False):
        if output.error is not None:
            raise output.error
