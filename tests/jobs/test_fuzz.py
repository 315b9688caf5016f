"""Piles of generated lines, half of them broken: a record for each, and the good ones are answered as if alone."""

from __future__ import annotations

import io
import json
import random
from collections import Counter

import pytest

from flexrun.config import Policy
from flexrun.jobs.runner import JobConfig, run_job
from flexrun.llm import LLM, open_model
from flexrun.sampling import SamplingParams

VOCABULARY = 64  # ids that both models of these tests have
DEEP = b', "x": ' + b"[" * 300 + b"]" * 300 + b"}"
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 5}


def good_line(draw: random.Random, name: str, texts: bool) -> dict:
    """A request in one of the shapes that are served. texts: also those that need a tokenizer."""
    ids = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 6))]
    text = " ".join(str(token) for token in ids)
    options = {
        "max_tokens": draw.randint(1, 2),
        **draw.choice(
            [{}, SAMPLED, {**SAMPLED, "n": 2}, {"stop_token_ids": [draw.randrange(VOCABULARY)]}, {"logprobs": 1}]
        ),
    }
    shapes = [
        {"prompt_token_ids": ids, **options},
        {"prompt": ids, **options, "label": "ü\u2028"},
        {"prompt": ids, **options, "label": json.loads('{"a": [' * 50 + "]}" * 50)},
        {"method": "POST", "url": "/v1/completions", "body": {"prompt": ids, **options}},
    ]
    if texts:
        shapes += [
            {"prompt": text, **options},
            {"messages": [{"role": "user", "content": text}], **options},
            {
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}], "max_tokens": 2},
            },
        ]
    return {"custom_id": name, **draw.choice(shapes)}


WRONG = [  # replaced or added in a bare line of token ids
    {"prompt_token_ids": []},
    {"prompt_token_ids": [1, "2"]},
    {"prompt_token_ids": [1, True]},
    {"prompt_token_ids": [1.5]},
    {"prompt_token_ids": [-1]},
    {"prompt_token_ids": [10**30]},
    {"prompt_token_ids": {"a": 1}},
    {"prompt_token_ids": [[[1]]]},
    {"prompt_token_ids": [5] * 5000},
    {"messages": [{"role": "user", "content": "x"}]},  # beside the ids
    {"prompt_token_ids": None, "messages": [{"role": "robot", "content": "x"}]},
    {"prompt_token_ids": None, "messages": [{"role": "user", "content": {"a": None}}]},
    {"prompt_token_ids": None, "messages": [None]},
    {"prompt_token_ids": None, "prompt": 0},
    {"prompt_token_ids": None, "prompt": ["a", None]},
    {"prompt_token_ids": None},
    {"max_tokens": -5},
    {"max_tokens": "3"},
    {"temperature": -0.1},
    {"temperature": "hot"},
    {"temperature": [1]},
    {"top_p": 1.5},
    {"top_k": 2.5},
    {"n": 0},
    {"n": 10**9},
    {"n": 10**9, "temperature": 1},
    {"n": 10**30, "temperature": 1},
    {"temperature": 10**400},
    {"top_k": 10**30},
    {"max_tokens": 10**30},
    {"repetition_penalty": 1e300},
    {"stop_token_ids": [10**30]},
    {"seed": "x"},
    {"seed": {}},
    {"stop": 5},
    {"stop": [None]},
    {"stop_token_ids": "5"},
    {"logprobs": -1},
    {"logprobs": "all"},
    {"logit_bias": {"5": 1}},
    {"min_tokens": 99},
    {"repetition_penalty": 0},
    {"return_token_ids": "yes"},
    {"custom_id": None, "prompt": ""},
    {"custom_id": 7},
    {"custom_id": {}},
    {"custom_id": ""},
    {"body": 5},
    {"url": "/v1/embeddings", "body": {}},
    {"method": "PUT", "url": "/v1/completions", "body": {"prompt": [5]}},
]


