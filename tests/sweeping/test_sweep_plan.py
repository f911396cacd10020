"""``sweep --dry-run``: what it says, that it says it of the sweep that would run, and that it leaves nothing."""

from __future__ import annotations

import json
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from lora2serve.artifacts.run_record import EvalLoss
from lora2serve.cli import run
from lora2serve.config import recipe as recipes
from lora2serve.errors import Lora2ServeError, UsageError
from lora2serve.planning.gpus import GpuModel
from lora2serve.progress import Silent
from lora2serve.sweeping.longest_search import most_trials
from lora2serve.sweeping.search_plan import SearchPlan
from lora2serve.sweeping.search_settings import SearchSettings
from lora2serve.sweeping.search_space import SearchPoint, SearchSpace
from lora2serve.sweeping.sweep_loop import SweepLoop
from lora2serve.sweeping.sweep_plan import SweepPlan, _planned, plan_sweep
from lora2serve.sweeping.sweep_preparation import prepare
from lora2serve.sweeping.sweep_recipe import sweep
from lora2serve.sweeping.sweep_request import SweepRequest
from lora2serve.sweeping.sweep_start import started
from lora2serve.sweeping.trial_files import TrialFiles
from lora2serve.sweeping.trial_ledger import open_ledger, spec_to_json
from lora2serve.sweeping.trial_plans import TrialPlanner, trial_planner
from lora2serve.sweeping.trial_process import TrialOrder
from lora2serve.sweeping.trial_record import FULL, RowLoss, TrialOutcome, TrialSpec
from tests.planning.conftest import LLAMA3_8B, write_config
from tests.support.folders import content
from tests.support.runs import DEMO, Told, recipe_file, write_jsonl
from tests.sweeping.planted_sweep import SPACE, PlantedPlace, begin, begun
from tests.sweeping.simulated_search import BASE_LOSS, ROWS, TARGETS, TOKENS, PlantedLoss

DATA = {"train": str(DEMO / "train.jsonl"), "eval": str(DEMO / "eval.jsonl")}
RATES = "learning rate and layers"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return recipe_file(tmp_path, DEMO / "base", DATA)


def planned(recipe: Path, **words: object) -> SweepPlan:
    """Without a trace."""
    before = content(recipe.parent)
    plan = plan_sweep(SweepRequest(recipe, **words), Silent())  # type: ignore[arg-type]
    assert content(recipe.parent) == before
    return plan


def test_what_would_be_tried(recipe: Path, tmp_path: Path) -> None:
    plan = planned(recipe, fraction=0.3, overrides=["train.steps=160"], gpu="24", jobs=1)
    assert plan.space == {
        "train.learning_rate": SearchSpace().rates, "train.lora.targets": TARGETS, "train.lora.rank": (8, 16, 32, 64)
    }  # fmt: skip
    assert (plan.rows, plan.all_rows, plan.search_rows, plan.final_rows) == (60, 200, 60, 60)
    assert (plan.steps, len(plan.rungs), plan.judged_by) == (48, 3, "eval loss")
    assert (plan.points, plan.fitting, plan.does_not_fit, plan.gpu) == (96, 96, (), "24 GiB")
    assert plan.folder == tmp_path / "sweeps" / plan.name and plan.storage == str(plan.folder / "sweep.db")
    assert plan.done is None and not plan.finished and plan.trials == 67
    assert plan.notes == (
        "where the best learning rate is an end of the range, rates beyond it are tried, too, 4 steps at most",
        "where the largest rank is still better, 128 and 256 may be tried, too",
    )
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").write_text("{}")
    after = planned(recipe, fraction=0.3, overrides=["train.steps=160"], gpu="24", jobs=1)
    assert "4 at most, which are counted" in after.notes[2] and after.trials == 72, "the control"


