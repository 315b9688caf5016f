"""The example runs as its first lines say, on a tiny model."""

from __future__ import annotations

import runpy
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

SCRIPT = Path(__file__).parents[2] / "examples" / "moe.py"


def test_the_example_runs_a_model_with_experts(monkeypatch, capsys, checkpoint, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint("mixtral").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    vocabulary = {chr(code): code for code in range(131)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.save(str(folder / "tokenizer.json"))
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["moe.py", str(folder)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    told = capsys.readouterr().out.splitlines()
    assert len([line for line in told if " -> " in line]) == 3
    assert "8 experts a layer, 2 a token" in told
    assert any(line.startswith("cpu: weights") for line in told)
