"""The page of an evaluation: what it says, and how a real browser shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora2serve.artifacts.suite_scores import SuiteFigure
from lora2serve.evaluation import eval_report
from lora2serve.evaluation.comparison import behavior_pairs, differences, score_pairs
from lora2serve.evaluation.eval_records import ItemResult
from lora2serve.evaluation.eval_report import EvalReport
from lora2serve.evaluation.report import eval_page
from lora2serve.evaluation.score_gates import judge, parse_gate
from lora2serve.evaluation.scorers import make_scorer
from lora2serve.evaluation.suite import Suite, SuiteItem
from lora2serve.evaluation.suite_run import Measured, evaluation, metric_names
from tests.support.browser import look, needs_browser

HOSTILE = 'a <b>text</b> & "more" <script>alert(1)</script>'


def measured(name: str, right: float, seed: int, count: int = 200) -> Measured:
    scores = np.random.default_rng(seed).uniform(size=count) < right
    items = [
        ItemResult(
            str(n), "0" * 64, HOSTILE if score else "no", float(score), 0.5 + n / 1000, 0.1, 12, "stop",
            "geo" if n % 2 else "law", question=f"{HOSTILE} {n}", expected=(HOSTILE,),
        )
        for n, score in enumerate(scores)
    ]  # fmt: skip
    return Measured(name, "llama.cpp 1.0", tuple(items))


def suite(count: int = 200) -> Suite:
    problems: list[str] = []
    scorer = make_scorer("exact", Path(), "scorer", problems)
    turns = ({"role": "user", "content": "?"},)
    items = tuple(SuiteItem(str(n), turns, ("x",), task="geo" if n % 2 else "law") for n in range(count))  # type: ignore[arg-type]
    return Suite("qa", items, scorer)


def report(new: float = 0.9, old: float = 0.5, name: str = "runs/demo", count: int = 200) -> EvalReport:
    both = [measured(name, new, 0, count), measured("base", old, 1, count)]
    asked = suite(count)
    metrics = metric_names(asked)
    records = [evaluation(item, asked, "3 of 200 questions were trained on") for item in both]
    rows = [eval_report.subject_row(item, record, "", cached=False) for item, record in zip(both, records, strict=True)]
    return EvalReport(
        suite="qa", suite_sha256=asked.sha256, items=count, scorer="exact", created=records[0].created,
        subjects=tuple(rows), differences=tuple(eval_report.differences(*both, metrics)),
        changes=tuple(eval_report.changes(*both)), notes=("qa.jsonl: 2 rows left out",),
        gates=(judge(parse_gate("acc >= base - 0.01"), name, both[0].vector("score"), both[1].vector("score"), None),),
    )  # fmt: skip


def compared() -> EvalReport:
    """As ``compare`` makes it: the first model twice, and figures that are no scores."""
    whole = report()
    new, old = measured("runs/demo", 0.9, 0), measured("base", 0.5, 1)
    again, (row, first) = replace(old, name="base, again"), whole.subjects
    pairs = {**score_pairs(old, new, suite()), **behavior_pairs(old, again, new)}
    shares = {name: SuiteFigure(value) for name, value in (("base, again", 0.0), ("runs/demo", 0.5))}
    others = [replace(first, name="base, again"), row]
    return replace(
        whole, command="compare", differences=tuple(differences("base", "runs/demo", pairs, {})), gates=(),
        subjects=(first, *(replace(r, figures={**r.figures, "changed": shares[r.name]}) for r in others)),
    )  # fmt: skip


def test_what_the_page_of_compare_says(tmp_path: Path) -> None:
    """Each figure in its unit; p as it is judged, adjusted for all figures; a rise of what is no score is not won."""
    both = compared()
    text = eval_page.write(both, tmp_path).read_text()
    found = {item.metric: item for item in both.differences}
    assert f"p {found['acc'].p_adjusted:.2g}." in text and found["acc"].p_adjusted > found["acc"].difference.p
    assert ">Higher</th>" in text and ">Won</th>" not in text and "is the floor" in text
    assert ">Won</th>" in eval_page.render(report()) and "is the floor" not in eval_page.render(report()), "the control"
    shown = [eval_page.smallest_text(found[name]) for name in ("acc", "length")]
    assert shown[0].endswith(" points") and float(shown[0].split()[0]) > 1 and shown[1].startswith("times 1.")


def test_what_the_page_says(tmp_path: Path) -> None:
    page = eval_page.write(report(), tmp_path)
    text = page.read_text()
    assert "runs/demo is better than base: +" in text and "<script>alert" not in text and HOSTILE not in text
    assert "accuracy, geo" in text and "3 of 200 questions were trained on" in text and "2 rows left out" in text
    assert 'class="pill met"' in text and 'class="pill missed"' not in text
    content = EvalReport.from_text((tmp_path / "report.json").read_text(), "report.json")
    assert (
        content == replace(report(), created=content.created)
        and json.loads((tmp_path / "report.json").read_text())["format"] == 1
    )
    lost = [change for change in content.changes if not change.won]
    assert lost and content.changes[0] == lost[0], "what was lost comes first"


def test_verdicts_in_words() -> None:
    assert "runs/demo is worse than base" in eval_page.verdict(report(0.5, 0.9))
    assert "20 items are not enough to tell" in eval_page.verdict(report(0.5, 0.5, count=20))
    assert "they show a difference of" in eval_page.verdict(report(0.5, 0.5, count=20))
    few = eval_page.verdict(report(1.0, 0.0, count=5))
    assert "5 items are not enough" in few and "; so few show none at all." in few, few
    assert "they show a difference of 100 points at least" in eval_page.verdict(report(1.0, 1.0, count=6))
    same = report()
    assert "do not differ" in eval_page.verdict(replace(same, differences=tuple(
        eval_report.differences(measured("a", 0.5, 0), measured("b", 0.5, 0), {"acc": None})
    )))  # fmt: skip
    assert eval_page.verdict(replace(same, differences=(), gates=())).startswith("runs/demo: accuracy 85.0 %")
    assert not report(0.5, 0.9).met and "1 of 1 gates are not met" in eval_page.verdict(report(0.5, 0.9))


@pytest.mark.engine
@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")])
def test_in_a_browser(tmp_path: Path, width: int, scheme: str) -> None:
    """Nothing wider than the window, every band drawn, the verdict on the first screen, the colors of the scheme."""
    page = eval_page.write(report(name="a-name-without-an-end-" * 5), tmp_path)
    measures = (
        "wide: root.scrollWidth - root.clientWidth, width: innerWidth,"
        "bands: [...document.querySelectorAll('.track i')].every(b => b.getBoundingClientRect().width > 1),"
        "count: document.querySelectorAll('.track').length,"
        "said: document.querySelector('.lead').getBoundingClientRect().top,"
        "small: [...document.querySelectorAll('body *')].filter(e => e.innerText && parseFloat(getComputedStyle(e).fontSize) < 11).length,"
        "paper: getComputedStyle(document.body).backgroundColor"
    )
    seen = look(page, measures, width=width, scheme=scheme)
    assert (seen["wide"], seen["small"], seen["width"], seen["bands"], seen["count"]) == (0, 0, width, True, 6)
    assert seen["said"] < 500
    assert seen["paper"] == ("rgb(251, 252, 253)" if scheme == "light" else "rgb(14, 18, 23)")


@pytest.mark.engine
@needs_browser
def test_compare_on_a_phone(tmp_path: Path) -> None:
    """Every verdict is seen without moving the table."""
    page = eval_page.write(compared(), tmp_path)
    measures = (
        "wide: root.scrollWidth - root.clientWidth,"
        "ends: [...document.querySelectorAll('td .pill')].map(p => p.getBoundingClientRect().right)"
    )
    seen = look(page, measures, width=390)
    assert seen["wide"] == 0 and len(seen["ends"]) == len(compared().differences) and max(seen["ends"]) < 390
