"""Every number that lm-evaluation-harness gets from flexrun equals what its own Hugging Face backend gives it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

WORDS = ["the", "river", "ran", "past", "old", "stones", "and", "seven", "grey", "herons", "stood", "near", "a", "mill"]


def write_task(folder: Path, name: str, rows: list[dict], **settings) -> None:
    """A task of the harness out of local JSON; its YAML is JSON, which is YAML too."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{name}.yaml").write_text(json.dumps({**task, "test_split": "test", **settings}))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("tasks"), numpy.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS, count))

    choices = [
        {"asked": f"{words(draw.integers(3, 30))}:", "choices": [" " + words(count) for count in (1, 2, 4)], "gold": 1}
        for _ in range(12)
    ]
    write_task(
        folder,
        "bytes_choices",
        choices,
        output_type="multiple_choice",
        doc_to_text="{{asked}}",
        doc_to_choice="choices",
        doc_to_target="gold",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    write_task(
        folder,
        "bytes_answers",
        [{"asked": words(count), "answer": "x"} for count in (1, 4, 9, 16, 60)],
        output_type="generate_until",
        doc_to_text="{{asked}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["e", "\n\n"], "max_gen_toks": 20, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    write_task(
        folder,
        "bytes_rolling",
        [{"text": words(count)} for count in (1, 12, 50, 130)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    return folder


@pytest.mark.slow
def test_three_kinds_of_requests_equal_the_hugging_face_backend(python_with, bytes_model, tasks, run_offline, tmp_path):
    python, samples = python_with("lm_eval", "lm-eval==0.4.13"), {}
    backends = {
        "flexrun": (["-m", "flexrun.evals.lm_eval_adapter"], f"cpu_memory=1GiB,cache_dir={tmp_path}"),
        "hf": (["-m", "lm_eval"], ""),
    }
    for name, (module, arguments) in backends.items():
        arguments = f"pretrained={bytes_model},dtype=float32,max_length=256,{arguments}".rstrip(",")
        command = [python, *module, "run", "--model", name, "--model_args", arguments]
        command += [
            "--tasks",
            "bytes_choices,bytes_answers,bytes_rolling",
            "--include_path",
            str(tasks),
            "--device",
            "cpu",
        ]
        command += ["--batch_size", "4", "--log_samples", "--output_path", str(tmp_path / name)]
        run_offline(command, tmp_path)
        for file in sorted((tmp_path / name).rglob("samples_*.jsonl")):
            task = file.name.split("_2")[0].removeprefix("samples_")
            for row in map(json.loads, file.read_text().splitlines()):
                samples.setdefault((task, row["doc_id"]), {})[name] = row
    assert len(samples) == 12 + 5 + 4
    for (task, _), pair in samples.items():
        ours, theirs = pair["flexrun"]["resps"], pair["hf"]["resps"]
        if task == "bytes_answers":
            assert ours == theirs
            continue
        for one, other in zip(ours, theirs, strict=True):
            one, other = (numpy.ravel(value[0]).tolist() for value in (one, other))
            assert abs(float(one[0]) - float(other[0])) < 1e-3
            assert [str(value) for value in one[1:]] == [str(value) for value in other[1:]]
    answers = [pair["flexrun"]["resps"][0][0] for (task, _), pair in samples.items() if task == "bytes_answers"]
    assert any(answers), "no answer has any text: nothing was compared"
