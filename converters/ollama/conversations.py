"""What templates are probed and compared on: conversations of marker words, and of texts that are hard to render."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lora2serve.data.rows import Message

USERS = tuple(f"Uq{n}vzx" for n in range(4))
ANSWERS = tuple(f"Aq{n}vzx" for n in range(4))
SYSTEM, LATER_SYSTEM = "Sq7vzx", "Sq8vzx"
TEXTS = (
    "Hello",
    "Say 'one' and \"two\", then {{ three }} {% four %} {# five #}",
    "Line one\nline two\n\nline four\twith a tab",
    "Grüße, 東京, Москва, مرحبا, 🙂 — 12 345,67 €",
    "<b>bold</b> & \\n \\u0041 `code` $5 100%",
    'a "quoted" end"',
    "x = {'a': [1, 2]}; y = {{x}}",
)


def said(**contents: str) -> list[Message]:
    """One message of each role that is named, in that order: ``said(system="Be brief.", user="Hello")``."""
    return [{"role": role, "content": content} for role, content in contents.items()]


def turns(users: int, system: str | None = None, text: Callable[[int], str] | None = None) -> list[Message]:
    """A conversation that ends with a user's turn; ``text(n)`` is the content of its n-th turn."""
    content_of = text or (lambda n: (USERS, ANSWERS)[n % 2][n // 2])
    first = said(system=system) if system is not None else []
    return first + [{"role": ("user", "assistant")[n % 2], "content": content_of(n)} for n in range(2 * users - 1)]


def conversations(with_system: bool) -> Iterator[list[Message]]:
    """What the proof runs on: one to six turns, with and without system, quotes, braces, newlines, other scripts."""
    for users in range(1, 7):
        for start in range(len(TEXTS)):
            yield turns(users, None, _texts(start))
            if with_system:
                yield turns(users, TEXTS[(start + 3) % len(TEXTS)], _texts(start))


def answer_first(with_system: bool) -> Iterator[list[Message]]:
    """Those that begin with an answer, as Ollama makes them when it drops what does not fit."""
    for users in (2, 3):
        for start in range(len(TEXTS)):
            yield turns(users, None, _texts(start))[1:]
            if with_system:
                system, _question, *rest = turns(users, TEXTS[(start + 3) % len(TEXTS)], _texts(start))
                yield [system, *rest]


def later_system() -> Iterator[list[Message]]:
    """A system message between turns and at the end, with and without one at the start."""
    for start in range(len(TEXTS)):
        first, later = (said(system=TEXTS[(start + n) % len(TEXTS)]) for n in (3, 5))
        question, answer, other = turns(2, None, _texts(start))
        yield [question, answer, *later, other]
        yield [*first, question, answer, *later, other]
        yield [*first, question, answer, other, *later]


def apart(with_system: bool) -> dict[str, list[list[Message]]]:
    """Conversations that a template may refuse, or render so that no Go template of ours does, by their kind."""
    kinds = {"answer_first": list(answer_first(with_system)), "system": [turns(n, "Be brief.") for n in (1, 2)]}
    if with_system:
        kinds |= {"later_system": list(later_system()), "empty_system": [turns(n, "") for n in (1, 2)]}
    return kinds


def _texts(start: int) -> Callable[[int], str]:
    return lambda n: TEXTS[(start + n) % len(TEXTS)]
