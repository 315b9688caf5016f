import random

import pytest

from flexrun.tokenizer import IncrementalDecoder, Tokenizer


@pytest.fixture(scope="module")
def folders(byte_level_backend, sentence_piece_backend, tmp_path_factory):
    made = {}
    for name, backend in (("byte level", byte_level_backend), ("sentence piece", sentence_piece_backend)):
        made[name] = tmp_path_factory.mktemp("tokenizer")
        backend.save(str(made[name] / "tokenizer.json"))
    return made


KINDS = ["byte level", "sentence piece"]


def stream(decoder: IncrementalDecoder, token_ids) -> list[str]:
    pieces = [decoder.feed(token_id) for token_id in token_ids] + [decoder.finish()]
    assert "".join(pieces) == decoder.text
    return pieces


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_real_text_join_to_the_text(kind, folders, texts):
    tokenizer = Tokenizer.from_path(folders[kind])
    for text in texts:
        decoder = tokenizer.incremental_decoder()
        pieces = stream(decoder, tokenizer.encode(text, add_special_tokens=False))
        assert decoder.text == tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_random_tokens_give_what_decoding_all_at_once_gives(kind, skip, folders):
    """Mostly invalid UTF-8, special tokens and ids without a token in between.

    Byte tokens of SentencePiece come as whole characters here: a run of them that is not UTF-8 spoils, when decoded
    at once, even the good characters at its beginning.
    """
    tokenizer = Tokenizer.from_path(folders[kind])
    generator = random.Random(kind)
    known = [[token_id] for token_id in range(tokenizer.vocab_size + 20)]
    if kind == "sentence piece":
        character = [3 + byte for byte in "🙂".encode()]
        known = known[:3] + known[3 + 256 :] + [character] * 40
    for _ in range(100):
        token_ids = [token_id for _ in range(60) for token_id in generator.choice(known)]
        decoder = tokenizer.incremental_decoder(skip_special_tokens=skip)
        stream(decoder, token_ids)
        assert decoder.text == tokenizer.decode(token_ids, skip_special_tokens=skip)


def test_a_character_of_several_tokens_appears_once_it_is_whole(folders):
    tokenizer = Tokenizer.from_path(folders["byte level"])
    token_ids = tokenizer.encode("🙂!", add_special_tokens=False)
    assert len(token_ids) == 5
    assert stream(tokenizer.incremental_decoder(), token_ids) == ["", "", "", "🙂", "!", ""]
    assert stream(tokenizer.incremental_decoder(), token_ids[:3])[-1] == "\ufffd"


def test_the_space_before_a_word_survives_after_a_prompt(folders):
    tokenizer = Tokenizer.from_path(folders["sentence piece"])
    prompt, answer = tokenizer.encode("The quick"), tokenizer.encode("fox", add_special_tokens=False)
    assert stream(tokenizer.incremental_decoder(), answer)[0] == tokenizer.decode(answer[:1])
    continued = tokenizer.incremental_decoder(prompt)
    stream(continued, answer)
    assert continued.text == " fox"
    after_special = tokenizer.incremental_decoder()
    stream(after_special, [*prompt, 2, 2, *answer])
    assert after_special.text == "The quick fox"


def test_the_cost_of_a_token_does_not_grow():
    """Even where nothing ever becomes valid text."""
    longest = 0

    def decode(token_ids):
        nonlocal longest
        longest = max(longest, len(token_ids))
        return "\ufffd" * len(token_ids)

    decoder = IncrementalDecoder(decode)
    stream(decoder, range(5000))
    assert decoder.text == "\ufffd" * 5000
    assert longest <= 64


def test_hidden_tokens_cost_nothing_and_say_nothing():
    def decode(token_ids):
        assert 7 not in token_ids
        return "".join(map(str, token_ids))

    decoder = IncrementalDecoder(decode, is_hidden=lambda token_id: token_id == 7, prompt_ids=[7, 1, 7])
    assert stream(decoder, [7] * 100 + [2, 7, 3]) == [""] * 100 + ["2", "", "3", ""]