def broken_line(draw: random.Random, name: str) -> bytes:
    """One line that cannot be served, whatever its bytes are."""
    whole = {"custom_id": name, "prompt_token_ids": [5, 6, 7], "max_tokens": 2}
    raw = json.dumps(whole).encode()
    kind = draw.randrange(9)
    if kind <= 3:
        return json.dumps({**whole, **draw.choice(WRONG)}).encode()
    if kind == 4:
        return raw[: draw.randrange(1, len(raw) - 1)]
    if kind == 5:
        return bytes(
            draw.choice(b'{}[]",:\\0123456789eE+-.truefalsn\x00\xff\xc3\xe2') for _ in range(draw.randint(1, 60))
        )
    if kind == 6:
        return draw.choice([b"null", b"[]", b"3", b'"x"', b"{}", b"[" * 3000, b'{"a":' * 3000, b"NaN", b"\xed\xa0\x80"])
    if kind == 7:
        return raw[:-1] + draw.choice(
            [b', "x": NaN}', DEEP, b', "x": 1e999}', b', "x": "\\ud800"}', b', "x": "\xc3"}', b",}"]
        )
    return raw + draw.choice([b"{}", b",", b"]", b"\x00", raw])


def pile(count: int, texts: bool) -> tuple[list[bytes], list[bytes]]:
    """(good lines, all lines): ``count`` in all, half of them broken, in a random order, with all line ends."""
    draw = random.Random(20_000)
    good = [json.dumps(good_line(draw, f"good-{number}", texts)).encode() for number in range(count // 2)]
    bad = [broken_line(draw, f"bad-{number}").strip(b" \t\r\n") or b"{" for number in range(count // 2 - 50)]
    lines = [(line, 0) for line in good] + [(line, 1) for line in bad]
    draw.shuffle(lines)
    lines += [(draw.choice(good), 1) for _ in range(50)]  # ids that were used before
    return good, [line + draw.choice([b"", b"\r", b"  "]) for line, _ in lines]


def answers_of(path) -> tuple[Counter, dict]:
    """(records of each input line, the choices of each good line by its id)."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    choices = {
        record["custom_id"]: [
            (each.get("text", each.get("message")), each["token_ids"], each["finish_reason"])
            for each in record["response"]["body"]["choices"]
        ]
        for record in records
        if record["error"] is None
    }
    for record in records:
        assert (record["error"] is None) != (record["response"] is None)
        assert record["error"] is None or (record["error"]["code"] and record["error"]["message"])
    return Counter(int(record["id"].rsplit("_", 1)[1]) for record in records), choices


def check(tmp_path, count: int, texts: bool, open_files, build) -> None:
    good, lines = pile(count, texts)
    assert len(lines) == count
    found = {}
    for name, content in (("good", good), ("all", lines)):
        source, output = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.out.jsonl"
        source.write_bytes(b"\n".join(content) + b"\n")
        sampling = SamplingParams(temperature=0.0, max_tokens=2)
        config = JobConfig(str(source), str(output), "m", sampling, progress=False, return_token_ids=True)
        summary = run_job(config, open_files, build, io.StringIO())
        found[name] = answers_of(output)
        assert summary["requests"]["answered"] == len(found[name][1]) and summary["requests"]["left"] == 0
    assert found["all"][0] == Counter(range(1, count + 1)), "not one record a line"
    assert found["good"][0] == Counter(range(1, len(good) + 1))
    assert len(found["good"][1]) == len(good), "a good line was refused"
    assert {name for name in found["all"][1] if not name.startswith("good-")} == set(), "a broken line was answered"
    assert found["all"][1] == found["good"][1]


def test_a_pile_with_every_fault(tmp_path, model, make_llm):
    check(tmp_path, 4000, True, lambda: model, lambda files: make_llm(slots=64))


@pytest.mark.slow
def test_twenty_thousand_lines_on_a_real_engine(tmp_path, checkpoint, packed_cache):
    policy = Policy(sequences_in_flight=256, tokens_per_pass=1024, attention_micro_batch=256)
    check(
        tmp_path,
        20_000,
        False,
        lambda: open_model(checkpoint("llama"), dtype="float32"),
        lambda files: LLM(files, threads=1, cpu_memory="512MiB", disk_dir=packed_cache, policy=policy),
    )
