"""Knows every line of a job by a few bytes each: validates the whole file in one pass, then finds any line again.

A good line costs 61 bytes of memory however long its prompt is, and up to 20 more where prefixes are shared; the prompt
itself is read again when its turn comes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from flexrun.errors import ExecutionError, RequestError
from flexrun.jobs.encoder import PromptEncoder
from flexrun.jobs.jsonl import (
    NEUTRAL_VALUES,
    OPTION_KEYS,
    OWN_KEYS,
    PromptLine,
    decode_line,
    line_id,
    parse_line,
    unread_keys,
)
from flexrun.jobs.source import MAX_LINE_BYTES, digest_rest, read_line_at, read_lines
from flexrun.prefixes import NONE, ROOT, Prefixes, PrefixTree, shareable_tokens
from flexrun.sampling import SamplingParams
from flexrun.workload import Workload, longest_answers_first

ORDERS = ("longest", "input")
BATCH_LINES = 512
BATCH_BYTES = 4 << 20
MAX_WARNINGS = 20
LOOKALIKE = 0.85  # difflib ratio from which a metadata key is taken for a misspelt option
_ERROR_SPOOL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LineError:
    """Why one line is refused. ``line`` counts from 1."""

    line: int
    custom_id: str
    code: str
    message: str

    @classmethod
    def of(cls, line: int, custom_id: str, error: RequestError) -> LineError:
        message = error.message if error.hint is None else f"{error.message}; {error.hint}"
        return cls(line, custom_id, error.code, message)


class JobIndex:
    """The good lines of one file as rows of compact arrays. Made by ``index_job``.

    lines: int64 [rows], 1-based line numbers. prompt_tokens, choices, answer_tokens: int64 [rows], the last the most
    tokens that one of the line's choices may generate. scored: bool [rows], whether the prompt is scored.
    prefixes; prefix: int32 [rows]: what prompts begin with in common, and which of it each line does; see Workload.
    input_sha256: of the whole (unpacked) file. error_count: lines refused.
    """

    def __init__(
        self,
        source: BinaryIO,
        encoder: PromptEncoder,
        defaults: SamplingParams,
        shares: bool = True,
        prefix_unit: int = 1,
    ):
        self._source, self._encoder, self._defaults = source, encoder, defaults
        self._offsets, self._lines = array("q"), array("q")
        self._prompt_tokens = array("q")  # 0 for a refused line
        self._answer_tokens, self._choices = array("q"), array("q")
        self._scored = bytearray()
        self._tree = PrefixTree(unit=prefix_unit) if shares else None
        self._nodes = array("i")  # of the tree
        self._digests = bytearray()
        self._errors = tempfile.SpooledTemporaryFile(_ERROR_SPOOL_BYTES, mode="w+", encoding="utf-8")  # noqa: SIM115
        self._unread_keys: dict[str, int] = {}  # first line of each
        self.error_count = 0
        self.input_sha256 = ""

    def __len__(self) -> int:
        return len(self.lines)

    def order(
        self, name: str = "longest", rows: np.ndarray | None = None, answer_tokens: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows (default: all) in the order to run. ``longest``: see longest_answers_first; lines that share a prefix
        follow the first of them.

        answer_tokens: of the rows of the index, what each choice is expected to take (default: the most that it may).
        """
        rows = np.arange(len(self)) if rows is None else rows
        if name == "input":
            return rows
        answers = (self.answer_tokens if answer_tokens is None else answer_tokens)[rows]
        rows = rows[longest_answers_first(self.prompt_tokens[rows], answers)]
        return rows[self.prefixes.order(self.prefix[rows])]

    def workload(self, rows: np.ndarray) -> Workload:
        """What the engine sizes itself by to run ``rows``."""
        choices = self.choices[rows]
        scored = np.where(self.scored[rows], self.prompt_tokens[rows] - 1, 0)
        columns = (self.prompt_tokens[rows], self.answer_tokens[rows], scored)
        workload = Workload.of(*(np.repeat(column, choices) for column in columns))
        return workload.sharing(self.prefixes, np.repeat(self.prefix[rows], choices))

    def load(self, rows: Sequence[int]) -> list[tuple[PromptLine, list[int]]]:
        """Each row's line and its prompt's token ids, read again from the file.

        Raises ExecutionError where the file has changed since it was indexed.
        """
        prompts = []
        for row in rows:
            line = int(self.lines[row])
            try:
                values = decode_line(read_line_at(self._source, int(self.offsets[row])))
                prompts.append(parse_line(values, line, self._defaults))
            except RequestError as error:
                raise self._changed(line) from error
        encoded = self._encoder.encode(prompts)
        for row, prompt, token_ids in zip(rows, prompts, encoded):
            if isinstance(token_ids, RequestError) or _digest(prompt.custom_id) != self.digests[row].tobytes():
                raise self._changed(prompt.line)
        return list(zip(prompts, encoded))

    def errors(self) -> Iterator[LineError]:
        """The refused lines as found: those that no tokenizer need see some lines early, duplicates at the end."""
        self._errors.seek(0)
        for text in self._errors:
            yield LineError(*json.loads(text))

    def warnings(self) -> list[str]:
        """Keys that travel as metadata although they look like options."""
        found = []
        for key, line in self._unread_keys.items():
            close = difflib.get_close_matches(key, OPTION_KEYS | OWN_KEYS, n=1, cutoff=LOOKALIKE)
            if key in NEUTRAL_VALUES:
                found.append(f"line {line}: {key!r} is not run; it travels to the output as metadata")
            elif close:
                found.append(f"line {line}: {key!r} travels to the output as metadata; did you mean {close[0]!r}?")
        return found[:MAX_WARNINGS]

    def close(self) -> None:
        self._errors.close()

    @staticmethod
    def _changed(line: int) -> ExecutionError:
        return ExecutionError(
            f"line {line} of the input file changed while the job was running",
            "leave the input file alone until the job is done; run it again from the start",
        )

    def _add(
        self,
        offset: int,
        line: int,
        custom_id: str,
        prompt_tokens: int = 0,
        answer_tokens: int = 0,
        choices: int = 0,
        scored: bool = False,
        node: int = ROOT,
    ) -> None:
        self._offsets.append(offset)
        self._lines.append(line)
        self._prompt_tokens.append(prompt_tokens)
        self._answer_tokens.append(answer_tokens)
        self._choices.append(choices)
        self._scored.append(scored)
        self._nodes.append(node)
        self._digests += _digest(custom_id)

    def _refuse(self, error: LineError) -> None:
        self._errors.write(json.dumps([error.line, error.custom_id, error.code, error.message]) + "\n")
        self.error_count += 1

    def _note_unread(self, values: dict, line: int) -> None:
        if "body" not in values and len(self._unread_keys) < 256:
            for key in unread_keys(values):
                self._unread_keys.setdefault(key, line)

    def _settle(self, input_sha256: str) -> None:
        """After the pass: refuse the later of lines with equal ids, and keep only the good lines, as numpy arrays."""
        self.input_sha256 = input_sha256
        in_file_order = np.argsort(np.frombuffer(self._lines, dtype=np.int64))
        columns = (self._lines, self._offsets, self._prompt_tokens, self._answer_tokens, self._choices)
        lines, offsets, prompt_tokens, answer_tokens, choices = (
            np.frombuffer(column, dtype=np.int64)[in_file_order] for column in columns
        )
        scored = np.frombuffer(self._scored, dtype=bool)[in_file_order]
        digests = np.frombuffer(self._digests, dtype=np.uint64).reshape(-1, 2)[in_file_order]
        first = first_equal(digests)
        duplicate = (first != np.arange(len(first))) & (prompt_tokens > 0)
        for row in np.flatnonzero(duplicate):
            line = int(lines[row])
            custom_id = line_id(decode_line(read_line_at(self._source, int(offsets[row]))), line)
            message = f"custom_id {custom_id!r} is already used by line {lines[first[row]]}"
            self._refuse(LineError(line, custom_id, "duplicate_custom_id", message))
        good = (prompt_tokens > 0) & ~duplicate
        self.lines, self.offsets, self.digests = lines[good], offsets[good], digests[good]
        self.prompt_tokens, self.answer_tokens, self.choices = prompt_tokens[good], answer_tokens[good], choices[good]
        self.scored = scored[good]
        del self._offsets, self._lines, self._prompt_tokens, self._answer_tokens, self._choices, self._digests
        self.prefixes, prefix_of = Prefixes(), np.array([NONE])
        if self._tree is not None:
            self.prefixes, prefix_of = self._tree.chosen()
        nodes = np.frombuffer(self._nodes, dtype=np.int32)[in_file_order][good]
        self.prefix = prefix_of.astype(np.int32)[nodes]
        del self._scored, self._nodes, self._tree


