"""An Ollama TEMPLATE (Go) from a chat template (Jinja): found by probing, and used only if it renders the same bytes.

The Jinja is rendered on conversations of marker words; what stands around the markers are the pieces of the Go
template. Then both are rendered on other conversations and compared. A template that these pieces cannot express is
refused, never guessed. Ollama's data model: ``template/template.go`` in its repository.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import TypedDict

from converters.gguf.jinja_template import Jinja, Messages, Render
from converters.ollama import template_dates
from converters.ollama.conversations import SYSTEM, apart, conversations, turns
from converters.ollama.modelfile_parser import is_printable
from converters.ollama.template_dates import DateMarks
from converters.ollama.template_not_proven import TemplateNotProven
from converters.ollama.template_parts import TemplateParts, without_bos, write_go
from converters.ollama.template_probe import attempt, probe


class OllamaData(TypedDict):
    """What Ollama hands to a template."""

    System: str
    Messages: list[dict[str, str]]


PADDED: Messages = ({"role": "user", "content": "  padded\n"},)
THOUGHT: Messages = (
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "<think>\nTwo?\n</think>\n\nTwo"},
    {"role": "user", "content": "Three"},
)
TOOL_WORDS = ("tools", "tool_call")  # what Ollama looks for in a Jinja: server/images.go
THINKING_WORDS = ("<think>", "enable_thinking", "reasoning_content", "thinking")


@dataclass(frozen=True)
class DerivedTemplate:
    """A proven template, and what its Jinja does that a Go template cannot: ``trims`` cuts white space around contents,
    ``drops_thoughts`` takes what stands in <think> out of earlier answers.

    Kinds of conversations (``conversations.apart``): those that the Jinja ``refuses``, and those in which the two
    ``differ``.
    """

    pieces: TemplateParts
    marks: DateMarks  # the dates in the pieces
    trims: bool
    drops_thoughts: bool
    refuses: tuple[str, ...] = ()
    differ: tuple[str, ...] = ()

    @property
    def dated(self) -> bool:
        """Whether it prints today's date."""
        return bool(self.marks.formats)

    def go(self, bos: str = "") -> str:
        """As Go; without ``bos`` at the start, where the engine itself adds it."""
        return self.marks.to_go(write_go(without_bos(self.pieces, bos) if bos else self.pieces))


def derive(jinja: Jinja) -> DerivedTemplate:
    """The proven template; ``TemplateNotProven`` says why there is none."""
    marks = DateMarks()
    pieces = probe(jinja.at(marks), lambda parts, messages: compile_go(write_go(parts))(messages))
    text = marks.to_go(write_go(pieces))
    with_system = pieces.before_system is not None
    for messages in conversations(with_system):
        _prove(jinja, text, messages, next(template_dates.days()))
    for day in template_dates.days() if marks.formats else ():
        _prove(jinja, text, turns(2), day)
        _prove(jinja, text, turns(2, SYSTEM if with_system else None), day)
    trims, drops = (_differs(jinja, text, messages) for messages in (PADDED, THOUGHT))
    refuses, differ = _kinds_apart(jinja, text, with_system)
    return DerivedTemplate(pieces, marks, trims, drops, refuses, differ)


def default_system(jinja: Jinja, derived: DerivedTemplate) -> str | None:
    """The system message that the template brings along, where naming it as SYSTEM changes no prompt."""
    pieces = derived.pieces
    if pieces.before_system is None or pieces.system_last or prefers_jinja(jinja.template):
        return None
    before, after = pieces.before_system, pieces.after_system or ""
    system = pieces.head.removeprefix(before).removesuffix(after)
    if not system or before + system + after != pieces.head or system != system.strip() or derived.marks.inside(system):
        return None
    same = all(attempt(jinja, turns(n, system)) == attempt(jinja, turns(n)) for n in (1, 2, 3))
    return system if same and all(is_printable(c) or c in "\n\t" for c in system) else None


def _kinds_apart(jinja: Jinja, go: str, with_system: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The kinds that the Jinja refuses, and those in which the Go template is not equal."""
    refuses, differ = [], []
    for kind, conversations_apart in apart(with_system).items():
        refuses += [kind] if any(_expected(jinja, messages) is None for messages in conversations_apart) else []
        differ += [kind] if any(_differs(jinja, go, messages) for messages in conversations_apart) else []
    return tuple(refuses), tuple(differ)


def _differs(jinja: Jinja, go: str, messages: Messages) -> bool:
    expected = _expected(jinja, messages)
    return expected is not None and expected != compile_go(go, next(template_dates.days()))(messages)


def _expected(jinja: Jinja, messages: Messages) -> str | None:
    return attempt(jinja.at(template_dates.on(next(template_dates.days()))), messages)


def _prove(jinja: Jinja, go: str, messages: Messages, day: date) -> None:
    """The same bytes on that day."""
    expected = attempt(jinja.at(template_dates.on(day)), messages)
    if expected is None:
        raise TemplateNotProven(f"it refuses {len(messages)} plain turns")
    rendered = compile_go(go, day)(messages)
    if rendered != expected:
        raise TemplateNotProven(f"no fixed pieces: {_difference(expected, rendered)}")


@lru_cache(maxsize=32)
def compile_go(template: str, day: date = date.min) -> Render:
    """The Go template, rendered as Ollama does it on that day, by gotpl."""
    import gotpl

    compiled = gotpl.Template(template, missing_key="zero", functions={"currentDate": day.isoformat})

    def render(messages: Messages) -> str:
        return str(compiled.render(ollama_data(messages)))

    return render


def ollama_data(messages: Messages) -> OllamaData:
    """What Ollama hands to a template: system messages joined, and all messages in order."""
    system = "\n\n".join(message["content"] or "" for message in messages if message["role"] == "system")
    return {"System": system, "Messages": [{"Role": m["role"], "Content": m["content"] or ""} for m in messages]}


def prefers_jinja(template: str) -> bool:
    """Whether Ollama from 0.30 on prefers this Jinja to a plain Go template: it knows tools or thinking."""
    return any(word in template for word in (*TOOL_WORDS, *THINKING_WORDS))


def _difference(expected: str, rendered: str) -> str:
    pairs = zip(expected, rendered, strict=False)
    at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(rendered)))
    return f"character {at} is {rendered[at : at + 20]!r}, expected {expected[at : at + 20]!r}"
