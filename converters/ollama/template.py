"""An Ollama TEMPLATE (Go) from a chat template (Jinja): found by probing, and used only if it renders the same bytes.

The Jinja is rendered on conversations of marker words; what stands around the markers are the pieces of the Go
template. Then both are rendered on other conversations and compared. A template that these pieces cannot express is
refused, never guessed. Ollama's data model: ``template/template.go`` in its repository.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Messages = Sequence[Mapping[str, str]]
Render = Callable[[Messages], str]  # raises where the template refuses a conversation

USERS = tuple(f"Uq{n}vzx" for n in range(4))
ANSWERS = tuple(f"Aq{n}vzx" for n in range(4))
SYSTEM = "Sq7vzx"
TOOLS = ("tools", "tool_call")  # what Ollama looks for in a Jinja: server/images.go
THINKING = ("<think>", "enable_thinking", "reasoning_content", "thinking")


class Unproven(Exception):
    """Why no Go template stands for this Jinja template, in words."""


@dataclass(frozen=True)
class Pieces:
    """What stands around the contents of a plain conversation."""

    head: str  # before the first user turn, without a system message
    before_system: str | None  # None: the template takes no system message
    after_system: str | None
    to_assistant: str  # between a user's content and the answer that follows
    to_user: str  # between an answer and the next user's content
    opening: str  # after the last user's content


@dataclass(frozen=True)
class Derived:
    """A proven template. ``trims``: the Jinja cuts white space around contents, which Go's cannot."""

    pieces: Pieces
    trims: bool

    def go(self, bos: str = "") -> str:
        """As Go; without ``bos`` at the start, where the engine itself adds it."""
        return write_go(without_bos(self.pieces, bos) if bos else self.pieces)


def jinja(template: str, special: Mapping[str, str]) -> Render:
    """transformers' own sandboxed renderer; ``special`` holds bos_token, eos_token and their like."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages: Messages, **more: Any) -> str:
        rendered, _ = render_jinja_template(
            [[dict(message) for message in messages]], chat_template=template, add_generation_prompt=True,
            **special, **more,
        )  # fmt: skip
        return str(rendered[0])

    if "strftime_now" in template:

        def on(day: str) -> Render:
            return lambda messages: render(messages, strftime_now=lambda _: day)

        if _attempt(on("one day"), turns(1)) != _attempt(on("another"), turns(1)):
            raise Unproven("it prints today's date, which a Go template cannot")
    return render


def derive(render: Render) -> Derived:
    """The proven template; ``Unproven`` says why there is none."""
    pieces = _probe(render)
    go = compile_go(write_go(pieces))
    for messages in conversations(pieces.before_system is not None):
        expected = _attempt(render, messages)
        if expected is None:
            raise Unproven(f"it refuses {len(messages)} plain turns")
        found = go(messages)
        if found != expected:
            raise Unproven(f"no fixed pieces: {_difference(expected, found)}")
    padded = [{"role": "user", "content": "  padded\n"}]
    return Derived(pieces, _attempt(render, padded) != go(padded))


def write_go(pieces: Pieces) -> str:
    """The one shape of all our templates. ``.System`` is Ollama's: all system messages, or the Modelfile's SYSTEM."""
    head = quote(pieces.head)
    if pieces.before_system is not None:
        system = f"{quote(pieces.before_system)}{{{{ .System }}}}{quote(pieces.after_system or '')}"
        head = f"{{{{ if .System }}}}{system}{{{{ else }}}}{head}{{{{ end }}}}"
    return (
        f"{head}{{{{ $first := true }}}}{{{{ range .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ if $first }}}}{{{{ $first = false }}}}{{{{ else }}}}{quote(pieces.to_user)}'
        "{{ end }}{{ .Content }}"
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


def compile_go(template: str) -> Render:
    """The Go template, rendered as Ollama does it, by gotpl."""
    import gotpl

    compiled = gotpl.Template(template, missing_key="zero")

    def render(messages: Messages) -> str:
        return str(compiled.render(ollama_data(messages)))

    return render


def ollama_data(messages: Messages) -> dict[str, Any]:
    """What Ollama hands to a template: system messages joined, and all messages in order."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return {"System": system, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}


def without_bos(pieces: Pieces, bos: str) -> Pieces:
    """The pieces without BOS at the start."""
    before = pieces.before_system
    return replace(
        pieces,
        head=pieces.head.removeprefix(bos),
        before_system=before.removeprefix(bos) if before is not None else None,
    )


def wants_native(template: str) -> bool:
    """Whether Ollama from 0.30 on prefers this Jinja to a plain Go template: it knows tools or thinking."""
    return any(word in template for word in (*TOOLS, *THINKING))


def turns(users: int, system: str | None = None, text: Callable[[int], str] | None = None) -> list[dict[str, str]]:
    """A conversation that ends with a user's turn; ``text(n)`` is the content of its n-th turn."""
    say = text or (lambda n: (USERS, ANSWERS)[n % 2][n // 2])
    made = [{"role": "system", "content": system}] if system is not None else []
    return made + [{"role": ("user", "assistant")[n % 2], "content": say(n)} for n in range(2 * users - 1)]


def conversations(with_system: bool) -> Iterator[list[dict[str, str]]]:
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

            def say(n: int, start: int = start) -> str:
                return texts[(start + n) % len(texts)]

            yield turns(users, None, say)
            if with_system:
                yield turns(users, texts[(start + 3) % len(texts)], say)


def _probe(render: Render) -> Pieces:
    three = _attempt(render, turns(3))
    one = _attempt(render, turns(1))
    if three is None or one is None:
        raise Unproven("it refuses a plain conversation")
    head, *between, opening = _split(three, [USERS[0], ANSWERS[0], USERS[1], ANSWERS[1], USERS[2]])
    if between[0::2] != [between[0]] * 2 or between[1::2] != [between[1]] * 2:
        raise Unproven("turns look different at different places")
    if _split(one, [USERS[0]]) != [head, opening]:
        raise Unproven("the first turn looks different when others follow")
    before, after = _probe_system(render)
    return Pieces(head, before, after, between[0], between[1], opening)


def _probe_system(render: Render) -> tuple[str | None, str | None]:
    said = _attempt(render, turns(1, SYSTEM))
    if said is None or SYSTEM not in said:
        return None, None
    before, after, _ = _split(said, [SYSTEM, USERS[0]])
    return before, after


def _split(text: str, marks: Sequence[str]) -> list[str]:
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise Unproven(f"a content is printed {text.count(mark)} times")
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]


def _attempt(render: Callable[[Any], str], messages: Messages) -> str | None:
    try:
        return render(messages)
    except Unproven:
        raise
    except Exception:  # a template raises what it likes to refuse a conversation
        return None


def _difference(expected: str, found: str) -> str:
    at = next(
        (n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    return f"character {at} is {found[at : at + 20]!r}, expected {expected[at : at + 20]!r}"
