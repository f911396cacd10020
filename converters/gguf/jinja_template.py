"""A chat template, rendered as in training: in a sandbox like transformers' own, with the variables it hands over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from lora2serve.data.rows import Message
from lora2serve.data.served_template import refuses_system, without_system
from lora2serve.exporting.jinja_sandbox import compiled_template

Messages = Sequence[Message]
Tools = Sequence[Mapping[str, object]]
Render = Callable[[Messages], str]  # raises where the template refuses a conversation
Clock = Callable[[str], str]  # a strftime format -> what it prints


@dataclass(frozen=True)
class Jinja:
    """``variables``: bos_token, eos_token and their like, and whatever else the template is given."""

    template: str
    variables: Mapping[str, object]

    def __call__(self, messages: Messages) -> str:
        return self.at(None)(messages)

    def at(self, clock: Clock | None, tools: Tools | None = None) -> Render:
        """The renderer at another time than now, with ``tools``."""
        variables = {**self.variables, **({"strftime_now": clock} if clock else {})}

        def render(messages: Messages) -> str:
            return compiled_template(self.template).render(
                messages=[dict(message) for message in messages], add_generation_prompt=True,
                tools=[dict(tool) for tool in tools] if tools else None, documents=None, **variables,
            )  # fmt: skip

        return render

    def attempt(self, messages: Messages, clock: Clock | None = None, tools: Tools | None = None) -> str | None:
        """The text; None where the template refuses the conversation."""
        try:
            return self.at(clock, tools)(messages)
        except Exception:  # a template raises what it likes
            return None


@dataclass(frozen=True)
class TrainedJinja(Jinja):
    """As training calls it: a system turn that the template refuses stands before what the user says first."""

    def at(self, clock: Clock | None, tools: Tools | None = None) -> Render:
        render = super().at(clock, tools)
        if not self._merges_system:
            return render
        return lambda messages: render(cast("Messages", without_system(messages)))

    @cached_property
    def _merges_system(self) -> bool:
        plain = Jinja(self.template, self.variables)
        return refuses_system(lambda messages: plain(cast("Messages", messages)))
