import json

import gguf
import pytest
import transformers
from tokenizers import Regex, pre_tokenizers

from flexrun.errors import CheckpointError, TokenizerError, UnsupportedError
from flexrun.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"


def test_a_byte_level_vocabulary_gives_back_its_tokenizer(byte_level_backend, gguf_byte_level, texts):
    def extra(writer):
        writer.add_chat_template(TEMPLATE)

    ours = Tokenizer.from_path(gguf_byte_level(byte_level_backend, "gpt-2", extra))
    for text in texts:
        ids = ours.encode(text)
        assert ids == byte_level_backend.encode(text).ids
        assert ours.decode(ids) == byte_level_backend.decode(ids)
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert (ours.bos_token_id, ours.eos_token_id, ours.stop_token_ids) == (0, 1, (1,))
    assert ours.vocab_size == byte_level_backend.get_vocab_size()
    chat = ours.encode_chat([{"role": "user", "content": "Hi"}])
    assert chat[-1] == 1 and ours.decode(chat) == "user: Hi"


def test_smollm_splits_every_digit(make_byte_level, gguf_byte_level, texts):
    """What the model's own tokenizer.json says: digits one by one, then GPT-2's words."""
    written = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend = make_byte_level(written)
    ours = Tokenizer.from_path(gguf_byte_level(backend, "smollm"))
    for text in [*texts, "1234567890 ½ ² 一二"]:
        assert ours.encode(text) == backend.encode(text).ids, text
    assert [ours.decode([token_id]) for token_id in ours.encode("12345")] == list("12345")


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_other_words_are_cut_as_in_transformers(pre, make_byte_level, gguf_byte_level, texts):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = make_byte_level(pre_tokenizers.Sequence([split, byte_level]))
    ours = Tokenizer.from_path(gguf_byte_level(backend, pre))
    for text in texts:
        assert ours.encode(text, add_special_tokens=False) == backend.encode(text).ids, text


@pytest.mark.parametrize(("pre", "flag", "bos"), [
    ("llama-bpe", None, True),
    ("llama-bpe", False, False),
    ("gpt-2", None, False),
    ("gpt-2", True, True),
])  # fmt: skip
def test_bos_follows_the_file_and_else_the_kind(pre, flag, bos, byte_level_backend, gguf_byte_level):
    def extra(writer):
        if flag is not None:
            writer.add_add_bos_token(flag)

    ours = Tokenizer.from_path(gguf_byte_level(byte_level_backend, pre, extra))
    plain = ours.encode("Hello", add_special_tokens=False)
    assert ours.encode("Hello") == ([0, *plain] if bos else plain)


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", [5]), ("gpt-2", [2, 6])])
def test_a_whole_word_that_is_a_token_needs_no_merges_in_llama3(pre, expected, raw_gguf):
    def fill(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["<|start|>", "<|end|>", "a", "b", "c", "abc", "bc"])
        writer.add_token_merges(["b c"])

    assert Tokenizer.from_path(raw_gguf(fill)).encode("abc") == expected


