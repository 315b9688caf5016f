"""flexrun quantize writes what a run then reads, or prints the rules for --keep."""

import json

import pytest

from flexrun.cli import main


@pytest.fixture
def model(checkpoint):
    return str(checkpoint("llama"))


def test_weights_are_packed_ahead(model, tmp_path, capsys):
    command = ["quantize", "--model", model, "--keep", "*.down_proj=8", "--disk-dir", str(tmp_path / "disk")]
    assert main([*command, "--cache-dir", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "disk").glob("*-w4-*")
    assert str(folder) in capsys.readouterr().err
    forms = [row[7:] for row in json.loads((folder / "manifest.json").read_text())["body"]["tensors"]]
    assert [4, 64, False] in forms and [8, 64, False] in forms


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--auto"], "needs a text"),
        (["--auto", "--text", "x", "--keep", "a=8"], "finds the rules itself"),
        (["--auto", "--text", "x", "--max-loss", "0"], "not above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(model, flags, complaint, capsys):
    assert main(["quantize", "--model", model, *flags]) == 2
    assert complaint in capsys.readouterr().err
