"""Data in every container, as plain values with their numbers: lines of a file, rows of a table or of a set."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lora2serve.data.text_readers import BOM, SPACE, Numbered, Reader, delimited, json_values, paragraphs
from lora2serve.errors import DataError, first_line
from lora2serve.system.hardware import memory_bytes
from lora2serve.system.small_files import digest

if TYPE_CHECKING:
    import datasets
    import pyarrow

TEXTS: dict[str, Reader] = {
    ".jsonl": json_values, ".ndjson": json_values, ".json": json_values,
    ".csv": delimited(","), ".tsv": delimited("\t"),
}  # fmt: skip
TABLES = (".parquet", ".arrow")
PACKED = {".gz": "gzip", ".zst": "zstd"}  # as Arrow calls them
SUFFIXES = (*TEXTS, *TABLES, *PACKED)
ROWS_AT_ONCE = 4096  # of a table
COMMIT = r"[0-9a-f]{40}"
Pin = Callable[[str], tuple[str, str | None]]  # org/name[@revision] -> id and commit


def read_values(path: Path, *, plain_text: bool = False) -> Numbered:
    """What a file holds, by its name; with ``plain_text`` any other name is read by paragraphs, unless it is JSON."""
    suffix = path.suffixes[-2] if path.suffix in PACKED and len(path.suffixes) > 1 else path.suffix
    if suffix in TABLES:
        if path.suffix in PACKED:
            raise DataError(f"{path}: a packed table", f"unpack it: {suffix} is compressed inside")
        yield from _table_rows(path, suffix)
        return
    with _opened(path) as file:
        reader = TEXTS.get(suffix)
        if reader is None:
            is_json = file.peek(1).lstrip(BOM + SPACE).startswith(b"{")
            reader = paragraphs if plain_text and not is_json else json_values
        yield from reader(file)


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: a pipe or a device, expected a file, which is read twice", "write the rows to a file")
    try:
        return str(digest(path)["sha256"])
    except OSError as error:
        raise _unreadable(path, error) from None


class Unpacked(io.RawIOBase):
    """What a compressed file holds; DataError beyond ``most`` bytes, which no memory could take as rows."""

    def __init__(self, path: Path, most: int) -> None:
        import pyarrow

        self.path, self.most, self.count = path, most, 0
        self._stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), PACKED[path.suffix])

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()

    def readinto(self, buffer: object) -> int:
        """As RawIOBase has it."""
        try:
            count = int(self._stream.readinto(buffer))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be unpacked ({first_line(error)})") from None
        self.count += count
        if self.count > self.most:
            raise _too_large(self.path, self.most)
        return count


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        raw = Unpacked(path, memory_bytes() // 2) if path.suffix in PACKED else path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from None
    with io.BufferedReader(raw, 1 << 16) as file:
        yield cast("io.BufferedReader", file)


def _too_large(path: Path, most: int) -> DataError:
    size = f"{most >> 20:,} MiB"
    return DataError(f"{path}: unpacks to more than {size}, half of the memory", "use a machine with more")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: {error.strerror or first_line(error)}", "data paths are relative to the recipe's file")


def _table_rows(path: Path, suffix: str) -> Numbered:
    import pyarrow

    number, most = 0, memory_bytes() // 2
    try:
        batches = parquet_batches(path, most) if suffix == ".parquet" else _arrow_batches(path)
        for batch in within(path, batches, most):
            for row in _plain_rows(batch):
                number += 1
                yield number, row
    except FileNotFoundError as error:
        raise _unreadable(path, error) from None
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not {suffix[1:].capitalize()} that can be read ({first_line(error)})") from None


def _plain_rows(batch: pyarrow.RecordBatch) -> Iterable[dict[str, object]]:
    """Rows as Python has them. ``datasets`` keeps columns of mixed values as JSON, and knows how to read them."""
    if "arrow.json" not in str(batch.schema):
        return cast("list[dict[str, object]]", batch.to_pylist(maps_as_pydicts="strict"))
    import datasets
    import pyarrow

    return cast("Iterable[dict[str, object]]", datasets.Dataset(pyarrow.Table.from_batches([batch])))


def within(path: Path, batches: Iterable[pyarrow.RecordBatch], most: int) -> Iterator[pyarrow.RecordBatch]:
    """Batches of a table up to ``most`` bytes in all; DataError beyond them."""
    count = 0
    for batch in batches:
        count += batch.nbytes
        if count > most:
            raise _too_large(path, most)
        yield batch


def parquet_batches(path: Path, most: int) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a file, as many at once as fit into ``most`` bytes.

    A value that is there often is stored once: a batch may be many times as large as the file.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        longest = max([1, *(group.total_byte_size for group in groups)])  # no row is longer than what is stored of all
        yield from file.iter_batches(batch_size=max(1, min(ROWS_AT_ONCE, most // longest)))


def _arrow_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Of an IPC file, or of a stream, as ``datasets`` writes it."""
    import pyarrow.ipc

    with pyarrow.OSFile(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(file)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(file)


def read_hub_set(name: str, split: str, pin: Pin, subset: str | None) -> tuple[Numbered, str, str | None]:
    """A data set of the Hub, or a directory laid out like one; with its fingerprint and its commit."""
    import datasets

    repo, revision = (name, None) if Path(name).is_dir() else pin(name)
    try:
        table = _saved(Path(name), split) or datasets.load_dataset(repo, subset, split=split, revision=revision)
    except Exception as error:  # every backend of datasets has its own
        first = " ".join(str(error).split())[:300] or type(error).__name__
        parts = any(word in first.lower() for word in ("split", "config"))
        hint = "data.split and data.subset name its parts" if parts else "expected a file or a data set of the Hub"
        raise DataError(f"data set {name}: {first}", hint) from error
    commit = _commit(table) or revision
    if revision and re.fullmatch(COMMIT, revision) and commit != revision:  # offline, datasets takes the last
        raise DataError(
            f"data set {name}: the cache offers commit {commit}, expected {revision}", "load it once online"
        )
    return enumerate(_without_media(table)), str(table._fingerprint), commit


def _without_media(table: datasets.Dataset) -> datasets.Dataset:
    """With pictures and sounds as they are stored: nobody reads them, and to decode them takes libraries and time."""
    import datasets

    media = (datasets.Image, datasets.Audio, datasets.Video)
    for name, feature in table.features.items():
        if isinstance(feature, media):
            table = table.cast_column(name, type(feature)(decode=False))
    return table


def _saved(directory: Path, split: str) -> datasets.Dataset | None:
    """What ``Dataset.save_to_disk`` or that of a DatasetDict wrote."""
    import datasets

    if not (directory / "state.json").is_file() and not (directory / "dataset_dict.json").is_file():
        return None
    saved = datasets.load_from_disk(str(directory))
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"no split {split!r}, expected one of {', '.join(saved)}")
    return saved[split]


def _commit(table: datasets.Dataset) -> str | None:
    """The commit that a data set of the Hub is of, also from the cache alone: datasets names its folder by it."""
    folders = [Path(file["filename"]).parent.name for file in table.cache_files]
    return next((name for name in folders if re.fullmatch(COMMIT, name)), None)
