"""An Ollama TEMPLATE (Go) from a chat template (Jinja): found by probing, and used only if it renders the same bytes.

The Jinja is rendered on conversations of marker words; what stands around the markers are the pieces of the Go
template. Then both are rendered on other conversations and compared. A template that these pieces cannot express is
refused, never guessed. Ollama's data model: ``template/template.go`` in its repository.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import TypedDict

from converters.ollama import template_dates
from converters.ollama.modelfile_parser import is_printable
from converters.ollama.template_dates import Clock, DateMarks
from converters.ollama.template_not_proven import TemplateNotProven
from lora2serve.data.rows import Message


class OllamaData(TypedDict):
    """What Ollama hands to a template."""

    System: str
    Messages: list[dict[str, str]]


Messages = Sequence[Message]
Render = Callable[[Messages], str]  # raises where the template refuses a conversation

USERS = tuple(f"Uq{n}vzx" for n in range(4))
ANSWERS = tuple(f"Aq{n}vzx" for n in range(4))
SYSTEM = "Sq7vzx"
PADDED: Messages = ({"role": "user", "content": "  padded\n"},)
THOUGHT: Messages = (
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "<think>\nTwo?\n</think>\n\nTwo"},
    {"role": "user", "content": "Three"},
)
TOOL_WORDS = ("tools", "tool_call")  # what Ollama looks for in a Jinja: server/images.go
THINKING_WORDS = ("<think>", "enable_thinking", "reasoning_content", "thinking")


@dataclass(frozen=True)
class TemplateParts:
    """What stands around the contents of a plain conversation."""

    head: str  # before the first user turn, without a system message
    before_system: str | None  # None: the template takes no system message
    after_system: str | None
    to_assistant: str  # between a user's content and the answer that follows
    to_user: str  # between an answer and the next user's content
    opening: str  # after the last user's content
    system_last: bool = False  # the system message stands before the last user's content, inside that turn


@dataclass(frozen=True)
class DerivedTemplate:
    """A proven template, and what its Jinja does that a Go template cannot: ``trims`` cuts white space around contents,
    ``drops_thoughts`` takes what stands in <think> out of earlier answers.
    """

    pieces: TemplateParts
    marks: DateMarks  # the dates in the pieces
    trims: bool
    drops_thoughts: bool

    @property
    def dated(self) -> bool:
        """Whether it prints today's date."""
        return bool(self.marks.formats)

    def go(self, bos: str = "") -> str:
        """As Go; without ``bos`` at the start, where the engine itself adds it."""
        return self.marks.to_go(write_go(without_bos(self.pieces, bos) if bos else self.pieces))


@dataclass(frozen=True)
class Jinja:
    """transformers' own sandboxed renderer; ``special`` holds bos_token, eos_token and their like."""

    template: str
    special: Mapping[str, str]

    def __call__(self, messages: Messages) -> str:
        return self.at(None)(messages)

    def at(self, clock: Clock | None) -> Render:
        """The renderer at another time than now."""
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {"strftime_now": clock} if clock else {}

        def render(messages: Messages) -> str:
            rendered, _ = render_jinja_template(
                [[dict(message) for message in messages]], chat_template=self.template, add_generation_prompt=True,
                **self.special, **variables,
            )  # fmt: skip
            return str(rendered[0])

        return render


def derive(jinja: Jinja) -> DerivedTemplate:
    """The proven template; ``TemplateNotProven`` says why there is none."""
    marks = DateMarks()
    pieces = _probe(jinja.at(marks))
    text = marks.to_go(write_go(pieces))
    with_system = pieces.before_system is not None
    for messages in conversations(with_system):
        _prove(jinja, text, messages, next(template_dates.days()))
    for day in template_dates.days() if marks.formats else ():
        _prove(jinja, text, turns(2), day)
        _prove(jinja, text, turns(2, SYSTEM if with_system else None), day)
    trims, drops = (_differs(jinja, text, messages) for messages in (PADDED, THOUGHT))
    return DerivedTemplate(pieces, marks, trims, drops)


def default_system(jinja: Jinja, derived: DerivedTemplate) -> str | None:
    """The system message that the template brings along, where naming it as SYSTEM changes no prompt."""
    pieces = derived.pieces
    if pieces.before_system is None or pieces.system_last or prefers_jinja(jinja.template):
        return None
    before, after = pieces.before_system, pieces.after_system or ""
    system = pieces.head.removeprefix(before).removesuffix(after)
    if not system or before + system + after != pieces.head or system != system.strip() or derived.marks.inside(system):
        return None
    same = all(_attempt(jinja, turns(n, system)) == _attempt(jinja, turns(n)) for n in (1, 2, 3))
    return system if same and all(is_printable(c) or c in "\n\t" for c in system) else None


def _differs(jinja: Jinja, go: str, messages: Messages) -> bool:
    day = next(template_dates.days())
    expected = _attempt(jinja.at(template_dates.on(day)), messages)
    return expected is not None and expected != compile_go(go, day)(messages)


def _prove(jinja: Jinja, go: str, messages: Messages, day: date) -> None:
    """The same bytes on that day."""
    expected = _attempt(jinja.at(template_dates.on(day)), messages)
    if expected is None:
        raise TemplateNotProven(f"it refuses {len(messages)} plain turns")
    rendered = compile_go(go, day)(messages)
    if rendered != expected:
        raise TemplateNotProven(f"no fixed pieces: {_difference(expected, rendered)}")


