"""When a text ends, and what of it is handed back."""

from __future__ import annotations

import pytest

from flexrun.sampling import TokenLogprob

LETTERS = {10: "a", 11: "b", 12: "c", 13: "ab", 14: "bc", 15: " "}


class Letters:
    """A decoder that gives each token its letters at once; tokens over 90 are held back until the next."""

    def __init__(self):
        self.text, self._held = "", ""

    def feed(self, token_id: int) -> str:
        if token_id > 90:
            self._held += "?"
            return ""
        piece = self._held + LETTERS.get(token_id, f"<{token_id}>")
        self._held = ""
        self.text += piece
        return piece

    def finish(self) -> str:
        piece, self._held = self._held, ""
        self.text += piece
        return piece


@pytest.fixture
def write(make_group):
    """write(tokens, **sampling) -> (how many tokens were taken, the completion or None)."""

    def take(tokens, decoder=Letters, **sampling):
        group, (sequence,) = make_group([5, 6], decoder, **{"max_tokens": 100, **sampling})
        for count, token in enumerate(tokens, start=1):
            if sequence.append(token, None, None, None):
                assert group.unfinished == 0
                return count, group.done[0]
        assert group.unfinished == 1
        return len(tokens), None

    return take


def ending(completion) -> tuple:
    return completion.text, completion.finish_reason, completion.stop_reason


def test_max_tokens_end_with_length(write):
    count, completion = write([10, 11, 12, 10], max_tokens=3)
    assert count == 3
    assert completion.token_ids == [10, 11, 12]
    assert ending(completion) == ("abc", "length", None)


def test_the_end_of_sequence_token_stops(write):
    count, completion = write([10, 2, 11])
    assert count == 2
    assert completion.token_ids == [10, 2]
    assert ending(completion) == ("a", "stop", None)


def test_ignore_eos_goes_on(write):
    assert write([10, 2, 11], ignore_eos=True) == (3, None)
    count, completion = write([10, 2, 11], ignore_eos=True, stop_token_ids=[2])
    assert count == 2, "asked for by name, it stops all the same"
    assert completion.stop_reason == 2


def test_a_stop_token_is_the_reason(write):
    count, completion = write([10, 11, 12], stop_token_ids=[11])
    assert count == 2
    assert ending(completion) == ("a", "stop", 11)


def test_a_stop_token_on_the_last_place_is_a_stop(write):
    _, completion = write([10, 2], max_tokens=2)
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize(
    ("tokens", "stop", "text", "reason", "taken"),
    [
        ([10, 11, 12], ["b"], "a", "b", 2),
        ([10, 11, 12, 10], ["bc"], "a", "bc", 3),  # spans two tokens
        ([10, 10, 11, 12], ["aabc"], "", "aabc", 4),  # spans all of them
        ([13, 14], ["bb"], "a", "bb", 2),  # begins inside one token and ends inside the next
        ([13, 14], ["c", "abb"], "", "abb", 2),  # the one that begins first wins
        ([10, 13, 12], ["abc"], "a", "abc", 3),
    ],
)
def test_stop_strings_end_the_text_before_them(write, tokens, stop, text, reason, taken):
    count, completion = write(tokens, stop=stop)
    assert count == taken
    assert ending(completion) == (text, "stop", reason)


def test_the_stop_string_stays_if_asked_for(write):
    _, completion = write([10, 11, 14], stop=["bb"], include_stop_str_in_output=True)
    assert ending(completion) == ("abb", "stop", "bb")


def test_what_follows_a_stop_string_in_its_token_is_cut(write):
    _, completion = write([10, 14], stop=["b"])
    assert ending(completion) == ("a", "stop", "b")


def test_a_stop_string_that_was_held_back_until_the_end_counts(write):
    _, completion = write([10, 95], max_tokens=2, stop=["?"])
    assert ending(completion) == ("a", "stop", "?")


def test_held_back_text_comes_out_at_the_end(write):
    assert ending(write([10, 95], max_tokens=2)[1]) == ("a?", "length", None)
    assert ending(write([10, 95, 2])[1]) == ("a?", "stop", None)


def test_min_tokens_put_every_stop_off(write):
    assert write([2, 2], min_tokens=2) == (2, None)
    count, completion = write([10, 2, 2, 10], min_tokens=2)
    assert count == 3
    assert completion.finish_reason == "stop"
    count, _ = write([11, 10, 11, 10], min_tokens=3, stop=["b"])
    assert count == 3, "a stop string before min_tokens has passed by"


def test_special_tokens_show_only_if_asked_for(write):
    assert ending(write([10, 2], skip_special_tokens=False)[1]) == ("a<2>", "stop", None)


def test_without_a_decoder_there_are_only_tokens(write):
    _, completion = write([10, 2], decoder=None)
    assert completion.token_ids == [10, 2]
    assert ending(completion) == ("", "stop", None)


def test_logprobs_are_kept_token_by_token(make_group):
    group, (sequence,) = make_group([5], Letters, logprobs=1, max_tokens=2)
    likeliest = TokenLogprob(10, -0.1, 1)
    assert not sequence.append(10, likeliest, [likeliest], LETTERS.get)
    assert sequence.append(12, TokenLogprob(12, -2.5, 7), [TokenLogprob(11, -0.2, 1)], LETTERS.get)
    (completion,) = group.done
    first, second = completion.logprobs
    assert {token: entry.decoded_token for token, entry in first.items()} == {10: "a"}
    assert {token: (entry.logprob, entry.rank) for token, entry in second.items()} == {11: (-0.2, 1), 12: (-2.5, 7)}
    assert completion.cumulative_logprob == pytest.approx(-2.6)


def test_a_group_is_done_when_all_its_choices_are(make_group):
    group, (first, second) = make_group([5, 6, 7], Letters, n=2, max_tokens=5)
    assert second.append(2, None, None, None)
    assert group.unfinished == 1
    assert not first.append(10, None, None, None)
    assert first.append(2, None, None, None)
    output = group.output(1.0)
    assert group.unfinished == 0
    assert output.prompt_token_ids == [5, 6, 7]
    assert [(choice.index, choice.text) for choice in output.outputs] == [(0, "a"), (1, "")]


def test_what_a_sequence_has_left_to_run(make_group):
    _, (sequence,) = make_group([5, 6, 7, 8], max_tokens=3)
    assert (sequence.kv_tokens, sequence.pending_tokens) == (6, 4)
    assert list(sequence.tokens(2)) == [5, 6]
    sequence.cached_tokens = 2
    assert list(sequence.tokens(2)) == [7, 8]
    sequence.cached_tokens = 4
    assert not sequence.certainly_ends()
    sequence.append(30, None, None, None)
    assert (sequence.pending_tokens, list(sequence.tokens(1))) == (1, [30])
    sequence.append(31, None, None, None)
    assert sequence.certainly_ends()
