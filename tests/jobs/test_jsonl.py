"""Lines in: both shapes, every option, and every way a line can be wrong."""

import pytest

from flexrun.errors import RequestError
from flexrun.jobs.jsonl import decode_line, parse_line
from flexrun.sampling import SamplingParams

DEFAULTS = SamplingParams(temperature=0.0, max_tokens=128)


def parse(**values):
    return parse_line(values, 1, DEFAULTS)


def openai(body, url="/v1/completions", **values):
    return parse(custom_id="a", method="POST", url=url, body=body, **values)


def chat(body):
    return openai(body, "/v1/chat/completions")


HELLO = [{"role": "user", "content": "Hello"}]


def test_bare_prompt_takes_the_defaults_and_a_line_id():
    line = parse_line({"prompt": "Hello"}, 7, DEFAULTS)
    assert (line.custom_id, line.kind, line.prompt, line.params) == ("line-7", "completion", "Hello", DEFAULTS)
    assert line.token_ids is line.messages is line.metadata is None


def test_bare_overrides_win_and_unknown_keys_become_metadata():
    line = parse(
        prompt="x", custom_id="q", max_tokens=5, temperature=0.7, stop=["\n"], top_k=3, label=4, source={"p": 1}
    )
    assert line.params == SamplingParams(temperature=0.7, max_tokens=5, stop=("\n",), top_k=3)
    assert line.metadata == {"label": 4, "source": {"p": 1}}


def test_a_key_named_metadata_is_not_wrapped_again():
    assert parse(prompt="x", metadata={"label": 1}, extra=2).metadata == {"label": 1, "extra": 2}
    assert parse(prompt="x", metadata="tag").metadata == {"metadata": "tag"}


@pytest.mark.parametrize("values", [{"prompt": [1, 2]}, {"prompt_token_ids": [1, 2]}, {"prompt": [[1, 2]]}])
def test_token_ids_in_every_spelling(values):
    line = parse(**values)
    assert line.token_ids == [1, 2] and line.kind == "completion"


def test_openai_chat_and_completion_lines():
    line = chat({"model": "ignored", "messages": HELLO, "max_completion_tokens": 9, "user": "u", "stream": False})
    assert (line.kind, line.messages, line.params.max_tokens) == ("chat", HELLO, 9)
    line = openai({"prompt": ["Hello"], "max_tokens": None, "metadata": {"k": "v"}})
    assert (line.prompt, line.params, line.metadata) == ("Hello", DEFAULTS, {"k": "v"})


def test_message_parts_are_joined_and_developer_means_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    line = parse(messages=[{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}])
    assert line.messages == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    "body, expected",
    [
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"logprobs": True}, 0),
        ({"logprobs": False}, None),
        ({"logprobs": 2}, 2),
        ({}, None),
    ],
)
def test_logprobs_in_both_conventions(body, expected):
    assert parse(messages=HELLO, **body).params.logprobs == expected


def test_equal_values_of_other_types_are_not_confused():
    assert parse(prompt="x", max_tokens=1).params.max_tokens == 1
    for value in (1.0, True):
        with pytest.raises(RequestError, match="max_tokens"):
            parse(prompt="x", max_tokens=value)


def test_logprobs_false_overrides_a_default():
    line = parse_line({"prompt": "x", "logprobs": False}, 1, SamplingParams(logprobs=4))
    assert line.params.logprobs is None


@pytest.mark.parametrize(
    "key, value",
    [
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"50": 1}),
        ("stream", True),
        ("best_of", 3),
        ("reasoning_effort", "high"),
        ("guided_json", {}),
        ("never_heard_of", 1),
    ],
)
def test_parameters_that_would_change_the_answer_are_refused_by_name(key, value):
    with pytest.raises(RequestError, match=key) as caught:
        openai({"prompt": "x", key: value})
    assert caught.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
    "key, value",
    [("tools", []), ("tools", None), ("response_format", {"type": "text"}), ("logit_bias", {}), ("n", 1), ("seed", 3)],
)
def test_neutral_values_are_accepted(key, value):
    assert openai({"prompt": "x", key: value}).prompt == "x"


def test_bare_lines_refuse_sampling_options_that_are_not_run():
    with pytest.raises(RequestError, match="logit_bias"):
        parse(prompt="x", logit_bias={"1": 2})


