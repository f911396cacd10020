"""The pieces of a template, and the one shape of Go that all our templates have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

# Where system messages stand: all in front of the first turn, or before the last user's content; the first alone, and
# later ones nowhere; each in its place.
SystemPlace = Literal["front", "last", "first", "each"]


@dataclass(frozen=True)
class LaterSystem:
    """What stands before a system message between turns, and after one at the end."""

    after_user: str
    after_answer: str
    opening: str


@dataclass(frozen=True)
class TemplateParts:
    """What stands around the contents of a plain conversation."""

    head: str  # before the first user turn, without a system message
    before_system: str | None  # None: the template takes no system message
    after_system: str | None
    to_assistant: str  # between a user's content and the answer that follows
    to_user: str  # between an answer and the next user's content
    opening: str  # after the last user's content
    place: SystemPlace = "front"
    empty_system: bool = False  # whether an empty system message is one
    answer_head: str | None = None  # before an answer that comes first; None: the template refuses it
    answer_after_system: str | None = None  # between a system message and such an answer; None: as before
    later: LaterSystem | None = None  # of place "each"

    @property
    def system_last(self) -> bool:
        """Whether the system message stands before the last user's content, inside that turn."""
        return self.before_system is not None and self.place == "last"

    @property
    def in_turn(self) -> bool:
        """Whether system messages are turns among others."""
        return self.before_system is not None and self.place in ("first", "each")


def write_go(parts: TemplateParts) -> str:
    """The Go template. ``.System`` is Ollama's: all system messages, or the Modelfile's SYSTEM; a message, too.

    ``$last`` is the role of the turn before. An answer that comes first where the Jinja refuses it is left out: nobody
    knows how it would look.
    """
    index = "$index, $_ := " if parts.system_last else ""
    return (
        f'{{{{ $last := "" }}}}{{{{ range {index}.Messages }}}}{_user(parts)}{_assistant(parts)}{_system(parts)}'
        f"{{{{ end }}}}{{{{ end }}}}{_ending(parts)}"
    )


def without_bos(parts: TemplateParts, bos: str) -> TemplateParts:
    """The pieces without BOS at the start."""
    before, answer = parts.before_system, parts.answer_head
    if before is not None and not parts.system_last:
        before = before.removeprefix(bos)
    if answer is not None:
        answer = answer.removeprefix(bos)
    return replace(parts, head=parts.head.removeprefix(bos), before_system=before, answer_head=answer)


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


def _user(parts: TemplateParts) -> str:
    before = {"": _first(parts, parts.head, parts.after_system)}
    if parts.in_turn:
        before["system"] = quote(parts.after_system or "")
    turn = ""
    if parts.system_last:
        system = f"{quote(parts.before_system or '')}{{{{ $.System }}}}{quote(parts.after_system or '')}"
        turn = f"{{{{ if and $.System (eq (len (slice $.Messages $index)) 1) }}}}{system}{{{{ end }}}}"
    begin = _by_last(before, quote(parts.to_user))
    return f'{{{{ if eq .Role "user" }}}}{begin}{turn}{{{{ .Content }}}}{{{{ $last = "user" }}}}'


def _assistant(parts: TemplateParts) -> str:
    before, condition = {}, 'eq .Role "assistant"'
    if parts.answer_head is None:
        after_system = parts.place == "front" and parts.answer_after_system is not None
        comes_later = '(or (ne $last "") $.System)' if after_system else '(ne $last "")'
        unknown = ' (ne $last "system")' if parts.in_turn and parts.answer_after_system is None else ""
        condition = f"and ({condition}) {comes_later}{unknown}"
    if parts.answer_head is not None or parts.answer_after_system is not None:
        before[""] = _first(parts, parts.answer_head or "", parts.answer_after_system)
        before |= {"system": quote(parts.answer_after_system or "")} if parts.in_turn else {}
    begin = _by_last(before, quote(parts.to_assistant))
    return f'{{{{ else if {condition} }}}}{begin}{{{{ .Content }}}}{{{{ $last = "assistant" }}}}'


def _system(parts: TemplateParts) -> str:
    if not parts.in_turn:
        return ""
    conditions = ['(eq .Role "system")', *([] if parts.empty_system else [".Content"])]
    begin = quote(parts.before_system or "")
    if parts.later:
        begin = _by_last({"": begin, "user": quote(parts.later.after_user)}, quote(parts.later.after_answer))
    else:
        conditions.append('(eq $last "")')
    condition = f"and {' '.join(conditions)}" if len(conditions) > 1 else conditions[0][1:-1]
    return f'{{{{ else if {condition} }}}}{begin}{{{{ .Content }}}}{{{{ $last = "system" }}}}'


def _ending(parts: TemplateParts) -> str:
    if not parts.in_turn:
        return quote(parts.opening)
    alone = parts.later.opening if parts.later else (parts.after_system or "") + parts.opening
    return _by_last({"system": quote(alone)}, quote(parts.opening))


def _first(parts: TemplateParts, head: str, after_system: str | None) -> str:
    """Before the first turn, with all system messages where they stand in front."""
    if parts.before_system is None or parts.place != "front":
        return quote(head)
    system = f"{quote(parts.before_system)}{{{{ $.System }}}}{quote(after_system or '')}"
    condition = 'or $.System (eq (index $.Messages 0).Role "system")' if parts.empty_system else "$.System"
    return f"{{{{ if {condition} }}}}{system}{{{{ else }}}}{quote(head)}{{{{ end }}}}"


def _by_last(cases: Mapping[str, str], otherwise: str) -> str:
    """The text for the role before, in Go; ``cases`` that differ from ``otherwise`` are asked for."""
    asked = {role: text for role, text in cases.items() if text != otherwise}
    branches = "{{ else ".join(f'if eq $last "{role}" }}}}{text}' for role, text in asked.items())
    if not asked:
        return otherwise
    return f"{{{{ {branches}{f'{{{{ else }}}}{otherwise}' if otherwise else ''}{{{{ end }}}}"


def _go_string(text: str) -> str:
    """A Go string literal: JSON's escapes are Go's too, pairs of surrogates apart."""
    escaped = json.dumps(text, ensure_ascii=False)
    return "".join(
        c if c.isprintable() else (f"\\u{ord(c):04x}" if ord(c) < 1 << 16 else f"\\U{ord(c):08x}") for c in escaped
    )
