"""Records out: the OpenAI envelope, for answers of both kinds and for refusals."""

from flexrun.errors import RequestError
from flexrun.jobs.index import LineError
from flexrun.jobs.jsonl import parse_line
from flexrun.jobs.records import answer_record, error_record, record_line
from flexrun.outputs import CompletionOutput, Logprob, RequestOutput
from flexrun.sampling import SamplingParams

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "custom_id": "c", "label": 3}


def record_of(values, output, return_token_ids=False):
    prompt = parse_line(values, 12, SamplingParams(temperature=0.0))
    return answer_record(
        prompt, output, job_id="ab12", model="m", created_seconds=1700000000, return_token_ids=return_token_ids
    )


def output_of(*completions, cached=0):
    return RequestOutput("c", None, [4, 5, 6], list(completions), num_cached_tokens=cached)


def test_chat_envelope():
    completion = CompletionOutput(0, "Hello", [7, 8], finish_reason="stop", stop_reason="\n")
    assert record_of(CHAT, output_of(completion)) == {
        "id": "batch_req_ab12_12",
        "custom_id": "c",
        "response": {
            "status_code": 200,
            "request_id": "req_ab12_12",
            "body": {
                "id": "chatcmpl-ab12-12",
                "object": "chat.completion",
                "created": 1700000000,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "Hello"},
                        "logprobs": None,
                        "finish_reason": "stop",
                        "stop_reason": "\n",
                    }
                ],
                "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
            },
        },
        "error": None,
        "metadata": {"label": 3},
    }


def test_completion_choices_token_ids_and_cached_tokens():
    completions = [CompletionOutput(index, "x", [index], finish_reason="length") for index in range(2)]
    body = record_of({"prompt": "Hi"}, output_of(*completions, cached=2), return_token_ids=True)["response"]["body"]
    assert body["object"] == "text_completion" and body["prompt_token_ids"] == [4, 5, 6]
    assert [(choice["index"], choice["text"], choice["token_ids"]) for choice in body["choices"]] == [
        (0, "x", [0]),
        (1, "x", [1]),
    ]
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


LOGPROBS = [
    {7: Logprob(-2.0, 3, "Hé"), 1: Logprob(-0.1, 1, "A"), 2: Logprob(-1.0, 2, "A")},
    {8: Logprob(float("-inf"), 4, "lo"), 3: Logprob(-0.2, 1, None)},
]


def test_chat_logprobs_list_the_likeliest_beside_the_chosen():
    completion = CompletionOutput(0, "Hélo", [7, 8], logprobs=LOGPROBS, finish_reason="length")
    record = record_of({**CHAT, "logprobs": True, "top_logprobs": 2}, output_of(completion))
    first, second = record["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("Hé", -2.0, [72, 195, 169])
    assert [entry["logprob"] for entry in first["top_logprobs"]] == [-0.1, -1.0]
    assert second["logprob"] == -9999.0  # JSON has no infinity
    assert second["top_logprobs"][0]["token"] == "token_id:3"


def test_chat_logprobs_without_alternatives():
    completion = CompletionOutput(0, "A", [1], logprobs=[{1: Logprob(-0.1, 1, "A")}], finish_reason="length")
    record = record_of({**CHAT, "logprobs": True}, output_of(completion))
    assert record["response"]["body"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_completion_logprobs_are_parallel_lists():
    completion = CompletionOutput(0, "Hélo", [7, 8], logprobs=LOGPROBS, finish_reason="length")
    record = record_of({"prompt": "Hi", "logprobs": 2}, output_of(completion))
    assert record["response"]["body"]["choices"][0]["logprobs"] == {
        "tokens": ["Hé", "lo"],
        "token_logprobs": [-2.0, -9999.0],
        "top_logprobs": [{"A": -0.1, "Hé": -2.0}, {"token_id:3": -0.2, "lo": -9999.0}],
        "text_offset": [0, 2],
    }


def test_errors_carry_code_message_and_line():
    error = LineError.of(9, "x", RequestError("too long", "shorten it", "context_length_exceeded"))
    record = error_record(error, "ab12")
    assert record == {
        "id": "batch_req_ab12_9",
        "custom_id": "x",
        "response": None,
        "error": {"code": "context_length_exceeded", "message": "too long; shorten it", "line": 9},
    }
    assert record_line(record) == 9


def test_an_echo_puts_the_prompt_before_the_answer():
    values = {"prompt": "a bc", "echo": True, "logprobs": 1, "max_tokens": 1}
    completion = CompletionOutput(0, " d", [9], logprobs=[{9: Logprob(-0.5, 1, " d")}], finish_reason="length")
    output = output_of(completion)
    output.prompt_logprobs = [None, {5: Logprob(-1.0, 2, " b"), 7: Logprob(-0.25, 1, " x")}, {6: Logprob(-2.0, 1, "c")}]
    choice = record_of(values, output)["response"]["body"]["choices"][0]
    assert choice["text"] == "a bc d" and "prompt_logprobs" not in choice
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", " b", "c", " d"] and logprobs["text_offset"] == [0, 1, 3, 4]
    assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -0.5]
    assert logprobs["top_logprobs"][:2] == [None, {" x": -0.25, " b": -1.0}]


def test_prompt_logprobs_are_vllms():
    output = output_of(CompletionOutput(0, "", [], finish_reason="length"))
    output.prompt_logprobs = [None, {5: Logprob(-1.0, 2, " b")}]
    choice = record_of({"prompt": "a b", "prompt_logprobs": 0, "max_tokens": 0}, output)["response"]["body"]["choices"][
        0
    ]
    assert choice["prompt_logprobs"] == [None, {"5": {"logprob": -1.0, "rank": 2, "decoded_token": " b"}}]
