"""Tokens under way: read back as written, whatever is cut off or was of another job, in a file that stays small."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrun.jobs import token_log
from flexrun.jobs.token_log import TokenLog

PASSES = [[(7, 0, 11), (9, 0, 5)], [(7, 0, 12), (9, 1, 6)], [(9, 0, 4_000_000_000)]]


def as_lists(partial) -> dict:
    return {line: {choice: list(tokens) for choice, tokens in choices.items()} for line, choices in partial.items()}


def write(path, passes, key=b"job"):
    log = TokenLog(path, key)
    log.start(())
    for entries in passes:
        log.append(entries, lambda: ())
    log.close()
    return log


def test_tokens_are_read_back_by_line_and_choice(tmp_path):
    path = tmp_path / "out.tokens"
    write(path, [*PASSES[:2], [], PASSES[2]])
    assert as_lists(TokenLog(path, b"job").read()) == {7: {0: [11, 12]}, 9: {0: [5, 4_000_000_000], 1: [6]}}
    assert TokenLog(path, b"another job").read() == {}
    assert TokenLog(tmp_path / "none", b"job").read() == {}


def test_a_log_cut_anywhere_gives_whole_passes(tmp_path):
    path = tmp_path / "out.tokens"
    write(path, PASSES)
    data = path.read_bytes()
    wholes = [as_lists(write(tmp_path / "part", PASSES[:count]).read()) for count in range(4)]
    seen = set()
    for end in range(len(data) + 1):
        path.write_bytes(data[:end])
        found = as_lists(TokenLog(path, b"job").read())
        assert found in wholes
        seen.add(wholes.index(found))
    assert seen == {0, 1, 2, 3}


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_a_damaged_byte_costs_what_comes_after_it_only(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "out.tokens"
    write(path, PASSES)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    found = as_lists(TokenLog(path, b"job").read())
    assert found in [as_lists(write(path, PASSES[:count]).read()) for count in range(3)]


def test_going_on_keeps_the_lines_that_are_asked_for(tmp_path):
    path = tmp_path / "out.tokens"
    write(path, PASSES)
    log = TokenLog(path, b"job")
    log.start({9})
    log.append([(9, 0, 8)], lambda: ())
    log.close()
    assert as_lists(log.read()) == {9: {0: [5, 4_000_000_000, 8], 1: [6]}}
    log.remove()
    assert not path.exists()


@pytest.mark.parametrize("under_way", [{3}, set()])
def test_the_file_is_rewritten_when_most_of_it_is_done(tmp_path, monkeypatch, under_way):
    monkeypatch.setattr(token_log, "COMPACT_BYTES", 2000)
    log = TokenLog(tmp_path / "out.tokens", b"job")
    log.start(())
    sizes = []
    for step in range(500):
        log.append([(line, 0, step) for line in range(20)], lambda: under_way)
        sizes.append(log.path.stat().st_size)
    assert max(sizes) < 4 * (500 * 12 + 100) + 2000 < 500 * 20 * 12 / 4
    if under_way:
        assert list(log.read()[3][0]) == list(range(500))
    log.close()
