import pytest
from tokenizers import Regex, pre_tokenizers

from flexrun.errors import UnsupportedError
from flexrun.tokenizer.pre_tokenizers import PRE_TOKENIZERS, build_pre_tokenizer, find_pre_tokenizer

TRICKY = [
    "it's I'LL we'Re 'tis",
    "abc123def 4567 89 ½²",
    "  two   three\n\n\n four \t\r\n five ",
    "CamelCaseWORDS miXed ÄÖÜß étude e\u0301a",
    "https://a.b/c?d=e&f=[1,2]...!!! -- //// \\\\",
    "日本語テスト 한국어 ไทย हिन्दी 🙂🙂",
]


def cut(name: str, text: str) -> list[str]:
    return [word for word, _ in build_pre_tokenizer(find_pre_tokenizer(name)).pre_tokenize_str(text)]


@pytest.mark.parametrize("name", ["llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"])
def test_words_are_those_of_transformers(name):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    oracle = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for text in TRICKY:
        assert cut(name, text) == [word for word, _ in oracle.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", ["gpt-2", "olmo"])
def test_plain_names_cut_as_gpt2(name):
    oracle = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in TRICKY:
        assert cut(name, text) == [word for word, _ in oracle.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", ["smollm", "refact", "starcoder"])
def test_digit_names_cut_digits_first(name):
    digits = pre_tokenizers.Digits(individual_digits=True)
    oracle = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for text in TRICKY:
        assert cut(name, text) == [word for word, _ in oracle.pre_tokenize_str(text)]


def test_the_default_cuts_punctuation_and_threes_of_digits():
    assert cut("default", "a+b=12345") == ["a", "+", "b", "=", "123", "45"]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_no_row_loses_text(name):
    for text in TRICKY:
        spelled = "".join(word for word, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text))
        assert "".join(cut(name, text)) == spelled


def test_an_unknown_name_is_refused():
    with pytest.raises(UnsupportedError, match="'spiral'"):
        find_pre_tokenizer("spiral")
