"""Beginnings of a conversation that are cut out of one rendering are those that the template writes by themselves."""

from __future__ import annotations

from datetime import date

import pytest

from lora2serve.data.chat_beginnings import Beginnings
from lora2serve.data.rows import ChatRow, Message
from lora2serve.data.served_template import ChatTemplate, ServedChat
from tests.data.test_chat_turns import CHATML, REFUSED, THINK, TURNS, tokenizer_with
from tests.support.llama_cpp_source import chat_templates, in_a_few_templates

CHAT: list[Message] = [
    {"role": message["role"], "content": f"{message['content']} {n}"} for n in range(2) for message in TURNS
]
BODY = "{{'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'}}"
PROMPT = "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
LOOP = "{% for m in messages %}" + BODY + "{% endfor %}"


def served(template: str, messages: list[Message] = CHAT) -> ServedChat:
    return ChatTemplate(tokenizer_with(template), day=date(2026, 3, 4)).serve(ChatRow(messages))


def beginnings(chat: ServedChat) -> list[Beginnings]:
    """Of the conversation with and without the opening of an answer, where they are known."""
    return [known for known in (chat._served, chat._written) if known]


def count_checked(chat: ServedChat) -> int:
    """How many beginnings are known; each is the one that is rendered by itself."""
    known = 0
    for opening, found in ((True, chat._served), (False, chat._written)):
        for count in range(1, len(chat.messages)):
            text = found.of(count) if found else None
            if text is not None:
                assert text == chat.render(chat.messages[:count], generation_prompt=opening)
                known += 1
    return known


@in_a_few_templates
def test_every_template(few: bool) -> None:
    """A third of the real templates write in turn; the others, such as those that rewrite history, are rendered."""
    known = {}
    for name, template in chat_templates(few).items():
        if name not in REFUSED:
            known[name] = count_checked(served(template, [Message(role="system", content="Be brief."), *CHAT[:8]]))
    assert sum(count > 0 for count in known.values()) >= (9 if few else 20)
    assert known["Qwen-Qwen2.5-7B-Instruct"] and known["meta-llama-Llama-3.1-8B-Instruct"]
    assert not known["Qwen-Qwen3-0.6B"] and not known["openai-gpt-oss-120b"] and not known["Qwen-QwQ-32B"]


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}{% else %}"
        "{% set rest = messages %}{% endif %}" + LOOP.replace("messages", "rest") + PROMPT,
        LOOP.replace(BODY, "{% if loop.first %}First: {% endif %}" + BODY) + PROMPT,
        LOOP.replace(BODY, BODY + "{{ messages[loop.index0 - 1].role if loop.index0 else '' }}") + PROMPT,
        "{% set last = 'x' %}{% if true %}" + LOOP + "{{ last }}{% endif %}" + PROMPT,
    ],
)  # fmt: skip
def test_templates_that_write_in_turn(template: str) -> None:
    assert count_checked(served(template)) == 2 * (len(CHAT) - 1)


@pytest.mark.parametrize(
    "template",
    [
        THINK,
        LOOP.replace(BODY, BODY + "{{ loop.nextitem.role }}") + PROMPT,
        LOOP.replace(BODY, BODY + "{{ loop.revindex }}") + PROMPT,
        LOOP.replace(BODY, BODY + "{{ messages[loop.index0 + 1].role }}") + PROMPT,
        LOOP.replace(BODY, "{{ messages | length }}" + BODY) + PROMPT,
        LOOP.replace(BODY, "{{ messages[-1].content }}" + BODY) + PROMPT,
        LOOP + "{{ messages[2].content }}" + PROMPT,
        LOOP + "{{ messages | length }}" + PROMPT,
        LOOP + LOOP,
        "{% set ns = namespace(last='') %}" + LOOP.replace(BODY, "{% set ns.last = m.role %}" + BODY) + "{{ ns.last }}",
        "{% set ns = namespace(last='') %}{% macro tail() %}{{ ns.last }}{% endmacro %}"
        + LOOP.replace(BODY, "{% set ns.last = m.role %}" + BODY) + "{{ tail() }}",
        "{% macro all(turns) %}" + LOOP.replace("messages", "turns") + "{% endmacro %}{{ all(messages) }}" + PROMPT,
        "{% set text %}" + LOOP + "{% endset %}{{ text }}" + PROMPT,
        "{% for m in messages if m.role == 'user' %}" + BODY + "{{ loop.length }}{% endfor %}" + PROMPT,
        "{% for m in messages if loop.length %}" + BODY + "{% endfor %}" + PROMPT,
        "{% for m in messages[1:] | list %}" + BODY + "{% endfor %}" + PROMPT,
        "{% for m in messages[:4] %}" + BODY + "{% endfor %}" + PROMPT,
        "{% for m in messages | selectattr('role', 'equalto', 'user') %}" + BODY + "{% endfor %}" + PROMPT,
        "{% if messages | selectattr('role', 'equalto', 'tool') | list %}T{% endif %}" + LOOP + PROMPT,
        LOOP.replace(BODY, BODY + "{% if loop.index0 == 5 %}{% break %}{% endif %}") + PROMPT,
        LOOP.replace(BODY, BODY + "{% for other in messages %}{{ other.role }}{% endfor %}") + PROMPT,
        LOOP + "{{ 'odd' if messages == [] else 'even' }}" + PROMPT,
        "{{ raise_exception('no') if messages | length > 3 }}" + LOOP + PROMPT,
    ],
)  # fmt: skip
def test_what_looks_further_is_rendered(template: str) -> None:
    """Each of them would be wrong somewhere, cut out of the whole."""
    assert count_checked(served(template)) == 0


def test_another_rendering_than_that_of_transformers_is_not_taken() -> None:
    """The control of the last check: variables that differ from what transformers gives to a template."""
    chat = served("{{ bos_token }}" + CHATML)
    assert len(beginnings(chat)) == 2
    other = served("{{ bos_token }}" + CHATML)
    other.template.tokenizer.apply_chat_template = lambda *a, **k: "something else"  # type: ignore[method-assign]
    assert not beginnings(other)
