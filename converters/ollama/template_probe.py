"""The pieces of a Jinja template, found by rendering marker words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from converters.gguf.jinja_template import Messages, Render
from converters.ollama.conversations import ANSWERS, LATER_SYSTEM, SYSTEM, USERS, said, turns
from converters.ollama.template_not_proven import TemplateNotProven
from converters.ollama.template_parts import LaterSystem, TemplateParts

RenderParts = Callable[[TemplateParts, Messages], str]  # as Go renders them
SYSTEM_APART = (  # later system messages, and an empty one
    [*turns(2)[:2], *said(system=LATER_SYSTEM, user=USERS[1])],
    [*turns(2, SYSTEM)[:3], *said(system=LATER_SYSTEM, user=USERS[1])],
    said(system=SYSTEM, user=USERS[0]) + said(assistant=ANSWERS[0]) + said(user=USERS[1], system=LATER_SYSTEM),
)
EMPTY_SYSTEM = said(system="", user=USERS[0])


def probe(render: Render, render_parts: RenderParts) -> TemplateParts:
    """The pieces; ``TemplateNotProven`` where a plain conversation has none."""
    three_turns = attempt(render, turns(3))
    one_turn = attempt(render, turns(1))
    if three_turns is None or one_turn is None:
        raise TemplateNotProven("it refuses a plain conversation")
    head, *between, opening = _split(three_turns, [USERS[0], ANSWERS[0], USERS[1], ANSWERS[1], USERS[2]])
    if between[0::2] != [between[0]] * 2 or between[1::2] != [between[1]] * 2:
        raise TemplateNotProven("turns look different at different places")
    if _split(one_turn, [USERS[0]]) != [head, opening]:
        raise TemplateNotProven("the first turn looks different when others follow")
    plain = TemplateParts(head, None, None, between[0], between[1], opening)
    parts = _with_first_answer(render, _with_system(render, plain))
    return next((each for each in _places(render, parts) if _agree(render, render_parts, each)), parts)


def _agree(render: Render, render_parts: RenderParts, parts: TemplateParts) -> bool:
    """Whether system messages between turns, and an empty one, are the same by Jinja and by Go; refused ones are."""
    pairs = ((attempt(render, messages), messages) for messages in (*SYSTEM_APART, EMPTY_SYSTEM))
    return all(expected is None or render_parts(parts, messages) == expected for expected, messages in pairs)


def attempt(render: Render, messages: Messages) -> str | None:
    """The text; None where the template refuses the conversation."""
    try:
        return render(messages)
    except TemplateNotProven:
        raise
    except Exception:  # a template raises what it likes to refuse a conversation
        return None


def _with_system(render: Render, plain: TemplateParts) -> TemplateParts:
    """The pieces with those around a system message, at the start or in the last turn."""
    text = attempt(render, turns(3, SYSTEM))
    if text is None or SYSTEM not in text:
        return plain
    if text.find(SYSTEM) < text.find(USERS[0]):
        before, after, *_ = _split(text, [SYSTEM, USERS[0]])
        return replace(plain, before_system=before, after_system=after)
    *_, before, after, _ = _split(text, [USERS[0], ANSWERS[0], USERS[1], ANSWERS[1], SYSTEM, USERS[2]])
    if not before.startswith(plain.to_user):
        raise TemplateNotProven("the turn with the system message begins otherwise")
    return replace(plain, before_system=before.removeprefix(plain.to_user), after_system=after, place="last")


def _with_first_answer(render: Render, parts: TemplateParts) -> TemplateParts:
    """The pieces with those around an answer that comes first, where the template renders it as it does others."""
    rest = [parts.to_user, parts.to_assistant, parts.to_user, parts.opening]
    marks = [ANSWERS[0], USERS[1], ANSWERS[1], USERS[2]]
    plain = _pieces(render, turns(3)[1:], marks)
    head = plain[0] if plain and plain[1:] == rest else None
    if parts.before_system is None or parts.system_last:
        return replace(parts, answer_head=head)
    system = _pieces(render, [*said(system=SYSTEM), *turns(3)[1:]], [SYSTEM, *marks])
    if system is None or system[0] != parts.before_system or system[2:] != rest:
        return parts
    return replace(parts, answer_head=head, answer_after_system=system[1])


def _places(render: Render, parts: TemplateParts) -> Iterator[TemplateParts]:
    """The ways to place other system messages than one at the start, the likeliest first."""
    if parts.before_system is None or parts.system_last:
        return
    for empty in (False, True):
        front = replace(parts, empty_system=empty)
        if later := _later(render, parts):
            yield replace(front, place="each", later=later)
        yield front
        yield replace(front, place="first")


def _later(render: Render, parts: TemplateParts) -> LaterSystem | None:
    between = _pieces(render, SYSTEM_APART[0], [USERS[0], ANSWERS[0], LATER_SYSTEM, USERS[1]])
    at_end = _pieces(render, SYSTEM_APART[2], [SYSTEM, USERS[0], ANSWERS[0], USERS[1], LATER_SYSTEM])
    if between is None or at_end is None or between[3] != parts.after_system:
        return None
    return LaterSystem(after_user=at_end[4], after_answer=between[2], opening=at_end[5])


def _pieces(render: Render, messages: Messages, marks: Sequence[str]) -> list[str] | None:
    """What stands around the marks; None where the template refuses, repeats, drops or moves one."""
    text = attempt(render, messages)
    try:
        return None if text is None else _split(text, marks)
    except TemplateNotProven:
        return None


def _split(text: str, marks: Sequence[str]) -> list[str]:
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise TemplateNotProven(f"a content is printed {text.count(mark)} times")
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]
