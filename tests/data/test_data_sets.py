"""Several data sets at once: weights, what is held out, columns, and every problem in one message."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lora2serve.config.data_recipe import COLUMNS, DataRecipe, SourceRecipe
from lora2serve.data import data_sets
from lora2serve.data.row_forms import BESIDE, BY_RANK, LABEL, PREFERENCES
from lora2serve.data.rows import ChatRow, CompletionRow, TextRow
from lora2serve.data.served_template import ChatTemplate
from lora2serve.data.tokenization import tokenize_all
from lora2serve.errors import DataError
from lora2serve.progress import Silent
from tests.data.test_readers import CONTAINERS
from tests.data.test_row_forms import SAME_CHAT
from tests.support.runs import DEMO, write_jsonl


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Ten rows of "a" and four of "b"."""
    counts = {"a": 10, "b": 4}
    return {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(count)]))
        for name, count in counts.items()
    }


def texts(data: data_sets.DataSet) -> list[str]:
    return [row.text for row in data.rows if isinstance(row, TextRow)]


def test_weights_say_how_often_a_row_is_seen(files: dict[str, str]) -> None:
    sources = (SourceRecipe(files["a"], weight=0.5), SourceRecipe(files["b"], weight=2.25))
    first, again = (data_sets.load(DataRecipe(train=sources)).train for _ in range(2))
    assert first == again, "the same rows each time"
    counts = Counter(texts(first))
    assert sorted(counts[f"a{n}"] for n in range(10)) == [0] * 5 + [1] * 5
    assert sorted(counts[f"b{n}"] for n in range(4)) == [2, 2, 2, 3]
    assert [len(part.rows) for part in first.parts] == [5, 9]
    assert {first.rows[n].source for n in range(5)} == {files["a"]}
    assert first.where(5) == f"{files['b']}:1"
    other = data_sets.load(DataRecipe(train=(sources[0], SourceRecipe(files["b"])))).train
    assert other.sha256 != first.sha256
    alone = data_sets.load(DataRecipe(train=(files["a"],))).train
    assert alone == data_sets.read(files["a"]), "one set is that set"


def test_what_is_held_out_of_each_set_is_not_trained_on(files: dict[str, str]) -> None:
    sources = (SourceRecipe(files["a"]), SourceRecipe(files["b"], weight=3))
    sets = data_sets.load(DataRecipe(train=sources, eval_split=0.25))
    assert sets.held_out is not None
    assert Counter(text[0] for text in texts(sets.held_out)) == {"a": 2, "b": 1}
    assert not set(texts(sets.held_out)) & set(texts(sets.train))
    assert Counter(text[0] for text in texts(sets.train)) == {"a": 8, "b": 9}


def test_every_problem_of_every_set_at_once(tmp_path: Path) -> None:
    one, two, held = (write_jsonl(tmp_path / f"{n}.jsonl", [{"text": "a"}, {"text": n}]) for n in range(3))
    with pytest.raises(DataError) as caught:
        data_sets.load(DataRecipe(train=(str(one), str(two)), eval=str(held)))
    expected = [f"{path}:2: text is {n}, expected text" for n, path in enumerate((one, two, held))]
    assert caught.value.message.splitlines() == ["3 of 6 rows cannot be used:", *expected]


def test_nothing_left(files: dict[str, str]) -> None:
    with pytest.raises(DataError, match="no rows left"):
        data_sets.load(DataRecipe(train=(SourceRecipe(files["b"], weight=0.1),)))


def test_columns_that_no_row_has(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "reply": "r", "kind": "k"}] * 3)
    columns = {"prompt": "query", "completion": "reply"}
    data = data_sets.load(DataRecipe(train=str(file), columns=columns)).train
    assert data.rows == [CompletionRow("q", "r")] * 3
    assert data.warnings() == [f"{file}: not read: kind (3 rows)"]
    with pytest.raises(DataError, match=r"data\.columns\.task: no row has 'knid'"):
        data_sets.load(DataRecipe(train=str(file), columns={**columns, "task": "knid"}))


def test_the_form_of_pairs(tmp_path: Path) -> None:
    data = data_sets.read(str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "r", "task": "t"}])))
    (row,) = data.in_form("chat", "a template").rows
    assert isinstance(row, ChatRow)
    assert (row.task, row.source) == ("t", data.path)
    assert data.in_form("raw", "a template") == data == data.in_form("chat", None), "the controls"


def test_every_key_of_a_form_may_be_mapped() -> None:
    keys = {key for names in (*BY_RANK, *PREFERENCES) for key in names}
    assert keys | {*BESIDE, LABEL, "input", "task", "role", "content"} == set(COLUMNS)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "array.json", "a.jsonl.zst", "a.csv", "a.tsv", "a.parquet", "stream.arrow"]
)
def test_the_same_ids_from_every_form_in_every_container(tmp_path: Path, name: str) -> None:
    """As they are trained; turns in a cell of CSV are read as such only where a form has nothing but turns there."""
    from transformers import AutoTokenizer

    template = ChatTemplate(AutoTokenizer.from_pretrained(DEMO / "base"))
    found = set()
    for value in SAME_CHAT:
        turns_or_text = isinstance(value.get("completion"), list)
        if value.get("input") or (turns_or_text and name.endswith(("csv", "tsv"))):
            continue
        (tmp_path / name).write_bytes(CONTAINERS[name]([value, value]))
        data = data_sets.read(str(tmp_path / name)).in_form("chat", template.tokenizer.chat_template)
        first, second = tokenize_all(data, template, DataRecipe(train=""), Silent())
        assert (first.input_ids, first.labels) == (second.input_ids, second.labels)
        found.add((tuple(first.input_ids), tuple(first.labels)))
    assert len(found) == 1
