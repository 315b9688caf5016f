"""The first pass: which lines are good, where they are, what they cost, and in how much memory."""

import gzip
import hashlib
import io
import json
import os
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrun.errors import ConfigError, ExecutionError, TokenizerError
from flexrun.jobs.encoder import PromptEncoder
from flexrun.jobs.index import BATCH_LINES, first_equal, index_job
from flexrun.jobs.source import open_source
from flexrun.sampling import SamplingParams

DEFAULTS = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture
def index_of(model):
    encoder = PromptEncoder(model.tokenizer, model.spec.vocab_size, model.max_model_len)

    def index_of(content, **options):
        return index_job(io.BytesIO(content), encoder, DEFAULTS, **options)

    return index_of


def lines_of(*values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def test_good_lines_are_found_again_by_row(index_of):
    index = index_of(lines_of({"prompt": "one two"}, {"prompt": "three", "custom_id": "b"}))
    ((prompt, token_ids),) = index.load([1])
    assert (prompt.custom_id, prompt.prompt, prompt.line, len(token_ids)) == ("b", "three", 2, 2)
    assert index.prompt_tokens.tolist() == [3, 2]  # BOS and one a word
    assert index.answer_tokens.tolist() == [8, 8]


def test_bom_crlf_blank_lines_and_a_missing_last_newline(index_of):
    content = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b"}\r\n{"prompt": "c"}'
    index = index_of(content)
    assert index.lines.tolist() == [1, 4, 5] and index.error_count == 0
    assert [prompt.prompt for prompt, _ in index.load([2, 0, 1])] == ["c", "a", "b"]


def test_every_bad_line_is_kept_apart(index_of):
    index = index_of(
        b'{"prompt": "fine"}\nnot json\n{"prompt": "\xff"}\n'
        + lines_of(
            {"prompt": "word " * 63},  # 64 tokens fill the context of 64
            {"prompt": "word " * 62},
            {"prompt": [5, 1000]},
            {"prompt": [5, -1]},
            {"prompt": "x", "max_tokens": 0, "custom_id": "zero"},
        )
    )
    assert index.lines.tolist() == [1, 5]
    assert [(error.line, error.custom_id, error.code) for error in sorted(index.errors(), key=lambda e: e.line)] == [
        (2, "line-2", "invalid_json"),
        (3, "line-3", "invalid_utf8"),
        (4, "line-4", "context_length_exceeded"),
        (6, "line-6", "invalid_token_id"),
        (7, "line-7", "invalid_token_id"),
        (8, "zero", "invalid_request"),
    ]
    assert index.error_count == 6


def test_the_later_of_equal_ids_is_refused_across_batches(index_of):
    values = [{"prompt": "a", "custom_id": f"id-{number}"} for number in range(BATCH_LINES + 3)]
    values[-1]["custom_id"] = "id-0"
    values[5]["custom_id"] = "line-7"
    del values[6]["custom_id"]  # its own id would be line-7
    index = index_of(lines_of(*values))
    assert {(error.line, error.code) for error in index.errors()} == {
        (BATCH_LINES + 3, "duplicate_custom_id"),
        (7, "duplicate_custom_id"),
    }
    assert "line 6" in next(error.message for error in index.errors() if error.line == 7)


def test_an_id_of_a_refused_line_is_taken_too(index_of):
    index = index_of(lines_of({"prompt": "", "custom_id": "a"}, {"prompt": "x", "custom_id": "a"}))
    assert [error.code for error in index.errors()] == ["empty_prompt", "duplicate_custom_id"]


def test_no_tokenizer_serves_token_ids_only(index_of, model):
    encoder = PromptEncoder(None, model.spec.vocab_size, model.max_model_len)
    index = index_job(io.BytesIO(lines_of({"prompt": "text"}, {"prompt": [1, 2]})), encoder, DEFAULTS)
    assert index.lines.tolist() == [2]
    assert [error.code for error in index.errors()] == ["no_tokenizer"]


def test_a_text_that_no_tokens_could_hold_is_refused_as_it_is(model):
    model.tokenizer.longest_token = 5
    encoder = PromptEncoder(model.tokenizer, model.spec.vocab_size, model.max_model_len)
    chat = {"messages": [{"role": "user", "content": "y" * 1281}]}
    lines = lines_of({"prompt": "x" * 1280}, {"prompt": "x" * 1281}, chat, {"prompt": "x"})
    index = index_job(io.BytesIO(lines), encoder, DEFAULTS)
    assert index.lines.tolist() == [1, 4] and model.tokenizer.batch_sizes == [2]
    errors = list(index.errors())
    assert [error.code for error in errors] == ["context_length_exceeded"] * 2 and "1,281 char" in errors[0].message


def test_a_template_that_refuses_is_the_lines_error(index_of, model):
    model.tokenizer.chat_template = None
    index = index_of(lines_of({"messages": [{"role": "user", "content": "x"}]}, {"prompt": "x"}))
    assert index.lines.tolist() == [2]
    assert [error.code for error in index.errors()] == ["chat_template"]


def test_a_text_the_tokenizer_cannot_take_fails_alone(index_of, model):
    encode_batch = model.tokenizer.encode_batch

    def picky(texts, add_special_tokens=True):
        if "bad" in texts:
            raise TokenizerError("cannot be tokenised")
        return encode_batch(texts, add_special_tokens)

    model.tokenizer.encode_batch = picky
    index = index_of(lines_of({"prompt": "fine"}, {"prompt": "bad"}, {"prompt": "good"}))
    assert index.lines.tolist() == [1, 3]
    assert [(error.line, error.code) for error in index.errors()] == [(2, "tokenizer")]


def test_longest_answers_first_and_of_those_about_as_long_the_longest_lines(index_of):
    index = index_of(
        lines_of(
            {"prompt": "a", "max_tokens": 2},
            {"prompt": "a b c d " * 9, "max_tokens": 1},
            {"prompt": "a", "max_tokens": 20},
            {"prompt": "a " * 9, "max_tokens": 18},
            {"prompt": "a", "max_tokens": 10, "n": 3, "temperature": 1.0},
        )
    )
    assert index.order("longest").tolist() == [3, 2, 4, 0, 1]
    assert index.order("longest", np.array([1, 2, 4])).tolist() == [2, 4, 1]
    learnt = np.array([2.0, 1.0, 3.0, 2.0, 9.0])  # whatever the limits are
    assert index.order("longest", answer_tokens=learnt).tolist() == [4, 3, 2, 0, 1]
    assert index.order("input", np.array([1, 2, 4])).tolist() == [1, 2, 4]


def test_limit_leaves_the_hash_of_the_whole_file(index_of):
    content = lines_of(*({"prompt": str(number)} for number in range(10)))
    index = index_of(content, limit=3)
    assert index.lines.tolist() == [1, 2, 3]
    assert index.input_sha256 == index_of(content).input_sha256 == hashlib.sha256(content).hexdigest()


def test_a_file_that_changes_meanwhile_is_noticed(model, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines_of({"prompt": "one", "custom_id": "a"}))
    encoder = PromptEncoder(model.tokenizer, model.spec.vocab_size, model.max_model_len)
    with open_source(path) as source:
        index = index_job(source, encoder, DEFAULTS)
        path.write_bytes(lines_of({"prompt": "one", "custom_id": "b"}))
        with pytest.raises(ExecutionError, match="line 1 of the input file changed"):
            index.load([0])


def test_lines_over_the_limit_are_refused_without_being_kept(index_of, monkeypatch):
    monkeypatch.setattr("flexrun.jobs.source.MAX_LINE_BYTES", 1000)
    content = lines_of({"prompt": "a"}, {"prompt": "long " * 1000}, {"prompt": "b"})
    index = index_of(content)
    assert [error.code for error in index.errors()] == ["line_too_long"]
    assert [prompt.prompt for prompt, _ in index.load([0, 1])] == ["a", "b"]
    assert index.input_sha256 == hashlib.sha256(content).hexdigest()


def test_lookalike_keys_are_warned_about(index_of):
    index = index_of(lines_of({"prompt": "a", "max_token": 5}, {"prompt": "a", "topic": "x", "tools": [1]}))
    warnings = index.warnings()
    assert len(warnings) == 2
    assert "line 1: 'max_token'" in warnings[0] and "'max_tokens'" in warnings[0]
    assert "line 2: 'tools' is not run" in warnings[1]


def zstd_frame(content, block_bytes=1000):
    """A zstd frame of blocks that are not compressed (RFC 8878)."""
    header = b"\x28\xb5\x2f\xfd\xa0" + len(content).to_bytes(4, "little")  # one segment, its size in four bytes
    blocks = [content[start : start + block_bytes] for start in range(0, len(content), block_bytes)]
    last = len(blocks) - 1
    heads = [(len(block) << 3 | (number == last)).to_bytes(3, "little") for number, block in enumerate(blocks)]
    return header + b"".join(head + block for head, block in zip(heads, blocks))


@pytest.fixture
def zstd_library():
    try:
        import compression.zstd  # noqa: F401
    except ImportError:
        pytest.importorskip("zstandard")


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "-", "pipe"])
def test_files_and_streams_plain_and_packed(name, pack, tmp_path, monkeypatch):
    content = lines_of(*({"prompt": f"prompt {number}"} for number in range(200)))
    if name.endswith(".gz") and pack is bytes:
        return
    opens_as(name, pack(content), content, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["in.jsonl.zst", "in.jsonl", "-"])
