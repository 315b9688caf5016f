import pytest
import torch

from flexrun.errors import CheckpointError
from flexrun.weights.gguf_reader import GgufReader
from flexrun.weights.readers import open_checkpoint
from flexrun.weights.safetensors_reader import SafetensorsReader


def test_the_format_follows_from_the_path(llama, gguf_file, tmp_path):
    path = gguf_file(llama)
    llama.save_pretrained(tmp_path / "hf")
    readers = [open_checkpoint(path), open_checkpoint(path.parent), open_checkpoint(str(tmp_path / "hf"))]
    assert [type(reader) for reader in readers] == [GgufReader, GgufReader, SafetensorsReader]
    assert readers[0].names() == readers[2].names()
    for name in readers[0].names():
        assert torch.equal(readers[0].read(name, torch.float32), readers[2].read(name, torch.float32))
    for reader in readers:
        reader.close()
        reader.close()


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ((), "holds no"),
        (("pytorch_model.bin", "config.json"), "pickled"),
        (("pytorch_model-00001-of-00002.bin",), "safetensors first"),
        (("a.gguf", "b.gguf"), "2 .gguf files: a.gguf, b.gguf"),
        (("config.json", "a.safetensors", "b.safetensors"), "index"),
    ],
)
def test_what_cannot_be_opened_is_explained(files, complaint, tmp_path):
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(tmp_path)


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "weights.safetensors").write_text("")
    with pytest.raises(CheckpointError, match=r"not a \.gguf file"):
        open_checkpoint(tmp_path / "weights.safetensors")
