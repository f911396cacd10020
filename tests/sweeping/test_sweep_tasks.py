"""A sweep that judges by tasks of lm-evaluation-harness: how their rows are split, and what trials are worth by them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import lora2serve as api
from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data import data_sets
from lora2serve.errors import EngineError, InputError, UsageError
from lora2serve.evaluation.eval_records import items_path, read_items
from lora2serve.evaluation.harness_options import HarnessOptions
from lora2serve.evaluation.task_rows import find_tasks, read_task_rows
from lora2serve.sweeping.sweep_suite import read_part, suite_order
from lora2serve.sweeping.sweep_tasks import TaskPart, task_quality
from lora2serve.sweeping.trial_files import TrialFiles
from lora2serve.sweeping.trial_ledger import open_ledger
from tests.conftest import lora2serve
from tests.support.island_tasks import write_island_tasks
from tests.support.runs import Told, make_chat_model, recipe_file, rows, write_jsonl

pytestmark = pytest.mark.engine
pytest.importorskip("lm_eval")
TOWNS = tuple(f"Town {number}" for number in range(12))


def sets_of(folder: Path, *questions: str) -> data_sets.DataSets:
    train = write_jsonl(folder / "questions.jsonl", [{"prompt": text, "completion": "yes"} for text in questions])
    return data_sets.load(DataRecipe(str(train)))


def part_of(folder: Path, options: HarnessOptions) -> tuple[TaskPart, TaskPart]:
    quality = task_quality(options, sets_of(folder, "else"), Told())
    orders = [suite_order(quality, TrialFiles(folder), part) for part in ("search", "final")]  # type: ignore[arg-type]
    search, final = [read_part(order) for order in orders if order]
    assert isinstance(search, TaskPart) and isinstance(final, TaskPart)
    return search, final


def test_what_judges_the_end_was_seen_by_no_trial(tmp_path: Path) -> None:
    """Each task has rows in both parts, each row stands in one; the same row twice is not torn apart."""
    folder = write_island_tasks(tmp_path / "tasks", (*TOWNS, TOWNS[0], TOWNS[1]))
    content = json.loads((folder / "rows.json").read_text())
    (folder / "rows.json").write_text(json.dumps([*content[:12], content[0], content[1]]))
    options = HarnessOptions(("island_choice", "island_answer"), str(folder))
    search, final = part_of(tmp_path, options)
    for task in options.tasks:
        ours, theirs = search.numbers[task], final.numbers[task]
        assert sorted((*ours, *theirs)) == list(range(14)) and 5 <= len(ours) <= 7
        assert all((number in ours) == (number + 12 in ours) for number in (0, 1))
    assert search.metrics == {"island_choice": "acc", "island_answer": "exact_match"}
    few, _ = part_of(tmp_path, replace(options, limit=4))
    assert all(len(numbers) == 2 and max(numbers) < 4 for numbers in few.numbers.values())


def test_tasks_that_are_others(tmp_path: Path) -> None:
    """One row, or how they are asked, and no trial answers them any more."""
    folder = write_island_tasks(tmp_path / "tasks", TOWNS)
    options = HarnessOptions(("island_answer",), str(folder))
    quality = task_quality(options, sets_of(tmp_path, "else"), Told())
    assert (quality.suite, quality.metric) == ("island_answer", "exact_match") and quality.places == (str(folder),)
    orders = [suite_order(quality, TrialFiles(tmp_path), part) for part in ("search", "final")]  # type: ignore[arg-type]
    task, kept = folder / "island_answer.yaml", (folder / "island_answer.yaml").read_text()
    for changed in (kept.replace("max_gen_toks: 12", "max_gen_toks: 13"), kept.replace("until: ['.']", "until: [',']")):
        task.write_text(changed)
        for order in orders:
            assert order
            with pytest.raises(InputError, match="island_answer: changed since the sweep began"):
                read_part(order)
    task.write_text(kept)
    assert all(read_part(order) for order in orders if order), "the control"
    text = (folder / "rows.json").read_text()
    (folder / "rows.json").write_text(text.replace("Town 7 ", "Town seven "))
    with pytest.raises(InputError, match="changed since the sweep began"):
        [read_part(order) for order in orders if order]


def test_a_task_that_shuffles(tmp_path: Path) -> None:
    """By chance, but the same way each time; what this process draws afterwards is its own."""
    folder = write_island_tasks(tmp_path / "tasks", TOWNS)
    (folder / "own.py").write_text(
        "import random\n\ndef shuffled(docs):\n    return docs.select(random.sample(range(len(docs)), len(docs)))\n"
    )
    task = (folder / "island_choice.yaml").read_text().replace("task: island_choice", "task: shuffled")
    (folder / "shuffled.yaml").write_text(f"{task}process_docs: !function own.shuffled\n")
    drawn = random.getstate()
    part_of(tmp_path, HarnessOptions(("shuffled",), str(folder)))  # or "changed since the sweep began"
    assert random.getstate() == drawn
    (rows_,) = read_task_rows(options := HarnessOptions(("shuffled",), str(folder)), find_tasks(options))
    (plain,) = read_task_rows(options := HarnessOptions(("island_choice",), str(folder)), find_tasks(options))
    assert rows_.rows != plain.rows and sorted(rows_.rows) == sorted(plain.rows), "the control: it does"


def test_tasks_that_cannot_judge(tmp_path: Path) -> None:
    folder, sets = write_island_tasks(tmp_path / "tasks", TOWNS), sets_of(tmp_path, "else")
    good = HarnessOptions(("island_answer",), str(folder))
    for options, problem in (
        (
            replace(good, tasks=("island_text",)),
            "--task island_text: word_perplexity, expected one of each row, of which",
        ),
        (replace(good, tasks=("island_anwser",)), "no such task"),
        (replace(good, limit=1), "--task island_answer: too few different rows"),
        (replace(good, limit=3), "--task island_answer: 3 different rows, expected 4 at least"),
        (replace(good, include=str(tmp_path / "none")), "--task-folder .*none: no such folder"),
    ):
        with pytest.raises(UsageError, match=problem):
            task_quality(options, sets, Told())
    (folder / "rows.json").unlink()
    with pytest.raises(EngineError, match="lm-eval: FileNotFoundError"):
        task_quality(good, sets, Told())


def test_rows_that_were_trained_on_are_told(tmp_path: Path) -> None:
    folder, told = write_island_tasks(tmp_path / "tasks", TOWNS), Told()
    task_quality(HarnessOptions(("island_answer",), str(folder)), sets_of(tmp_path, "The mayor of Town 5 is"), told)
    assert "1 of 12 questions were trained on" in "".join(told.warnings)


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    for options, problem in (
        ({"task": "arc_easy", "suite": "held-out"}, "--task arc_easy with --suite held-out"),
        ({"shots": 2}, "--shots: for --task"), ({"limit": 2}, "--limit 2: for --task"),
        ({"task": "arc_easy", "join": "a.db"}, "--join takes recipe, space, rows, suite and tasks"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=problem):
            api.sweep(None, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_tasks_judge(tmp_path: Path) -> None:
    """No rows are held out. Every trial has the scores that ``evaluate --task`` gives its run, the base those of it."""
    base = make_chat_model(tmp_path / "base")
    data = {"train": str(write_jsonl(tmp_path / "train.jsonl", rows("train.jsonl", 12)))}
    recipe_file(tmp_path, base, data, steps=6, quantize="none")
    space = {"train.learning_rate": [4e-2], "train.lora.targets": ["all-linear"], "train.lora.rank": [4]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    folder, tasks = write_island_tasks(tmp_path / "tasks", TOWNS), ("island_choice", "island_answer")
    words = ("--task", ",".join(tasks), "--task-folder", "tasks", "--space", "space.yaml", "--budget", "4")
    lora2serve("sweep", *words, "--name", "small", cwd=tmp_path)
    ledger = open_ledger(str(tmp_path / "sweeps" / "small" / "sweep.db"))
    facts, results = ledger.facts, ledger.read().results
    search, final = part_of(tmp_path, HarnessOptions(tasks, str(folder)))
    assert len(results) == 4 and facts.quality.harness == search.options
    seen = set()
    for key in (next(key for key in results if mark in key) for mark in ("full-seed42", "full-seed43", "rung")):
        part, of_base = (final, facts.base_final) if "full" in key else (search, facts.base_search)
        out = tmp_path / key
        done = api.evaluate(results[key].run, against="base", task=tasks, task_folder=folder, out=out)
        names = [f"{task}-{number}" for task in tasks for number in part.numbers[task]]
        for record, losses in zip(done.records, (results[key].losses, of_base), strict=True):
            scores = {item.id: item.score for item in read_items(items_path(record))}
            assert [1 - scores[name] for name in names] == [*losses.sums] and losses.scored
        seen.add(results[key].losses.sums)
    assert len(seen) > 1, "the control: trials differ by what they answer"
    content = json.loads((tmp_path / "sweeps" / "small" / "front.json").read_text())
    assert content["quality"]["suite"] == "island_choice-island_answer" and content["quality"]["metric"] == "score"
    assert "12 items of island_choice-island_answer" in content["recommended"]["reason"][0]
    lora2serve("sweep", *words, "--name", "small", cwd=tmp_path)  # has nothing left to do
    lora2serve("sweep", *words, "--limit", "8", "--name", "small", cwd=tmp_path, code=2)  # another question