def test_zstd_in_one_frame_or_several(name, zstd_library, tmp_path, monkeypatch):
    content = lines_of(*({"prompt": f"prompt {number}"} for number in range(200)))
    packed = zstd_frame(content[:100]) + zstd_frame(content[100:3000]) + zstd_frame(content[3000:])
    opens_as(name, packed, content, tmp_path, monkeypatch)


def opens_as(name, given, content, tmp_path, monkeypatch):
    path = tmp_path / name if name != "-" else name
    if name == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    elif name == "pipe":
        os.mkfifo(path)
        threading.Thread(target=lambda: path.write_bytes(given), daemon=True).start()
    else:
        path.write_bytes(given)
    with open_source(path) as source:
        assert source.seekable() and source.read() == content
        source.seek(5)
        assert source.read(10) == content[5:15]


def test_zstd_without_a_library_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "in.jsonl"
    path.write_bytes(zstd_frame(b"content"))
    with pytest.raises(ConfigError, match="packed with zstd") as caught:
        open_source(path)
    assert "pip install -U zstandard" in caught.value.hint and "zstd -dc" in caught.value.hint


@pytest.mark.parametrize("damage", [b"not zstd", b"", zstd_frame(b"content " * 999)[:-12], zstd_frame(b"a") + b"junk"])
def test_a_broken_zstd_is_a_config_error(damage, zstd_library, tmp_path):
    path = tmp_path / "in.jsonl.zst"
    path.write_bytes(damage)
    with pytest.raises(ConfigError, match="not a whole zstd file"):
        open_source(path)


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-12]])
def test_a_broken_gzip_is_a_config_error(content, tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="gzip"):
        open_source(path)


