"""Data sets of every form: rows, bad rows by file and line, and which tokens a loss is taken on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data import data_sets, tokenization
from lora2serve.data.rendering import IGNORE, Renderer
from lora2serve.data.row_forms import parse_row
from lora2serve.data.rows import ChatRow, CompletionRow, Row, TextRow
from lora2serve.data.sample_rendering import cut
from lora2serve.data.samples import Sample
from lora2serve.data.served_template import ChatTemplate
from lora2serve.errors import DataError
from lora2serve.progress import Silent
from tests.support.drawn import examples
from tests.support.runs import DEMO, plain, write_jsonl

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
PAIR = {"prompt": "Question: who? Answer:", "completion": " Nobody."}
TEXT = {"text": "Once upon a time."}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "base")


def row_of(value: dict[str, Any]) -> Row:
    row = parse_row(value)
    assert not isinstance(row, str), row
    return row


def samples_of(row: Row, tokenizer: Any, recipe: DataRecipe) -> list[Sample]:
    rendered = Renderer(ChatTemplate(tokenizer)).render(row, completion_only=recipe.completion_only)
    return cut(rendered.samples, recipe.max_length, 0)


def learned(value: dict[str, Any], tokenizer: Any, **recipe: Any) -> str:
    """The text that a loss is taken on."""
    (sample,) = samples_of(row_of(value), tokenizer, DataRecipe(train="", **recipe))
    assert len(sample.input_ids) == len(sample.labels)
    assert all(label in (IGNORE, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
    return tokenizer.decode([label for label in sample.labels if label != IGNORE])


def test_loss_on_completions_only(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ada Wörld 🙂"},
        {"role": "user", "content": "assistant: no"},
        {"role": "assistant", "content": "Bob"},
    ]
    assert learned({"messages": turns}, tokenizer) == "Ada Wörld 🙂<|im_end|>\nBob<|im_end|>\n"
    assert learned(PAIR, tokenizer) == " Nobody." + tokenizer.eos_token
    assert learned(TEXT, tokenizer) == "Once upon a time." + tokenizer.eos_token


def test_loss_on_everything_is_the_control(tokenizer: Any) -> None:
    chat = learned(CHAT, tokenizer, completion_only=False)
    assert chat == tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert learned(PAIR, tokenizer, completion_only=False).startswith("Question: who? Answer: Nobody.")


def test_cut_rows_are_marked(tokenizer: Any) -> None:
    long = TextRow("word " * 50)
    (cut,) = samples_of(long, tokenizer, DataRecipe(train="", max_length=16))
    assert (len(cut.input_ids), cut.cut, cut.learned) == (16, True, True)
    assert not samples_of(row_of(TEXT), tokenizer, DataRecipe(train=""))[0].cut
    prompt = CompletionRow("word " * 50, "x")
    assert not samples_of(prompt, tokenizer, DataRecipe(train="", max_length=16))[0].learned


def test_parquet_columns_that_a_row_leaves_empty(tmp_path: Path) -> None:
    empty = {"text": None, "prompt": None, "completion": None}
    table = pyarrow.Table.from_pylist([{**empty, **TEXT}, {**empty, **PAIR}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert plain(data_sets.read(str(tmp_path / "a.parquet"))) == [TEXT, PAIR]


def test_the_split_is_kept_apart_and_the_same_each_time(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {n}"} for n in range(20)])
    first, second = (data_sets.load(DataRecipe(train=str(file), eval_split=0.3)) for _ in range(2))
    train, held_out = first.train, first.held_out
    assert held_out is not None
    assert first == second
    assert (len(train.rows), len(held_out.rows)) == (14, 6)
    texts = [row["text"] for row in plain(train) + plain(held_out)]
    assert sorted(texts, key=str) == sorted(f"row {n}" for n in range(20))
    assert plain(train) == [{"text": f"row {number - 1}"} for number in train.numbers], "each still knows its line"
    one = write_jsonl(tmp_path / "one.jsonl", [TEXT])
    with pytest.raises(DataError, match="1 row, none left to train on") as caught:
        data_sets.load(DataRecipe(train=str(one), eval_split=0.3))
    assert caught.value.hint == "more rows, or data.eval_split 0"


BAD_ROWS = [
    (b"[1, 2", "a JSON array"),
    (b"nonsense", "not JSON"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b"3", "a int, expected an object"),
    (b"{}", "keys none, expected messages"),
    (b'{"txet": "a"}', "keys txet, expected messages"),
    (b'{"text": ""}', "text is ''"),
    (b'{"text": null}', "text is None"),
    (b'{"prompt": "a"}', "completion is None"),
    (b'{"prompt": "a", "completion": ""}', "completion is empty"),
    (b'{"messages": []}', "messages is empty"),
    (b'{"messages": [{"role": "human", "content": "a"}]}', "messages[0].role is 'human'"),
    (b'{"messages": [{"role": "user", "content": 3}]}', "messages[0].content is 3"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
    (b"[" * 100000, "JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS, ids=[reason for _, reason in BAD_ROWS])
def test_a_bad_row_names_file_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    good = json.dumps(TEXT).encode()
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([good, b"", good, line, good]))
    with pytest.raises(DataError) as caught:
        data_sets.read(str(file))
    assert caught.value.message.splitlines()[0] == "1 of 4 rows cannot be used:"
    assert caught.value.message.splitlines()[1].startswith(f"{file}:4: ")
    assert reason.removeprefix("a JSON array") in caught.value.message
    assert caught.value.hint


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": ""}] * 30 + [TEXT])
    with pytest.raises(DataError) as caught:
        data_sets.read(str(file))
    lines = caught.value.message.splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("30 of 31 rows cannot be used:", "... and 20 more", 12)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.json", b"[\n]", "no rows"),
        ("a.parquet", b"PAR1 no", "not Parquet"),
        ("missing.jsonl", None, "No such file"),
    ],
)
def test_a_file_that_is_no_data_set(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        data_sets.read(str(tmp_path / name))


def test_a_set_of_the_hub_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="data set nobody/nothing-at-all: "):
        data_sets.read("nobody/nothing-at-all")


def test_line_separators_inside_json_end_no_line(tmp_path: Path) -> None:
    """U+2028 and U+0085 may stand inside a JSON string; a byte order mark may stand before the first row."""
    row = {"text": "one\u2028two\x85three"}
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + (json.dumps(row, ensure_ascii=False) + "\r\n").encode() * 2)
    assert plain(data_sets.read(str(file))) == [row, row]


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path, tokenizer: Any) -> None:
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tool turn') }}{% endfor %}"
        + strict.chat_template
    )
    tool = {"messages": [*CHAT["messages"], {"role": "tool", "content": "T"}, CHAT["messages"][-1]]}
    chats = data_sets.read(str(write_jsonl(tmp_path / "a.jsonl", [CHAT, TEXT, tool])))
    with pytest.raises(DataError, match=r"a\.jsonl:3: the chat template refuses it: no tool turn"):
        tokenization.tokenize_all(chats, ChatTemplate(strict), DataRecipe(train=""), Silent())
    strict.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        tokenization.tokenize_all(chats, ChatTemplate(strict), DataRecipe(train=""), Silent())


def test_a_template_that_rewrites_history_is_trained_as_served(tmp_path: Path, tokenizer: Any) -> None:
    import copy

    moody = copy.deepcopy(tokenizer)
    moody.chat_template = "{{ messages | length }}: " + moody.chat_template
    chats = data_sets.read(str(write_jsonl(tmp_path / "a.jsonl", [CHAT])))
    (sample,) = tokenization.tokenize_all(chats, ChatTemplate(moody), DataRecipe(train=""), Silent())
    assert moody.decode(sample.input_ids).startswith("1:"), "as a server sees it, before the answer"
    assert moody.decode([label for label in sample.labels if label != IGNORE]) == "Ho<|im_end|>\n"
    moody.chat_template = "{% if messages[-1].content == 'Ho' %}!{% endif %}" + moody.chat_template
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*the chat template writes this answer in another place"):
        tokenization.tokenize_all(chats, ChatTemplate(moody), DataRecipe(train=""), Silent())
    assert tokenization.tokenize_all(chats, ChatTemplate(moody), DataRecipe(train="", completion_only=False), Silent())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "messages", "text", "prompt", "completion"]), inner)
    ),
    max_leaves=10,
)


@settings(max_examples=examples(100))
@given(row=VALUES)
def test_any_value_is_a_row_or_has_a_reason(row: Any) -> None:
    parsed = parse_row(row)
    if isinstance(parsed, str):
        assert parsed
        assert "\n" not in parsed
    else:
        assert isinstance(parsed, ChatRow | CompletionRow | TextRow)
        assert set(parsed.json()) in ({"messages"}, {"prompt", "completion"}, {"text"})
        assert parse_row(parsed.json()) == parsed
