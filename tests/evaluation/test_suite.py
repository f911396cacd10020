"""Suites: which rows are read, what is refused, and by what a suite is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from lora2serve.data.rows import ChatRow, CompletionRow, TextRow
from lora2serve.errors import DataError, RecipeError
from lora2serve.evaluation.eval_records import ItemResult
from lora2serve.evaluation.overlap import compare, questions
from lora2serve.evaluation.score_gates import judge, parse_gate
from lora2serve.evaluation.suite import Suite, read_suite
from lora2serve.evaluation.suite_run import Measured

ROWS: Sequence[dict[str, object]] = [
    {"prompt": "Capital of France?", "expected": "Paris", "task": "geo", "group": "europe", "id": "fr"},
    {"messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "2+2?"}], "expected": [4, "four"]},
    {"prompt": "Which?", "choices": ["red", "green"], "expected": 1},
    {"question": "Who wrote Faust?", "answer": "Goethe"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "task": "talk"},
]  # fmt: skip


def written(folder: Path, rows: Sequence[object] = ROWS, name: str = "qa.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def suite_of(folder: Path, yaml: str, rows: Sequence[object] = ROWS) -> Suite:
    written(folder, rows)
    (folder / "qa.yaml").write_text(f"rows: qa.jsonl\n{yaml}")
    return read_suite(folder / "qa.yaml")


def test_the_forms_of_rows(tmp_path: Path) -> None:
    suite = read_suite(written(tmp_path))
    first, second, third, fourth, fifth = suite.items
    assert (first.name, first.task, first.group, first.expected) == ("fr", "geo", "europe", ("Paris",))
    assert second.expected == ("4", "four") and [turn["role"] for turn in second.messages] == ["system", "user"]
    assert third.expected == ("green",) and third.choices == ("red", "green") and third.name == "3"
    assert (fourth.question, fourth.expected) == ("Who wrote Faust?", ("Goethe",))
    assert (fifth.question, fifth.expected, fifth.task) == ("Hi", ("Hello",), "talk")
    assert suite.name == "qa" and suite.scorer.kind == "normalized"
    assert len(read_suite(tmp_path / "qa.jsonl", 2).items) == 2


def test_what_a_suite_is_known_by(tmp_path: Path) -> None:
    """All that a score depends on, and nothing else."""
    plain = suite_of(tmp_path, "scorer: exact\n").sha256
    assert suite_of(tmp_path, "name: other\nscorer: exact\n").sha256 == plain, "the control: a name is none of it"
    others = [
        suite_of(tmp_path, text).sha256
        for text in ("scorer: f1\n", "scorer: exact\nmax_tokens: 5\n", "scorer: exact\ntemperature: 1\n",
                     "scorer: exact\nsystem: Be brief.\n", "scorer: exact\ntasks: {geo: contains}\n")
    ]  # fmt: skip
    others.append(
        suite_of(tmp_path, "scorer: exact\n", [*ROWS[:4], {**ROWS[0], "id": "x", "expected": "paris"}]).sha256
    )
    assert len({plain, *others}) == len(others) + 1
    (tmp_path / "own.py").write_text("def right(answer, expected, question):\n    return True\n")
    before = suite_of(tmp_path, "scorer: {kind: python, function: 'own.py:right'}\n").sha256
    (tmp_path / "own.py").write_text("def right(answer, expected, question):\n    return False\n")
    assert suite_of(tmp_path, "scorer: {kind: python, function: 'own.py:right'}\n").sha256 != before


def test_scorers_by_task(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "scorer: exact\ntasks:\n  geo: {kind: regex, pattern: '(P\\w+)'}\nsystem: Be brief.\n")
    first, second = suite.items[:2]
    assert suite.scorer_of(first).score("It is Paris.", first) == 1 and suite.scorer_of(second).kind == "exact"
    assert first.messages[0]["content"] == "Be brief." and second.messages[0]["content"] == "Brief.", (
        "its own goes first"
    )


def test_the_first_rows_alone(tmp_path: Path) -> None:
    """The task of a later one has its scorer all the same."""
    (tmp_path / "qa.yaml").write_text("rows: qa.jsonl\ntasks: {talk: exact}\n")
    written(tmp_path)
    assert len(read_suite(tmp_path / "qa.yaml", 2).items) == 2


def test_the_same_question_twice_is_no_news(tmp_path: Path) -> None:
    """A hundred right answers to one question show nothing; to a hundred questions they do: the control."""
    same = [{"prompt": "Capital of France?", "expected": "Paris"}] * 100
    others = [{"prompt": f"{n} and {n}?", "expected": str(2 * n)} for n in range(100)]
    suites = [read_suite(written(tmp_path, rows)) for rows in (same, others)]
    measured = [
        Measured("a", "", tuple(ItemResult(i.name, "", "", 1.0, 1.0, group=i.group) for i in suite.items))
        for suite in suites
    ]
    gates = [judge(parse_gate("acc >= 0.9"), "a", m.vector("score"), None, m.groups()).verdict for m in measured]
    assert gates == ["not enough items", "met"]
    assert "100 rows ask what others do: each question is one group" in suites[0].notes[0] and not suites[1].notes
    choices = [{"prompt": "Which?", "choices": ["a", str(n)], "expected": "a"} for n in range(3)]
    assert not any(item.group for item in suite_of(tmp_path, "scorer: choice\n", choices).items)


def test_every_bad_row_is_named(tmp_path: Path) -> None:
    bad = [ROWS[0], {"prompt": "", "expected": "x"}, {"prompt": "x", "choices": ["a", "b"], "expected": 2},
           {"prompt": "x", "expected": {"a": 1}}, 7, {**ROWS[1], "id": "fr"}]  # fmt: skip
    with pytest.raises(DataError) as refused:
        read_suite(written(tmp_path, bad))
    for part in ("5 of 6 rows", ":2: prompt", ":3: expected is 2", ":4: expected", ":5: a int", "id 'fr' is there 2"):
        assert part in refused.value.message


@pytest.mark.parametrize(
    ("yaml", "problem"),
    [
        ("scorer: exakt\n", "unknown scorer 'exakt' (did you mean 'exact'?)"),
        ("scorr: exact\n", "unknown key (did you mean 'scorer'?)"),
        ("scorer: {kind: regex}\n", "pattern is missing"),
        ("scorer: {kind: regex, pattern: '('}\n", "scorer: regex: missing )"),
        ("scorer: {kind: python, function: 'none.py:f'}\n", "none.py"),
        ("scorer: {kind: judge}\n", "url is missing"),
        ("tasks: {none: exact}\n", "tasks.none: no row has that task"),
        ("max_tokens: 0\n", "max_tokens: 0"),
        ("name: a/b\n", "name: 'a/b'"),
    ],
)
def test_a_suite_that_is_wrong(tmp_path: Path, yaml: str, problem: str) -> None:
    with pytest.raises(RecipeError) as refused:
        suite_of(tmp_path, yaml)
    assert problem in refused.value.message


def test_every_problem_of_a_suite_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        suite_of(tmp_path, "scorer: exakt\nmax_token: 5\nname: a/b\n")
    for part in ("unknown scorer 'exakt'", "max_token: unknown key", "name: 'a/b'"):
        assert part in refused.value.message, part


def test_items_that_their_scorer_cannot_score(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"5 of 5 items cannot be scored.*\n.*fr: 0 choices"):
        suite_of(tmp_path, "scorer: choice\n", [ROWS[0], *({**ROWS[2], "expected": "blue"} for _ in range(4))])
    with pytest.raises(DataError, match="which is no number"):
        suite_of(tmp_path, "scorer: number\n", [ROWS[0]])
    with pytest.raises(DataError, match="expected each once"):
        suite_of(tmp_path, "scorer: choice\n", [{**ROWS[2], "choices": ["red", "green", "red"]}])
    with pytest.raises(DataError, match="stands in every answer"):
        suite_of(tmp_path, "scorer: contains\n", [{**ROWS[0], "expected": ""}])
    with pytest.raises(DataError, match="expected is missing"):
        suite_of(tmp_path, "", [{"prompt": "x", "choices": ["a", "b"]}])


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    suite = read_suite(written(tmp_path, [*ROWS, {"text": "Some text."}, {**ROWS[4], "tools": [tool]}]))
    assert len(suite.items) == 5
    assert [note.partition(": ")[2] for note in suite.notes] == [
        "1 rows left out: a text, without a question", "1 rows left out: the model may call tools in them",
    ]  # fmt: skip
    with pytest.raises(DataError, match="no row of 1 has an answer"):
        read_suite(written(tmp_path, [{"text": "Some text."}]))


def test_overlap_with_training_rows(tmp_path: Path) -> None:
    long = "the quick brown fox jumps over the lazy dog and then runs home"
    asked = questions(read_suite(written(tmp_path, [
        {"prompt": "The capital of France?", "expected": "x", "id": "same"},
        {"prompt": f"Say why {long}", "expected": "x", "id": "near"},
        {"prompt": "Say why nobody ever asked any of these questions before today", "expected": "x", "id": "new"},
    ])))  # fmt: skip
    rows = [
        CompletionRow("the CAPITAL of france", "Paris"),
        TextRow(f"Once {long}."),
        ChatRow([{"role": "user", "content": "Hi"}]),
    ]
    found = compare(asked, rows)
    assert found.same == ("same",) and found.near == ("near",)
    assert "1 of 3 questions were trained on (same)" in found.text
    assert compare(asked, rows[2:]).text == "", "the control"
    assert compare(asked, rows[:1]).near == ()
