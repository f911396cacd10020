"""What the terminal shows: results on stdout; messages, bars and tables on stderr. With ``cli``, all that prints."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lora2serve.errors import Lora2ServeError
from lora2serve.progress import Advance, Progress, Silent, Unit

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.table import Table


# controls, half characters, ends of lines that are none to a terminal, and marks of format: of these, U+200C and U+200D
# are left, which join letters and emoji
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)

OPEN, CLOSE = "\u27e6", "\u27e7"  # around what is marked, where there is no color


def result(text: str) -> None:
    """One line of result, for a program or a pipe to read."""
    print(printable(text), flush=True)


def result_json(value: Any) -> None:
    """A result as JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    result(UNPRINTABLE.sub(lambda match: json.dumps(match[0])[1:-1], text))


def result_line(value: object) -> None:
    """A result as JSON in one line, of which there may be many."""
    print(json.dumps(value, ensure_ascii=True), flush=False)


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A line for each row, its cells below each other; the lines of one cell become one."""
    cells = [[printable("; ".join(cell.splitlines())) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def result_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that is a result, and an empty line below; plain text where stdout is no terminal."""
    from rich.console import Console

    console = Console(emoji=False)
    if console.is_terminal:
        console.print(_drawn("", columns, rows))
    else:
        for line in aligned([columns, *rows]):
            result(line)
    result("")


def heading(text: str) -> None:
    """A line of result above others; it stands out in a terminal."""
    from rich.console import Console

    Console(soft_wrap=True, emoji=False).print(f"[bold]{_escape(text)}", highlight=False)


def marked(parts: Sequence[tuple[str, bool]]) -> None:
    """A text, some parts of which are marked: in color in a terminal, between brackets elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    if not console.is_terminal:
        result("".join(f"{OPEN}{text}{CLOSE}" if mark else text for text, mark in parts))
        return
    shown = Text()
    for text, mark in parts:
        shown.append(printable(text), style="bold green" if mark else "dim")
    console.print(shown)


def answer_piece(text: str, dim: bool = False) -> None:
    """A piece of a result that comes bit by bit; what is dim is shown in a terminal only."""
    if not dim:
        print(printable(text), end="", flush=True)
    elif sys.stdout.isatty():
        print(f"\x1b[2m{printable(text)}\x1b[22m", end="", flush=True)


class Columns:
    """Results side by side in a terminal while they come, for a ``with`` statement."""

    NARROWEST = 60  # characters of a terminal

    def __init__(self, names: Sequence[str]) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._texts = {name: Text() for name in names}
        self._live = Live(console=Console(emoji=False), auto_refresh=False)

    @classmethod
    def fit(cls) -> bool:
        """Whether stdout is a terminal with room for them."""
        from rich.console import Console

        console = Console()
        return console.is_terminal and not console.is_dumb_terminal and console.width >= cls.NARROWEST

    def add(self, name: str, text: str, dim: bool) -> None:
        """Append to the column of that name."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        self._texts[name].append(printable(text), style="dim" if dim else "")
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=True)
        for column in self._texts:
            table.add_column(_escape(column), ratio=1, overflow="fold")
        table.add_row(*self._texts.values())
        self._live.update(table, refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


class LiveTable:
    """A table in a terminal that is drawn again and again, for a ``with`` statement."""

    def __init__(self, heads: Sequence[str]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._heads = heads
        self._live = Live(console=Console(emoji=False), auto_refresh=False)

    @staticmethod
    def fits() -> bool:
        """Whether stdout is a terminal."""
        from rich.console import Console

        console = Console()
        return console.is_terminal and not console.is_dumb_terminal

    def show(self, title: str, rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
        """Draw these rows, and the notes below, instead of what is there."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for number, head in enumerate(self._heads):
            table.add_column(_escape(head), overflow="fold", justify="left" if number < 2 else "right")
        for row in rows:
            table.add_row(*map(_escape, row))
        self._live.update(Group(table, *(Text(printable(note)) for note in notes)), refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def printable(text: str, line_ends: bool = True) -> str:
    """``text`` with escapes for what would move the cursor, turn the direction of writing, or is no character."""
    escaped = UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return escaped if line_ends else escaped.replace("\n", "\\n")


def error(problem: Lora2ServeError) -> None:
    """An error and its way out."""
    console = _stderr()
    first, *rest = printable(problem.message).splitlines() or [""]
    console.print(f"[bold red]error:[/] {_escape(first)}", highlight=False, soft_wrap=True)
    for line in rest:
        console.print(f"       {_escape(line)}", highlight=False, soft_wrap=True)
    if problem.hint:
        console.print(f"[bold]hint:[/] {_escape(problem.hint)}", highlight=False, soft_wrap=True)


class Terminal:
    """A ``Progress`` that writes to stderr."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bars: Bars | None = None  # on the screen, of one piece of work or several at a time

    def note(self, text: str) -> None:
        if not self.quiet:
            _stderr().print(_escape(text), highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        _stderr().print(f"[yellow]warning:[/] {_escape(text)}", highlight=False, soft_wrap=True)

    @contextmanager
    def track(self, label: str, total: int, unit: Unit = "") -> Iterator[Advance]:
        if self.quiet:  # no bar, and no 6 MB for a library of bars
            yield lambda amount, status="": None
            return
        first = self._bars is None
        bars = self._bars = self._bars or _bars(unit)
        if first:
            bars.start()
        task = bars.add_task(label, total=total, status="")
        try:
            yield lambda amount, status="": bars.update(task, advance=amount, **({"status": status} if status else {}))
        finally:
            bars.remove_task(task)
            if not bars.tasks:
                self._bars = None
                bars.stop()


def _bars(unit: Unit) -> Bars:
    """Those of a piece of work that is counted so; they go when it is done."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    amount = {"bytes": [DownloadColumn()], "": []}.get(unit, [MofNCompleteColumn()])
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        *amount,
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    ]
    console = _stderr()
    shown = console.is_terminal or console.is_jupyter
    return Bars(*columns, console=console, transient=True, disable=not shown)


def default_progress() -> Progress:
    """Where the Python API shows its work by default: at a prompt or in a notebook, where a person looks at it."""
    interactive = hasattr(sys, "ps1") or sys.flags.interactive or _stderr().is_jupyter
    return Terminal() if interactive else Silent()


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[int, str] | None = None
) -> None:
    """A table on stderr; ``styles`` colors whole rows."""
    console = _stderr()
    console.print()
    console.print(_drawn(title, columns, rows, styles or {}))


def _drawn(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[int, str] = {}
) -> Table:  # fmt: skip
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(
        title=title or None,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        shown.add_column(column, overflow="fold")
    for number, row in enumerate(rows):
        shown.add_row(*(_escape(cell) for cell in row), style=styles.get(number))
    return shown


def size(count: float) -> str:
    """``4.1 MB``: bytes in decimal units."""
    from rich.filesize import decimal

    return decimal(int(count))


def upper_first(text: str) -> str:
    """As a sentence begins."""
    return text[:1].upper() + text[1:]


def _stderr() -> Console:
    from rich.console import Console

    console = Console(stderr=True, emoji=False)  # `:abc:` in a message is no name of an emoji
    if not (console.is_terminal or console.is_jupyter):
        console = Console(file=sys.stderr, width=160, emoji=False)
    return console


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(printable(text))