def _sentence_piece(backend, writer, **changes):
    size = backend.get_vocab_size()
    tokens = [backend.id_to_token(token_id) for token_id in range(size)]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    kinds += [gguf.TokenType.NORMAL] * (size - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores(changes.get("scores", [-float(token_id) for token_id in range(size)]))
    for name, token_id in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(token_id)
    if "space" in changes:
        writer.add_add_space_prefix(changes["space"])


def test_a_sentence_piece_vocabulary_gives_back_its_tokenizer(sentence_piece_backend, raw_gguf, texts):
    """Its merges are not in the file: they follow from the scores."""
    path = raw_gguf(lambda writer: _sentence_piece(sentence_piece_backend, writer))
    ours = Tokenizer.from_path(path)
    assert len(json.loads(sentence_piece_backend.to_str())["model"]["merges"]) > 50
    for text in texts:
        ids = ours.encode(text)
        assert ids == [1, *sentence_piece_backend.encode(text, add_special_tokens=False).ids], text
        assert ours.decode(ids) == text
    assert (ours.bos_token_id, ours.eos_token_id, ours.stop_token_ids) == (1, 2, (2,))


def test_a_sentence_piece_vocabulary_agrees_with_transformers(sentence_piece_backend, raw_gguf, texts):
    path = raw_gguf(lambda writer: _sentence_piece(sentence_piece_backend, writer))
    oracle = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = Tokenizer.from_path(path)
    for text in texts:
        if not text.startswith(" "):  # there transformers leaves out the space that llama.cpp always puts in front
            assert ours.encode(text) == oracle(text)["input_ids"], text


def test_without_the_space_in_front(sentence_piece_backend, raw_gguf):
    path = raw_gguf(lambda writer: _sentence_piece(sentence_piece_backend, writer, space=False))
    ours = Tokenizer.from_path(path)
    assert ours.decode(ours.encode(" fox")) == " fox" and ours.decode(ours.encode("fox")) == "fox"
    assert ours.encode("fox") != Tokenizer.from_path(
        raw_gguf(lambda writer: _sentence_piece(sentence_piece_backend, writer))
    ).encode("fox")


def test_gemma_merges_in_token_order_and_keeps_runs_of_spaces(raw_gguf):
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "a", "b", "c", "  ", "ab", "bc", "▁a"]
    kinds = [3, 3, 3, 2, 1, 1, 1, 1, 4, 1, 1, 1]

    def fill(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(1)
        writer.add_unk_token_id(3)
        writer.add_add_space_prefix(False)

    path = raw_gguf(fill, arch="gemma3")
    ours = Tokenizer.from_path(path)
    oracle = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("abc", "a  b", " abc", "b   c"):
        assert ours.encode(text) == oracle(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("abc", add_special_tokens=False) == [9, 7]


def test_ends_of_turns_come_from_metadata_and_from_the_chat_template(byte_level_backend, gguf_byte_level):
    def extra(writer):
        writer.add_eot_token_id(9)
        writer.add_chat_template("{{ messages[0].content }}<|end|>")
        writer.add_uint32("tokenizer.ggml.eom_token_id", 11)

    ours = Tokenizer.from_path(gguf_byte_level(byte_level_backend, "gpt-2", extra))
    assert ours.stop_token_ids == (1, 9, 11)


def test_an_end_of_turn_that_only_the_template_names(raw_gguf):
    def fill(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["<|endoftext|>", "<|end|>", "<|im_end|>", "a", "b", "ab"])
        writer.add_token_types([3, 3, 3, 1, 1, 1])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ messages[0].content }}<|end|>")

    assert Tokenizer.from_path(raw_gguf(fill)).stop_token_ids == (0, 1)


def test_an_unknown_pre_tokenizer_or_kind_is_refused_by_name(byte_level_backend, gguf_byte_level, raw_gguf):
    with pytest.raises(UnsupportedError, match="'spiral'"):
        Tokenizer.from_path(gguf_byte_level(byte_level_backend, "spiral"))

    def fill(writer):
        writer.add_tokenizer_model("bert")
        writer.add_token_list(["a"])

    with pytest.raises(UnsupportedError, match="'bert'"):
        Tokenizer.from_path(raw_gguf(fill))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda writer: writer.add_token_list(["a", "b", "a"]), "appears twice"),
        (lambda writer: writer.add_token_list(["a", "b"]), "merges is missing"),
        (lambda writer: (writer.add_token_list(["a", "b"]), writer.add_token_merges(["ab"])), "no pair"),
        (lambda writer: (writer.add_token_list(["a", "b"]), writer.add_token_merges(["a z"])), "do not fit"),
        (lambda writer: (writer.add_token_list(["a", "b"]), writer.add_token_types([1])), "token_type"),
        (
            lambda writer: (
                writer.add_token_list(["a", "b", "ab"]),
                writer.add_token_merges(["a b"]),
                writer.add_eos_token_id(9),
            ),
            "is no token",
        ),
        (lambda writer: None, "holds no tokenizer"),
    ],
)
def test_a_vocabulary_that_does_not_hang_together_is_explained(change, complaint, raw_gguf):
    def fill(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        change(writer)

    path = raw_gguf(fill)
    with pytest.raises(TokenizerError, match=complaint) as caught:
        Tokenizer.from_path(path)
    assert str(path) in str(caught.value)


def test_a_damaged_file_is_a_checkpoint_error(byte_level_backend, gguf_byte_level):
    path = gguf_byte_level(byte_level_backend, "gpt-2")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r"raw\.gguf"):
        Tokenizer.from_path(path)


@pytest.mark.slow
def test_the_real_vocabulary():
    from flexrun.weights.catalog import resolve_model

    try:
        path = resolve_model("smollm2-135m-instruct")
    except CheckpointError as error:
        pytest.skip(f"the real model cannot be fetched: {error.message}")
    ours = Tokenizer.from_path(path)
    oracle = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "It's a fine day, isn't it? Größe, 日本語.\n\n    return x  # end"  # no digits: see pre_tokenizers.py
    assert ours.encode(text) == oracle(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == text
    assert [ours.decode([token_id]) for token_id in ours.encode("2024")] == list("2024")
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id, ours.stop_token_ids) == (49152, 1, 2, (2,))
    messages = [{"role": "user", "content": "Hi"}]
    expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages) == expected
    assert ours.encode_chat(messages).count(1) == 3  # one <|im_start|> a turn, no BOS in front
