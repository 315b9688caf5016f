"""A model of words and an engine of counters: everything a job needs of an LLM, with no weights."""

import json
from types import SimpleNamespace

import pytest

from flexrun.errors import RequestError, TokenizerError
from flexrun.jobs.runner import JobConfig, run_job
from flexrun.outputs import CompletionOutput, Logprob, RequestOutput

VOCAB_SIZE = 1000
MAX_MODEL_LEN = 64


class WordTokenizer:
    """One token a word: its length, plus its first character's code, modulo the vocabulary. BOS is 1."""

    chat_template = "words"
    longest_token = 10**6

    def encode_batch(self, texts, add_special_tokens=True):
        self.batch_sizes = [*getattr(self, "batch_sizes", []), len(texts)]
        return [[1] * add_special_tokens + [(ord(w[0]) * 7 + len(w)) % VOCAB_SIZE for w in t.split()] for t in texts]

    def apply_chat_template(self, messages):
        if self.chat_template is None:
            raise TokenizerError("this model has no chat template, so it cannot be given messages", "send prompts")
        return " ".join(f"<{message['role']}> {message['content']}" for message in messages) + " <assistant>"


class CountingLLM:
    """Runs ``slots`` requests at once, one token each a pass; the answer is the sum of the prompt's ids, counted up.

    Its own end comes after ``sum(ids) % 5 + 1`` tokens. fail_ids: requests it refuses. on_pass: called every pass.
    generated: tokens it made itself, not those that an earlier run had begun with.
    """

    def __init__(self, slots=4, fail_ids=(), on_pass=None):
        self.slots, self.fail_ids, self.on_pass = slots, set(fail_ids), on_pass
        self.seen, self.most_in_flight, self.closed = [], 0, False
        self.generated = 0
        self.has_better, self.reconsidered = False, None
        self.chosen = {}  # what was left to it and came out, as LLM has it

    def prepare(self, workload):
        self.prepared_for = workload

    def reconsider(self, workload):
        """Keeps to its plan, but for the first time where it ``has_better``."""
        has_better, self.has_better = self.has_better, False
        if has_better:
            self.prepared_for = self.reconsidered = workload
        return has_better

    def generate_iter(self, requests, workload, on_pass=None, on_tokens=None):
        assert (workload.prompt_tokens == self.prepared_for.prompt_tokens).all()
        requests = iter(requests)
        running = {}
        while True:
            while len(running) < self.slots and (request := next(requests, None)) is not None:
                self.seen.append(request)
                running[request.request_id] = request, len((request.partial or {}).get(0, ()))
            self.most_in_flight = max(self.most_in_flight, len(running))
            if not running:
                return
            if self.on_pass is not None:
                self.on_pass(self)
            finished, sampled = [], []
            for request_id, (request, count) in list(running.items()):
                running[request_id] = request, count + 1
                assert (
                    list((request.partial or {}).get(0, ()))
                    == [self._token(request, step) for step in range(count)][: len((request.partial or {}).get(0, ()))]
                )
                if request_id not in self.fail_ids and count < self._length(request):
                    self.generated += 1
                    sampled += [(request_id, choice, self._token(request, count)) for choice in range(request.params.n)]
                if request_id in self.fail_ids or count + 1 >= self._length(request):
                    del running[request_id]
                    finished.append(request)
            if on_tokens is not None:
                on_tokens(sampled)
            yield from map(self._output, finished)

    @staticmethod
    def _token(request, step):
        return (sum(request.token_ids) + step) % VOCAB_SIZE

    def _length(self, request):
        return min(request.params.max_tokens, sum(request.token_ids) % 5 + 1)

    def _output(self, request):
        if request.request_id in self.fail_ids:
            return RequestOutput.refused(request, RequestError("the engine refused it", "ask again", "engine_error"))
        length = self._length(request)
        token_ids = [self._token(request, step) for step in range(length)]
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = [
                {token: Logprob(-0.5, 1, f"t{token}"), token + 1: Logprob(float("-inf"), 2, f"t{token + 1}")}
                for token in token_ids
            ]
        reason = "length" if length == request.params.max_tokens else "stop"
        choices = [
            CompletionOutput(index, " ".join(map(str, token_ids)), token_ids, -0.5 * length, logprobs, reason)
            for index in range(request.params.n)
        ]
        return RequestOutput(request.request_id, request.prompt, request.token_ids, choices)

    def summary(self):
        return {"generated_tokens": self.generated}

    def close(self):
        self.closed = True


@pytest.fixture
def model():
    return SimpleNamespace(
        tokenizer=WordTokenizer(),
        spec=SimpleNamespace(vocab_size=VOCAB_SIZE),
        max_model_len=MAX_MODEL_LEN,
        weights_digest=lambda: "w",
        close=lambda: None,
    )


@pytest.fixture
def make_llm():
    return CountingLLM


@pytest.fixture
def run(tmp_path, model):
    """run(lines, llm=..., **JobConfig fields) -> (summary, records); lines is what to write to in.jsonl, or None."""

    def run(lines=None, llm=None, **settings):
        source = tmp_path / "in.jsonl"
        if lines is not None:
            text = lines if isinstance(lines, bytes) else b"".join(_raw(line) + b"\n" for line in lines)
            source.write_bytes(text)
        settings = {
            "input_file": str(source),
            "output_file": str(tmp_path / "out.jsonl"),
            "model_name": "counting",
            "progress": False,
            **settings,
        }
        summary = run_job(JobConfig(**settings), lambda: model, lambda files: llm or CountingLLM())
        output = tmp_path / "out.jsonl"
        return summary, read_jsonl(output) if output.exists() else []

    return run


def _raw(line):
    if isinstance(line, bytes):
        return line
    return (line if isinstance(line, str) else json.dumps(line)).encode()


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
