"""Containers: the same rows from each of them, and files that are damaged or hostile."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora2serve.data import data_sets, text_readers
from lora2serve.data.readers import Unpacked, file_digest, parquet_batches, read_values, within
from lora2serve.data.text_readers import Unreadable
from lora2serve.errors import DataError
from tests.support.drawn import examples
from tests.support.runs import plain

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": 'Weather, in "Oslo"?\nAnd\u2028now? 🙂'},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "rain", "name": "get_weather"},
            {"role": "assistant", "content": "Rain.", "reasoning_content": "It says rain."},
        ],
        "tools": [TOOL],
        "task": "weather",
    },
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
]


def lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def delimited(rows: Sequence[dict[str, Any]], delimiter: str) -> bytes:
    """With texts as they are and everything else as JSON."""
    keys = sorted({key for row in rows for key in row})
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, keys, delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow({key: item if isinstance(item, str) else json.dumps(item) for key, item in row.items()})
    return file.getvalue().encode()


def table(rows: Sequence[dict[str, Any]]) -> pyarrow.Table:
    keys = sorted({key for row in rows for key in row})
    return pyarrow.Table.from_pylist([{key: row.get(key) for key in keys} for row in rows])


def parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table(rows), sink, row_group_size=1)
    return bytes(sink.getvalue())


def arrow(rows: Sequence[dict[str, Any]], kind: Callable[..., Any] = pyarrow.ipc.new_file) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with kind(sink, table(rows).schema) as writer:
        writer.write_table(table(rows), max_chunksize=1)
    return bytes(sink.getvalue())


CONTAINERS: dict[str, Callable[[Sequence[dict[str, Any]]], bytes]] = {
    "a.jsonl": lines,
    "a.ndjson": lines,
    "a.data": lines,
    "crlf.jsonl": lambda rows: lines(rows).replace(b"\n", b"\r\n"),
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + lines(rows),
    "blank.jsonl": lambda rows: b"\n \n" + lines(rows).replace(b"\n", b"\n\n"),
    "escaped.jsonl": lambda rows: "\n".join(json.dumps(row) for row in rows).encode(),
    "array.json": lambda rows: json.dumps(rows).encode(),
    "indented.json": lambda rows: b"\xef\xbb\xbf\n" + json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "a.jsonl.gz": lambda rows: gzip.compress(lines(rows[:1])) + gzip.compress(lines(rows[1:])),
    "a.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "a.jsonl.zst": lambda rows: bytes(pyarrow.Codec("zstd").compress(lines(rows))),
    "a.csv": lambda rows: delimited(rows, ","),
    "a.csv.gz": lambda rows: gzip.compress(delimited(rows, ",")),
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + delimited(rows, ","),
    "a.tsv": lambda rows: delimited(rows, "\t"),
    "a.tsv.zst": lambda rows: bytes(pyarrow.Codec("zstd").compress(delimited(rows, "\t"))),
    "a.parquet": parquet,
    "a.arrow": arrow,
    "stream.arrow": lambda rows: arrow(rows, pyarrow.ipc.new_stream),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_same_rows_from_every_container(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(CONTAINERS[name](ROWS))
    expected = tmp_path / "expected.jsonl"
    expected.write_bytes(lines(ROWS))
    data = data_sets.read(str(file))
    assert data.rows == data_sets.read(str(expected)).rows
    assert list(map(json.dumps, plain(data))) == list(map(json.dumps, plain(data_sets.read(str(expected))))), "in order"
    assert data.rows[0].source == str(file)


@pytest.mark.parametrize("as_dict", [False, True])
def test_the_same_rows_from_what_datasets_saved(tmp_path: Path, as_dict: bool) -> None:
    import datasets

    saved = datasets.Dataset(table(ROWS))
    (datasets.DatasetDict(train=saved, test=saved) if as_dict else saved).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    assert data_sets.read(str(tmp_path / "saved")).rows == data_sets.read(str(tmp_path / "a.jsonl")).rows
    if as_dict:
        with pytest.raises(DataError, match=r"no split 'tset', expected one of train, test"):
            data_sets.read(str(tmp_path / "saved"), "tset")


MIXED: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "Ho"},
        ]
    },
    {"messages": [{"role": "user", "content": '"Hi"'}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
]


def test_columns_of_mixed_values_as_datasets_keeps_them(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "a.jsonl").write_bytes(lines(MIXED))
    saved = datasets.Dataset.from_json(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    saved.to_parquet(str(tmp_path / "a.parquet"))
    saved.save_to_disk(str(tmp_path / "saved"))
    (arrow_file,) = (tmp_path / "saved").glob("*.arrow")
    assert "arrow.json" in str(pyarrow.parquet.read_schema(tmp_path / "a.parquet")), "the control"
    expected = data_sets.read(str(tmp_path / "a.jsonl")).rows
    for path in (tmp_path / "a.parquet", tmp_path / "saved", arrow_file):
        assert data_sets.read(str(path)).rows == expected


def test_pictures_are_not_looked_at(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(text=datasets.Value("string"), image=datasets.Image())
    image = {"bytes": b"no picture at all", "path": None}
    datasets.Dataset.from_list([{"text": "a", "image": image}], features).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="image: rows with images, sound or films are not trained"):
        data_sets.read(str(tmp_path / "saved"))


GOOD = b'{"text": "a"}'
LONGEST_LINE = 1 << 20  # here: a line beyond the true bound takes a third of a second
HOSTILE: list[tuple[str, bytes, str]] = [
    ("a.jsonl", GOOD + b'\n{"text": "a", "text": "b"}\n', ":2: not JSON (key 'text' is there twice)"),
    ("a.jsonl", GOOD + b'\n{"text": NaN}\n', ":2: not JSON (NaN is no number of JSON)"),
    ("a.jsonl", GOOD + b'\n{"text": "\\ud83d"}\n', ":2: not JSON (half of a surrogate pair: \\ud83d)"),
    ("a.jsonl", GOOD + b'\n{"text": "a\0b"}\n', ":2: not JSON (Invalid control character"),
    ("a.jsonl", GOOD + b'\n{"text": "\xff"}\n', ":2: not UTF-8 (byte 10 of the line)"),
    ("a.jsonl", GOOD + b"\n" + b'{"a":' * 100_000, ":2: not JSON (nested too deep to be read)"),
    ("a.jsonl", GOOD + b'\n{"text": ' + b"9" * 5000 + b"}", ":2: not JSON (Exceeds the limit"),
    ("a.jsonl", GOOD + b"\n" + b" " * (LONGEST_LINE + 9), ":2: a line of over 1 MiB; nothing after it was read"),
    ("utf16.jsonl", '{"text": "a"}'.encode("utf-16"), ":1: not UTF-8 (byte 0 of the line)"),
    ("a.json", b"[\n" + GOOD + b",\n\n{]", ":2: not JSON (Expecting property name"),
    ("a.json", b"[" + GOOD + b"\n" + GOOD + b"]", ":1: not JSON (expected ',' or ']' after this value)"),
    ("a.json", b"[" + GOOD + b",\n]", ":2: not JSON (Expecting value"),
    ("a.json", b"[" + GOOD + b"]\nmore", ":1: not JSON (more after the end of the array)"),
    ("a.json", b"[" + GOOD, ":1: not JSON (expected ',' or ']' after this value)"),
    ("a.json", b"[" * 100_000, ":1: not JSON (nested too deep to be read)"),
    ("a.json", b"[" + GOOD + b',\n"\xff"]', ":2: not UTF-8 (byte 1 of the line)"),
    ("a.json", b"[1,\n" + GOOD + b",\n[2]]", ":1: a int, expected an object"),
    ("a.csv", b"text,text\na,b\n", ":1: column 'text' is there twice"),
    ("a.csv", b'text,task\n"a\nb",c\nd\n', ":4: 1 cells, expected 2 as in the header"),
    ("a.csv", b'text\na\n"b\nc', ":3: not CSV (unexpected end of data)"),
    ("a.csv", b'text\n"a"b\n', ":2: not CSV ("),
    ("a.csv", b"text\na\n\xff\n", ":3: not UTF-8 (byte 0 of the line)"),
    ("a.csv", b"prompt;completion\na;b\n", ":2: keys prompt;completion, expected messages"),
    ("a.csv", b"messages\n[1\n", ":2: messages is '[1', not JSON"),
    ("a.csv", b'messages\n"[{""role"": ""user"", ""content"": ""\\ud83d""}]"\n', ":2: messages is "),
    ("a.tsv", b"prompt\tcompletion\na\t\n", ":2: completion is None, expected text"),
]


@pytest.mark.parametrize(("name", "content", "reason"), HOSTILE, ids=[reason for _, _, reason in HOSTILE])
def test_a_bad_row_of_each_container(
    tmp_path: Path, name: str, content: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_readers, "LONGEST_LINE", LONGEST_LINE)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        data_sets.read(str(tmp_path / name))
    first, *rows = caught.value.message.splitlines()
    assert first.endswith("rows cannot be used:")
    assert any(row.startswith(f"{tmp_path / name}{reason}") for row in rows), rows
    assert all(len(row) < 400 for row in rows)


@pytest.mark.slow
def test_the_longest_line(tmp_path: Path) -> None:
    """At the true bound."""
    longest = text_readers.LONGEST_LINE
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + GOOD + b" " * (longest - len(GOOD) - 1) + b"\n")
    assert len(data_sets.read(str(tmp_path / "a.jsonl")).rows) == 2
    (tmp_path / "b.jsonl").write_bytes(GOOD + b"\n" + GOOD + b" " * (longest - len(GOOD)) + b"\n")
    with pytest.raises(DataError, match=":2: a line of over 64 MiB; nothing after it was read"):
        data_sets.read(str(tmp_path / "b.jsonl"))


BROKEN: list[tuple[str, bytes, str]] = [
    ("a.jsonl.gz", b"nonsense", "cannot be unpacked"),
    ("a.jsonl.gz", gzip.compress(GOOD * 100, mtime=0)[:-9], "cannot be unpacked (Truncated compressed stream)"),
    ("a.jsonl.zst", b"nonsense", "cannot be unpacked"),
    ("a.parquet", b"PAR1 nonsense PAR1", "not Parquet that can be read"),
    ("a.parquet", parquet(ROWS)[:-9], "not Parquet that can be read"),
    ("a.arrow", b"ARROW1 nonsense", "not Arrow that can be read"),
    ("a.arrow", arrow(ROWS, pyarrow.ipc.new_stream)[:-200], "not Arrow that can be read"),
    ("a.arrow", b"", "not Arrow that can be read"),
    ("a.parquet.gz", gzip.compress(parquet(ROWS), mtime=0), "a packed table"),
    ("a.csv", b"text\n", "no rows"),
    ("a.csv", b"", "no rows"),
    ("a.json", b"", "no rows"),
]


@pytest.mark.parametrize(("name", "content", "reason"), BROKEN)
def test_a_damaged_file(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        data_sets.read(str(tmp_path / name))
    assert caught.value.message.startswith(f"{tmp_path / name}: {reason}")
    assert "\n" not in caught.value.message
    assert caught.value.hint or reason != "no rows"


def test_what_unpacks_to_more_than_the_memory(tmp_path: Path) -> None:
    """Blank lines, of which no row takes memory; and a line without an end, which is not read to its end."""
    bomb = tmp_path / "a.jsonl.gz"
    bomb.write_bytes(gzip.compress(b"\n" * (4 << 20)))
    with io.BufferedReader(Unpacked(bomb, 4 << 20)) as file:
        assert len(file.read()) == 4 << 20, "the control: just fits"
    with (
        io.BufferedReader(Unpacked(bomb, 1 << 20)) as file,
        pytest.raises(DataError, match="unpacks to more than 1 MiB"),
    ):
        file.read()


def test_a_table_that_unpacks_to_more_than_the_memory(tmp_path: Path) -> None:
    """A text that is there three hundred times is stored once; what is read of it at once stays within the bound, too."""
    rows = pyarrow.table({"text": pyarrow.array(["x" * 100_000] * 300)})
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000, "the control"
    batches = list(parquet_batches(tmp_path / "a.parquet", 10_000_000))
    assert sum(batch.num_rows for batch in batches) == 300 and max(batch.nbytes for batch in batches) < 10_000_000
    assert len(list(within(tmp_path, batches, 31_000_000))) == len(batches), "the control: just fits"
    with pytest.raises(DataError, match="unpacks to more than 28 MiB, half of the memory"):
        list(within(tmp_path, batches, 30_000_000))


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: a pipe or a device, expected a file"):
        file_digest(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="No such file"):
        file_digest(tmp_path / "b.jsonl")


def test_lines_are_read_as_a_stream(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes((b'{"text": "' + b"x" * 1000 + b'"}\n') * 4000)
    tracemalloc.start()
    count = sum(1 for _ in read_values(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4000
    assert peak < 2 << 20 < file.stat().st_size


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


SLOW = settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW
@given(values=st.lists(JSON, min_size=1, max_size=4), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_any_values_are_read_as_they_were_written(
    tmp_path: Path, values: list[Any], indent: int | None, ascii_only: bool
) -> None:
    file = tmp_path / "a.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    file.write_text(text, encoding="utf-8", newline="")
    assert [value for _, value in read_values(file)] == values
    texts = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
    if not texts[0].startswith("["):
        file.write_text("\n".join(texts), encoding="utf-8", newline="")
        assert list(read_values(file)) == list(enumerate(values, 1))


CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@SLOW
@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
@example(rows=[('a "quoted",\r\n\tcell', "\x00\u2028")])
def test_any_cells_are_read_as_they_were_written(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    values = [{"a": first, "b": second} for first, second in rows]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_bytes(delimited(values, delimiter))
        filled = [{key: cell for key, cell in value.items() if cell} for value in values]
        assert [value for _, value in read_values(tmp_path / name)] == filled


@SLOW
@given(content=st.binary(max_size=60), name=st.sampled_from([*CONTAINERS, "a.txt"]))
@example(content=b"[", name="a.jsonl")
@example(content=b'[{},"', name="a.jsonl")
@example(content=b'"', name="a.csv")
@example(content=b"\xef\xbb\xbf", name="bom.csv")
def test_any_bytes_are_read_or_refused_in_lines(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    try:
        for number, value in read_values(tmp_path / name, plain_text=True):
            assert number >= 1
            assert not isinstance(value, Unreadable) or "\n" not in value.reason
    except DataError as error:
        assert "\n" not in error.message


def test_an_array_on_one_line_has_a_number_for_each_row(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"text": text} for text in ("one", "two", "three")]))
    assert data_sets.read(str(file)).numbers == [1, 2, 3]