def index_job(
    source: BinaryIO,
    encoder: PromptEncoder,
    defaults: SamplingParams,
    *,
    limit: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    shares: bool = True,
    prefix_unit: int = 1,
) -> JobIndex:
    """Validate every line of a seekable JSONL file in one pass, in memory that does not grow with the prompts.

    limit: only the first so many lines that are not blank. on_progress: called with the lines checked so far.
    shares: whether to look for what prompts begin with in common, in whole units of so many tokens.
    """
    index = JobIndex(source, encoder, defaults, shares, prefix_unit)
    digest = hashlib.sha256()
    batch: list[tuple[int, PromptLine]] = []  # (offset, line) parsed but not tokenised
    batch_bytes = 0
    with _Tokenising(index) as tokenising:
        for checked, (line, offset, content) in enumerate(read_lines(source, digest)):
            if checked == limit:
                break
            custom_id = f"line-{line}"
            try:
                if content is None:
                    raise RequestError(f"the line is over {MAX_LINE_BYTES >> 20} MiB", code="line_too_long")
                values = decode_line(content)
                custom_id = line_id(values, line)
                index._note_unread(values, line)
                batch.append((offset, parse_line(values, line, defaults)))
                batch_bytes += len(content)
            except RequestError as error:
                index._add(offset, line, custom_id)
                index._refuse(LineError.of(line, custom_id, error))
            if len(batch) >= BATCH_LINES or batch_bytes >= BATCH_BYTES:
                tokenising.take(batch)
                batch, batch_bytes = [], 0
                if on_progress is not None:
                    on_progress(checked + 1)
        tokenising.take(batch)
        tokenising.finish()
    digest_rest(source, digest)
    index._settle(digest.hexdigest())
    return index