def test_overrides_as_values(recipe: Path) -> None:
    """As ``sweep`` takes them; what is no value of YAML is refused at once."""
    asked = [planned(recipe, jobs=1, overrides=each) for each in ({"train.steps": 3}, ["train.steps=3"])]
    assert asked[0] == asked[1] and asked[0].steps == 3 != planned(recipe, jobs=1).steps
    with pytest.raises(UsageError, match=r"^overrides\['train.steps'\]: "):
        SweepRequest(recipe, overrides={"train.steps": {3}})


def test_answers_to_held_out_rows(recipe: Path, tmp_path: Path) -> None:
    assert planned(recipe, suite="held-out").judged_by == "accuracy on held-out"
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"a text of its own {n}"} for n in range(9)])
    words = {"suite": "held-out", "overrides": [f"data.eval={texts}"]}
    for ask in (sweep, lambda *args, **more: plan_sweep(SweepRequest(*args, **more))):
        with pytest.raises(Lora2ServeError, match=r"^--suite held-out: search.jsonl: no row of 4 has an answer"):
            ask(recipe, **words)  # type: ignore[operator]
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize(
    "words",
    [{"overrides": ["train.lora.rnk=8"]}, {"overrides": ["data.train=none.jsonl"]}, {"overrides": ["model.path=./none"]},
     {"overrides": ["model.revision=main"]}, {"space": "none.yaml"}, {"gpu": "40900"}, {"suite": "heldout"},
     {"budget": 3}, {"shots": 2}, {"task": ("a",), "suite": "held-out"}, {"limit": 5}, {"name": "taken"},
     {"storage": "postgrsql://ada:word@db/x"}, {"storage": "sweeps"}, {"on": "rey"}],
    ids=str,
)  # fmt: skip
def test_it_refuses_as_the_sweep_does(recipe: Path, tmp_path: Path, words: dict[str, object]) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "taken").touch()
    before = content(tmp_path)
    with pytest.raises(Lora2ServeError) as swept:
        sweep(recipe, **words)  # type: ignore[arg-type]
    with pytest.raises(Lora2ServeError) as dry:
        plan_sweep(SweepRequest(recipe, **words))  # type: ignore[arg-type]
    assert (type(dry.value), dry.value.message, dry.value.hint) == (
        type(swept.value), swept.value.message, swept.value.hint
    )  # fmt: skip
    assert content(tmp_path) == before


@pytest.mark.parametrize("option", ["storage", "join"])
def test_a_database_of_no_kind(recipe: Path, option: str) -> None:
    """The control: one of SQLAlchemy's own, whose driver may not be here."""
    own = {"storage": recipe, "join": None}[option]
    with pytest.raises(UsageError) as refused:
        sweep(own, **{option: "postgrsql://ada:word@db/x"})  # type: ignore[arg-type]
    assert (
        refused.value.message == f"--{option} postgrsql://db/x: unknown kind of database (did you mean 'postgresql'?)"
    )
    with pytest.raises(Lora2ServeError, match=r"^(?!.*unknown kind)"):
        sweep(own, **{option: "mysql://nowhere.invalid/x"})  # type: ignore[arg-type]


def test_what_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the points that a trial's own plan refuses, at all rates."""
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / "llama", LLAMA3_8B)
    recipe = recipe_file(tmp_path, path, DATA, batch_size=1, quantize="nf4")
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"train.lora.targets": ["qv", "all-linear"]}))
    plan = planned(recipe, space="space.yaml", gpu="8")
    planner = trial_planner(recipes.load(recipe), "8", 1, Silent())
    refused = []
    for targets in ("qv", "all-linear"):
        for rank in SearchSpace().ranks:
            values = {"train.lora.targets": targets, "train.lora.rank": rank}
            if planner.plan(recipe, [f"{key}={json.dumps(value)}" for key, value in values.items()]).misfit:
                refused.append(f"rank {rank} on {targets}")
    assert [each.words for each in plan.does_not_fit] == refused and 0 < len(refused) < 8
    assert plan.fitting == plan.points - 6 * len(refused) == 48 - 6 * len(refused)
    assert "GB by its plan, and 8 GiB has 8.6 GB" in plan.does_not_fit[0].reason
    assert planned(recipe, space="space.yaml", gpu="24").does_not_fit == (), "the control"


