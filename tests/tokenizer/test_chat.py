import datetime

import pytest
import transformers

from flexrun.errors import TokenizerError
from flexrun.tokenizer.chat import render_chat

MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "Hi there\n"},
    {"role": "assistant", "content": " Hello "},
    {"role": "user", "content": "What's 2+2?"},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks on lines of their own": """{{ bos_token }}
    {%- for message in messages %}
        {%- if message.role == 'system' %}
            {{- '<<SYS>>' + message.content + '<</SYS>>' }}
        {%- elif loop.index0 is odd %}
[INST] {{ message.content | trim }} [/INST]
        {%- else %}
            {{ message.content }}{{ eos_token }}
        {% endif %}
    {%- endfor %}
    {% if add_generation_prompt %}
>>{% endif %}""",
    "json": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(seen=0) %}{% for m in messages %}{% set ns.seen = ns.seen + 1 %}{% endfor %}"
    "{{ ns.seen }}{{ 'tools' if tools else 'plain' }}{{ documents is none }}",
    "date": "{{ strftime_now('%Y-%m-%d') }}",
    "undefined": "[{{ nothing }}][{{ enable_thinking is defined }}]",
}


@pytest.fixture(scope="module")
def oracle(byte_level_backend):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend, bos_token="<|start|>", eos_token="<|end|>"
    )


SPECIAL = {"bos_token": "<|start|>", "eos_token": "<|end|>"}


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_prompts_are_those_of_transformers(template, generation, oracle):
    expected = oracle.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=generation
    )
    assert render_chat(template, MESSAGES, generation, SPECIAL) == expected


def test_further_variables_reach_the_template():
    assert render_chat("{{ enable_thinking }}", MESSAGES, True, {"enable_thinking": False}) == "False"


def test_text_parts_are_joined():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert render_chat("{{ messages[0].content }}", messages, True, {}) == "ab"
    assert isinstance(messages[0]["content"], list)  # the caller's message is untouched


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"content": "x"}], "a role"),
        (["x"], "a role"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": 5}], "must be text, got int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
    ],
)
def test_messages_of_the_wrong_form_are_explained(messages, complaint):
    with pytest.raises(TokenizerError, match=complaint):
        render_chat("{{ messages }}", messages, True, {})


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "cannot be parsed"),
        ("{{ messages[0].content + 1 }}", "failed: TypeError"),
        ("{{ messages[9].content.x }}", "refused these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_refuses_or_misbehaves_gives_a_tokenizer_error(template, complaint):
    with pytest.raises(TokenizerError, match=complaint):
        render_chat(template, MESSAGES, True, {})


def test_the_date_is_that_of_the_beginning_and_no_later_prompt_has_another():
    year = str(datetime.datetime.now().year)
    first, second = (render_chat("{{ strftime_now('%Y %d %b %S.%f') }}", MESSAGES, True, {}) for _ in range(2))
    assert year in first and first == second
