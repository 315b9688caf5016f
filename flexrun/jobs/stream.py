"""Sends the lines of a job to the engine and writes down what comes back, pass by pass and answer by answer."""

from __future__ import annotations

import dataclasses
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from flexrun.errors import ExecutionError
from flexrun.jobs.index import LineError
from flexrun.jobs.journal import Journal
from flexrun.jobs.jsonl import PromptLine
from flexrun.jobs.outlook import Outlook
from flexrun.jobs.progress import Progress
from flexrun.jobs.records import answer_record, error_record
from flexrun.jobs.report import JobReport
from flexrun.jobs.signals import StopSignals
from flexrun.jobs.summary import Tally
from flexrun.jobs.token_log import Partial
from flexrun.outputs import Request, RequestOutput
from flexrun.workload import Workload

LOAD_ROWS = 32  # lines read and tokenised at a time, ahead of the engine


class _Stopped(Exception):
    """Ends the engine's loop from inside the stream of requests."""


@dataclass(slots=True)
class _UnderWay:
    """A request that was sent. row: of the index. tokens: generated so far, by choice."""

    prompt: PromptLine
    row: int
    tokens: dict[int, array]

    @property
    def is_kept(self) -> bool:
        """Whether another run goes on from its tokens: not with log-probabilities."""
        return self.prompt.params.logprobs is None and self.prompt.params.prompt_logprobs is None


def _token_seconds(llm: Any) -> tuple[float, float]:
    """What a token of a prompt and one of an answer are forecast to take; equal where nothing is known."""
    plan = getattr(llm, "plan", None)
    job = None if plan is None else plan.forecast
    if job is None or not (job.prefill_seconds > 0 and job.decode_seconds > 0):
        return 1.0, 1.0
    return job.prefill_seconds / job.prompt_tokens, job.decode_seconds / job.generated_tokens


