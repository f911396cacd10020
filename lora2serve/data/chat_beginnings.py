"""All beginnings of a conversation from one rendering, by templates for which that can be shown.

Most templates write one message after the other in a loop. Where nothing has looked further than the messages that are
written, a shorter conversation would have been written alike; and where what stands behind the loop uses nothing that
the loop sets, it is the same behind each of them. Both are looked at, never supposed: the first in each rendering, the
second in the template.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from jinja2 import Template, nodes

NEXT_IN_LOOP = ("root", "__next__")  # what takes the next item of a loop, and not to see whether there is one


@dataclass(frozen=True)
class Beginnings:
    """``text`` of a whole conversation; ``ends`` are where its first messages end in it, by their number."""

    text: str
    ends: Mapping[int, int]
    loop_end: int

    def of(self, count: int) -> str | None:
        """What the template writes of the first ``count`` messages; None where that is not known."""
        end = self.ends.get(count) if count else None  # a template may ask whether there is any
        return None if end is None else self.text[:end] + self.text[self.loop_end :]


def beginnings(source: str, messages: Sequence[object], variables: Mapping[str, object]) -> Beginnings | None:
    """Rendered by a template's ``source`` with these variables; None where nothing can be shown.

    A template raises what it likes to refuse them.
    """
    if not writes_in_turn(source):
        return None
    trace, pieces = _Trace(), list[str]()
    for piece in compiled(source).generate(**variables, messages=_Watched(messages, trace)):
        pieces.append(piece)
        trace.written += len(piece)
    loop_end = trace.ends.get(len(messages))
    if trace.loops != 1 or loop_end is None or trace.taken_otherwise:
        return None
    return Beginnings("".join(pieces), trace.ends, loop_end)


def compiled(source: str) -> Template:
    """A chat template as transformers has it; jinja2.TemplateSyntaxError for what is none."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return cast("Template", _compile_jinja_template(source))


@dataclass
class _Trace:
    """What a rendering has looked at: ``highest`` number of a message, and what was written when a loop took one."""

    written: int = 0
    highest: float = -1
    loops: int = 0
    taken_otherwise: bool = False
    ends: dict[int, int] = field(default_factory=dict)

    def take(self, number: int, taker: str) -> None:
        """A loop goes on to a message, or to the end."""
        self.taken_otherwise |= taker not in NEXT_IN_LOOP
        if self.highest < number:
            self.ends[number] = self.written

    def see(self, number: float) -> None:
        self.highest = max(self.highest, number)


class _Watched(Sequence[object]):
    """Messages from ``start`` on. Who asks for how many there are has seen all of them."""

    def __init__(self, messages: Sequence[object], trace: _Trace, start: int = 0) -> None:
        self._messages, self._trace, self._start = messages, trace, start

    def __len__(self) -> int:
        self._trace.see(float("inf"))
        return max(0, len(self._messages) - self._start)

    def __bool__(self) -> bool:
        self._trace.see(self._start)
        return len(self._messages) > self._start

    def __eq__(self, other: object) -> bool:
        return list(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, place: int | slice) -> object:  # type: ignore[override]
        if isinstance(place, int) and place >= 0:
            self._trace.see(self._start + place)
            return self._messages[self._start + place]
        if isinstance(place, slice) and place.stop is None and place.step in (None, 1) and (place.start or 0) >= 0:
            return _Watched(self._messages, self._trace, self._start + (place.start or 0))
        self._trace.see(float("inf"))
        return self._messages[self._start :][place]

    def __iter__(self) -> Iterator[object]:
        self._trace.loops += 1
        for number in range(self._start, len(self._messages)):
            self._trace.take(number, sys._getframe(1).f_code.co_name)
            self._trace.see(number)
            yield self._messages[number]
        self._trace.take(len(self._messages), sys._getframe(1).f_code.co_name)


@cache
def writes_in_turn(source: str) -> bool:
    """Whether a template has one loop over messages, and behind it nothing that depends on them."""
    from jinja2 import nodes

    tree = compiled(source).environment.parse(source)
    held = _holding_messages(tree)
    loops = [loop for loop in tree.find_all(nodes.For) if _loaded([loop.iter]) & held]
    if len(loops) != 1 or loops[0].recursive or loops[0].test or loops[0].else_:
        return False
    macros = {macro.name: _loaded(macro.body) for macro in tree.find_all(nodes.Macro)}
    handed_on = [argument for call in tree.find_all(nodes.Call) for argument in (*call.args, *call.kwargs)]
    if held & (_loaded(handed_on) | set().union(*macros.values())):
        return False
    behind = _behind(tree.body, loops[0])
    if behind is None:
        return False
    read = _loaded(behind)
    read = read.union(*macros.values()) if read & macros.keys() else read
    return not read & (held | _stored(loops[0]))


def _holding_messages(tree: nodes.Template) -> set[str]:
    """Names that may hold the messages, or some of them."""
    from jinja2 import nodes

    held: set[str] = set()
    more = {"messages"}
    while more - held:
        held |= more
        settings = [(one, [one.node]) for one in tree.find_all(nodes.Assign)]
        blocks = [(block, block.body) for block in tree.find_all(nodes.AssignBlock)]
        more = more.union(*(_stored(one) for one, read in (*settings, *blocks) if _loaded(read) & held))
    return held


def _behind(body: Sequence[nodes.Node], loop: nodes.For) -> list[nodes.Node] | None:
    """What may run after a loop that stands in ``body`` or under its conditions; None where it stands elsewhere."""
    from jinja2 import nodes

    for place, node in enumerate(body):
        rest = list(body[place + 1 :])
        if node is loop:
            return rest
        if isinstance(node, nodes.If):
            for branch in (node.body, *(other.body for other in node.elif_), node.else_):
                behind = _behind(branch, loop)
                if behind is not None:
                    return behind + rest
    return None


def _loaded(parts: Sequence[nodes.Node]) -> set[str]:
    """The names that are read in them."""
    return {name.name for part in parts for name in _names(part) if name.ctx == "load"}


def _stored(part: nodes.Node) -> set[str]:
    """The names that are set in it, those of namespaces among them."""
    from jinja2 import nodes

    names = {name.name for name in _names(part) if name.ctx != "load"}
    return names | {name.name for name in part.find_all(nodes.NSRef)}


def _names(part: nodes.Node) -> Iterator[nodes.Name]:
    from jinja2 import nodes

    if isinstance(part, nodes.Name):
        yield part
    yield from part.find_all(nodes.Name)
