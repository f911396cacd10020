"""One suite through the engines that serve its exports: the same choices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lora2serve as api
from lora2serve.artifacts.run import Run
from lora2serve.evaluation.eval_records import items_path, read_items
from tests.conftest import lora2serve
from tests.evaluation.conftest import copy_of

pytestmark = pytest.mark.engine


def choices_of(rows: Path, out: Path, count: int) -> Path:
    """Each held-out question with its own answer and three of others, by log-likelihood."""
    pairs = [[turn["content"] for turn in json.loads(line)["messages"][-2:]] for line in rows.read_text().splitlines()]
    answers = list(dict.fromkeys(answer for _, answer in pairs))
    lines = []
    for number, (question, answer) in enumerate(pairs[:count]):
        at = answers.index(answer)
        others = [answers[(at + step) % len(answers)] for step in (1, 2, 3)]
        choices = [*others[: number % 4], answer, *others[number % 4 :]]
        lines.append(json.dumps({"prompt": question, "choices": choices, "expected": answer}))
    (out / "choice.jsonl").write_text("\n".join(lines))
    (out / "choice.yaml").write_text("rows: choice.jsonl\nscorer: choice\n")
    return out / "choice.yaml"


def choices_in(record: Path, count: int) -> list[str]:
    items = read_items(items_path(record))
    assert len(items) == count
    return [item.answer for item in items]


def agreeing(first: list[str], second: list[str]) -> int:
    return sum(a == b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("engines", "count"),
    [
        (("transformers", "llama.cpp"), 40),
        pytest.param(("transformers", "llama.cpp", "vllm-server"), 100, marks=pytest.mark.slow),
    ],
)
def test_the_same_choice_in_every_engine(demo_run: Run, tmp_path: Path, engines: tuple[str, ...], count: int) -> None:
    run = copy_of(demo_run, tmp_path)
    targets = ("-t", "vllm", "-t", "gguf", "-q", "F32", "--dtype", "fp32")
    lora2serve("export", run, *targets, cwd=tmp_path)
    exports = {path.name: path for path in (run / "exports").iterdir()}
    suite = choices_of(run / "eval.jsonl", tmp_path, count)
    chosen = {}
    for engine in engines:
        export = next(path for name, path in exports.items() if name.startswith("gguf") == (engine == "llama.cpp"))
        result = api.evaluate(export, suite=suite, engine=engine, allow_overlap=True, out=tmp_path / engine)
        assert result.report.subjects[0].figures["acc"].value >= 0.9
        chosen[engine] = choices_in(result.records[0], count)
    for engine, choices in chosen.items():
        assert agreeing(chosen["transformers"], choices) >= 0.99 * count, engine
    other = api.evaluate(run, against="base", suite=suite, allow_overlap=True, out=tmp_path / "base")
    run_choices, base_choices = (choices_in(record, count) for record in other.records)
    assert agreeing(run_choices, chosen["llama.cpp"]) >= 0.99 * count
    assert agreeing(base_choices, chosen["llama.cpp"]) < 0.9 * count, "the control: another model, by the same measure"
