"""One input line in, one checked prompt out: the only place that knows the shapes a prompt file may have.

Two shapes, told apart line by line:
- OpenAI batch: {"custom_id", "method": "POST", "url": "/v1/chat/completions" | "/v1/completions", "body": {...}}
- bare: {"prompt" | "messages" | "prompt_token_ids": ...} with sampling overrides; other keys travel as metadata.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from flexrun.errors import FlexrunError, RequestError
from flexrun.sampling import UNSUPPORTED_OPTIONS, SamplingParams

URLS = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
ROLES = ("system", "developer", "user", "assistant")
SAMPLING_KEYS = frozenset(field.name for field in fields(SamplingParams) if field.init)
ALIASES = {"max_completion_tokens": "max_tokens", "max_new_tokens": "max_tokens"}
OPTION_KEYS = SAMPLING_KEYS | ALIASES.keys() | {"top_logprobs"}
PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")
OWN_KEYS = frozenset({"custom_id", "echo", "return_token_ids", *PROMPT_KEYS})

# Body parameters that name bookkeeping or transport and cannot change the answer of an offline job.
HARMLESS_KEYS = frozenset(
    {
        "metadata",
        "model",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "stream_options",
        "user",
    }
)
# Body parameters accepted only with a value that changes nothing.
NEUTRAL_VALUES = {
    "stream": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
}
MOST_NESTED = 200  # lists and objects one within another: Python's own limit depends on where it is met
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class PromptLine:
    """A good line. Exactly one of prompt, token_ids and messages is set.

    line: 1-based line number; kind: 'chat' or 'completion', the layout of its output body.
    params: sampling of this line, the job's defaults filled in; metadata: what travels to the output unread.
    echo: the prompt's text goes before the answer's, its log-probabilities before the answer's where these are wanted.
    """

    line: int
    custom_id: str
    kind: str
    prompt: str | None
    token_ids: list[int] | None
    messages: list[dict[str, str]] | None
    params: SamplingParams
    return_token_ids: bool | None
    metadata: dict[str, Any] | None
    echo: bool = False


def decode_line(raw: bytes) -> dict[str, Any]:
    """The JSON object of one line. Raises RequestError on invalid UTF-8, bad JSON, NaN or anything not an object."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"not valid UTF-8 at byte {error.start} of the line", code="invalid_utf8") from error
    try:
        values = _DECODER.decode(text)
    except RecursionError as error:
        raise _too_nested() from error
    except ValueError as error:
        raise RequestError(f"not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise RequestError(f"expected a JSON object, got {_kind(values)}", code="invalid_json")
    if raw.count(b"[") + raw.count(b"{") > MOST_NESTED and _is_nested_deeper(values, MOST_NESTED):
        raise _too_nested()
    if _SURROGATE.search(raw):
        try:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                "a string holds half of a surrogate pair (\\ud800-\\udfff)", code="invalid_utf8"
            ) from error
    return values


def _is_nested_deeper(values: Any, levels: int) -> bool:
    level = [values]
    for _ in range(levels):
        level = [
            each
            for outer in level
            for each in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(each, (dict, list))
        ]
    return bool(level)


def _too_nested() -> RequestError:
    return RequestError(f"more than {MOST_NESTED} lists and objects one within another", code="invalid_json")


def line_id(values: Mapping, line: int) -> str:
    """The line's custom_id, or ``line-N`` if it has none. Raises RequestError unless it is a non-empty string."""
    custom_id = values.get("custom_id")
    if custom_id is None:
        return f"line-{line}"
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError(f"custom_id must be a non-empty string, got {_show(custom_id)}", code="invalid_custom_id")
    return custom_id


def parse_line(values: Mapping, line: int, defaults: SamplingParams) -> PromptLine:
    """Check everything about a line that needs no tokenizer. Raises RequestError naming the key that is wrong."""
    custom_id = line_id(values, line)
    if "body" in values or "url" in values or "method" in values:
        return _openai_line(values, custom_id, line, defaults)
    return _bare_line(values, custom_id, line, defaults)


