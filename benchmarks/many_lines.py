"""Files of very many lines: seconds of checking and of running a line, and whether memory grows with the file.

    python benchmarks/many_lines.py --lines 1000 10000 100000
    python benchmarks/many_lines.py --lines 1000000 --start-only                               # until answers come
    python benchmarks/many_lines.py --lines 1000000 --start-only --model smollm2-135m-instruct # and lines of text

The model is tiny and each line asks for one token, so what is measured is the job around the engine: reading,
checking, scheduling, journal. With a --model the lines are questions in words, which are tokenised too. The last line
of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_checkpoint import SHAPES, make_checkpoint
from processes import MachineTimes, end_on_terminate, outside_use, say

SAMPLE_SECONDS = 0.1
PROMPT_TOKENS = (4, 16)  # shortest and longest


def write_lines(path: Path, count: int, vocab_size: int, seed: int = 0) -> None:
    """``count`` JSONL lines of random token ids that ask for one token each."""
    draw = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            ids = [draw.randrange(3, vocab_size) for _ in range(draw.randint(*PROMPT_TOKENS))]
            file.write(f'{{"prompt_token_ids": {ids}, "max_tokens": 1}}\n')


def write_texts(path: Path, count: int) -> None:
    """``count`` JSONL lines of short questions in words."""
    words = Path(__file__).read_text().split()
    draw = random.Random(0)
    with open(path, "w") as file:
        for number in range(count):
            text = " ".join(draw.choices(words, k=draw.randint(6, 14)))
            line = {"custom_id": f"question-{number}", "prompt": f"Question {number}: {text}?", "max_tokens": 1}
            file.write(json.dumps(line) + "\n")


def run_lines(count: int, settings: argparse.Namespace, scratch: Path) -> dict:
    """``flexrun run`` over ``count`` lines, with its resident memory sampled against the answers on disk."""
    lines, answers, summary = (scratch / f"{count}{end}" for end in (".jsonl", ".out.jsonl", ".summary.json"))
    if settings.model:
        write_texts(lines, count)
    else:
        write_lines(lines, count, SHAPES["llama-tiny"]["vocab_size"])
    command = [sys.executable, "-m", "flexrun", "run", "--input-file", lines, "--output-file", answers]
    command += ["--output-json", summary]
    command += ["--model", settings.model or scratch / "model"]
    command += [] if settings.model else ["--cache-dir", scratch / "cache"]
    command += ["--max-model-len", settings.max_model_len, "--max-num-seqs", settings.max_num_seqs]
    command += [
        "--cpu-memory",
        settings.cpu_memory,
        "--ignore-eos",
        "--no-progress",
        *settings.flags,
    ]
    threads = settings.threads or (None if settings.model else 1)
    command += ["--threads", threads] if threads else []
    before = MachineTimes.now()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([str(word) for word in command], stdout=errors, stderr=errors)
        try:
            samples = sample(process, answers, settings.start_only)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        if process.returncode and not settings.start_only:
            raise SystemExit(f"flexrun run ended with {process.returncode}:\n{errors.read()[-2000:]}")
        said = errors.read()
    if settings.start_only:
        if not any(written for _, _, written in samples):
            raise SystemExit(f"no answer came:\n{said[-2000:]}")
        return {
            "lines": count,
            "input_bytes": lines.stat().st_size,
            "seconds_to_first_answer": samples[-1][0],
            "rss_bytes_peak": max(rss for _, rss, _ in samples),
            "said": said,
            **outside_use(before, MachineTimes.now()),
        }
    document = json.loads(summary.read_text())
    answered = document["requests"]["answered"]
    if answered != count:
        raise SystemExit(f"{answered} of {count} lines were answered")
    return {
        "lines": count,
        "check_seconds": document["check_seconds"],
        "run_seconds": document["run_seconds"],
        "job_seconds": document["job_seconds"],
        "check_seconds_per_line": document["check_seconds"] / count,
        "run_seconds_per_line": document["run_seconds"] / count,
        "rss_bytes_at_10_percent": rss_at(samples, 0.1),
        "rss_bytes_at_90_percent": rss_at(samples, 0.9),
        "rss_bytes_peak": max((rss for _, rss, _ in samples), default=0),
        "output_bytes": answers.stat().st_size,
        "samples": samples[:: max(len(samples) // 100, 1)],
        **outside_use(before, MachineTimes.now()),
    }


def sample(process: subprocess.Popen, answers: Path, start_only: bool) -> list[tuple[float, int, int]]:
    """(seconds since start, resident bytes, bytes of answers written), until the process ends, or answers come."""
    start, page_bytes, samples = time.perf_counter(), os.sysconf("SC_PAGE_SIZE"), []
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page_bytes
            written = answers.stat().st_size if answers.exists() else 0
            if resident:
                samples.append((round(time.perf_counter() - start, 2), resident, written))
            if written and start_only:
                break
        time.sleep(SAMPLE_SECONDS)
    return samples


def rss_at(samples: list[tuple[float, int, int]], share: float) -> int | None:
    """Resident bytes when ``share`` of the answers had been written; None where the run was too short to tell."""
    final = max((written for _, _, written in samples), default=0)
    return next((rss for _, rss, written in samples if final and written >= share * final), None)


def print_starts(results: list[dict]) -> None:
    for result in results:
        print(
            f"  {result['lines']:>9,} lines, {result['input_bytes'] / 1e6:,.0f} MB: first answers after "
            f"{result['seconds_to_first_answer']:.1f} s, RSS peak {result['rss_bytes_peak'] / 1e6:,.0f} MB"
        )


def print_results(results: list[dict]) -> None:
    heads = f"{'lines':>9}  {'check s':>8}  {'run s':>8}  {'check us/line':>13}  {'run us/line':>11}"
    print(f"  {heads}  RSS MB at 10 % / 90 % / peak")
    for result in results:
        at = [result[f"rss_bytes_at_{share}_percent"] for share in (10, 90)] + [result["rss_bytes_peak"]]
        print(
            f"  {result['lines']:>9,}  {result['check_seconds']:>8.2f}  {result['run_seconds']:>8.2f}  "
            f"{result['check_seconds_per_line'] * 1e6:>13.1f}  {result['run_seconds_per_line'] * 1e6:>11.1f}  "
            + " / ".join("-" if rss is None else f"{rss / 1e6:.0f}" for rss in at)
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--max-model-len", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--cpu-memory", default="1GiB")
    parser.add_argument("--threads", type=int, help="default: one for the tiny model, flexrun's own for another")
    parser.add_argument("--start-only", action="store_true", help="end each run when its first answers are written")
    parser.add_argument("--model", help="a model with a tokenizer: the lines are text then")
    parser.add_argument("--scratch", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="write the JSON document here as well")
    parser.add_argument("flags", nargs="*", help="further flags of flexrun run, after --")
    return parser


def main() -> int:
    settings = build_parser().parse_args()
    end_on_terminate()
    with tempfile.TemporaryDirectory(dir=settings.scratch, prefix="many-lines-") as scratch:
        make_checkpoint("llama-tiny", Path(scratch, "model"), "float32")
        results = []
        for count in settings.lines:
            say(f"{count:,} lines")
            results.append(run_lines(count, settings, Path(scratch)))
    (print_starts if settings.start_only else print_results)(results)
    document = {"results": results}
    print(json.dumps(document))
    if settings.output:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
