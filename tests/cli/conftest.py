"""The command line over a fake engine: what is checked is parsing, calling and printing."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from flexrun.cli import main
from flexrun.outputs import CompletionOutput, RequestOutput


class Tokenizer:
    chat_template = None
    longest_token = 100

    def encode_batch(self, texts, add_special_tokens=True):
        return [[len(word) for word in text.split()] for text in texts]


class EchoLLM:
    """Answers with the number of prompt tokens. Class attributes say what happened and what is to happen."""

    built = None  # the arguments of the last one
    on_request = None

    def __init__(self, files, **settings):
        EchoLLM.built = {**files.opened, **settings}

    def prepare(self, workload):
        self.sequences = len(workload)

    def generate_iter(self, requests, workload, on_pass=None, on_tokens=None):
        for request in requests:
            if EchoLLM.on_request is not None:
                EchoLLM.on_request(request)
            count = len(request.token_ids)
            completion = CompletionOutput(0, str(count), [count], finish_reason="stop")
            yield RequestOutput(request.request_id, request.prompt, request.token_ids, [completion])

    def summary(self):
        return {
            "prompt_tokens": 4,
            "generated_tokens": 2,
            "prefill_seconds": 0.5,
            "decode_seconds": 1.5,
            "tiers": {"cpu": {"peak_bytes": 1 << 20}},
            "process_peak_bytes": 1 << 21,
        }

    def close(self):
        pass


@pytest.fixture
def engine(monkeypatch):
    module = ModuleType("flexrun.llm")
    module.LLM = EchoLLM
    module.open_model = lambda model, **settings: SimpleNamespace(
        tokenizer=Tokenizer(),
        spec=SimpleNamespace(vocab_size=100),
        max_model_len=50,
        weights_digest=lambda: "w",
        close=lambda: None,
        opened={"model": model, **settings},
    )
    monkeypatch.setitem(sys.modules, "flexrun.llm", module)
    monkeypatch.setattr(EchoLLM, "built", None)
    monkeypatch.setattr(EchoLLM, "on_request", None)
    return EchoLLM


@pytest.fixture
def files(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "one two three"}\n{"prompt": "four"}\n')
    return SimpleNamespace(
        source=source, output=tmp_path / "out.jsonl", folder=tmp_path, errors=tmp_path / "errors.jsonl"
    )


@pytest.fixture
def flexrun(engine, files, capsys):
    """flexrun(*flags) runs ``flexrun run`` over the two-line file; returns (exit code, stdout, stderr)."""

    def flexrun(*flags, output=None):
        code = main(["run", "-i", str(files.source), "-o", output or str(files.output), "--model", "echo", *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return flexrun
