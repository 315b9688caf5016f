"""What a run of HELM came to: what its requests took in the engine, HELM's own metrics, and both as a table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Statistics of HELM that tell about a run, not about how good its answers are.
BOOKKEEPING = (
    "num_",
    "finish_reason_",
    "inference_",
    "training_",
    "batch_size",
    "prompt_truncated",
    "max_prob",
    "logprob",
)
SPLITS = ("test", "valid")


@dataclass(frozen=True)
class Execution:
    """What the requests of one run took in the engine; planning and loading are not counted."""

    requests: int
    seconds: float
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class HelmRun:
    """One run of HELM. engine: what its requests took. metrics: HELM's means, without perturbations, by name."""

    name: str
    engine: Execution
    metrics: dict[str, float]

    @property
    def requests_per_second(self) -> float:
        return self.engine.requests / self.engine.seconds

    @property
    def generated_per_second(self) -> float:
        return self.engine.generated_tokens / self.engine.seconds

    @property
    def total_per_second(self) -> float:
        return (self.engine.prompt_tokens + self.engine.generated_tokens) / self.engine.seconds


def metrics_of(stats: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The means of HELM's metrics on unperturbed instances: of the test split, or where there is none the valid one."""
    metrics: dict[str, float] = {}
    for split in SPLITS:
        for stat in stats:
            name, mean = stat["name"], stat.get("mean")
            if name.get("split") != split or "perturbation" in name or mean is None:
                continue
            if not name["name"].startswith(BOOKKEEPING):
                metrics.setdefault(name["name"], mean)
    return metrics


def render(runs: Sequence[HelmRun], form: str) -> str:
    """The runs as a table in Markdown, as CSV, or as JSON."""
    if form == "json":
        return json.dumps([dataclasses.asdict(run) for run in runs], indent=2)
    rows = [_row(run) for run in runs]
    heads = list(rows[0]) if rows else []
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().rstrip("\n")
    table = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _row(run: HelmRun) -> dict[str, str | int]:
    return {
        "run": run.name,
        "requests": run.engine.requests,
        "seconds": f"{run.engine.seconds:.2f}",
        "requests/s": f"{run.requests_per_second:.2f}",
        "generated tokens/s": f"{run.generated_per_second:.1f}",
        "all tokens/s": f"{run.total_per_second:.1f}",
        "metrics": ", ".join(f"{name} {value:.3f}" for name, value in run.metrics.items()),
    }