def test_a_sweep_that_is_there_is_told(recipe: Path, tmp_path: Path) -> None:
    """With its trials, of which one that failed is tried again, as the sweep itself then says."""
    request = SweepRequest(recipe, name="there", jobs=1)
    prepared = prepare(request, Silent())
    folder = prepared.files.folder
    begin(folder, prepared.location, question=prepared.question, space=prepared.space)
    ledger = open_ledger(prepared.location)
    for point, outcome in zip(
        prepared.space.grid(), [PlantedLoss(2e-4, "qv", 8).outcome] * 2 + [lambda spec: TrialOutcome("failed", "no")],
        strict=False,
    ):  # fmt: skip
        spec = TrialSpec(point, 0, 42)
        assert ledger.claim(spec)
        ledger.finish(spec, outcome(spec))
    plan = planned(recipe, name="there", jobs=1)
    assert (plan.done, plan.failed, plan.folder) == (2, 1, folder)
    assert planned(recipe, name="another").done is None, "the control"
    for ask in (sweep, lambda *args, **more: plan_sweep(SweepRequest(*args, **more))):
        with pytest.raises(UsageError, match="a sweep of another recipe, space, rows or budget"):
            ask(recipe, name="there", budget=40)  # type: ignore[operator]
    started(request, told := Told())
    assert "the sweep there goes on: 2 trials are done, 1 that failed are tried again" in told.notes


def test_what_a_begun_sweep_tries_first_is_counted(recipe: Path) -> None:
    """Two rates beyond its space; the control: a sweep that begins with none."""
    request = SweepRequest(recipe, name="there", jobs=1)
    prepared = prepare(request, Silent())
    first = [TrialSpec(SearchPoint(rate, "qv", prepared.space.first_rank), 0, 42) for rate in (3e-6, 6e-6)]
    begin(
        prepared.files.folder, prepared.location, question=prepared.question, space=prepared.space,
        first=tuple(map(spec_to_json, first)),
    )  # fmt: skip
    most = most_trials(prepared.space, prepared.settings(0.0), 1, 2)
    plan = planned(recipe, name="there", jobs=1)
    assert {each.phase: each.trials for each in plan.phases} == most
    assert plan.trials > planned(recipe, name="another", jobs=1).trials


def test_a_storage_is_shown_without_its_password(recipe: Path) -> None:
    """Of a sweep that is not there, as no such database is. The control: the sweep itself opens it with the password."""
    prepared = prepare(SweepRequest(recipe, storage="postgresql://ada:word@h.invalid/db"), Silent())
    assert prepared.location == "postgresql://ada:word@h.invalid/db"
    assert _planned(prepared, None).storage == "postgresql://h.invalid/db"


@dataclass
class FailingOnce:
    """All trials but the first."""

    failed: bool = False

    def outcome(self, spec: TrialSpec) -> TrialOutcome:
        fails, self.failed = not self.failed, True
        return TrialOutcome("failed", "no") if fails else PlantedLoss(2e-4, "all-linear", 16).outcome(spec)


