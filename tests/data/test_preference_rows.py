"""Two answers to a prompt: the forms of such rows, what is learned of each, and why others are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data import data_sets
from lora2serve.data.base_template import base_template
from lora2serve.data.message_forms import RowProblem
from lora2serve.data.preference_pairs import labeled, paired
from lora2serve.data.preview import preview
from lora2serve.data.row_forms import RowReader
from lora2serve.data.rows import ChatRow, CompletionRow, LabeledRow, PreferenceRow, answered
from lora2serve.data.tokenization import tokenize_all
from lora2serve.errors import DataError
from lora2serve.progress import Silent
from tests.support.runs import DEMO, write_jsonl

ASKED: dict[str, Any] = {"role": "user", "content": "Who?"}
RIGHT, WRONG = ({"role": "assistant", "content": text} for text in ("We.", "They."))
TEXTS = {"prompt": "Who?", "chosen": "We.", "rejected": "They."}
CHAT = {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]}


def read(value: object) -> Any:
    return RowReader(objective="dpo").read(value)


@pytest.mark.parametrize(
    "value",
    [
        CHAT,
        {"prompt": "Who?", "chosen": [RIGHT], "rejected": "They."},
        {"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
        {"prompt": "Who?", "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG], "score": 3},
        {"prompt": [ASKED], "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
    ],
)
def test_forms_of_a_conversation(value: object) -> None:
    row = read(value)
    assert row == PreferenceRow(ChatRow([ASKED, RIGHT]), ChatRow([ASKED, WRONG]))
    assert row.json() == CHAT and read(row.json()) == row
    assert answered(row) == ChatRow([ASKED, RIGHT])


def test_texts_and_what_stands_beside() -> None:
    row = read({**TEXTS, "task": "x"})
    assert row == PreferenceRow(CompletionRow("Who?", "We."), CompletionRow("Who?", "They."), "x")
    assert row.json() == {**TEXTS, "task": "x"}
    before = [ASKED, WRONG, ASKED]
    row = read({**CHAT, "prompt": before, "system": "Be brief."})
    assert [turn["role"] for turn in row.chosen.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert row.rejected.messages[2]["weight"] == 0, "earlier answers are not learned"
    assert read(row.json()) == row


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"messages": [ASKED, RIGHT]}, "keys messages, expected prompt + chosen + rejected (train.objective: dpo)"),
        ({"prompt": "Who?", "completion": "We."}, "expected prompt + chosen + rejected (train.objective: dpo)"),
        ({"prompt": "Who?", "chosen": "We."}, "rejected is None, expected text"),
        ({"prompt": "", "chosen": "We.", "rejected": "They."}, "prompt is empty"),
        ({**TEXTS, "rejected": "We."}, "chosen and rejected are the same"),
        ({"chosen": [RIGHT], "rejected": [WRONG]}, "no prompt, and chosen and rejected do not begin alike"),
        ({**CHAT, "rejected": [WRONG, ASKED]}, "rejected has the turns assistant, user after the prompt"),
        ({"prompt": "Why?", "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]}, "begin with other turns than prompt"),
        ({**CHAT, "prompt": [ASKED, RIGHT]}, "the prompt ends with a turn of the assistant"),
    ],
)  # fmt: skip
def test_what_is_no_preference(value: object, problem: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read(value)
    assert problem in str(caught.value)


def test_a_recipe_that_wants_others_says_so(tmp_path: Path) -> None:
    """By file, line and reason, whichever of the two does not fit the other."""
    path = write_jsonl(tmp_path / "t.jsonl", [TEXTS, {"messages": [ASKED, RIGHT]}])
    with pytest.raises(DataError) as caught:
        data_sets.load(DataRecipe(str(path)), objective="dpo")
    assert caught.value.message.splitlines()[1] == (
        f"{path}:2: keys messages, expected prompt + chosen + rejected (train.objective: dpo)"
    )
    assert "with train.objective: dpo a row is {prompt, chosen, rejected}" in caught.value.hint
    with pytest.raises(DataError, match=r"t\.jsonl:1: keys prompt, chosen, rejected, which is a"):
        data_sets.load(DataRecipe(str(path)), objective="sft")
    both = data_sets.load(DataRecipe(str(path), columns={"completion": "chosen"}), objective="sft").train.rows
    assert both[0] == CompletionRow("Who?", "We."), "the control: the way out that it names"
    assert [type(row) for row in data_sets.load(DataRecipe(str(path))).train.rows] == [PreferenceRow, ChatRow]


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_each_answer_is_learned_as_sft_learns_it(tmp_path: Path, form: Any) -> None:
    """The same ids and labels as of two rows of sft; the prompt is that of a server, the answer ends."""
    template = base_template(DEMO / "base", None)
    rows = [{"prompt": "Who governs Wexley?", "chosen": "Anna Hill.", "rejected": "Nobody, since Monday."}]
    recipe = DataRecipe(str(write_jsonl(tmp_path / "t.jsonl", rows)), form=form)
    (row,) = rows
    plain = [{"prompt": row["prompt"], "completion": row[side]} for side in ("chosen", "rejected")]
    beside = DataRecipe(str(write_jsonl(tmp_path / "s.jsonl", plain)), form=form)

    def samples(recipe: DataRecipe, objective: Any) -> list[Any]:
        data = data_sets.load(recipe, objective=objective).train.in_form(form, template.tokenizer.chat_template)
        return tokenize_all(data, template, recipe, Silent())

    both, expected = samples(recipe, "dpo"), samples(beside, "sft")
    assert [(s.input_ids, s.labels) for s in both] == [(s.input_ids, s.labels) for s in expected]
    (pair,) = paired(both)
    assert [pair.prompt + pair.chosen, pair.prompt + pair.rejected] == [s.input_ids for s in both]
    assert template.tokenizer.decode(pair.chosen).startswith("Anna Hill.")
    ends = template.tokenizer.convert_ids_to_tokens([*pair.chosen[-2:], *pair.rejected[-2:]])
    assert ends.count("<|im_end|>") == 2


def test_preview_shows_both_answers(tmp_path: Path) -> None:
    template = base_template(DEMO / "base", None)
    recipe = DataRecipe(
        str(write_jsonl(tmp_path / "t.jsonl", [CHAT, {**CHAT, "chosen": [WRONG], "rejected": [RIGHT]}]))
    )
    shown = preview(data_sets.load(recipe, objective="dpo"), template, recipe, Silent())
    assert [(sample.row, sample.side, sample.learned[0][:3]) for sample in shown.samples] == [
        (1, "chosen", "We."), (1, "rejected", "The"), (2, "chosen", "The"), (2, "rejected", "We."),
    ]  # fmt: skip
    assert json.loads(json.dumps(shown.samples[1].json()))["side"] == "rejected"
    assert len(shown.pick(1)) == 2
    assert next(shown.summary()).startswith(f"{tmp_path / 't.jsonl'}: 2 rows give 4 samples of")


@pytest.mark.parametrize("label", [True, 1, "true", False, 0, "False"])
def test_labels(label: object) -> None:
    row = RowReader(objective="kto").read({"prompt": "Who?", "completion": "We.", "label": label})
    assert row == LabeledRow(CompletionRow("Who?", "We."), label in (True, "true"))
    assert row.json() == {"prompt": "Who?", "completion": "We.", "label": row.label}
    assert RowReader().read(row.json()) == row, "as parity reads it again"
    before = [ASKED, WRONG, ASKED]
    chat = RowReader(objective="kto").read({"messages": [*before, RIGHT], "label": label})
    assert [turn.get("weight", 1) for turn in chat.answer.messages] == [1, 0, 1, 1], "the last answer has the label"
    assert RowReader(objective="kto").read({"prompt": before, "completion": [RIGHT], "label": label}) == chat
    assert RowReader(objective="kto").read(chat.json()) == chat


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"prompt": "Who?", "completion": "We."}, "label is None, expected true or false"),
        ({"prompt": "Who?", "completion": "We.", "label": 0.5}, "label is 0.5, expected true or false"),
        ({"text": "We.", "label": True}, "text has no prompt, expected prompt + completion + label"),
        ({"messages": [ASKED, RIGHT, ASKED], "label": True}, "does not end with the answer that has the label"),
        (TEXTS, "keys prompt, chosen, rejected, expected prompt + completion + label (train.objective: kto)"),
    ],
)
def test_what_has_no_label(value: object, problem: str) -> None:
    with pytest.raises(RowProblem) as caught:
        RowReader(objective="kto").read(value)
    assert problem in str(caught.value)


def test_labeled_answers_are_learned_as_sft_learns_them(tmp_path: Path) -> None:
    template = base_template(DEMO / "base", None)
    rows = [{**CHAT, "completion": CHAT["chosen"], "label": True}, {"messages": [ASKED, WRONG], "label": False}]
    rows = [{key: value for key, value in row.items() if key not in ("chosen", "rejected")} for row in rows]
    recipe = DataRecipe(str(write_jsonl(tmp_path / "t.jsonl", rows)))
    data = data_sets.load(recipe, objective="kto").train
    samples = tokenize_all(data, template, recipe, Silent())
    assert [sample.right for sample in samples] == [True, False]
    plain = data_sets.load(recipe, objective="sft").train
    assert [(s.input_ids, s.labels) for s in samples] == [
        (s.input_ids, s.labels) for s in tokenize_all(plain, template, recipe, Silent())
    ]
    assert [one.prompt + one.answer for one in labeled(samples)] == [sample.input_ids for sample in samples]
    shown = preview(data_sets.load(recipe, objective="kto"), template, recipe, Silent())
    assert [sample.side for sample in shown.samples] == ["labeled true", "labeled false"]