def _openai_line(values: Mapping, custom_id: str, line: int, defaults: SamplingParams) -> PromptLine:
    url, method, body = values.get("url"), values.get("method", "POST"), values.get("body")
    if method != "POST":
        raise RequestError(f"method must be 'POST', got {_show(method)}")
    if url not in URLS:
        raise RequestError(f"url must be one of {', '.join(URLS)}; got {_show(url)}", code="unsupported_url")
    if not isinstance(body, Mapping):
        raise RequestError(f"body must be an object, got {_kind(body)}")
    kind = URLS[url]
    prompt_key = "messages" if kind == "chat" else "prompt"
    other_keys = [key for key in PROMPT_KEYS if key != prompt_key and body.get(key) is not None]
    if other_keys:
        raise RequestError(f"{other_keys[0]!r} does not belong in the body of {url}; it takes {prompt_key!r}")
    for key, value in body.items():
        if value is not None and key not in OPTION_KEYS and key not in OWN_KEYS and key not in HARMLESS_KEYS:
            _require_neutral(key, value)
    prompt, token_ids, messages = _prompt_of(body, prompt_key)
    metadata = body.get("metadata")
    return PromptLine(
        line=line,
        custom_id=custom_id,
        kind=kind,
        prompt=prompt,
        token_ids=token_ids,
        messages=messages,
        params=_sampling_of(body, "body", defaults),
        return_token_ids=_flag(body, "return_token_ids"),
        metadata=dict(metadata) if isinstance(metadata, Mapping) else None,
        echo=_echo(body, prompt),
    )


def _bare_line(values: Mapping, custom_id: str, line: int, defaults: SamplingParams) -> PromptLine:
    present = [key for key in PROMPT_KEYS if values.get(key) is not None]
    if len(present) != 1:
        found = "none of them" if not present else " and ".join(repr(key) for key in present)
        raise RequestError(
            f"a line needs exactly one of {', '.join(map(repr, PROMPT_KEYS))}; found {found}", code="missing_prompt"
        )
    prompt, token_ids, messages = _prompt_of(values, present[0])
    metadata = {}
    for key in unread_keys(values):
        if key in UNSUPPORTED_OPTIONS and values[key] is not None:
            _require_neutral(key, values[key])
        # A key named metadata is already what its value says; it is not wrapped once more.
        metadata.update(values[key] if key == "metadata" and isinstance(values[key], Mapping) else {key: values[key]})
    return PromptLine(
        line=line,
        custom_id=custom_id,
        kind="chat" if messages is not None else "completion",
        prompt=prompt,
        token_ids=token_ids,
        messages=messages,
        params=_sampling_of(values, "line", defaults),
        return_token_ids=_flag(values, "return_token_ids"),
        metadata=metadata or None,
        echo=_echo(values, prompt),
    )


def unread_keys(values: Mapping) -> list[str]:
    """Keys of a bare line that are neither prompt, id nor sampling option, and so travel as metadata."""
    return [key for key in values if key not in OPTION_KEYS and key not in OWN_KEYS]


def _require_neutral(key: str, value: Any) -> None:
    neutral = NEUTRAL_VALUES.get(key, ())
    if not any(value == harmless and type(value) is type(harmless) for harmless in neutral):
        raise RequestError(
            f"parameter {key!r} is not supported (got {_show(value)})",
            hint=f"remove {key!r} from the line",
            code="unsupported_parameter",
        )