class _Tokenising:
    """Tokenises a batch of lines in a thread of its own while the next one is read: tokenizers let go of Python."""

    def __init__(self, index: JobIndex):
        self._index, self._thread = index, ThreadPoolExecutor(1, "flexrun-tokenise")
        self._under_way: tuple[list[tuple[int, PromptLine]], Future] | None = None

    def __enter__(self) -> _Tokenising:
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, batch: list[tuple[int, PromptLine]]) -> None:
        before = self._under_way
        future = self._thread.submit(self._index._encoder.encode, [prompt for _, prompt in batch])
        self._under_way = batch, future
        if before is not None:
            _add_batch(self._index, before[0], before[1].result())

    def finish(self) -> None:
        batch, future = self._under_way
        _add_batch(self._index, batch, future.result())


def _add_batch(index: JobIndex, batch: list[tuple[int, PromptLine]], encoded: list[list[int] | RequestError]) -> None:
    most_tokens = index._encoder.max_model_len
    for (offset, prompt), token_ids in zip(batch, encoded):
        if isinstance(token_ids, RequestError):
            index._add(offset, prompt.line, prompt.custom_id)
            index._refuse(LineError.of(prompt.line, prompt.custom_id, token_ids))
            continue
        room = most_tokens - len(token_ids)
        params = prompt.params
        answer_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        scored = params.prompt_logprobs is not None
        node = ROOT
        if index._tree is not None:
            most = shareable_tokens(len(token_ids), answer_tokens, 1 if scored else None)
            node = index._tree.add(token_ids[:most], params.n)
        index._add(offset, prompt.line, prompt.custom_id, len(token_ids), answer_tokens, params.n, scored, node)


def first_equal(digests: np.ndarray) -> np.ndarray:
    """For each row of uint64 [rows, 2], the first row equal to it (itself where it is the first)."""
    if not len(digests):
        return np.zeros(0, dtype=np.int64)
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal rows keep their order
    ordered = digests[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def _digest(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