def test_a_finished_sweep_is_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its loop begins nothing. The controls: before its first trial, and with one that failed and is tried again."""
    prepared = prepare(SweepRequest(recipe, name="there", jobs=1), Silent())
    begin(prepared.files.folder, prepared.location, question=prepared.question, space=SPACE)
    words = ["sweep", str(recipe), "--name", "there", "--jobs", "1", "--dry-run"]
    assert planned(recipe, name="there", jobs=1).done == 0
    place = PlantedPlace(prepared.files.folder / "log")
    planner = TrialPlanner(None, GpuModel("none", 1), 1.0)

    def loop() -> SweepLoop:
        loss, ledger = EvalLoss(BASE_LOSS, 1.0, 1), open_ledger(prepared.location)
        return SweepLoop(ledger, prepared.files, planner, place, Path("base"), loss, 1, Silent())

    place.planted, usual = FailingOnce(), place.planted  # type: ignore[assignment]
    count = len(loop().run().tried)
    plan = planned(recipe, name="there", jobs=1)
    assert (plan.done, plan.failed, plan.finished) == (count - 1, 1, False)
    place.planted = usual
    open_ledger(prepared.location).retry_failed()
    count, before = len(loop().run().tried), len(begun(place.log))
    plan = planned(recipe, name="there", jobs=1)
    assert (plan.done, plan.failed, plan.finished) == (count, 0, True)
    assert run(words) == 0
    shown = capsys.readouterr().out
    assert f"that sweep is finished, {count} trials are done; nothing is trained" in shown and "at most," not in shown
    assert run([*words, "--json"]) == 0 and json.loads(capsys.readouterr().out)["finished"]
    loop().run()
    assert len(begun(place.log)) == before > count


def test_ctrl_c_says_that_it_goes_on(tmp_path: Path) -> None:
    """The control: another error does not."""
    location = str(tmp_path / "a.journal")
    facts = begin(tmp_path / "sweep", location)
    for error, notes in (
        (KeyboardInterrupt(), ["the same command goes on with the sweep sweep"]),
        (ValueError("no"), []),
    ):

        class Ending(PlantedPlace):
            raised: BaseException = error

            def run(self, order: TrialOrder) -> TrialOutcome:
                raise self.raised

        planner, told = TrialPlanner(None, GpuModel("none", 1), 1.0), Told()
        place, files = Ending(tmp_path / "log"), TrialFiles(Path(facts.folder))
        with pytest.raises(type(error)):
            SweepLoop(open_ledger(location), files, planner, place, Path("base"), None, 1, told).run()
        assert [note for note in told.notes if "goes on" in note] == notes


def test_a_storage_is_as_it_was(recipe: Path, tmp_path: Path) -> None:
    """Optuna would make its tables in a database of another program."""
    connection = sqlite3.connect(tmp_path / "own.db")
    connection.execute("create table towns (name text)")
    connection.commit()
    connection.close()
    assert planned(recipe, storage="own.db").storage == str(tmp_path / "own.db")
    (tmp_path / "own.journal").touch()
    assert planned(recipe, storage="own.journal").done is None
    (tmp_path / "text.db").write_text("no database at all, though it has some bytes")
    with pytest.raises(Lora2ServeError, match="file is not a database"):
        planned(recipe, storage="text.db")


# --- how many trials at most ---


@dataclass
class Longest:
    """Short trials like the smallest rate of ``qv`` alone, whole ones all larger rates; each rank is a gain."""

    settings: SearchSettings

    def outcome(self, spec: TrialSpec) -> TrialOutcome:
        point = spec.point
        if spec.level not in (self.settings.last_level, FULL):
            loss = 1.0 if (point.targets, point.rate) == ("qv", 1e-4) else 1 + point.rate + (point.targets == "qv")
        else:
            loss = (1.5 + 0.01 * (point.targets != "qv") - 50 * point.rate) * 8 / point.rank
        return TrialOutcome(
            losses=RowLoss((loss * TOKENS,) * ROWS, (TOKENS,) * ROWS), memory=int(1e9 / loss), memory_measured=True
        )


def phases(specs: list[TrialSpec], space: SearchSpace) -> Counter[str]:
    """By what stands in the trials themselves."""
    return Counter(
        "front" if spec.level == FULL else RATES if spec.point.rank == space.first_rank else "rank" for spec in specs
    )


@pytest.mark.parametrize("trials", [None, 25])
def test_the_longest_sweep_is_as_long_as_that(tmp_path: Path, trials: int | None) -> None:
    """The loop, the storage and the search are the real ones; the losses are planted."""
    settings = SearchSettings(base_loss=BASE_LOSS, trials=trials)
    location = str(tmp_path / "a.journal")
    facts = begin(tmp_path / "sweep", location, settings=settings)
    place = PlantedPlace(tmp_path / "log")
    place.planted = Longest(settings)  # type: ignore[assignment]
    planner = TrialPlanner(None, GpuModel("none", 1), 1.0)
    loss, files = EvalLoss(BASE_LOSS, 1.0, 1), TrialFiles(Path(facts.folder))
    plan = SweepLoop(open_ledger(location), files, planner, place, Path("base"), loss, 1, Silent()).run()
    most = most_trials(SPACE, settings, 1)
    counts = phases(list(plan.tried.values()), SPACE)
    if trials is None:
        assert counts == most and sum(counts.values()) == 33
    else:
        assert sum(counts.values()) <= trials and all(counts[phase] <= most[phase] for phase in most)
        assert counts[RATES] == most[RATES] == settings.exploring_trials


def searched_by(
    space: SearchSpace, settings: SearchSettings, jobs: int, outcome: Callable[[TrialSpec], TrialOutcome],
    draw: random.Random, first: Sequence[SearchPoint],
) -> list[TrialSpec]:  # fmt: skip
    """All trials of a search of which ``jobs`` run at a time, and end in any order."""
    results: dict[str, TrialOutcome] = {}
    tried: dict[str, TrialSpec] = {}
    running: list[TrialSpec] = []
    while True:
        plan = SearchPlan(space, settings, dict(results), dict(tried), first)
        step = plan.step()
        wanted = [spec for spec in step.trials if spec.key not in tried]
        if step.to_choose:
            left = [spec for point in space.grid() if (spec := plan.spec(point, 0)).key not in tried]
            wanted += [draw.choice(left)] if left and not wanted else []
        room = (settings.trials if settings.trials is not None else 10**9) - len(tried)
        for spec in wanted[: min(jobs - len(running), room)]:
            tried[spec.key] = spec
            running.append(spec)
        if not running:
            return list(tried.values())
        ended = running.pop(draw.choice([0, -1, draw.randrange(len(running))]))
        results[ended.key] = outcome(ended)


def drawn_outcome(number: int, draw: random.Random) -> Callable[[TrialSpec], TrialOutcome]:
    """Losses that rise or fall with the rate, for each choice of layers and each rung as it comes; some trials fail."""
    slope, gain, failing = draw.random(), draw.choice([0.9, 1.0]), draw.random() / 4

    def outcome(spec: TrialSpec) -> TrialOutcome:
        own = random.Random(f"{number} {spec.key}")
        if own.random() < failing:
            return TrialOutcome("failed", "no")
        up = random.Random(f"{number} {spec.level} {spec.point.targets}").choice([-1, 1])
        loss = (2 + up * slope * spec.point.rate) * gain ** (spec.point.rank / 16) * (1 + own.random() * slope / 99)
        return TrialOutcome(losses=RowLoss((loss,) * 10, (1,) * 10), memory=int(1e9 / loss))

    return outcome


def drawn_first(space: SearchSpace, draw: random.Random) -> list[SearchPoint]:
    """Points of earlier runs, some of them beyond the range of rates or between two of it."""
    rates = [draw.choice([5e-5, 1e-4, 1.5e-4, 3e-4, 5e-4, 2e-3, 1e-2]) for _ in range(draw.choice([1, 2, 4, 4]))]
    return list(dict.fromkeys(SearchPoint(rate, draw.choice(space.targets), space.first_rank) for rate in rates))


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_search_is_longer(count: int) -> None:
    """Whatever trials reach, in whichever order they end; the longest is met where one is drawn that wanders."""
    draw = random.Random(0)
    met: Counter[str] = Counter()
    for number in range(count):
        rates, ranks = draw.choice([1, 2, 3, 6]), draw.choice([1, 2, 4])
        space = SearchSpace(
            tuple(1e-4 * 2**n for n in range(rates)), TARGETS[: draw.choice([1, 2, 4])], tuple(8 * 2**n for n in range(ranks))
        )  # fmt: skip
        shares = draw.choice([(1.0,), (1 / 3, 1.0), (1 / 9, 1 / 3, 1.0)])
        settings = SearchSettings(100.0, shares, trials=draw.choice([None, None, 4, 7, 10, 25, 40]))
        jobs, outcome = draw.choice([1, 1, 2, 4]), drawn_outcome(number, draw)
        first = drawn_first(space, draw) if number % 2 else []
        most = most_trials(space, settings, jobs, len(first))
        counts = phases(searched_by(space, settings, jobs, outcome, draw, first), space)
        assert all(counts[phase] <= most[phase] for phase in most), (number, counts, most)
        met.update(phase for phase in most if counts[phase] == most[phase] > 0)
    assert min(met[phase] for phase in (RATES, "rank", "front")) > 0, "the control"


@pytest.mark.parametrize(
    ("budget", "jobs", "expected"),
    [({}, 4, (18, 9, 18)), ({"seconds": 3600.0}, 1, (15, 6, 12)), ({"seconds": 3600.0}, 4, (18, 9, 72)),
     ({"trials": 10}, 1, (6, 3, 7)), ({"trials": 25}, 4, (18, 9, 19)), ({"trials": 40}, 4, (18, 9, 34))],
    ids=str,
)  # fmt: skip
def test_most_with_a_budget(budget: dict[str, float], jobs: int, expected: tuple[int, ...]) -> None:
    """The front may be another one after each trial that ends late; what is tried at first is of no rank or front."""
    settings = replace(SearchSettings(BASE_LOSS), **budget)  # type: ignore[arg-type]
    assert tuple(most_trials(SPACE, settings, jobs).values()) == expected


def test_longer_where_trials_fail() -> None:
    """What is first looked at is alone in the end, so that all around it is new; the control: where none fails."""
    space, settings = SearchSpace((1e-4, 2e-4), ("qv",), (8,)), SearchSettings(BASE_LOSS)
    longest = Longest(settings).outcome

    def outcome(spec: TrialSpec) -> TrialOutcome:
        return TrialOutcome("failed", "no") if spec.level == 0 and spec.point.rate > 1e-4 else longest(spec)

    most = most_trials(space, settings, 1)
    counts = [phases(searched_by(space, settings, 1, each, random.Random(0), []), space) for each in (outcome, longest)]
    assert counts[0][RATES] == most[RATES] == counts[1][RATES] + 1


# --- the command ---


def test_the_command(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(tmp_path)
    words = ["sweep", str(recipe), "--dry-run", "--gpu", "24", "--budget", "40", "--set", "train.steps=160"]
    assert run(words) == 0
    shown = capsys.readouterr().out
    for part in (
        "train.learning_rate       5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3\n", "96; into 24 GiB (25.8 GB) 96 fit\n",
        "learning rate and layers  24 trials at most\n", "in all                    40 trials at most, ",
        "held out                  60 rows for the search, 60 for the front\n", f"{tmp_path}/sweeps/",
    ):  # fmt: skip
        assert part in shown, part
    assert run([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [each["trials"] for each in plan["phases"]] == [24, 10, 12] and plan["trials"] == 40
    assert plan["space"]["train.lora.rank"] == [8, 16, 32, 64] and plan["done"] is None
    assert run(["sweep", "--dry-run", "--join", "x.db"]) == 2
    assert "--dry-run and --join: a sweep that was begun needs no plan" in capsys.readouterr().err
    assert content(tmp_path) == before
