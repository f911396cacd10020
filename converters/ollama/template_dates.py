"""Today's date in a Go template: what a Jinja's ``strftime_now`` prints, out of Ollama's ``currentDate``.

Ollama's function gives YYYY-MM-DD and nothing else (``template/template.go``); Go's own ``slice`` takes it apart. What
cannot be made of year, month and day, such as the hour or the day of the week, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date

from converters.gguf.jinja_template import Clock
from converters.ollama.template_not_proven import TemplateNotProven

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")  # fmt: skip
_MONTH = "slice currentDate 5 7"


class DateMarks:
    """A clock that prints a marker word for each format, so that a probe finds where dates stand."""

    def __init__(self) -> None:
        self.formats: list[str] = []

    def __call__(self, pattern: str) -> str:
        if pattern not in self.formats:
            self.formats.append(pattern)
        return f"Dq{self.formats.index(pattern)}vzx"

    def inside(self, text: str) -> bool:
        """Whether a marker word stands there."""
        return any(self(pattern) in text for pattern in self.formats)

    def to_go(self, template: str) -> str:
        """The Go template with a date for each marker word."""
        for pattern in self.formats:
            template = template.replace(self(pattern), in_go(pattern))
        return template


def on(day: date) -> Clock:
    """A clock that stands still, in English whatever the locale."""

    def clock(pattern: str) -> str:
        return re.sub("%(.)", lambda match: _plain(match[1], day) or day.strftime(match[0]), pattern, flags=re.S)

    return clock


def days() -> Iterator[date]:
    """Days to compare on: every month, days of one and two figures, the turn of a year and of a century."""
    yield from (date(2025 + month % 3, month, (1, 9, 10, 28)[month % 4]) for month in range(1, 13))
    yield from (date(2028, 2, 29), date(2099, 12, 31), date(2100, 1, 1))


def in_go(pattern: str) -> str:
    """A strftime format as Go; TemplateNotProven where ``currentDate`` does not hold it."""
    return re.sub("%(.?)", lambda match: _directive(match[1], pattern), pattern, flags=re.S)


def _directive(letter: str, pattern: str) -> str:
    simple = {
        "Y": "{{ slice currentDate 0 4 }}", "y": "{{ slice currentDate 2 4 }}", "m": f"{{{{ {_MONTH} }}}}",
        "d": "{{ slice currentDate 8 10 }}", "F": "{{ currentDate }}", "%": "%",
    }  # fmt: skip
    if letter in simple:
        return simple[letter]
    if letter not in ("B", "b", "h"):
        raise TemplateNotProven(f"it prints the time as {pattern!r}, and Ollama knows only the date")
    names = MONTHS if letter == "B" else tuple(name[:3] for name in MONTHS)
    cases = "{{ else ".join(f'if eq . "{number:02}" }}}}{name}' for number, name in enumerate(names, 1))
    return f"{{{{ with {_MONTH} }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}"


def _plain(letter: str, day: date) -> str:
    """Names of months do not depend on the locale of the process."""
    name = MONTHS[day.month - 1]
    return {"B": name, "b": name[:3], "h": name[:3]}.get(letter, "")
