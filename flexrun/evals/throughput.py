"""Throughput of a model on this machine: uniform workloads of random prompts, each beside its forecast."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy

from flexrun.errors import ConfigError, FlexrunError
from flexrun.llm import LLM
from flexrun.outputs import Request
from flexrun.sampling import SamplingParams
from flexrun.workload import Workload

FORMATS = ("md", "csv", "json")


@dataclass(frozen=True)
class Cell:
    """A workload: ``prompts`` of ``prompt_tokens`` tokens, to each of which ``output_tokens`` are generated.

    shared_tokens: how many tokens at the start are the same in all of them.
    """

    name: str
    prompts: int
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0

    def requests(self, vocab_size: int, seed: int) -> list[Request]:
        """Random token ids, no two runs of one cell alike."""
        draw = numpy.random.default_rng(seed)
        shared = draw.integers(0, vocab_size, min(self.shared_tokens, self.prompt_tokens)).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=self.output_tokens, ignore_eos=True)
        return [
            Request(
                str(number),
                shared + draw.integers(0, vocab_size, self.prompt_tokens - len(shared)).tolist(),
                params=params,
            )
            for number in range(self.prompts)
        ]

    @property
    def workload(self) -> Workload:
        return Workload.uniform(self.prompts, self.prompt_tokens, self.output_tokens)


def _five_shot(name: str, prompts: int, prompt_tokens: int, output_tokens: int) -> Cell:
    return Cell(name, prompts, prompt_tokens, output_tokens, shared_tokens=prompt_tokens * 5 // 6)


# The seven sub-scenarios that FlexGen's paper runs of HELM (arXiv 2303.06865): their lengths and counts. Five examples
# come before each question; they are taken to be as long as it and the same for all.
HELM_SHAPES = (
    _five_shot("wikifact plaintiff", 288, 256, 8),
    _five_shot("wikifact instance_of", 2592, 256, 8),
    _five_shot("mmlu abstract_algebra", 864, 512, 1),
    _five_shot("mmlu us_foreign_policy", 1008, 512, 1),
    _five_shot("synthetic_reasoning pattern_match", 1584, 256, 50),
    _five_shot("synthetic_reasoning_natural easy", 1584, 512, 20),
    _five_shot("summarization_xsum sampled", 1568, 1984, 64),
)


def helm_suite(share: float = 1.0) -> list[Cell]:
    """HELM_SHAPES with that share of their prompts."""
    return [dataclasses.replace(cell, prompts=max(round(cell.prompts * share), 1)) for cell in HELM_SHAPES]


@dataclass(frozen=True)
class Measured:
    """What a cell took. Rates are tokens a second of wall clock, means over the repetitions with standard deviations.

    generated_per_second: FlexGen's "throughput"; total_per_second counts prompt tokens too. prefill_per_second,
    decode_per_second: each of its own phase's time. forecast_seconds: of the plan, before any was run; share_of_bound:
    the time the busiest lane needs at least, of the time taken.
    """

    cell: Cell
    seconds: float
    seconds_deviation: float
    generated_per_second: float
    generated_deviation: float
    total_per_second: float
    requests_per_second: float
    prefill_per_second: float
    decode_per_second: float
    forecast_seconds: float
    share_of_bound: float
    sequences_in_flight: int


def sweep(prompts: int, prompt_tokens: Sequence[int], output_tokens: Sequence[int]) -> list[Cell]:
    """A cell for each pair of lengths."""
    return [
        Cell(f"{prompt}+{output}", prompts, prompt, output)
        for prompt, output in itertools.product(prompt_tokens, output_tokens)
    ]


def measure(
    llm: LLM,
    cells: Sequence[Cell],
    *,
    repetitions: int = 3,
    warmup: int = 1,
    seed: int = 0,
    on_pass: Callable[[int, int], None] | None = None,
) -> Iterator[Measured]:
    """Run each cell ``warmup`` times unmeasured, then ``repetitions`` times; loading and planning are not counted.

    Raises ConfigError where a cell does not fit the model's context.
    """
    longest = max(cell.prompt_tokens + cell.output_tokens for cell in cells)
    if longest > llm.max_model_len:
        raise ConfigError(
            f"{longest} tokens of prompt and answer are more than the context of {llm.max_model_len}",
            "lower --prompt-len or --gen-len, or raise --max-model-len where the model allows",
        )
    for cell in cells:
        llm.prepare(cell.workload, anew=True)  # by its own plan, whatever ran before
        for _ in range(warmup):
            _run(llm, cell, seed, on_pass)
        before, seconds = llm.summary(), []
        for repetition in range(repetitions):
            seconds.append(_run(llm, cell, seed + 1 + repetition, on_pass))
        yield _measured(llm, cell, seconds, before, llm.summary())


def _run(llm: LLM, cell: Cell, seed: int, on_pass: Callable[[int, int], None] | None) -> float:
    requests = cell.requests(llm.spec.vocab_size, seed)
    start_seconds = time.perf_counter()
    for output in llm.generate_iter(requests, cell.workload, on_pass):
        if output.error is not None:
            raise FlexrunError(output.error.message, output.error.hint)
    return time.perf_counter() - start_seconds


def _measured(llm: LLM, cell: Cell, seconds: list[float], before: dict, after: dict) -> Measured:
    def gained(key: str) -> float:
        return after[key] - before.get(key, 0)

    mean = statistics.fmean(seconds)
    rates = [cell.prompts * cell.output_tokens / each for each in seconds]
    return Measured(
        cell,
        mean,
        _deviation(seconds),
        statistics.fmean(rates),
        _deviation(rates),
        cell.prompts * (cell.prompt_tokens + cell.output_tokens) / mean,
        cell.prompts / mean,
        gained("prompt_tokens") / gained("prefill_seconds"),
        (gained("generated_tokens") - len(seconds) * cell.prompts) / gained("decode_seconds")
        if gained("decode_seconds")
        else 0.0,
        llm.plan.forecast.seconds,
        llm.plan.forecast.bound_seconds / mean,
        llm.plan.policy.sequences_in_flight,
    )


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def render(results: Sequence[Measured], form: str) -> str:
    """The results as a table in Markdown, or with all their figures as CSV or JSON."""
    if form == "json":
        return json.dumps([dataclasses.asdict(result) for result in results], indent=2)
    if form == "csv":
        rows = [{**(found := dataclasses.asdict(result)).pop("cell"), **found} for result in results]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().rstrip("\n")
    rows = [_row(result) for result in results]
    heads = list(rows[0])
    table = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _row(result: Measured) -> dict[str, str | int]:
    cell = result.cell
    return {
        "workload": cell.name,
        "prompts": cell.prompts,
        "in flight": result.sequences_in_flight,
        "seconds": f"{result.seconds:.2f} ± {result.seconds_deviation:.2f}",
        "forecast": f"{result.forecast_seconds:.2f}",
        "generated tokens/s": f"{result.generated_per_second:.1f} ± {result.generated_deviation:.1f}",
        "all tokens/s": f"{result.total_per_second:.1f}",
        "prefill tokens/s": f"{result.prefill_per_second:.1f}",
        "decode tokens/s": f"{result.decode_per_second:.1f}",
        "requests/s": f"{result.requests_per_second:.2f}",
        "of the bound": f"{result.share_of_bound:.0%}",
    }
