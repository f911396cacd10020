"""Tokenizing in processes and from the cache: the same samples, whatever happens to either."""

from __future__ import annotations

import hashlib
import os
import signal
import zlib
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data import sample_cache, tokenization
from lora2serve.data.rendering import Renderer
from lora2serve.data.rows import ChatRow, CompletionRow, Row, TextRow
from lora2serve.data.sample_rendering import render_rows
from lora2serve.data.sample_workers import in_processes
from lora2serve.data.samples import Sample, SampleBatch, pack, unpack
from lora2serve.data.served_template import ChatTemplate
from tests.support.runs import DEMO, Told

RECIPE = DataRecipe(train="", max_length=48)
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada 🙂"}]
ROWS: list[Row] = [ChatRow(CHAT * (n % 4 + 1)) for n in range(90)] + [TextRow("Once."), CompletionRow("a", "b" * 99)]


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    from transformers import AutoTokenizer

    return ChatTemplate(AutoTokenizer.from_pretrained(DEMO / "base"), (0,))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lora2serve" / "samples"


@pytest.fixture(scope="module")
def expected(template: ChatTemplate) -> SampleBatch:
    batch = render_rows(ROWS, Renderer(template), RECIPE)
    assert (batch.rows, batch.problem) == (len(ROWS), None)
    assert any(sample.cut for sample in batch.samples)
    return batch


def tokenize(template: ChatTemplate, rows: list[Row] = ROWS, log: Any = None) -> SampleBatch:
    """As for a set that takes long: what it does after its first moment."""
    return tokenization._tokenize(rows, template, RECIPE, log or Told(), lambda count: None, alone=0.0)


def test_packed_samples_are_the_same(expected: SampleBatch) -> None:
    assert unpack(pack(expected)) == expected
    assert unpack(pack(SampleBatch())) == SampleBatch()
    for content in (
        b"",
        b"{}\n",
        b"[]\n",
        b"nonsense",
        pack(expected)[:-1],
        pack(expected).replace(b'"rows"', b'"rosw"'),
    ):
        with pytest.raises(ValueError):
            unpack(content)


def test_the_second_time_it_comes_from_the_cache(template: ChatTemplate, expected: SampleBatch, cache: Path) -> None:
    assert tokenize(template) == expected
    (file,) = cache.iterdir()
    before = file.stat()
    os.utime(file, (1, 1))
    assert tokenize(template) == expected
    assert file.stat().st_ino == before.st_ino, "not made again"
    assert file.stat().st_mtime > 1, "used now"


def test_what_the_key_is_made_of(template: ChatTemplate) -> None:
    import copy

    keys = {sample_cache.key_of(ROWS, template, RECIPE)}
    assert keys == {sample_cache.key_of(list(ROWS), ChatTemplate(template.tokenizer, (0,)), RECIPE)}
    assert keys == {sample_cache.key_of(ROWS, replace(template, day=date(2020, 1, 1)), RECIPE)}, "prints no date"
    dated, other = copy.deepcopy(template.tokenizer), copy.deepcopy(template.tokenizer)
    dated.chat_template = str(dated.chat_template) + "{{ strftime_now('%d') }}"
    other.add_tokens(["Ada"])
    for rows, used, recipe in (
        (ROWS[1:], template, RECIPE),
        ([ROWS[1], ROWS[0], *ROWS[2:]], template, RECIPE),
        ([replace(ROWS[0], tools=[{"type": "function"}]), *ROWS[1:]], template, RECIPE),
        (ROWS, replace(template, stop_ids=(0, 1)), RECIPE),
        (ROWS, ChatTemplate(other, (0,)), RECIPE),
        (ROWS, ChatTemplate(dated, (0,), date(2020, 1, 1)), RECIPE),
        (ROWS, ChatTemplate(dated, (0,), date(2020, 1, 2)), RECIPE),
        (ROWS, template, replace(RECIPE, max_length=64)),
        (ROWS, template, replace(RECIPE, completion_only=False)),
    ):
        key = sample_cache.key_of(rows, used, recipe)
        assert key not in keys
        keys.add(key)


