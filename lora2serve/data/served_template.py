"""A chat template as a server calls it: with the messages in the form that servers give it, on one day."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import cached_property
from typing import cast

from lora2serve.data.chat_beginnings import Beginnings, beginnings
from lora2serve.data.end_tokens import EndTokens, end_tokens, find_answer_end
from lora2serve.data.new_tokens import NO_TOKENS, NewTokens
from lora2serve.data.rows import THOUGHT_KEYS, ChatRow, Message
from lora2serve.data.tokenizer import Tokenizer
from lora2serve.errors import DataError

NO_TEMPLATE = "rows of messages, but the tokenizer has no chat template"
NO_TEMPLATE_HINT = "data.chat_template: chatml (or llama3, gemma, mistral, a file) gives it one"
LONG = 8  # messages of a conversation whose beginnings are worth a look at the template
STAND_IN = "Zq8 says"  # an answer, or a thought, to see what a template writes around it
ServedMessage = Mapping[str, object]


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer.

    ``stop_ids`` end an answer beside the tokenizer's own end token. ``day`` is what a template that prints the date
    prints; None for today. ``prints_date`` turns true when one did. ``new_tokens`` are those that the base has not.
    """

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...] = ()
    day: date | None = None
    new_tokens: NewTokens = NO_TOKENS
    prints_date: bool = field(default=False, init=False)

    def serve(self, row: ChatRow) -> ServedChat:
        """``row`` as a server has it. DataError where the tokenizer has no template."""
        if not self.tokenizer.chat_template:
            raise DataError(NO_TEMPLATE, NO_TEMPLATE_HINT)
        tools = [served_tool(tool) for tool in row.tools] if row.tools else None
        arguments = {"strftime_now": self._strftime, **row.chat_template_kwargs}
        return ServedChat(self, [as_served(message) for message in row.messages], tools, arguments)

    @cached_property
    def ends(self) -> EndTokens:
        """The tokens that end an answer, the one by which this template closes a turn among them."""
        known = end_tokens(self.tokenizer, self.stop_ids)
        return EndTokens((self.closing, *known.texts)) if self.closing else known

    @cached_property
    def refuses_system(self) -> bool:
        """Whether the template raises where a system turn comes first, and not without it: Gemma 2's does."""
        return refuses_system(self._render_anything)

    @cached_property
    def closing(self) -> str:
        """The token by which the template closes a turn, where no server would stop at it; empty otherwise."""
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": STAND_IN}]
        try:
            tail = self._render_anything(turns).rpartition(STAND_IN)[2]
        except Exception:  # a template raises what it likes
            return ""
        if end_tokens(self.tokenizer, self.stop_ids).place(tail) >= 0:
            return ""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        return find_answer_end(self._render_anything, added) or ""

    def _render_anything(self, messages: Sequence[Mapping[str, object]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    def reads(self, name: str) -> bool:
        """Whether the template looks at an argument of that name."""
        return re.search(rf"\b{re.escape(name)}\b", str(self.tokenizer.chat_template)) is not None

    def _strftime(self, pattern: str) -> str:
        """What templates call for the date."""
        self.prints_date = True
        return datetime.combine(self.day or date.today(), time()).strftime(pattern)


@dataclass(frozen=True)
class ServedChat:
    """A conversation in the form that servers give to a template."""

    template: ChatTemplate
    messages: list[ServedMessage]
    tools: list[Mapping[str, object]] | None
    arguments: Mapping[str, object]

    def render(self, messages: Sequence[ServedMessage] | None = None, *, generation_prompt: bool = False) -> str:
        """These messages, by default all of them, with the tools and arguments of the conversation.

        A template raises what it likes to refuse them.
        """
        chosen = self.messages if messages is None else messages
        if self.template.refuses_system:
            chosen = without_system(chosen)
        if not chosen:
            return self._render_nothing(generation_prompt)
        return self.template.tokenizer.apply_chat_template(
            chosen, tools=self.tools, tokenize=False, add_generation_prompt=generation_prompt, **self.arguments
        )

    def beginning(self, count: int, *, generation_prompt: bool = False) -> str:
        """The first ``count`` messages, rendered."""
        if len(self.messages) >= LONG and count:
            known = self._served if generation_prompt else self._written
            text = known.of(count) if known else None
            if text is not None:
                return text
        return self.render(self.messages[:count], generation_prompt=generation_prompt)

    @cached_property
    def _served(self) -> Beginnings | None:
        return self._beginnings(generation_prompt=True)

    @cached_property
    def _written(self) -> Beginnings | None:
        return self._beginnings(generation_prompt=False)

    def _beginnings(self, *, generation_prompt: bool) -> Beginnings | None:
        """All beginnings at once, where the template has them in it, and the whole is what is rendered otherwise."""
        if self.messages[0]["role"] == "system" and self.template.refuses_system:
            return None
        tokenizer = self.template.tokenizer
        variables = {
            "tools": self.tools, "documents": None, **tokenizer.special_tokens_map, **self.arguments,
            "add_generation_prompt": generation_prompt,
        }  # fmt: skip
        source = tokenizer.get_chat_template(tools=self.tools)
        try:
            known = beginnings(source, self.messages, variables)
            return known if known and known.text == self.render(generation_prompt=generation_prompt) else None
        except Exception:  # a template raises what it likes
            return None

    def _render_nothing(self, generation_prompt: bool) -> str:
        """The start of a conversation in which the assistant speaks first; transformers wants at least one message."""
        from transformers.utils.chat_template_utils import render_jinja_template

        tokenizer = self.template.tokenizer
        rendered, _ = render_jinja_template(
            conversations=[[]],
            tools=self.tools,
            chat_template=tokenizer.get_chat_template(tools=self.tools),
            add_generation_prompt=generation_prompt,
            **{**tokenizer.special_tokens_map, **self.arguments},
        )
        return cast("Sequence[str]", rendered)[0]


def refuses_system(render: Callable[[Sequence[ServedMessage]], object]) -> bool:
    """Whether ``render`` raises where a system turn comes first, and not without it."""
    user = {"role": "user", "content": STAND_IN}
    try:
        render([user])
    except Exception:  # a template raises what it likes
        return False
    try:
        render([{"role": "system", "content": STAND_IN}, user])
    except Exception:
        return True
    return False


def without_system(messages: Sequence[ServedMessage]) -> Sequence[ServedMessage]:
    """With a first system turn put before what the user says first, for a template that refuses it."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, *others = messages
    if not others or others[0]["role"] != "user":
        return [{"role": "user", "content": system["content"]}, *others]
    return [{**others[0], "content": f"{system['content']}\n\n{others[0]['content']}"}, *others[1:]]


def served_tool(tool: Mapping[str, object]) -> Mapping[str, object]:
    """As vLLM gives a tool to a template: with these keys, in this order (``ChatCompletionToolsParam``)."""
    function = cast("Mapping[str, object]", tool["function"])
    strict = {"strict": function["strict"]} if function.get("strict") is not None else {}
    known = {key: function.get(key) for key in ("name", "description", "parameters")}
    return {"type": "function", "function": {**known, **strict}}


def as_served(message: Message) -> ServedMessage:
    """As servers give a message to a template: text for content, thoughts under each of their names, no weight."""
    served: dict[str, object] = {key: value for key, value in message.items() if key != "weight"}
    served["content"] = message.get("content") or ""
    thought = thought_of(message)
    if thought:
        served.update(dict.fromkeys(THOUGHT_KEYS, thought))
    return served


def thought_of(message: Mapping[str, object]) -> str:
    """The thoughts that a turn holds beside its content."""
    return next((str(message[key]) for key in THOUGHT_KEYS if message.get(key)), "")


def without_thought(message: Message) -> Message:
    """The same turn without thoughts beside its content."""
    return cast("Message", {key: value for key, value in message.items() if key not in THOUGHT_KEYS})
