"""Renders chat templates: they are programs from a model's files, so they run in a sandbox and see only messages."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexrun.errors import TokenizerError

_BEGUN = datetime.datetime.now()  # of the process: a prompt must be the same when its turn comes as when it was checked


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's part for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Not jinja2's own filter, which escapes HTML characters that a prompt must keep.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _strftime_now(pattern):
    return _BEGUN.strftime(pattern)


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise TokenizerError(f"the chat template cannot be parsed: {error}") from error


def render_chat(
    template: str, messages: Sequence[Mapping], add_generation_prompt: bool, variables: Mapping[str, object]
) -> str:
    """The prompt text of ``messages``. ``variables`` are what the template may also read (bos_token, ...).

    Raises TokenizerError for messages of the wrong form and for whatever the template itself refuses.
    """
    values = {"tools": None, "documents": None, **variables}
    values.update(messages=[_plain_message(message) for message in messages])
    values.update(add_generation_prompt=add_generation_prompt)
    compiled = _compile(template)
    try:
        return compiled.render(values)
    except jinja2.TemplateError as error:
        raise TokenizerError(f"the chat template refused these messages: {error}") from error
    except Exception as error:  # a template is foreign code: whatever it raises is its own fault
        raise TokenizerError(f"the chat template failed: {type(error).__name__}: {error}") from error


def _plain_message(message: Mapping) -> dict:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TokenizerError(
            f"a chat message must be an object with a role, got {message!r:.200}",
            'write {"role": "user", "content": "..."}',
        )
    message = dict(message)
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        message["content"] = "".join(_text_part(part) for part in content)
    elif content is None and "tool_calls" not in message:
        raise TokenizerError(f"a chat message of role {message['role']!r} has no content")
    elif content is not None and not isinstance(content, str):
        raise TokenizerError(f"a chat message's content must be text, got {type(content).__name__}")
    return message


def _text_part(part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise TokenizerError(f"a chat message holds a part of type {kind!r}", "only text parts run")
