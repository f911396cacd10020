"""What a comparison asks: held-out rows exactly as training saw them, and general text."""

from __future__ import annotations

import copy
import json
from datetime import date
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import pytest

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data import data_sets
from lora2serve.data.calibration import calibration_ids, tokenizer_of
from lora2serve.data.prompts import CLOCK, PROBES, PromptOptions, Reading, load_saved, prepare
from lora2serve.data.served_template import ChatTemplate
from lora2serve.data.tokenization import tokenize_all
from lora2serve.data.tokenizer import load_tokenizer
from lora2serve.errors import DataError
from lora2serve.progress import Silent
from tests.support.runs import DEMO, write_jsonl

CHAT = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Hum"},
    ]
}
ROWS: list[dict[str, Any]] = [
    CHAT,
    {"prompt": "Question: who? Answer:", "completion": " Nobody."},
    {"text": "One. Two."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEMO / "base")


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_scored_as_trained_and_calibrated(form: Literal["chat", "raw"], tmp_path: Path, tokenizer: Any) -> None:
    """The same row has the same ids everywhere: in training, in a comparison and in calibration."""
    rows = [CHAT, {"query": ROWS[1]["prompt"], "completion": ROWS[1]["completion"]}, ROWS[2]]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = DataRecipe(train=str(file), form=form, columns={"prompt": "query"})
    sets = data_sets.load(recipe).in_form(form, tokenizer.chat_template)
    samples = tokenize_all(sets.train, ChatTemplate(tokenizer), recipe, Silent())
    trained, reading = [sample.input_ids for sample in samples], Reading(form, recipe.columns)
    general = str(write_jsonl(tmp_path / "g.jsonl", rows))
    prompts = prepare(tokenizer, file, general, [0], PromptOptions(tokens=10**6), reading=reading)
    assert prompts.note.startswith("1 rows of prompt and completion are written by the chat") == (form == "chat")
    kept = write_jsonl(tmp_path / "eval.jsonl", [row.json() for row in sets.train.rows])  # as a run keeps them
    for reading in (Reading("chat", recipe.columns, own_rows=True), Reading("raw", own_rows=True)):
        again = prepare(tokenizer, kept, None, [0], PromptOptions(tokens=10**6), reading=reading)
        assert [list(text.ids) for text in again.sequences if text.part == "task"] == trained and not again.note
    for part in ("task", "general"):
        assert [list(text.ids) for text in prompts.sequences if text.part == part] == trained
    assert calibration_ids(recipe, DEMO / "base", DEMO / "base", lambda name: (name, None), Silent()) == trained
    assert trained[2][-1] == tokenizer.eos_token_id, "a text ends where it was trained to end"
    cut = prepare(tokenizer, file, None, [0], PromptOptions(window=8), reading=Reading(form, recipe.columns))
    assert [list(text.ids) for text in cut.sequences if text.part == "task"] == [ids[:8] for ids in trained]


def test_openings(tmp_path: Path, tokenizer: Any) -> None:
    """A user's part of each row, by the chat template; then the probes."""
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    prompts = prepare(tokenizer, file, None, [3, 0, 3], PromptOptions(prompts=2), reading=Reading("raw"))
    assert prompts.stop == (0, 3)
    chat, pair, text, *probes = prompts.conversations
    assert [message["content"] for message in chat.messages] == ["Hi", "Ho", "And?"]
    assert chat.text.endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(list(chat.ids)) == chat.text
    assert (pair.text, text.text) == ("Question: who? Answer:", "One.")
    assert len(probes) == len([probe for probe in PROBES if not probe.tools]), "this template knows no tools"
    assert prompts.prompts == prompts.conversations[:2]
    prompts.save(tmp_path / "prompts.json")
    assert load_saved(tmp_path / "prompts.json") == prompts


def test_tools_where_the_template_shows_them(tmp_path: Path, tokenizer: Any) -> None:
    """Those of a row, and a probe of our own; the longest conversation has seven turns."""
    row = {"messages": [*ROWS[0]["messages"]], "tools": [CLOCK]}
    file = write_jsonl(tmp_path / "rows.jsonl", [row])
    without = prepare(tokenizer, file, None, [0], PromptOptions())
    assert not any(conversation.tools for conversation in without.conversations)
    knowing = copy.deepcopy(tokenizer)
    knowing.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    prompts = prepare(knowing, file, None, [0], PromptOptions())
    own, *_, probe = prompts.conversations
    assert own.tools and probe.tools and "time_in_city" in probe.text and "time_in_city" in own.text
    assert max(len(conversation.messages) for conversation in prompts.conversations) == 7
    prompts.save(tmp_path / "prompts.json")
    assert load_saved(tmp_path / "prompts.json") == prompts


def test_half_task_half_general_and_the_rest_from_the_task(tmp_path: Path, tokenizer: Any) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{'word ' * 20}{n}"} for n in range(40)])
    general = write_jsonl(tmp_path / "general.jsonl", [{"text": "a b c d e f g"}])
    prompts = prepare(tokenizer, rows, str(general), [0], PromptOptions(tokens=400))
    task = [text for text in prompts.sequences if text.part == "task"]
    assert len({text.text for text in task}) == len(task), "no row twice"
    assert 400 <= prompts.positions < 400 + len(task[0].ids)
    shipped = prepare(tokenizer, rows, None, [0], PromptOptions(tokens=400))
    halves = [sum(len(text.ids) - 1 for text in shipped.sequences if text.part == part) for part in ("task", "general")]
    assert min(halves) >= 150, "the control: half of each where there is enough"


@pytest.mark.parametrize("suffix", ["txt", "parquet", "data"])
def test_general_text_in_other_files(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    """Paragraphs of plain text, or rows; training reads rows only."""
    file = tmp_path / f"general.{suffix}"
    if suffix == "txt":
        file.write_text("First paragraph.\n\n\n\nSecond one.\n", encoding="utf-8")
    elif suffix == "data":
        write_jsonl(file, [{"text": "First paragraph."}, {"text": "Second one."}])
    else:
        rows = [{"text": "First paragraph.", "prompt": None}, {"text": "Second one.", "prompt": None}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    prompts = prepare(tokenizer, None, str(file), [0], PromptOptions())
    assert [text.text for text in prompts.sequences] == ["First paragraph.", "Second one."]
    if suffix == "txt":
        with pytest.raises(DataError, match=r"general\.txt:1: not JSON"):
            data_sets.read(str(file))


def test_a_row_that_cannot_be_scored_is_named_as_in_training(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(CHAT) + '\n{"prompt": "no completion"}\n', encoding="utf-8")
    for read in (lambda: prepare(tokenizer, file, None, [0], PromptOptions()), lambda: data_sets.read(str(file))):
        with pytest.raises(DataError, match=r"rows\.jsonl:2: completion is None, expected text"):
            read()
    write_jsonl(file, [{"text": "One"}, CHAT])
    plain = load_tokenizer(DEMO / "base")
    plain.chat_template = None
    with pytest.raises(DataError, match=r"rows\.jsonl:2: rows of messages, but the tokenizer has no chat template"):
        prepare(plain, file, None, [0], PromptOptions())
    with pytest.raises(DataError, match=r"general\.txt: "):
        prepare(tokenizer, None, str(tmp_path / "general.txt"), [0], PromptOptions())
    with pytest.raises(DataError, match="no prompt is shorter than 3 tokens"):
        prepare(tokenizer, None, None, [0], PromptOptions(new_tokens=5), most=8)


def test_the_trained_tokenizer_lies_beside_the_adapter(tmp_path: Path) -> None:
    assert tokenizer_of(tmp_path, DEMO / "base") == DEMO / "base"
    (tmp_path / "tokenizer.json").touch()
    assert tokenizer_of(tmp_path, DEMO / "base") == tmp_path
    assert tokenizer_of(None, DEMO / "base") == DEMO / "base"


def test_the_day_of_the_training(tmp_path: Path, tokenizer: Any) -> None:
    """Answers are asked for as trained; what is compared with an engine's own rendering has its date, today's."""
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%Y-%m-%d') }}|" + tokenizer.chat_template
    file = write_jsonl(tmp_path / "rows.jsonl", [CHAT])
    prompts = prepare(dated, file, None, [0], PromptOptions(), reading=Reading(day="2024-02-29"))
    assert [text.text[:11] for text in prompts.sequences if text.part == "task"] == ["2024-02-29|"]
    assert {prompt.text[:11] for prompt in prompts.prompts} == {"2024-02-29|"}
    assert {prompt.text[:11] for prompt in prompts.conversations} == {f"{date.today()}|"}
    assert prompts.prompts[0].text[11:] == prompts.conversations[0].text[11:]
    undated = prepare(dated, file, None, [0], PromptOptions())
    assert undated.prompts == undated.conversations[:1]
