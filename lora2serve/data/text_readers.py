"""JSON Lines, JSON arrays, CSV and plain text, as values with the lines that they begin at. Read as a stream.

A line that cannot be read is an ``Unreadable`` in its place, and what comes after it is read; where that cannot be (in
an array, behind an open quote), it is the last one.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader

from lora2serve.system.small_files import without_repeated

LONGEST_LINE = 64 << 20  # bytes, and characters of a cell
BOM = b"\xef\xbb\xbf"
SPACE = b" \t\r\n"
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # may be half of a surrogate pair, which UTF-8 has not
BETWEEN = re.compile(r"[ \t\r\n]*")
Numbered = Iterator[tuple[int, object]]
Reader = Callable[[BufferedReader], Numbered]


@dataclass(frozen=True)
class Unreadable:
    """What stands where no value could be read, and why."""

    reason: str


def json_values(file: BufferedReader) -> Numbered:
    """An array, or else one value a line. Only \\n ends a line: U+2028 may stand inside JSON."""
    if starts_array(file):
        return _array_items(file)
    return _json_lines(file)


def starts_array(file: BufferedReader) -> bool:
    """Whether the first character is a bracket."""
    return file.peek(1).removeprefix(BOM).lstrip(SPACE).startswith(b"[")


def _json_lines(file: BufferedReader) -> Numbered:
    decoder = _decoder()
    for number, line in _lines(file):
        if isinstance(line, Unreadable):
            yield number, line
        elif line.strip():
            try:
                yield number, without_half_pairs(decoder.decode(line), line)
            except (ValueError, RecursionError) as error:
                yield number, Unreadable(_not_json(error))


def _array_items(file: BufferedReader) -> Numbered:
    """By their number, as an array may stand on one line."""
    try:
        text = file.read().removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        yield error.object.count(b"\n", 0, error.start) + 1, Unreadable(_not_utf8(error))
        return
    decoder, place = _decoder(), text.index("[") + 1
    number, separator = 0, ""
    while True:
        start = _skip(text, place)
        if text.startswith("]", start) and separator != ",":
            if text[start + 1 :].strip():
                yield max(1, number), Unreadable("not JSON (more after the end of the array)")
            return
        number += 1
        try:
            value, place = decoder.raw_decode(text, start)
            yield number, without_half_pairs(value, text[start:place])
        except (ValueError, RecursionError) as error:
            yield number, Unreadable(_not_json(error))
            return
        after = _skip(text, place)
        separator = text[after : after + 1]
        if separator not in (",", "]"):
            yield number, Unreadable("not JSON (expected ',' or ']' after this value)")
            return
        place = after + (separator == ",")


def delimited(delimiter: str) -> Reader:
    """CSV (or TSV) with a header, whose cells are texts; one that is empty is not there."""

    def read(file: BufferedReader) -> Numbered:
        csv.field_size_limit(LONGEST_LINE)
        bad: list[tuple[int, Unreadable]] = []
        reader = csv.reader(_texts(file, bad), delimiter=delimiter, strict=True)
        start = 1
        try:
            header = next(reader, [])
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                yield 1, Unreadable(f"column {repeated[0]!r} is there twice")
                return
            start = reader.line_num + 1
            for cells in reader:
                if len(cells) == len(header):
                    yield start, {name: cell for name, cell in zip(header, cells, strict=True) if cell}
                elif cells:
                    yield start, Unreadable(f"{len(cells)} cells, expected {len(header)} as in the header")
                start = reader.line_num + 1
        except csv.Error as error:
            yield start, Unreadable(f"not CSV ({error})")
        yield from bad

    return read


def paragraphs(file: BufferedReader) -> Numbered:
    """Plain text, a row for each paragraph."""
    try:
        content = file.read().removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        yield error.object.count(b"\n", 0, error.start) + 1, Unreadable(_not_utf8(error))
        return
    texts = (part.strip() for part in content.split("\n\n"))
    yield from enumerate(({"text": text} for text in texts if text), 1)


def _lines(file: BufferedReader) -> Iterator[tuple[int, str | Unreadable]]:
    """Numbered lines without a byte order mark, those that are no UTF-8 as Unreadable."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            yield number, Unreadable(f"a line of over {LONGEST_LINE >> 20} MiB; nothing after it was read")
            return
        try:
            yield number, (line.removeprefix(BOM) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            yield number, Unreadable(_not_utf8(error))


def _texts(file: BufferedReader, bad: list[tuple[int, Unreadable]]) -> Iterator[str]:
    """Lines until one cannot be read, which is put into ``bad``."""
    for number, line in _lines(file):
        if isinstance(line, Unreadable):
            bad.append((number, line))
            return
        yield line


def _skip(text: str, place: int) -> int:
    found = BETWEEN.match(text, place)
    return found.end() if found else place


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=without_repeated, parse_constant=_no_number)


def _no_number(word: str) -> object:
    raise ValueError(f"{word} is no number of JSON")


def without_half_pairs(value: object, text: str) -> object:
    """``value`` of a JSON ``text``; ValueError where it holds half of a surrogate pair."""
    if HALF_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a surrogate pair: \\u{ord(error.object[error.start]):x}") from None
    return value


def _not_json(error: Exception) -> str:
    return f"not JSON ({error if isinstance(error, ValueError) else 'nested too deep to be read'})"


def _not_utf8(error: UnicodeDecodeError) -> str:
    line = error.object.rfind(b"\n", 0, error.start) + 1
    return f"not UTF-8 (byte {error.start - line} of the line)"
