"""lm-evaluation-harness's requests a second on flexrun, and on its own Hugging Face backend at its best batch size.

    python benchmarks/lm_eval_requests.py --folder path/to/smollm2 --questions 48

Wants an environment with lm-eval, transformers and flexrun; the model is one that helm_requests.py --folder writes, in
bfloat16. Two kinds of requests as tasks make them: log-likelihoods of four choices behind five examples, and greedy
answers of 16 tokens behind them. Loading and planning are not counted: flexrun is asked once before. The last line of
stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from processes import say


def requests_of(questions: int) -> dict[str, list]:
    """Requests of each kind."""
    from lm_eval.api.instance import Instance

    draw = random.Random(0)

    def question() -> tuple[str, int]:
        first, second = draw.randrange(1000), draw.randrange(1000)
        return f"Question: a shelf has {first} books, and {second} more are put on it. How many has it?\nAnswer:", (
            first + second
        )

    header = "".join(f"{text} {answer}.\n\n" for text, answer in (question() for _ in range(5)))
    asked = [(header + text, answer) for text, answer in (question() for _ in range(questions))]
    settings = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}
    choices = [(text, f" {answer + step}.") for text, answer in asked for step in (0, 1, 10, 100)]
    kinds = {"loglikelihood": choices, "generate_until": [(text, settings) for text, _ in asked]}
    return {
        kind: [Instance(kind, {}, arguments, number) for number, arguments in enumerate(rows)]
        for kind, rows in kinds.items()
    }


def seconds_of(lm, kind: str, requests: list) -> tuple[float, list]:
    start_seconds = time.perf_counter()
    found = getattr(lm, kind)(requests, disable_tqdm=True)
    return time.perf_counter() - start_seconds, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3, help="of flexrun, and of the other's best batch size")
    parser.add_argument("--cpu-memory", default="4GiB")
    parser.add_argument("--dtype", default="bfloat16", help="of both")
    settings = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    from flexrun.evals.lm_eval_adapter import FlexrunLM

    asked = requests_of(settings.questions)
    ours = FlexrunLM(str(settings.folder), dtype=settings.dtype, cpu_memory=settings.cpu_memory, max_length=2048)
    theirs = HFLM(str(settings.folder), dtype=settings.dtype, device="cpu", max_length=2048)
    document = []
    for kind, requests in asked.items():
        seconds_of(theirs, kind, requests[:2])
        by_size = {}
        for size in settings.batch_sizes:
            theirs.batch_size_per_gpu = size
            by_size[size], expected = seconds_of(theirs, kind, requests)
            say(f"{kind}: Hugging Face, batches of {size}: {len(requests) / by_size[size]:.2f} requests/s")
        best = min(by_size, key=by_size.__getitem__)
        theirs.batch_size_per_gpu = best
        seconds_of(ours, kind, requests)
        rounds = []
        for _ in range(settings.rounds):
            rounds.append((seconds_of(ours, kind, requests), seconds_of(theirs, kind, requests)))
        rates = [[len(requests) / pair[side][0] for pair in rounds] for side in (0, 1)]
        found, expected = (pair[1] for pair in rounds[0])
        if kind == "loglikelihood":
            apart = max(abs(one[0] - other[0]) for one, other in zip(found, expected))
            alike = f"log-likelihoods differ by up to {apart:.2g}"
        else:
            equal = sum(one == other for one, other in zip(found, expected))
            alike = f"{equal} of {len(requests)} answers equal"
        medians = [statistics.median(each) for each in rates]
        ratio = statistics.median(one / other for one, other in zip(*rates))
        print(
            f"{kind}: flexrun {medians[0]:.1f} requests/s, lm-eval's Hugging Face backend {medians[1]:.1f} "
            f"(batches of {best}): {ratio:.1f} times; {alike}"
        )
        tried = {size: len(requests) / seconds for size, seconds in by_size.items()}
        document.append(
            {"kind": kind, "flexrun": rates[0], "huggingface": rates[1], "tried": tried, "best": best, "alike": alike}
        )
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
