"""Runs a prompt file through a model: check every line, then load weights, then stream answers to the journal."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from flexrun import __version__
from flexrun.errors import ConfigError, FlexrunError
from flexrun.jobs.encoder import PromptEncoder
from flexrun.jobs.files import check_distinct
from flexrun.jobs.index import ORDERS, JobIndex, LineError, index_job
from flexrun.jobs.journal import CHOSEN, Journal, Recovered
from flexrun.jobs.outlook import Outlook
from flexrun.jobs.progress import PLAIN_SECONDS
from flexrun.jobs.records import error_record, job_id_of
from flexrun.jobs.report import JobReport
from flexrun.jobs.source import open_source
from flexrun.jobs.stream import AnswerStream
from flexrun.jobs.summary import Tally
from flexrun.sampling import SamplingParams

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
    prefix_unit: int = 1  # tokens of which what is shared must be a multiple
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
        check_distinct(
            {"the input file": self.input_file, "the output file": self.output_file, "the error file": self.error_file}
        )


def run_job(
    config: JobConfig, open_model: Callable[[], Any], build_llm: Callable[..., Any], log: TextIO | None = None
) -> dict[str, Any]:
    """Run one job and return its summary.

    open_model: returns the ModelFiles (of which tokenizer, spec.vocab_size, max_model_len and weights_digest are used),
        no weights.
    build_llm: returns the LLM of these files (prepare, generate_iter, reconsider, summary and close are called); called
    only once every line has been checked and some are left to do. A resume calls it with what the LLM of the first run
    had chosen (its ``chosen``).

    The summary: requests {total, answered, failed, answered_before, failed_before, left}, finish_reasons and errors
    as counts, prompt_tokens, generated_tokens, generated_tokens_per_second, total_tokens_per_second, the seconds of
    each phase, engine (the engine's own summary, None if it was not needed), interrupted, error (None).

    Raises ConfigError for settings that cannot work, and with ``strict`` for any bad line, before weights are loaded.
    """
    return _Job(config, log or sys.stderr).run(open_model, build_llm)


class _Job:
    """One run's state: what is in flight, and the counts for the summary."""

    def __init__(self, config: JobConfig, log: TextIO):
        self.config, self.log = config, log
        self.report = JobReport(config.report_dir)
        self.tally = Tally(config.model_name, config.output_file)
        self.seconds = self.tally.seconds

    def run(self, open_model: Callable[[], Any], build_llm: Callable[..., Any]) -> dict[str, Any]:
        try:
            self._run(open_model, build_llm)
        except BaseException as error:
            self.tally.interrupted |= isinstance(error, KeyboardInterrupt)
            self.report.write(self.tally.summary(error), self._say)
            raise
        summary = self.tally.summary()
        self.report.write(summary, self._say)
        return summary

    def _run(self, open_model: Callable[[], Any], build_llm: Callable[..., Any]) -> None:
        config = self.config
        journal = Journal(config.output_file, config.error_file, resume=config.resume, overwrite=config.overwrite)
        with (
            closing(journal),
            closing(open_model()) as model,
            closing(open_source(config.input_file)) as source,
            closing(self._check(source, model)) as index,
        ):
            manifest = self._manifest(index, model)
            recovered = journal.recover(manifest, config.retry_errors)
            self.report.begin()
            self.tally.before(recovered.answered_count, recovered.failed_count)
            rows = np.flatnonzero(~np.isin(index.lines, recovered.lines))
            outlook = self._outlook(index, rows, recovered)
            rows = outlook.order(config.order, rows)
            stream = AnswerStream(
                config, outlook, recovered.partial, journal, self.tally, self.report, self.job_id, self._say
            )
            self._answer(lambda: build_llm(model, **recovered.chosen), stream, rows, recovered, journal, manifest)
            interrupted = self.tally.interrupted
            journal.finish(config.preserve_order and not interrupted, keep_tokens=interrupted)

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
            prefix_unit=self.config.prefix_unit,
        )
        self.seconds["check"] = time.perf_counter() - started
        self.tally.total = len(index) + index.error_count
        self._say(f"checked {self.tally.total:,} lines in {self.seconds['check']:.1f} s: {len(index):,} good")
        for warning in index.warnings():
            self._say(f"warning: {warning}")
        shown = list(itertools.islice(index.errors(), STRICT_SHOWN))
        for error in shown:
            self._say(f"line {error.line} refused ({error.code}): {error.message}")
        if index.error_count > len(shown):
            self._say(f"... and {index.error_count - len(shown):,} more lines refused")
        if self.config.strict and index.error_count:
            self.report.begin()
            for error in index.errors():
                self._count_error(error)
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
            "weights": model.weights_digest(),
            "max_model_len": model.max_model_len,
            "input_sha256": index.input_sha256,
            "return_token_ids": config.return_token_ids,
            "error_file": config.error_file and Path(config.error_file).name,
            "sampling": dataclasses.asdict(config.sampling),
            **config.identity,
        }
        self.job_id = job_id_of(manifest)
        return manifest

    def _answer(self, build_llm, stream, rows, recovered, journal, manifest) -> None:
        """Everything that writes."""
        started = time.perf_counter()
        with closing(build_llm()) if len(rows) else nullcontext() as llm:
            if llm is not None:
                llm.prepare(stream.workload(rows))  # refuses what does not fit while nothing is written yet
            self.seconds["load"] = time.perf_counter() - started
            if chosen := recovered.chosen or getattr(llm, "chosen", None):
                manifest = {**manifest, CHOSEN: chosen}
            journal.start(manifest, recovered.partial.keys())
            self._write_refusals(stream.index, recovered, journal)
            if llm is None:
                return
            started = time.perf_counter()
            try:
                stream.run(llm, rows)
            except BaseException as error:
                if isinstance(error, FlexrunError) and self.config.output_file != "-":
                    where = self.config.output_file
                    self._say(f"{self.tally.answered:,} answers of this run are safe in {where}; go on with --resume")
                with suppress(Exception):  # what ended the run is what there is to say
                    self.tally.engine = llm.summary()
                raise
            finally:
                self.seconds["run"] = time.perf_counter() - started
            self.tally.engine = llm.summary()

    def _write_refusals(self, index: JobIndex, recovered: Recovered, journal: Journal) -> None:
        for error in index.errors():
            if error.line not in recovered:
                self._count_error(error)
                journal.append(error_record(error, self.job_id))

    def _count_error(self, error: LineError) -> None:
        self.tally.errors[error.code] += 1
        self.report.add_error(error)

    def _outlook(self, index: JobIndex, rows: np.ndarray, recovered: Recovered) -> Outlook:
        """What is to be done, and what earlier answers tell about it."""
        outlook = Outlook(index, rows)
        row_of = np.searchsorted(index.lines, recovered.answers[:, 0])
        for row, (choices, tokens, ended) in zip(row_of.tolist(), recovered.answers[:, 1:].tolist()):
            if row < len(index) and tokens:
                outlook.add(row, round(tokens / choices), bool(ended))
        if len(recovered.answers):
            begun = np.isin(index.lines[rows], np.fromiter(recovered.partial, dtype=np.int64))
            outlook.look(
                (row, len(tokens))
                for row in rows[begun].tolist()
                for tokens in recovered.partial[int(index.lines[row])].values()
            )
        return outlook

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

    def _say(self, text: str) -> None:
        print(text, file=self.log, flush=True)
