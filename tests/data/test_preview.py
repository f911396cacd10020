"""``lora2serve data``: exactly what the trainer is given, and what is worth knowing of the rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora2serve.artifacts.run import Run
from lora2serve.cli import run as command
from lora2serve.config.data_recipe import DataRecipe, SourceRecipe
from lora2serve.config.recipe import load
from lora2serve.data import data_sets
from lora2serve.data.base_template import base_template
from lora2serve.data.preview import preview
from lora2serve.progress import Silent
from tests.data.test_chat_turns import THINK, TURNS
from tests.support.runs import DEMO, Told, write_jsonl

LONG = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "ALPHA."}]}
ROWS: list[dict[str, Any]] = [
    {"messages": TURNS},
    {"prompt": "Who?", "completion": "We."},
    {"text": "Once upon a time."},
    LONG,
    {"messages": TURNS},
    {"messages": [TURNS[0], {"role": "assistant", "content": "ALPHA. " * 90}]},
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a base whose template gives each turn a sample of its own."""
    home = tmp_path_factory.mktemp("preview")
    shutil.copytree(DEMO / "base", home / "base")
    (home / "base" / "chat_template.jinja").write_text(THINK)
    write_jsonl(home / "train.jsonl", ROWS)
    write_jsonl(home / "eval.jsonl", [{"prompt": "Who?", "completion": "We."}])
    data = "{train: train.jsonl, eval: eval.jsonl, max_length: 128}"
    (home / "r.yaml").write_text(f"name: r\nmodel: {{path: base}}\ndata: {data}\ntrain: {{quantize: none}}\n")
    return home / "r.yaml"


