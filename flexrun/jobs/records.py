"""One answer or refusal out: the OpenAI batch envelope, the only shape a result line ever has.

{"id", "custom_id", "response": {"status_code", "request_id", "body"} | null, "error": {...} | null, "metadata"?}
The line number of the input is the last part of ``id``; resume and --preserve-order read it back from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flexrun.jobs.index import LineError
from flexrun.jobs.jsonl import PromptLine
from flexrun.outputs import CompletionOutput, Logprob, RequestOutput

OBJECTS = {"chat": ("chat.completion", "chatcmpl"), "completion": ("text_completion", "cmpl")}
_ID_START = "batch_req_"
RECORD_START = f'{{"id": "{_ID_START}'.encode()  # of a record's line
LEAST_LOGPROB = -9999.0  # JSON has no -infinity; OpenAI and vLLM write this


def job_id_of(manifest: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that stand for all that decides the answers of a job."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:8]


def answer_record(
    prompt: PromptLine,
    output: RequestOutput,
    *,
    job_id: str,
    model: str,
    created_seconds: int,
    return_token_ids: bool,
) -> dict[str, Any]:
    """The record of a request that was answered. ``created_seconds``: Unix time."""
    object_name, prefix = OBJECTS[prompt.kind]
    body: dict[str, Any] = {
        "id": f"{prefix}-{job_id}-{prompt.line}",
        "object": object_name,
        "created": created_seconds,
        "model": model,
        "choices": [_choice(prompt, output, completion, return_token_ids) for completion in output.outputs],
        "usage": _usage(output),
    }
    if return_token_ids:
        body["prompt_token_ids"] = list(output.prompt_token_ids or ())
    response = {"status_code": 200, "request_id": f"req_{job_id}_{prompt.line}", "body": body}
    return _envelope(job_id, prompt.line, prompt.custom_id, response, None, prompt.metadata)


def error_record(error: LineError, job_id: str, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """The record of a line that was refused or failed."""
    complaint = {"code": error.code, "message": error.message, "line": error.line}
    return _envelope(job_id, error.line, error.custom_id, None, complaint, metadata)


def record_lengths(record: dict[str, Any]) -> tuple[int, int, int]:
    """(choices, tokens of all of them, whether none was cut at its limit) of an answer; zeros of any other record."""
    body = (record["response"] or {}).get("body") or {}
    if not body.get("choices"):
        return 0, 0, 0
    ended = all(choice["finish_reason"] != "length" for choice in body["choices"])
    return len(body["choices"]), int(body["usage"]["completion_tokens"]), int(ended)


def record_line(record: dict[str, Any]) -> int:
    """The 1-based input line that a record answers. Raises KeyError, TypeError or ValueError on a foreign record."""
    return int(record["id"].rsplit("_", 1)[1])


def record_job(record: dict[str, Any]) -> str:
    """Id of the job that wrote a record. Raises as ``record_line``."""
    return record["id"].rsplit("_", 2)[1]


def _envelope(job_id, line, custom_id, response, error, metadata) -> dict[str, Any]:
    record = {"id": f"{_ID_START}{job_id}_{line}", "custom_id": custom_id, "response": response, "error": error}
    if metadata:
        record["metadata"] = metadata
    return record


def _usage(output: RequestOutput) -> dict[str, Any]:
    prompt_tokens = len(output.prompt_token_ids or ())
    completion_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if output.num_cached_tokens:
        usage["prompt_tokens_details"] = {"cached_tokens": output.num_cached_tokens}
    return usage


def _choice(
    prompt: PromptLine, output: RequestOutput, completion: CompletionOutput, return_token_ids: bool
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": completion.index}
    if prompt.kind == "chat":
        choice["message"] = {"role": "assistant", "content": completion.text}
        choice["logprobs"] = _chat_logprobs(completion, prompt.params.logprobs or 0)
    else:
        choice["text"] = (prompt.prompt if prompt.echo else "") + completion.text
        choice["logprobs"] = _completion_logprobs(completion, prompt.prompt or "", output if prompt.echo else None)
    choice["finish_reason"] = completion.finish_reason
    choice["stop_reason"] = completion.stop_reason
    if output.prompt_logprobs is not None and not prompt.echo:
        choice["prompt_logprobs"] = [_position(position) for position in output.prompt_logprobs]
    if return_token_ids:
        choice["token_ids"] = list(completion.token_ids)
    return choice


def _chat_logprobs(completion: CompletionOutput, top_count: int) -> dict[str, Any] | None:
    """OpenAI's chat layout: the chosen token of each position, with the ``top_count`` likeliest beside it."""
    if completion.logprobs is None:
        return None
    content = []
    for token, choices in zip(completion.token_ids, completion.logprobs):
        top = [_token_entry(other, choices[other]) for other in _ranked(choices)[:top_count]]
        content.append({**_token_entry(token, choices[token]), "top_logprobs": top})
    return {"content": content}


def _completion_logprobs(
    completion: CompletionOutput, prompt: str, echoed: RequestOutput | None
) -> dict[str, Any] | None:
    """OpenAI's completions layout: parallel lists; text_offset counts characters from the start of the text.

    echoed: the output whose prompt comes before the answer. Nothing comes before its first token: null.
    """
    if completion.logprobs is None:
        return None
    token_ids, positions = completion.token_ids, completion.logprobs
    if echoed is not None:
        token_ids, positions = [*echoed.prompt_token_ids, *token_ids], [*echoed.prompt_logprobs, *positions]
    tokens = [
        "" if choices is None else _token_text(token, choices[token]) for token, choices in zip(token_ids, positions)
    ]
    if (
        echoed is not None
    ):  # what the others leave of the prompt is the first one's; a token that begins it adds nothing
        rest = "".join(tokens[1 : len(echoed.prompt_token_ids)])
        tokens[0] = prompt.removesuffix(rest) if prompt.endswith(rest) else ""
    token_logprobs, top_logprobs, text_offset = [], [], []
    offset = 0
    for text, token, choices in zip(tokens, token_ids, positions):
        token_logprobs.append(None if choices is None else _finite(choices[token]))
        top: dict[str, float] = {}
        for other in _ranked(choices or {}):  # two tokens may share a text: the likelier one keeps it
            top.setdefault(_token_text(other, choices[other]), _finite(choices[other]))
        top_logprobs.append(None if choices is None else top)
        text_offset.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": text_offset,
    }


def _position(choices: dict[int, Logprob] | None) -> dict[str, dict[str, Any]] | None:
    """vLLM's layout of one prompt token: token id -> its entry."""
    if choices is None:
        return None
    return {
        str(token): {"logprob": _finite(entry), "rank": entry.rank, "decoded_token": entry.decoded_token}
        for token, entry in choices.items()
    }


def _ranked(choices: dict[int, Logprob]) -> Sequence[int]:
    return sorted(choices, key=lambda token: -choices[token].logprob)


def _token_entry(token: int, logprob: Logprob) -> dict[str, Any]:
    text = _token_text(token, logprob)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, LEAST_LOGPROB)


def _token_text(token: int, logprob: Logprob) -> str:
    return f"token_id:{token}" if logprob.decoded_token is None else logprob.decoded_token
