"""front.json, the recommended recipe and the page, of a planted search; the page in a real browser."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lora2serve.config import recipe as recipes
from lora2serve.sweeping.report.sweep_page import render
from lora2serve.sweeping.search_plan import SearchPlan
from lora2serve.sweeping.search_settings import SearchSettings
from lora2serve.sweeping.sweep_facts import SweepFacts
from lora2serve.sweeping.sweep_report import SweepReport, report
from lora2serve.sweeping.sweep_writers import write_result
from lora2serve.sweeping.trial_files import TrialFiles
from lora2serve.sweeping.trial_record import TrialOutcome, TrialSpec
from tests.parity_check.test_report import Tags
from tests.support.browser import look, needs_browser
from tests.sweeping.planted_sweep import BASE, FORK, SPACE, begin
from tests.sweeping.simulated_search import BASE_LOSS, PlantedLoss, searched

HOSTILE = "<img src=x onerror=alert(1)>'\"&"


@pytest.fixture
def facts(tmp_path: Path) -> SweepFacts:
    return begin(tmp_path / "planted")


@cache
def plan(problem: str) -> SearchPlan:
    """A search that is done."""
    planted = PlantedLoss(4e-4, "all-linear", 16, for_targets=0.05)

    def outcome(spec: TrialSpec) -> TrialOutcome:
        if problem and spec.point.targets == "qv" and spec.point.rate == 1e-4:
            return TrialOutcome("failed", problem)
        return replace(planted.outcome(spec), curve=((10, 2.0), (20, 1.5), (30, 1.1)))

    return searched(outcome, SPACE, SearchSettings(base_loss=BASE_LOSS))


def made(facts: SweepFacts, problem: str = "") -> SweepReport:
    """A report with a trial that failed, and curves."""
    assert facts.settings == plan(problem).settings
    return report(plan(problem), replace(facts, near=("runs/a (near)",)), "quality")


def test_front_json_is_whole(facts: SweepFacts) -> None:
    """The front is that of a comparison of all with all, and what is written can be read."""
    result = made(facts, "why")
    assert SweepReport.from_text(result.to_text(), "front.json") == result
    content = json.loads(result.to_text())
    whole = [line for line in content["trials"] if line["level"] >= 0 and line["share"] == 1.0 and line["objectives"]]
    values = {line["key"]: tuple(line["objectives"].values()) for line in whole}
    brute = {
        key for key, own in values.items()
        if not any(all(a <= b for a, b in zip(o, own, strict=True)) and o != own for o in values.values())
    }  # fmt: skip
    assert {line["key"] for line in whole if line["on_front"]} == brute and len(brute) < len(whole)
    assert [line["status"] for line in content["trials"]].count("failed") == 1
    assert content["base_final_loss"] == pytest.approx(BASE.mean) and content["judged"]
    assert {choice["constraint"] for choice in content["choices"]} == {"quality", "memory", "time"}


def test_the_recommended_recipe(facts: SweepFacts, tmp_path: Path) -> None:
    """It loads, is the swept one but for what is recommended, and its first lines say why."""
    files, result = TrialFiles(Path(facts.folder)), made(facts)
    write_result(result, facts, files)
    chosen, settings = recipes.load(files.recommended), result.recommended.settings
    assert chosen.train.learning_rate == settings["train.learning_rate"]
    assert (chosen.train.lora.rank, chosen.train.lora.targets) == (
        settings["train.lora.rank"], settings["train.lora.targets"],
    )  # fmt: skip
    assert chosen.train.lora.alpha == 2 * chosen.train.lora.rank
    original = recipes.load(files.recipe)
    same = replace(
        chosen, train=replace(chosen.train, lora=original.train.lora, learning_rate=original.train.learning_rate)
    )
    assert same == original
    text = files.recommended.read_text()
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert text.startswith("# lora2serve train ") and " ".join(result.recommended.reason) in comment
    assert sorted(path.name for path in files.folder.glob("*.*")) == [
        "front.json", "recipe.yaml", "recommended.yaml", "report.html",
    ]  # fmt: skip


def test_whether_it_looked_far_enough_is_seen(facts: SweepFacts) -> None:
    """Enough is no alarm."""
    result = made(facts)
    for at_edge, mark in (("", "first enough"), ("the rate is the largest", "first found")):
        looked = replace(result.explored, growth=0.0, at_edge=at_edge, budget_ended=False)
        page = render(replace(result, explored=looked, explored_words=looked.words))
        assert f'<div class="{mark}"><b>{looked.words[:16]}' in page


@pytest.mark.parametrize(("workers", "times"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_workers_that_end_at_the_same_time(facts: SweepFacts, workers: int, times: int) -> None:
    """Each writes all of it, into one folder."""
    files, result = TrialFiles(Path(facts.folder)), made(facts)
    start = FORK.Barrier(workers)

    def write() -> None:
        start.wait()
        for _ in range(times):
            write_result(result, facts, files)

    children = [FORK.Process(target=write) for _ in range(workers)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * workers
    assert SweepReport.from_text(files.front.read_text(), "front.json") == result
    recipes.load(files.recommended)
    assert sorted(path.name for path in files.folder.iterdir() if path.is_file()) == [
        "front.json", "recipe.yaml", "recommended.yaml", "report.html",
    ]  # fmt: skip


def test_the_page_is_whole_and_alone(facts: SweepFacts) -> None:
    text = render(made(replace(facts, name=HOSTILE), HOSTILE))
    tags = Tags()
    tags.feed(text)
    assert not tags.open and "img" not in tags.names and tags.names.count("script") == 0
    assert all(link.startswith(("#", "data:")) for link in tags.links)
    assert tags.names.count("svg") >= 3, "the front, and the curves"
    for words in ("Where memory is scarce", "PED-ANOVA", "rank", "Not explored enough", "runs/a (near)", "flat"):
        assert words in text, words


@pytest.mark.engine
@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")])
def test_in_a_browser(facts: SweepFacts, tmp_path: Path, width: int, scheme: str) -> None:
    """No console error, nothing wider than the window, pictures drawn, and the colors of the scheme."""
    page = tmp_path / "report.html"
    page.write_text(render(made(facts, "a-name-without-an-end-" * 9)))
    seen = look(
        page,
        "wide: root.scrollWidth - root.clientWidth,"
        "drawn: [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height > 100),"
        "said: document.querySelector('.ship .name').getBoundingClientRect().bottom,"
        "small: [...document.querySelectorAll('body *')].filter(e => e.innerText && parseFloat(getComputedStyle(e).fontSize) < 11).length,"
        "paper: getComputedStyle(document.body).backgroundColor, width: innerWidth",
        width=width, scheme=scheme,
    )  # fmt: skip
    assert seen["said"] < 500, "on the first screen"
    assert len(seen["drawn"]) >= 3 and all(seen["drawn"])
    assert (seen["wide"], seen["small"], seen["width"]) == (0, 0, width)
    assert seen["paper"] == ("rgb(251, 252, 253)" if scheme == "light" else "rgb(14, 18, 23)")