@pytest.mark.parametrize(
    "values, code, match",
    [
        ({}, "missing_prompt", "none of them"),
        ({"prompt": None}, "missing_prompt", "none of them"),
        ({"prompt": "a", "messages": HELLO}, "missing_prompt", "'prompt' and 'messages'"),
        ({"prompt": ""}, "empty_prompt", "empty"),
        ({"prompt": []}, "empty_prompt", "empty"),
        ({"prompt": 3}, "invalid_request", "a number"),
        ({"prompt": ["a", "b"]}, "invalid_request", "one prompt a line"),
        ({"prompt": [1, "b"]}, "invalid_token_id", '"b"'),
        ({"prompt": [1, True]}, "invalid_token_id", "true"),
        ({"prompt_token_ids": [1.5]}, "invalid_token_id", "1.5"),
        ({"prompt_token_ids": "1 2"}, "invalid_request", "a string"),
        ({"messages": []}, "empty_prompt", "empty"),
        ({"messages": "hi"}, "invalid_request", "a list"),
        ({"messages": ["hi"]}, "invalid_request", r"messages\[0\]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown_role", "robot"),
        ({"messages": [{"content": "x"}]}, "unknown_role", "null"),
        ({"messages": [{"role": "user"}]}, "invalid_request", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported_content", "image_url"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
            "unsupported_parameter",
            "tool_calls",
        ),
        ({"prompt": "x", "max_tokens": 0}, "invalid_request", "max_tokens"),
        ({"prompt": "x", "max_tokens": "5"}, "invalid_request", "max_tokens"),
        ({"prompt": "x", "max_tokens": 5, "max_completion_tokens": 6}, "invalid_request", "contradicts"),
        ({"prompt": "x", "temperature": -1}, "invalid_request", "temperature"),
        ({"prompt": "x", "n": 2}, "invalid_request", "greedy"),
        ({"prompt": "x", "top_logprobs": 2}, "invalid_request", "top_logprobs"),
        ({"prompt": "x", "return_token_ids": 1}, "invalid_request", "return_token_ids"),
        ({"prompt": "x", "custom_id": 3}, "invalid_custom_id", "3"),
        ({"prompt": "x", "custom_id": ""}, "invalid_custom_id", "non-empty"),
        ({"method": "GET", "url": "/v1/completions", "body": {}}, "invalid_request", "method"),
        ({"url": "/v1/embeddings", "body": {"prompt": "x"}}, "unsupported_url", "embeddings"),
        ({"body": {"prompt": "x"}}, "unsupported_url", "null"),
        ({"url": "/v1/completions", "body": "x"}, "invalid_request", "body"),
        ({"url": "/v1/completions", "body": {"messages": HELLO}}, "invalid_request", "messages"),
        ({"url": "/v1/completions", "body": {}}, "missing_prompt", "prompt"),
    ],
)
def test_bad_lines_are_named(values, code, match):
    with pytest.raises(RequestError, match=match) as caught:
        parse(**values)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "raw, code",
    [
        (b"{", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b'{"prompt": "a", "x": NaN}', "invalid_json"),
        (b'{"prompt": "a", "x": 1e999}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"prompt": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}", "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_utf8"),
        (b'{"prompt": "\\ud83d"}', "invalid_utf8"),
    ],
)
def test_undecodable_lines(raw, code):
    with pytest.raises(RequestError) as caught:
        decode_line(raw)
    assert caught.value.code == code


def test_whole_surrogate_pairs_are_text():
    assert decode_line(b'{"prompt": "\\ud83d\\ude00"}') == {"prompt": "\U0001f600"}


def test_an_echoed_prompt_is_scored_where_log_probabilities_are_wanted():
    body = {"prompt": "x", "echo": True, "logprobs": 3, "max_tokens": 0}
    prompt = parse_line(body, 1, SamplingParams())
    assert prompt.echo and (prompt.params.prompt_logprobs, prompt.params.max_tokens) == (3, 0)
    assert not parse_line({"prompt": "x", "echo": False}, 1, SamplingParams()).echo
    assert parse_line({"prompt": "x", "echo": True}, 1, SamplingParams()).params.prompt_logprobs is None
    with pytest.raises(RequestError, match="'echo'"):
        parse_line({"messages": [{"role": "user", "content": "x"}], "echo": True}, 1, SamplingParams())