def test_the_samples_are_those_of_the_trainer(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from lora2serve.training.finetune import FineTune
    from lora2serve.training.model import device
    from lora2serve.training.trainer import _dataset

    assert command(["data", str(recipe), "--json"]) == 0
    shown = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    chosen, told = load(recipe), Told()
    template = base_template(Path(chosen.model.path))
    base = Path(chosen.model.path)
    fine_tune = FineTune(chosen, Run(recipe.parent), data_sets.load(chosen.data), base, device(), told)
    rows, _ = fine_tune.in_form(template.tokenizer).tokenize(template)
    trained = _dataset(rows, chosen)
    assert [sample["ids"] for sample in shown] == list(trained["input_ids"])
    assert [sample["labels"] for sample in shown] == list(trained["labels"])
    assert [sample["row"] for sample in shown] == [1, 1, 1, 2, 3, 5, 5, 5, 6]
    assert {sample["source"] for sample in shown} == {str(recipe.parent / "train.jsonl")}
    assert shown[1]["learned"] == ["<think>\n\n</think>\n\nBRAVO.<|im_end|>\n"]
    assert shown[1]["text"].endswith(
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n" + shown[1]["learned"][0]
    )
    assert all("".join(sample["learned"]) in sample["text"] for sample in shown)
    assert command(["data", str(recipe)]) == 0
    amount, first = told.notes[-2:]
    assert f"\n{amount}\n" in capfd.readouterr().out, "a training begins with the same words"
    assert first == 'the first answer that is learned: "<think> </think> ALPHA.<|im_end|>"'


def test_in_words(recipe: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "data.html"
    assert command(["data", str(recipe), "--report", str(page)]) == 0
    out = capfd.readouterr().out
    assert "⟦<think>\n\n</think>\n\nALPHA.<|im_end|>\n⟧" in out
    assert "6 rows give 9 samples of" in out and "1 rows are held out" in out
    for what in (
        "2 rows are cut at 128 tokens (data.max_length): ", "1 rows have nothing to learn and are dropped: ",
        "1 rows repeat another: ", "1 rows are also held out: ",
    ):  # fmt: skip
        assert what in out
    assert f"{recipe.parent / 'train.jsonl'}:4" in out
    assert out.rstrip().endswith(str(page))
    text = page.read_text(encoding="utf-8")
    assert "<mark>&lt;think&gt;" in text
    assert "rows repeat another" in text


def test_one_row(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(["data", str(recipe), "--row", "5"]) == 0
    out = capfd.readouterr().out
    assert [out.count(f"⟦<think>\n\n</think>\n\n{answer}") for answer in ("ALPHA.", "BRAVO.", "CHARLIE.")] == [1, 1, 1]
    assert "rows give" not in out
    assert command(["data", str(recipe), "--row", "4"]) == 2
    assert "--row 4: nothing of this row is trained: it has no token to learn from" in capfd.readouterr().err
    assert command(["data", str(recipe), "--row", "99"]) == 2
    assert "--row 99: there is no such row" in capfd.readouterr().err
    apart = ["data", str(recipe), "--set", "data.eval=null", "--set", "data.eval_split=0.2"]
    assert command(apart) == 0
    assert "5 rows give" in (out := capfd.readouterr().out) and "\n1 rows are held out\n" in out
    refused = []
    for row in range(1, 7):
        if command([*apart, "--row", str(row)]):
            refused.append(capfd.readouterr().err)
    assert sum("this row is held out, and not trained" in line for line in refused) == 1


def test_formats_by_name(recipe: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A file or a name; a format whose tokens are not there is refused, and no template is what it was."""
    assert command(["data", str(recipe), "--row", "1", "--set", "data.chat_template=chatml"]) == 0
    assert "⟦ALPHA.<|im_end|>\n⟧<|im_start|>user\ntwo?" in capfd.readouterr().out
    own = tmp_path / "own.jinja"
    own.write_text(THINK.replace("assistant", "model"))
    assert command(["data", str(recipe), "--row", "2", "--set", f"data.chat_template={own}"]) == 0
    assert "<|im_start|>model\n" in capfd.readouterr().out
    for name, reason in (("llama3", "needs <|start_header_id|>"), ("chatnl", "did you mean 'chatml'?")):
        assert command(["data", str(recipe), "--set", f"data.chat_template={name}"]) == 1
        assert reason in capfd.readouterr().err


def test_what_nobody_reads_and_what_a_weight_repeats(tmp_path: Path) -> None:
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": 2}, {"text": "a", "id": 3}]
    file = str(write_jsonl(tmp_path / "a.jsonl", rows))
    recipe = DataRecipe(train=(SourceRecipe(file, weight=2),))
    found = preview(data_sets.load(recipe), base_template(DEMO / "base"), recipe, Silent())
    assert len(found.samples) == 6
    assert [sample.row for sample in found.pick(3)] == [1, 2, 3], "each once"
    assert [(item.first, item.last, item.count) for item in found.lengths()] == [(2, 2, 6)], "from the shortest"
    assert list(map(str, found.findings)) == [f"1 rows repeat another: {file}:3"]
    assert found.losses == [f"{file}: not read: id (3 rows)"]


def test_a_source_is_not_hidden_behind_another(tmp_path: Path) -> None:
    files = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}", "id": n} for n in range(9)]))
        for name in "ab"
    ]
    recipe = DataRecipe(train=(SourceRecipe(files[0], weight=2), SourceRecipe(files[1])), eval_split=0.3)
    sets = data_sets.load(recipe)
    found = preview(sets, base_template(DEMO / "base"), recipe, Silent())
    assert [Path(sample.source).stem for sample in found.pick(3)].count("b") == 1
    assert len(found.held_out) == 6 and "6 rows are held out" in list(found.summary())
    assert found.losses == sets.warnings() == [f"{files[0]} + {files[1]}: not read: id (18 rows)"], "told once"


def test_a_page_that_cannot_be_written_is_refused_first(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command(["data", "demo", "--report", str(tmp_path / "none" / "x.html")]) == 2
    assert f"hint: mkdir -p {tmp_path / 'none'}" in capfd.readouterr().err
