import json
import pathlib

import pytest
import transformers

from flexrun.errors import TokenizerError
from flexrun.tokenizer import Tokenizer


@pytest.fixture
def folder(byte_level_backend, tmp_path):
    byte_level_backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|start|>", "eos_token": "<|end|>"})
    )
    return tmp_path


def write_gpt2_files(folder: pathlib.Path, backend, config: dict) -> None:
    model = json.loads(backend.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **config}))


def test_ids_and_text_are_those_of_transformers(folder, texts):
    ours, oracle = Tokenizer.from_path(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = ours.encode(text)
        assert ids == oracle(text)["input_ids"]
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == text == oracle.decode(ids)
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]
    assert ours.vocab_size == len(oracle) and ours.longest_token == max(map(len, oracle.get_vocab()))
    assert (ours.bos_token_id, ours.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id) == (0, 1)


def test_special_tokens_are_hidden_and_visible_ones_are_not(folder):
    ours = Tokenizer.from_path(folder)
    ids = ours.encode("a<|end|>b<|tool|>")
    assert ours.decode(ids) == "ab<|tool|>"
    assert ours.decode([*ids, ours.vocab_size + 5]) == "ab<|tool|>"  # padded rows of an embedding have no token


def test_bos_comes_from_the_post_processor_and_can_be_left_out(byte_level_backend, tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(byte_level_backend.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_path(tmp_path)
    plain = ours.encode("Hello world out there", add_special_tokens=False)
    assert len(plain) > 4
    assert ours.encode("Hello world out there") == [0, *plain]
    assert ours.encode_batch(["Hello world out there", "x"])[0] == [0, *plain]
    assert ours.encode_batch(["Hello world out there"], add_special_tokens=False) == [plain]


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "<|start|>", "eos_token": "<|end|>", "unk_token": "<|end|>", "add_bos_token": True},
        {"bos_token": {"content": "<|start|>"}, "eos_token": {"content": "<|end|>"}, "unk_token": "<|end|>"},
        {"bos_token": "<|end|>", "eos_token": "<|end|>", "unk_token": "<|end|>", "add_prefix_space": True},
    ],
)
def test_gpt2_files_give_the_ids_of_transformers(config, byte_level_backend, texts, tmp_path):
    write_gpt2_files(tmp_path, byte_level_backend, config)
    flat = {key: value["content"] if isinstance(value, dict) else value for key, value in config.items()}
    oracle = transformers.GPT2Tokenizer.from_pretrained(tmp_path, **flat)
    ours = Tokenizer.from_path(tmp_path)
    for text in texts:
        text = text.replace("<|tool|>", "")
        assert ours.encode(text) == oracle(text)["input_ids"], text
    assert ours.encode("x")[0] == (0 if config.get("add_bos_token") else ours.encode("x", add_special_tokens=False)[0])


def test_stop_ids_gather_what_the_files_call_an_end(folder):
    assert Tokenizer.from_path(folder).stop_token_ids == (1,)
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.from_path(folder).stop_token_ids == (1, 7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 1, 6]}')
    assert Tokenizer.from_path(folder).stop_token_ids == (1, 5, 6)


def test_an_end_named_only_by_the_config_is_still_the_end(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text('{"eos_token_id": 1}')
    ours = Tokenizer.from_path(folder)
    assert ours.eos_token_id == 1 and ours.bos_token_id is None


def test_tokens_that_only_the_config_declares_are_added(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    size = Tokenizer.from_path(folder).vocab_size
    config["added_tokens_decoder"] = {str(size): {"content": "<|new|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, oracle = Tokenizer.from_path(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.encode("a<|new|>b") == oracle("a<|new|>b")["input_ids"]
    assert size in ours.encode("a<|new|>b") and ours.decode([size]) == ""


@pytest.mark.parametrize("where", ["argument", "file", "config", "named", "none"])
def test_the_chat_template_is_found_where_it_lies(where, folder):
    template, other = "{{ messages[0].content }}!", "{{ 'other' }}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = {
        "named": [{"name": "tool_use", "template": other}, {"name": "default", "template": template}],
        "config": template,
        "none": None,
    }.get(where, other)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if where == "file":
        (folder / "chat_template.jinja").write_text(template)
    ours = Tokenizer.from_path(folder, chat_template=template if where == "argument" else None)
    messages = [{"role": "user", "content": "Hello"}]
    if where == "none":
        with pytest.raises(TokenizerError, match="no chat template"):
            ours.apply_chat_template(messages)
    else:
        assert ours.apply_chat_template(messages) == "Hello!"


def test_a_chat_gets_no_second_bos(byte_level_backend, tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    config = {"bos_token": "<|start|>", "eos_token": "<|end|>", "unk_token": "<|end|>", "add_bos_token": True}
    write_gpt2_files(tmp_path, byte_level_backend, {**config, "chat_template": template})
    ours = Tokenizer.from_path(tmp_path)
    ids = ours.encode_chat([{"role": "user", "content": "Hello"}])
    assert ids.count(0) == 1 and ids[0] == 0 and ids[-1] == 1
    assert ours.encode("Hello")[0] == 0


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "no tokenizer files"),
        ({"tokenizer.model": "x"}, "no tokenizer files"),
        ({"tokenizer.json": "{"}, "tokenizer.json"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "["}, "tokenizer_config.json"),
        ({"vocab.json": "{}", "merges.txt": "a b\n"}, "merges.txt"),
        ({"vocab.json": "[]", "merges.txt": ""}, "vocab.json"),
    ],
)
def test_missing_and_damaged_files_are_named(files, complaint, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=complaint):
        Tokenizer.from_path(tmp_path)


def test_paths_that_are_no_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="does not exist"):
        Tokenizer.from_path(tmp_path / "nothing")
    (tmp_path / "x.bin").write_text("")
    with pytest.raises(TokenizerError, match=r"not a \.gguf file"):
        Tokenizer.from_path(tmp_path / "x.bin")


@pytest.mark.parametrize("text", ["half a pair \ud800", 5, None])
def test_what_is_no_text_is_a_tokenizer_error(text, folder):
    ours = Tokenizer.from_path(folder)
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        ours.encode(text)
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        ours.encode_batch(["good", text])