def signed(packed: bytes) -> bytes:
    return hashlib.sha256(packed).digest() + packed


def test_a_damaged_or_foreign_file_is_made_again(template: ChatTemplate, cache: Path) -> None:
    rows = ROWS[-9:]  # made again for each of the files
    expected = tokenize(template, rows)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    foreign = SampleBatch([Sample([1 << 30], [-100], False)], len(rows))
    fewer = SampleBatch(expected.samples, len(rows) - 1)
    for content in (
        b"", b"nonsense", good[:-1], good[:40] + b"x" + good[41:], signed(b"nonsense"),
        signed(zlib.compress(b"{}\n")), signed(zlib.compress(b"[" * 9000)),
        signed(zlib.compress(pack(foreign))), signed(zlib.compress(pack(fewer))),
    ):  # fmt: skip
        file.write_bytes(content)
        assert tokenize(template, rows) == expected
        assert sample_cache.load(file.stem, len(rows), len(template.tokenizer)) == expected, "made again"


def test_the_folder_is_bounded_and_its_leftovers_go(expected: SampleBatch, cache: Path, monkeypatch: Any) -> None:
    assert sample_cache.store("a", expected) == ""
    size = (cache / "a.samples").stat().st_size
    monkeypatch.setattr(sample_cache, "MOST_BYTES", 2 * size)
    killed, running, mine = (cache / name for name in ("k.1.part", "r.2.part", "notes.txt"))
    for path in (killed, running, mine):
        path.write_bytes(b"")
    os.utime(killed, (1, 1))
    for number, name in enumerate("bcd"):
        os.utime(cache / "a.samples", (number + 10, number + 10))
        sample_cache.store(name, expected)
        os.utime(cache / f"{name}.samples", (number + 2, number + 2))
        if name == "c":
            assert {path.name for path in cache.iterdir()} >= {"c.samples"}
    names = {path.name for path in cache.iterdir()}
    assert len([name for name in names if name.endswith(".samples")]) == 2
    assert "d.samples" in names
    assert running.name in names and mine.name in names and killed.name not in names


def test_a_folder_that_cannot_be_written(template: ChatTemplate, expected: SampleBatch, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file")
    log = Told()
    assert tokenize(template, log=log) == expected
    assert [note for note in log.notes if note.endswith("so the tokens are not kept for the next run")]


@pytest.mark.engine
def test_several_processes_give_the_same(template: ChatTemplate, expected: SampleBatch) -> None:
    done, batch = [0], SampleBatch()

    def advance(count: int) -> None:
        done[0] += count

    for part in in_processes(ROWS, 0, template, RECIPE, 2, advance):
        batch.add(part)
    assert batch == expected
    assert done == [len(ROWS)]


@pytest.mark.engine
def test_the_first_bad_row_in_order(template: ChatTemplate) -> None:
    rows = [*ROWS[:40], ChatRow(CHAT, chat_template_kwargs={"add_generation_prompt": True}), *ROWS]
    alone = render_rows(rows, Renderer(template), RECIPE)
    assert alone.problem is not None and alone.problem.row == 40
    batch = SampleBatch()
    for part in in_processes(rows, 0, template, RECIPE, 2, lambda count: None):
        batch.add(part)
        if batch.problem:
            break
    assert batch.problem == alone.problem
    assert tokenize(template, rows).problem == alone.problem


class Deadly(ChatTemplate):
    """One that ends every other process which loads it."""

    def __reduce__(self) -> Any:
        return exec, (f"import os; os.getpid() == {os.getpid()} or os.kill(os.getpid(), {signal.SIGKILL:d})",)


def test_processes_that_die_leave_the_work_to_this_one(
    template: ChatTemplate, expected: SampleBatch, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tokenization, "WORTH_A_PROCESS", 1e-9)
    monkeypatch.setattr(tokenization, "cores", lambda: 2)
    log = Told()
    assert tokenize(Deadly(template.tokenizer, (0,)), log=log) == expected
    assert [note for note in log.notes if "died (signal SIGKILL)" in note], log.notes
