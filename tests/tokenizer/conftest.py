"""Small vocabularies trained on the spot, and the files they would be shipped in."""

import gguf
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's 12345 times faster than 678 snails.",
    "def main(argument):\n    return argument + 1  # naïve café, Größe, 日本語 テスト 中文字符\n\n\tend",
    "We'll see; they're here. I'd say YOU'RE wrong! Prices: $3.50, 1,000,000 and 20%...  two  spaces",
] * 4
TEXTS = [
    "Hello world",
    " leading and trailing ",
    "it's 1234567 o'clock, YOU'LL see 3.14",
    "tabs\tand\n\nnewlines \n mixed   runs",
    "Größe 日本語 🙂 e\u0301",
    "a",
    "",
    "x = {'k': [1, 22, 333, 4444]}; // comment\r\n",
    "<|end|> inside <|end|><|tool|> text",
]
CONTROL = ("<|start|>", "<|end|>")
VISIBLE = ("<|tool|>",)


def byte_level(pre_tokenizer=None) -> tokenizers.Tokenizer:
    """GPT-2 style BPE with two control tokens and a visible added one, after ``pre_tokenizer``."""
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken(token, normalized=False) for token in VISIBLE])
    return backend


def sentence_piece() -> tokenizers.Tokenizer:
    """Llama-2 style BPE: visible spaces, a space before every text, bytes for unknown characters."""
    backend = tokenizers.Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    words = [word for line in CORPUS[:2] for word in line.replace(" ", " ▁").split(" ")]
    backend.train_from_iterator(words, trainer)
    return backend


def merges_of(backend: tokenizers.Tokenizer) -> list[str]:
    import json

    merges = json.loads(backend.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


@pytest.fixture(scope="session")
def byte_level_backend():
    return byte_level()


@pytest.fixture(scope="session")
def make_byte_level():
    return byte_level


@pytest.fixture(scope="session")
def sentence_piece_backend():
    return sentence_piece()


@pytest.fixture(scope="session")
def texts():
    return TEXTS


@pytest.fixture
def gguf_byte_level(raw_gguf):
    """gguf_byte_level(backend, pre, extra=...) -> path of a GGUF file that embeds ``backend``."""

    def write(backend, pre, extra=lambda writer: None):
        tokens = [backend.id_to_token(token_id) for token_id in range(backend.get_vocab_size())]
        control, visible = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
        kinds = {**dict.fromkeys(CONTROL, control), **dict.fromkeys(VISIBLE, visible)}

        def build(writer):
            writer.add_tokenizer_model("gpt2")
            if pre is not None:
                writer.add_tokenizer_pre(pre)
            writer.add_token_list(tokens)
            writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
            writer.add_token_merges(merges_of(backend))
            writer.add_bos_token_id(0)
            writer.add_eos_token_id(1)
            extra(writer)

        return raw_gguf(build)

    return write
