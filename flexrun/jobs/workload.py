"""The workload of a prompt file, without running it: what a planner needs to know of a job."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import flexrun.workload
from flexrun.jobs.encoder import PromptEncoder
from flexrun.jobs.index import index_job
from flexrun.jobs.source import open_source
from flexrun.llm.model_files import read_model_plan
from flexrun.sampling import SamplingParams


class Workload(flexrun.workload.Workload):
    """``flexrun.workload.Workload`` that can also be read from prompts."""

    @classmethod
    def from_jsonl(
        cls,
        path: str | Path,
        model: Any,
        *,
        sampling: SamplingParams | None = None,
        order: str = "longest",
        limit: int | None = None,
        shared_prefixes: bool = True,
        prefix_unit: int = 1,
    ) -> Workload:
        """Lengths of every good line of a prompt file, in the order a job would run them.

        model: path or name of a model with a tokenizer, or an object with tokenizer, spec and max_model_len.
        sampling: defaults as for ``flexrun run``; a line's own values win. Raises what a job raises for its input.
        """
        if isinstance(model, (str, Path)):
            model = read_model_plan(model)
        sampling = sampling or SamplingParams(temperature=0.0, max_tokens=128)
        encoder = PromptEncoder(model.tokenizer, model.spec.vocab_size, model.max_model_len)
        with (
            closing(open_source(str(path))) as source,
            closing(
                index_job(source, encoder, sampling, limit=limit, shares=shared_prefixes, prefix_unit=prefix_unit)
            ) as index,
        ):
            rows = index.workload(index.order(order))
        return cls(rows.prompt_tokens, rows.max_tokens, rows.scored_tokens, rows.prefixes, rows.prefix)
