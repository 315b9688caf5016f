"""Runs a prompt file through a model: check every line, then load weights, then stream answers to the journal."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, TextIO

import numpy as np

from flexrun import __version__
from flexrun.errors import ConfigError, ExecutionError, FlexrunError
from flexrun.jobs.encoder import PromptEncoder
from flexrun.jobs.index import ORDERS, JobIndex, LineError, index_job
from flexrun.jobs.journal import CHOSEN, Journal, Recovered
from flexrun.jobs.jsonl import PromptLine
from flexrun.jobs.progress import PLAIN_SECONDS, Progress
from flexrun.jobs.records import answer_record, error_record, job_id_of
from flexrun.jobs.report import JobReport
from flexrun.jobs.signals import StopSignals
from flexrun.jobs.source import open_source
from flexrun.jobs.token_log import Partial
from flexrun.outputs import Request, RequestOutput
from flexrun.sampling import SamplingParams
from flexrun.workload import Workload

LOAD_ROWS = 32  # lines read and tokenised at a time, ahead of the engine
STRICT_SHOWN = 10


@dataclass(frozen=True)
class JobConfig:
    """What to run and where to write; the engine's own settings are in the two factories of ``run_job``.

    input_file, output_file: ``-`` is stdin, stdout. model_name: goes into the records and the manifest.
    sampling: defaults; a line's own values win.
    identity: further settings that change answers (dtype, seed, ...); a resume must repeat them.
    progress: None is automatic. report_dir: folder for a page about the run, see JobReport.
    The rest are the flags of ``flexrun run`` of the same names.
    """

    input_file: str
    output_file: str
    model_name: str
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0, max_tokens=128))
    error_file: str | None = None
    order: str = "longest"
    limit: int | None = None
    strict: bool = False
    resume: bool = False
    retry_errors: bool = False
    overwrite: bool = False
    preserve_order: bool = False
    return_token_ids: bool = False
    progress: bool | None = None
    report_dir: str | None = None
    shared_prefixes: bool = True
    identity: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ConfigError(f"unknown order {self.order!r}", f"use one of: {', '.join(ORDERS)}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit} runs no line at all", "give a limit of at least 1")
        if self.retry_errors and not self.resume:
            raise ConfigError("--retry-errors only means something with --resume", "add --resume")
        if self.preserve_order and self.output_file == "-":
            raise ConfigError("--preserve-order cannot rewrite stdout", "use --order input, or write to a file")
        if self.input_file == self.output_file != "-":
            raise ConfigError("the input file and the output file are the same", "name another output file")


def run_job(
    config: JobConfig, open_model: Callable[[], Any], build_llm: Callable[..., Any], log: TextIO | None = None
) -> dict[str, Any]:
    """Run one job and return its summary.

    open_model: returns the ModelFiles (of which tokenizer, spec.vocab_size and max_model_len are read), no weights.
    build_llm: returns the LLM of these files (of which prepare, generate_iter, summary and close are called); called
    only once every line has been checked and some are left to do. A resume calls it with what the LLM of the first run
    had chosen (its ``chosen``).

    The summary: requests {total, answered, failed, answered_before, failed_before, left}, finish_reasons and errors
    as counts, prompt_tokens, generated_tokens, generated_tokens_per_second, total_tokens_per_second, the seconds of
    each phase, engine (the engine's own summary, None if it was not needed), interrupted.

    Raises ConfigError for settings that cannot work, and with ``strict`` for any bad line, before weights are loaded.
    """
    return _Job(config, log or sys.stderr).run(open_model, build_llm)


class _Stopped(Exception):
    """Ends the engine's loop from inside the stream of requests."""


class _Job:
    """One run's state: what is in flight, and the counts for the summary."""

    def __init__(self, config: JobConfig, log: TextIO):
        self.config, self.log = config, log
        self.in_flight: dict[str, tuple[PromptLine, int]] = {}  # custom_id -> (line, expected tokens)
        self.partial: Partial = {}  # what an earlier run generated of lines that are not sent yet
        self.finish_reasons: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.report = JobReport(config.report_dir)
        self.answered = self.prompt_tokens = self.generated_tokens = 0
        self.seconds = {"check": 0.0, "load": 0.0, "run": 0.0}
        self.stopping = self.interrupted = False

    def run(self, open_model: Callable[[], Any], build_llm: Callable[..., Any]) -> dict[str, Any]:
        config = self.config
        started = time.perf_counter()
        journal = Journal(config.output_file, config.error_file, resume=config.resume, overwrite=config.overwrite)
        with (
            closing(journal),
            closing(open_model()) as model,
            closing(open_source(config.input_file)) as source,
            closing(self._check(source, model)) as index,
        ):
            manifest = self._manifest(index, model)
            recovered = journal.recover(manifest, config.retry_errors)
            rows = index.order(config.order)
            rows = rows[~np.isin(index.lines[rows], recovered.lines)]
            self.partial = recovered.partial
            engine = self._answer(
                lambda: build_llm(model, **recovered.chosen), index, rows, recovered, journal, manifest
            )
            journal.finish(config.preserve_order and not self.interrupted, keep_tokens=self.interrupted)
            summary = self._summary(index, rows, recovered, engine, time.perf_counter() - started)
        self.report.write(summary, self._say)
        return summary

    def _check(self, source: BinaryIO, model: Any) -> JobIndex:
        """Validate the whole file and tell the user what was found."""
        started = time.perf_counter()
        encoder = PromptEncoder(model.tokenizer, model.spec.vocab_size, model.max_model_len)
        index = index_job(
            source,
            encoder,
            self.config.sampling,
            limit=self.config.limit,
            on_progress=self._checking_report(started),
            shares=self.config.shared_prefixes,
        )
        self.seconds["check"] = time.perf_counter() - started
        self._say(
            f"checked {len(index) + index.error_count:,} lines in {self.seconds['check']:.1f} s: {len(index):,} good"
        )
        for warning in index.warnings():
            self._say(f"warning: {warning}")
        shown = list(itertools.islice(index.errors(), STRICT_SHOWN))
        for error in shown:
            self._say(f"line {error.line} refused ({error.code}): {error.message}")
        if index.error_count > len(shown):
            self._say(f"... and {index.error_count - len(shown):,} more lines refused")
        if self.config.strict and index.error_count:
            index.close()
            raise ConfigError(
                f"{index.error_count:,} lines of {self.config.input_file} are refused, and --strict is set",
                "correct these lines, or leave --strict out to run the others",
            )
        return index

    def _manifest(self, index: JobIndex, model: Any) -> dict[str, Any]:
        """What decides the answers: a resume must agree on all of it."""
        config = self.config
        manifest = {
            "format": 1,
            "flexrun_version": __version__,
            "model": config.model_name,
            "max_model_len": model.max_model_len,
            "input_sha256": index.input_sha256,
            "return_token_ids": config.return_token_ids,
            "sampling": dataclasses.asdict(config.sampling),
            **config.identity,
        }
        self.job_id = job_id_of(manifest)
        return manifest

    def _answer(self, build_llm, index, rows, recovered, journal, manifest) -> dict[str, Any] | None:
        """Everything that writes. Returns the engine's summary, None where no line needed it."""
        started = time.perf_counter()
        with closing(build_llm()) if len(rows) else nullcontext() as llm:
            if llm is not None:
                llm.prepare(self._workload(index, rows))  # refuses what does not fit while nothing is written yet
            self.seconds["load"] = time.perf_counter() - started
            if chosen := recovered.chosen or getattr(llm, "chosen", None):
                manifest = {**manifest, CHOSEN: chosen}
            journal.start(manifest, recovered.partial.keys())
            self._write_refusals(index, recovered, journal)
            if llm is None:
                return None
            started = time.perf_counter()
            try:
                self._stream(llm, index, rows, journal)
            except FlexrunError:
                if self.config.output_file != "-":
                    where = self.config.output_file
                    self._say(f"{self.answered:,} answers of this run are safe in {where}; go on with --resume")
                raise
            finally:
                self.seconds["run"] = time.perf_counter() - started
            return llm.summary()

    def _write_refusals(self, index: JobIndex, recovered: Recovered, journal: Journal) -> None:
        for error in index.errors():
            if error.line not in recovered:
                self._count_error(error)
                journal.append(error_record(error, self.job_id))

    def _count_error(self, error: LineError) -> None:
        self.errors[error.code] += 1
        self.report.add_error(error)

    def _stream(self, llm: Any, index: JobIndex, rows: np.ndarray, journal: Journal) -> None:
        total_tokens = int(index.expected_tokens(rows).sum())
        done_requests = len(index) - len(rows)
        self.report.start()
        stop = StopSignals(partial(self._announce_stop, journal.keeps_tokens))
        with (
            closing(
                Progress(len(index), total_tokens, done_requests=done_requests, enabled=self.config.progress)
            ) as bar,
            stop,
            closing(
                llm.generate_iter(
                    self._requests(index, rows, stop),
                    self._workload(index, rows),
                    partial(self._count_pass, llm, bar),
                    partial(self._after_pass, journal, stop),
                )
            ) as outputs,
        ):
            try:
                for output in outputs:
                    self.report.add_request()
                    prompt, expected_tokens = self.in_flight.pop(output.request_id)
                    bar.finish(expected_tokens - self._record(prompt, output, journal))
            except (KeyboardInterrupt, _Stopped):
                self.interrupted = True
        self.interrupted |= stop.requested and bool(self.in_flight)
        if self.in_flight and not self.interrupted:
            raise ExecutionError(f"the engine ended without an answer to {len(self.in_flight):,} requests")

    def _workload(self, index: JobIndex, rows: np.ndarray) -> Workload:
        """What is left to do: what an earlier run generated is prefilled."""
        workload = index.workload(rows)
        if not self.partial:
            return workload
        begun = [
            len(self.partial.get(line, {}).get(choice, ()))
            for line, choices in zip(index.lines[rows].tolist(), index.choices[rows].tolist())
            for choice in range(choices)
        ]
        begun = np.minimum(begun, workload.max_tokens - 1)
        return dataclasses.replace(
            workload, prompt_tokens=workload.prompt_tokens + begun, max_tokens=workload.max_tokens - begun
        )

    def _count_pass(self, llm: Any, bar: Progress, prompt_tokens: int, generated_tokens: int) -> None:
        bar.advance(prompt_tokens, generated_tokens)
        self.report.add_pass(prompt_tokens, generated_tokens, llm.lane_seconds)

    def _after_pass(self, journal: Journal, stop: StopSignals, sampled: list[tuple[str, int, int]]) -> None:
        """Keep the tokens of a pass, and stop here if so asked; a stream first gets the answers that the pass ended.

        Answers with log-probabilities are not kept: a resume generates them again.
        """
        if not journal.keeps_tokens:
            if self.stopping:
                raise _Stopped
            self.stopping = stop.requested
            return
        entries = [
            (prompt.line, choice, token)
            for prompt, choice, token in ((self.in_flight[name][0], choice, token) for name, choice, token in sampled)
            if prompt.params.logprobs is None and prompt.params.prompt_logprobs is None
        ]
        journal.append_tokens(entries, lambda: [*(prompt.line for prompt, _ in self.in_flight.values()), *self.partial])
        if stop.requested:
            raise _Stopped

    def _requests(self, index: JobIndex, rows: np.ndarray, stop: StopSignals) -> Iterator[Request]:
        for start in range(0, len(rows), LOAD_ROWS):
            chunk = rows[start : start + LOAD_ROWS]
            columns = (index.expected_tokens(chunk).tolist(), index.prefix[chunk].tolist())
            for (prompt, token_ids), expected_tokens, prefix in zip(index.load(chunk), *columns):
                if stop.requested:
                    # The engine asks for more once it has handed out what is finished: the moment to stop.
                    raise _Stopped
                self.in_flight[prompt.custom_id] = prompt, expected_tokens
                text = prompt.prompt, prompt.messages
                begun = self.partial.pop(prompt.line, None)
                yield Request(prompt.custom_id, token_ids, *text, prompt.params, partial=begun, prefix=prefix)

    def _record(self, prompt: PromptLine, output: RequestOutput, journal: Journal) -> int:
        """Write one finished request down and count it. Returns the tokens it took, prompt and answer."""
        if output.error is not None:
            error = LineError.of(prompt.line, prompt.custom_id, output.error)
            self._count_error(error)
            journal.append(error_record(error, self.job_id, prompt.metadata))
            return 0
        wants_ids = prompt.return_token_ids
        record = answer_record(
            prompt,
            output,
            job_id=self.job_id,
            model=self.config.model_name,
            created_seconds=int(time.time()),
            return_token_ids=self.config.return_token_ids if wants_ids is None else wants_ids,
        )
        journal.append(record)
        usage = record["response"]["body"]["usage"]
        self.answered += 1
        self.prompt_tokens += usage["prompt_tokens"]
        self.generated_tokens += usage["completion_tokens"]
        self.finish_reasons.update(completion.finish_reason for completion in output.outputs)
        return usage["total_tokens"]

    def _summary(self, index, rows, recovered, engine, job_seconds) -> dict[str, Any]:
        run_seconds = self.seconds["run"]
        failed = sum(self.errors.values())
        # A refused line that an earlier run already recorded is in failed_before, not in failed.
        total = len(index) + index.error_count
        done = self.answered + failed + recovered.answered_count + recovered.failed_count
        return {
            "requests": {
                "total": total,
                "answered": self.answered,
                "failed": failed,
                "answered_before": recovered.answered_count,
                "failed_before": recovered.failed_count,
                "left": max(total - done, 0),
            },
            "finish_reasons": dict(self.finish_reasons),
            "errors": dict(self.errors),
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "generated_tokens_per_second": self.generated_tokens / run_seconds if run_seconds else 0.0,
            "total_tokens_per_second": (self.prompt_tokens + self.generated_tokens) / run_seconds
            if run_seconds
            else 0.0,
            "check_seconds": self.seconds["check"],
            "load_seconds": self.seconds["load"],
            "run_seconds": run_seconds,
            "job_seconds": job_seconds,
            "model": self.config.model_name,
            "output_file": self.config.output_file,
            "interrupted": self.interrupted,
            "engine": engine,
        }

    def _checking_report(self, started: float) -> Callable[[int], None] | None:
        """Says now and then that a large file is still being checked."""
        if self.config.progress is False:
            return None
        last_said = started

        def report(checked_lines: int) -> None:
            nonlocal last_said
            if time.perf_counter() - last_said >= PLAIN_SECONDS:
                last_said = time.perf_counter()
                self._say(f"checking: {checked_lines:,} lines so far")

        return report

    def _announce_stop(self, keeps_tokens: bool) -> None:
        lost = "" if keeps_tokens else "; the output is a stream, so answers under way will be lost"
        self._say(f"stopping after this pass{lost}; press Ctrl-C again to stop at once")

    def _say(self, text: str) -> None:
        print(text, file=self.log, flush=True)