def _prompt_of(values: Mapping, key: str) -> tuple[str | None, list[int] | None, list[dict[str, str]] | None]:
    """(prompt, token_ids, messages), two of them None."""
    value = values.get(key)
    if value is None:
        raise RequestError(f"{key!r} is missing", code="missing_prompt")
    if key == "messages":
        return None, None, _messages(value)
    if key == "prompt" and isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]  # OpenAI allows a list of prompts; a list of one is one prompt
    if key == "prompt" and isinstance(value, str):
        if not value:
            raise RequestError("the prompt is empty", code="empty_prompt")
        return value, None, None
    if not isinstance(value, list):
        expected = "a string or a list of token ids" if key == "prompt" else "a list of token ids"
        raise RequestError(f"{key!r} must be {expected}, got {_kind(value)}")
    if not value:
        raise RequestError("the prompt is empty", code="empty_prompt")
    if key == "prompt" and all(isinstance(item, (str, list)) for item in value):
        raise RequestError(f"one prompt a line, got {len(value)}", "write each prompt on its own line")
    for token in value:
        if type(token) is not int:
            raise RequestError(f"token ids must be integers, got {_show(token)}", code="invalid_token_id")
    return None, value, None


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise RequestError(f"'messages' must be a list, got {_kind(value)}")
    if not value:
        raise RequestError("'messages' is empty", code="empty_prompt")
    messages = []
    for position, message in enumerate(value):
        where = f"messages[{position}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} must be an object, got {_kind(message)}")
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(
                f"{where}: role must be one of {', '.join(ROLES)}; got {_show(role)}", code="unknown_role"
            )
        for key, extra in message.items():
            if key not in ("role", "content", "name") and extra:
                raise RequestError(f"{where}: {key!r} is not supported", code="unsupported_parameter")
        # "developer" is OpenAI's newer name for the system role; chat templates know only the latter.
        messages.append({"role": "system" if role == "developer" else role, "content": _content(message, where)})
    return messages


def _content(message: Mapping, where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}: content must be a string or a list of text parts, got {_kind(content)}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            name = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise RequestError(f"{where}: only text parts are supported, got {_show(name)}", code="unsupported_content")
    return "".join(part["text"] for part in content)


def _sampling_of(values: Mapping, where: str, defaults: SamplingParams) -> SamplingParams:
    given = {key: value for key, value in values.items() if key in OPTION_KEYS and value is not None}
    if not given:
        return defaults
    for alias, name in ALIASES.items():
        if alias in given:
            value = given.pop(alias)
            if given.setdefault(name, value) != value:
                raise RequestError(f"{alias}={_show(value)} contradicts {name}={_show(given[name])}")
    # OpenAI's chat bodies say logprobs: true, top_logprobs: K; completions and vLLM say logprobs: K.
    top_logprobs = given.pop("top_logprobs", None)
    if isinstance(given.get("logprobs"), bool):
        given["logprobs"] = (top_logprobs or 0) if given["logprobs"] else None
    elif top_logprobs is not None and top_logprobs != 0 and "logprobs" not in given:
        raise RequestError("top_logprobs needs logprobs: true")
    if values.get("echo") is True and given.get("logprobs") is not None:
        given.setdefault("prompt_logprobs", given["logprobs"])
    return _sampling_params(json.dumps(given, sort_keys=True), where, defaults)


@lru_cache(maxsize=256)
def _sampling_params(given: str, where: str, defaults: SamplingParams) -> SamplingParams:
    """Cached by the JSON of what was given (so that 1, 1.0 and true differ): most lines of a file say the same."""
    try:
        return SamplingParams.from_dict(json.loads(given), where, defaults)
    except RequestError:
        raise
    except FlexrunError as error:
        raise RequestError(error.message, error.hint, code="unsupported_parameter") from error


def _flag(values: Mapping, key: str) -> bool | None:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{key!r} must be true or false, got {_show(value)}")
    return value


def _echo(values: Mapping, prompt: str | None) -> bool:
    echo = bool(_flag(values, "echo"))
    if echo and prompt is None:
        raise RequestError("'echo' needs a prompt given as text", code="unsupported_parameter")
    return echo


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large a number")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_float)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
