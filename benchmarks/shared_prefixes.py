"""Shared prefixes against the same engine without them: seconds, prompt tokens run, and whether tokens are the same.

    python benchmarks/shared_prefixes.py --model smollm2-135m-instruct --dtype float32

Three jobs: a few-shot header before every question; a system prompt, one of several sets of shots behind it, and a
question; and eight choices of every prompt. Runs with and without sharing take turns in one process each round, so that
what else the machine does slows both. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from contextlib import closing

from flexrun import LLM, SamplingParams
from flexrun.llm import open_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
CHOICES = SamplingParams(temperature=0.8, max_tokens=8, n=8, seed=1, ignore_eos=True)


class Texts:
    """Runs of tokens of plain arithmetic, as many as asked for, no two alike."""

    def __init__(self, tokenizer, seed: int = 0):
        self._tokenizer, self._draw = tokenizer, random.Random(seed)

    def tokens(self, count: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < count:
            first, second = self._draw.randrange(1000), self._draw.randrange(1000)
            text = f"Question: what is {first} plus {second}?\nAnswer: {first + second}.\n\n"
            ids += self._tokenizer.encode(text, add_special_tokens=False)
        return ids[:count]


def header_job(texts: Texts, prompts: int) -> tuple[list[list[int]], SamplingParams]:
    header = texts.tokens(400)
    return [header + texts.tokens(60) for _ in range(prompts)], GREEDY


def nested_job(texts: Texts, prompts: int) -> tuple[list[list[int]], SamplingParams]:
    """A system prompt of 200 tokens, four sets of shots of 250, questions of 60, in no order."""
    system, shots = texts.tokens(200), [texts.tokens(250) for _ in range(4)]
    asked = [system + shots[number % 4] + texts.tokens(60) for number in range(prompts)]
    random.Random(1).shuffle(asked)
    return asked, GREEDY


def choices_job(texts: Texts, prompts: int) -> tuple[list[list[int]], SamplingParams]:
    """Eight choices of each of as many prompts as make the same number of sequences."""
    return [texts.tokens(460) for _ in range(prompts // 8)], CHOICES


JOBS = {"header": header_job, "nested": nested_job, "choices": choices_job}


def run(llm: LLM, prompts, params) -> tuple[float, list[list[list[int]]]]:
    start_seconds = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start_seconds
    return seconds, [[choice.token_ids for choice in output.outputs] for output in outputs]


def compare(settings: argparse.Namespace, files, name: str) -> dict:
    prompts, params = JOBS[name](Texts(files.tokenizer), settings.prompts)
    options = {"dtype": settings.dtype, "cache_dir": settings.cache_dir, "threads": settings.threads}
    options |= {"max_model_len": 1024, "max_num_seqs": settings.max_num_seqs}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    found, run_tokens, forecast_seconds = {}, {}, {}
    for round_number, shares in itertools.product(range(settings.rounds), (True, False)):
        with LLM(settings.model, shared_prefixes=shares, **options) as llm:
            whole, tokens = run(llm, prompts, params)
            summary = llm.summary()
        taken = summary["seconds"]  # without opening the engine
        seconds[shares].append(taken)
        found.setdefault(shares, tokens)
        run_tokens[shares] = summary["prompt_tokens"]
        forecast_seconds[shares] = summary["forecast"]["as_it_came"]["seconds"]
        word = "shared" if shares else "apart"
        print(f"{name} round {round_number + 1}, {word}: {taken:.2f} s, {whole:.1f} s with opening", flush=True)
    medians = {shares: statistics.median(values) for shares, values in seconds.items()}
    pairs = list(zip(itertools.chain(*found[True]), itertools.chain(*found[False]), strict=True))
    return {
        "job": name,
        "prompts": len(prompts),
        "sequences": len(pairs),
        "prompt_tokens": sum(map(len, prompts)) * params.n,
        "prompt_tokens_run": run_tokens[True],
        "seconds_shared": seconds[True],
        "seconds_apart": seconds[False],
        "forecast_seconds": [forecast_seconds[True], forecast_seconds[False]],
        "times_faster": medians[False] / medians[True],
        "sequences_with_other_tokens": sum(one != other for one, other in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache-dir")
    settings = parser.parse_args()
    with closing(open_model(settings.model, dtype=settings.dtype, cache_dir=settings.cache_dir)) as files:
        results = [compare(settings, files, name) for name in settings.jobs]
    print(json.dumps({**vars(settings), "results": results}))


if __name__ == "__main__":
    main()