def test_a_line_of_ten_megabytes_costs_nobody_else_anything(index_of):
    """Whether it is one prompt too long, or no JSON at all."""
    fine = {"prompt": "fine"}
    for giant in (json.dumps({"prompt": "word " * 2_000_000}).encode(), b"x" * 10_000_000):
        index = index_of(lines_of(fine) + giant + b"\r\n" + lines_of(fine))
        assert index.lines.tolist() == [1, 3]
        (error,) = index.errors()
        assert (error.line, error.code) in {(2, "context_length_exceeded"), (2, "invalid_json")}
        assert len(error.message) < 300


def test_missing_and_utf16_inputs_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        open_source(tmp_path / "none.jsonl")
    path = tmp_path / "in.jsonl"
    path.write_bytes('{"prompt": "a"}\n'.encode("utf-16"))
    with pytest.raises(ConfigError, match="UTF-16"):
        open_source(path)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40))
def test_first_equal_is_the_first_occurrence(values):
    digests = np.array([[value % 2, value // 2] for value in values], dtype=np.uint64).reshape(-1, 2)
    assert first_equal(digests).tolist() == [values.index(value) for value in values]


def test_100k_lines_in_seconds_and_flat_memory(index_of, tmp_path, model):
    path = tmp_path / "many.jsonl"
    with open(path, "w") as file:
        for number in range(100_000):
            file.write(json.dumps({"custom_id": f"request-{number}", "prompt": f"question {number} is short"}) + "\n")
    encoder = PromptEncoder(model.tokenizer, model.spec.vocab_size, model.max_model_len)
    with open_source(path) as source:
        started = time.perf_counter()
        index = index_job(source, encoder, DEFAULTS)
        seconds = time.perf_counter() - started
        assert len(index) == 100_000
        assert seconds < 20  # about 2 on an idle core
        tracemalloc.start()
        index = index_job(source, encoder, DEFAULTS, limit=20_000)
        held_bytes, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # 56 bytes a line are kept; the peak adds a batch of parsed lines and the arrays while they are sorted
        assert held_bytes < 20_000 * 56 + (1 << 20)
        assert peak_bytes < 20_000 * 56 * 4 + (4 << 20)
        assert index.load([19_999])[0][0].custom_id == "request-19999"
