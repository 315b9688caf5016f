"""Runs entries of HELM on flexrun, and reads what HELM says about each."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexrun.errors import ExecutionError
from flexrun.evals.helm_adapter import EXECUTIONS, register, run_helm
from flexrun.evals.helm_results import HelmRun, metrics_of


def bench_helm(
    model: str,
    entries: Sequence[str],
    *,
    max_eval_instances: int,
    suite: str = "flexrun",
    output_path: str | Path = "benchmark_output",
    chat: bool | None = None,
    options: Mapping[str, Any],
) -> list[HelmRun]:
    """Run ``entries`` (as HELM writes them; the model is added) and read what HELM says about them.

    options: arguments of flexrun.LLM. chat: None where the model's template decides. HELM's words go to stderr.
    Raises ExecutionError where a run fails.
    """
    EXECUTIONS.clear()
    arguments = ["--suite", suite, "--output-path", str(output_path), "--max-eval-instances", str(max_eval_instances)]
    with contextlib.redirect_stdout(sys.stderr):
        try:
            run_helm(register(model, chat=chat, **options), [*arguments, "--run-entries", *entries])
        except Exception as error:
            raise ExecutionError(
                f"HELM: {error}", "see its words above; scenarios that fetch their data need it staged"
            ) from error
    folder = Path(output_path) / "runs" / suite
    return [
        HelmRun(name, engine, metrics_of(json.loads((folder / name / "stats.json").read_text())))
        for name, engine in EXECUTIONS.items()
    ]