def write_go(pieces: TemplateParts) -> str:
    """The one shape of all our templates. ``.System`` is Ollama's: all system messages, or the Modelfile's SYSTEM."""
    head, turn, index = quote(pieces.head), "", ""
    if pieces.before_system is not None:
        system = f"{quote(pieces.before_system)}{{{{ $.System }}}}{quote(pieces.after_system or '')}"
        if pieces.system_last:
            index = "$index, $_ := "
            turn = f"{{{{ if and $.System (eq (len (slice $.Messages $index)) 1) }}}}{system}{{{{ end }}}}"
        else:
            head = f"{{{{ if .System }}}}{system}{{{{ else }}}}{head}{{{{ end }}}}"
    return (
        f"{head}{{{{ $first := true }}}}{{{{ range {index}.Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ if $first }}}}{{{{ $first = false }}}}{{{{ else }}}}{quote(pieces.to_user)}'
        f"{{{{ end }}}}{turn}{{{{ .Content }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{quote(pieces.to_assistant)}{{{{ .Content }}}}'
        f"{{{{ end }}}}{{{{ end }}}}{quote(pieces.opening)}"
    )


def quote(text: str) -> str:
    """Text in a Go template in a Modelfile: characters that either would change become Go strings."""
    out, plain = [], ""
    for character in text:
        if character in "\n\t" or (character.isprintable() and character not in '{}"') or character == " ":
            plain += character
            continue
        out += [plain, f"{{{{ {_go_string(character)} }}}}"]
        plain = ""
    return "".join([*out, plain])


def _go_string(text: str) -> str:
    """A Go string literal: JSON's escapes are Go's too, pairs of surrogates apart."""
    escaped = json.dumps(text, ensure_ascii=False)
    return "".join(
        c if c.isprintable() else (f"\\u{ord(c):04x}" if ord(c) < 1 << 16 else f"\\U{ord(c):08x}") for c in escaped
    )


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


def without_bos(pieces: TemplateParts, bos: str) -> TemplateParts:
    """The pieces without BOS at the start."""
    before = pieces.before_system
    if before is not None and not pieces.system_last:
        before = before.removeprefix(bos)
    return replace(pieces, head=pieces.head.removeprefix(bos), before_system=before)


def prefers_jinja(template: str) -> bool:
    """Whether Ollama from 0.30 on prefers this Jinja to a plain Go template: it knows tools or thinking."""
    return any(word in template for word in (*TOOL_WORDS, *THINKING_WORDS))


def turns(users: int, system: str | None = None, text: Callable[[int], str] | None = None) -> list[Message]:
    """A conversation that ends with a user's turn; ``text(n)`` is the content of its n-th turn."""
    content_of = text or (lambda n: (USERS, ANSWERS)[n % 2][n // 2])
    first: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": ("user", "assistant")[n % 2], "content": content_of(n)} for n in range(2 * users - 1)]


def conversations(with_system: bool) -> Iterator[list[Message]]:
    """What the proof runs on: one to six turns, with and without system, quotes, braces, newlines, other scripts."""
    texts = (
        "Hello",
        "Say 'one' and \"two\", then {{ three }} {% four %} {# five #}",
        "Line one\nline two\n\nline four\twith a tab",
        "Grüße, 東京, Москва, مرحبا, 🙂 — 12 345,67 €",
        "<b>bold</b> & \\n \\u0041 `code` $5 100%",
        'a "quoted" end"',
        "x = {'a': [1, 2]}; y = {{x}}",
    )
    for users in range(1, 7):
        for start in range(len(texts)):

            def content_of(n: int, start: int = start) -> str:
                return texts[(start + n) % len(texts)]

            yield turns(users, None, content_of)
            if with_system:
                yield turns(users, texts[(start + 3) % len(texts)], content_of)


def _probe(render: Render) -> TemplateParts:
    three_turns = _attempt(render, turns(3))
    one_turn = _attempt(render, turns(1))
    if three_turns is None or one_turn is None:
        raise TemplateNotProven("it refuses a plain conversation")
    head, *between, opening = _split(three_turns, [USERS[0], ANSWERS[0], USERS[1], ANSWERS[1], USERS[2]])
    if between[0::2] != [between[0]] * 2 or between[1::2] != [between[1]] * 2:
        raise TemplateNotProven("turns look different at different places")
    if _split(one_turn, [USERS[0]]) != [head, opening]:
        raise TemplateNotProven("the first turn looks different when others follow")
    return _probe_system(render, TemplateParts(head, None, None, between[0], between[1], opening))


def _probe_system(render: Render, plain: TemplateParts) -> TemplateParts:
    """The pieces with those around a system message, at the start or in the last turn."""
    text = _attempt(render, turns(3, SYSTEM))
    if text is None or SYSTEM not in text:
        return plain
    if text.find(SYSTEM) < text.find(USERS[0]):
        before, after, *_ = _split(text, [SYSTEM, USERS[0]])
        return replace(plain, before_system=before, after_system=after)
    *_, before, after, _ = _split(text, [USERS[0], ANSWERS[0], USERS[1], ANSWERS[1], SYSTEM, USERS[2]])
    if not before.startswith(plain.to_user):
        raise TemplateNotProven("the turn with the system message begins otherwise")
    return replace(plain, before_system=before.removeprefix(plain.to_user), after_system=after, system_last=True)


def _split(text: str, marks: Sequence[str]) -> list[str]:
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise TemplateNotProven(f"a content is printed {text.count(mark)} times")
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]


def _attempt(render: Render, messages: Messages) -> str | None:
    try:
        return render(messages)
    except TemplateNotProven:
        raise
    except Exception:  # a template raises what it likes to refuse a conversation
        return None


def _difference(expected: str, rendered: str) -> str:
    pairs = zip(expected, rendered, strict=False)
    at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(rendered)))
    return f"character {at} is {rendered[at : at + 20]!r}, expected {expected[at : at + 20]!r}"