class AnswerStream:
    """One run of one job between its index and its journal: what is in flight, and what is left.

    config: a runner's JobConfig. partial: what an earlier run generated of lines that are not sent yet.
    """

    def __init__(
        self,
        config: Any,
        outlook: Outlook,
        partial: Partial,
        journal: Journal,
        tally: Tally,
        report: JobReport,
        job_id: str,
        say: Callable[[str], None],
    ):
        self.config, self.outlook, self.index = config, outlook, outlook.index
        self.journal, self.tally, self.report = journal, tally, report
        self.job_id, self.say = job_id, say
        self.partial = partial
        self.in_flight: dict[str, _UnderWay] = {}  # by custom_id
        self.stopping = self.knows_more = False

    def run(self, llm: Any, rows: np.ndarray) -> None:
        """Answer these rows, in this order until answers tell of a better one.

        Raises ExecutionError where some get no answer, and what the engine and the journal raise.
        """
        self.report.start()
        self.outlook.cost(*_token_seconds(llm))
        stop = StopSignals(partial(self._announce_stop, self.journal.keeps_tokens))
        done, work, shown = len(self.index) - len(rows), self.outlook.work_left, self.config.progress
        with closing(Progress(len(self.index), work, done=done, enabled=shown)) as bar, stop:
            while len(rows):
                rows = self._run(llm, rows, stop, bar)
        self.tally.interrupted |= stop.requested and bool(self.in_flight)
        if self.in_flight and not self.tally.interrupted:
            raise ExecutionError(f"the engine ended without an answer to {len(self.in_flight):,} requests")

    def _run(self, llm: Any, rows: np.ndarray, stop: StopSignals, bar: Progress) -> np.ndarray:
        """Answer rows until none is left, or another plan is better: returns those that are then left, in order."""
        steps = (partial(self._count_pass, llm, bar), partial(self._after_pass, stop))
        with closing(llm.generate_iter(self._requests(rows, stop), self.workload(rows), *steps)) as outputs:
            try:
                for output in outputs:
                    self.report.add_request()
                    under_way = self.in_flight.pop(output.request_id)
                    expected = self.outlook.work_of(under_way.row)
                    self.outlook.left[under_way.row] = False
                    bar.finish(expected, self.outlook.work(*self._record(under_way, output)))
                    if self.outlook.due and not stop.requested:
                        self._look(bar)
                        if len(rows := self._replanned(llm)):
                            return rows
            except (KeyboardInterrupt, _Stopped):
                self.tally.interrupted = True
        return rows[:0]

    def _look(self, bar: Progress) -> None:
        """What the latest answers tell changes the time that is left, and the order of what is not sent yet."""
        under_way = self.in_flight.values()
        self.outlook.look((each.row, len(tokens)) for each in under_way for tokens in each.tokens.values())
        bar.expect(self.outlook.work_left)
        self.knows_more = True

    def _replanned(self, llm: Any) -> np.ndarray:
        """What is left, in order, if it is sooner done by another plan, which goes on from what is under way; else
        nothing."""
        rows = self.outlook.order(self.config.order, np.flatnonzero(self.outlook.left))
        begun = {each.prompt.line: each.tokens for each in self.in_flight.values() if each.is_kept and each.tokens}
        self.partial |= begun
        if llm.reconsider(self.workload(rows)):
            self.say(f"{len(rows):,} lines are left; by the answers so far another plan ends them sooner:")
            self.in_flight.clear()
            return rows
        for line in begun:
            del self.partial[line]
        return rows[:0]

    def workload(self, rows: np.ndarray) -> Workload:
        """What is left to do: what an earlier run generated is prefilled."""
        workload = self.outlook.workload(rows)
        if not self.partial:
            return workload
        begun = [
            len(self.partial.get(line, {}).get(choice, ()))
            for line, choices in zip(self.index.lines[rows].tolist(), self.index.choices[rows].tolist())
            for choice in range(choices)
        ]
        begun = np.minimum(begun, workload.max_tokens - 1)
        return dataclasses.replace(
            workload,
            prompt_tokens=workload.prompt_tokens + begun,
            max_tokens=workload.max_tokens - begun,
            likely_tokens=np.maximum(workload.likely_tokens - begun, 1),
            kept_tokens=np.maximum(workload.kept_tokens - begun, 1),
        )

    def _count_pass(self, llm: Any, bar: Progress, prompt_tokens: int, generated_tokens: int) -> None:
        bar.advance(self.outlook.work(prompt_tokens, generated_tokens), generated_tokens)
        self.report.add_pass(prompt_tokens, generated_tokens, llm.lane_seconds)

    def _after_pass(self, stop: StopSignals, sampled: list[tuple[str, int, int]]) -> None:
        """Keep the tokens of a pass, and stop here if so asked; a stream first gets the answers that the pass ended.

        Answers with log-probabilities are not kept: a resume generates them again.
        """
        entries = []
        for name, choice, token in sampled:
            under_way = self.in_flight[name]
            under_way.tokens.setdefault(choice, array("q")).append(token)
            if under_way.is_kept:
                entries.append((under_way.prompt.line, choice, token))
        if not self.journal.keeps_tokens:
            if self.stopping:
                raise _Stopped
            self.stopping = stop.requested
            return
        self.journal.append_tokens(
            entries, lambda: [*(each.prompt.line for each in self.in_flight.values()), *self.partial]
        )
        if stop.requested:
            raise _Stopped

    def _requests(self, rows: np.ndarray, stop: StopSignals) -> Iterator[Request]:
        while len(rows):
            if self.knows_more:
                rows, self.knows_more = self.outlook.order(self.config.order, rows), False
            chunk, rows = rows[:LOAD_ROWS], rows[LOAD_ROWS:]
            kept = self.outlook.kept_tokens[chunk].tolist() if self.outlook.knows else [None] * len(chunk)
            columns = (chunk.tolist(), self.index.prefix[chunk].tolist(), kept)
            for (prompt, token_ids), row, prefix, kept_tokens in zip(self.index.load(chunk), *columns):
                if stop.requested:
                    # The engine asks for more once it has handed out what is finished: the moment to stop.
                    raise _Stopped
                begun = self.partial.pop(prompt.line, None)
                tokens = {choice: array("q", tokens) for choice, tokens in (begun or {}).items()}
                self.in_flight[prompt.custom_id] = _UnderWay(prompt, row, tokens)
                yield Request(
                    prompt.custom_id,
                    token_ids,
                    prompt.prompt,
                    prompt.messages,
                    prompt.params,
                    partial=begun,
                    prefix=prefix,
                    kept_tokens=kept_tokens,
                )

    def _record(self, under_way: _UnderWay, output: RequestOutput) -> tuple[int, int]:
        """Write one finished request down and count it. Returns the tokens it took, of its prompt and its answer."""
        prompt = under_way.prompt
        if output.error is not None:
            error = LineError.of(prompt.line, prompt.custom_id, output.error)
            self.tally.errors[error.code] += 1
            self.report.add_error(error)
            self.journal.append(error_record(error, self.job_id, prompt.metadata))
            return 0, 0
        wants_ids = prompt.return_token_ids
        record = answer_record(
            prompt,
            output,
            job_id=self.job_id,
            model=self.config.model_name,
            created_seconds=int(time.time()),
            return_token_ids=self.config.return_token_ids if wants_ids is None else wants_ids,
        )
        self.journal.append(record)
        for completion in output.outputs:
            if completion.token_ids:
                self.outlook.add(under_way.row, len(completion.token_ids), completion.finish_reason != "length")
        usage = record["response"]["body"]["usage"]
        self.tally.add_answer(usage, [completion.finish_reason for completion in output.outputs])
        return usage["prompt_tokens"], usage["completion_tokens"]

    def _announce_stop(self, keeps_tokens: bool) -> None:
        lost = "" if keeps_tokens else "; the output is a stream, so answers under way will be lost"
        self.say(f"stopping after this pass{lost}; press Ctrl-C again to stop at once")
