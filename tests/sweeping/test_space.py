"""What a sweep may change, what of it fits, and where it begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lora2serve.api.memory_check import refuse_too_large
from lora2serve.artifacts.lineage import BaseRecord, Fingerprint
from lora2serve.artifacts.run_record import EvalLoss
from lora2serve.config import recipe as recipes
from lora2serve.errors import RecipeError, UsageError
from lora2serve.planning.gpus import GpuModel
from lora2serve.planning.memory_plan import planned_bytes
from lora2serve.planning.plan_settings import settings_of
from lora2serve.progress import Silent
from lora2serve.sweeping.data_likeness import NEAR, data_figures
from lora2serve.sweeping.earlier_runs import earlier_runs, first_points
from lora2serve.sweeping.search_space import SearchPoint, SearchSpace, read_space
from lora2serve.sweeping.sweep_loop import SweepLoop
from lora2serve.sweeping.sweep_plan import plan_sweep
from lora2serve.sweeping.sweep_recipe import sweep
from lora2serve.sweeping.sweep_request import SweepRequest
from lora2serve.sweeping.trial_files import TrialFiles, trial_overrides
from lora2serve.sweeping.trial_ledger import open_ledger
from lora2serve.sweeping.trial_plans import TrialPlanner, trial_planner, usable_targets
from lora2serve.sweeping.trial_record import FULL, TrialSpec
from tests.planning.conftest import LLAMA3_8B, write_config
from tests.support.runs import DEMO, Told, recipe_file, rows, write_jsonl
from tests.sweeping.planted_sweep import PlantedPlace, begin, begun

DATA = {"train": str(DEMO / "train.jsonl"), "eval": str(DEMO / "eval.jsonl")}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return recipe_file(tmp_path, DEMO / "base", DATA)


def space_file(folder: Path, content: object) -> Path:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_space(recipe: Path, tmp_path: Path) -> None:
    content = {
        "train.learning_rate": [4e-4, 1e-4], "train.lora.targets": ["qv", ["q_proj", "down_proj"]],
        "train.lora.rank": 8, "train.lora.dropout": [0.0, 0.1],
    }  # fmt: skip
    space = read_space(space_file(tmp_path, content), recipe, ())
    assert (space.rates, space.targets, space.ranks) == ((1e-4, 4e-4), ("qv", "q_proj+down_proj"), (8,))
    assert len(space.grid()) == 8 and space.neighbors(1e-4) == (2.5e-5, 4e-4)
    point = space.grid()[-1]
    loaded = recipes.load(recipe, [f"{key}={json.dumps(value)}" for key, value in point.overrides(2.0).items()])
    assert loaded.train.lora.targets == ("q_proj", "down_proj") and loaded.train.lora.alpha == 16
    assert loaded.train.lora.dropout == dict(point.others)["train.lora.dropout"]
    assert SearchSpace.from_json(json.loads(space.to_text()), "") == space
    assert read_space(None, recipe, ()) == SearchSpace()


def test_every_problem_of_a_space_at_once(recipe: Path, tmp_path: Path) -> None:
    content = {
        "train.learning_rate": [2.0, "x"], "train.lora.rnk": [8], "data.max_length": [64], "train.steps": [5],
        "train.lora.alpha": [8], "train.lora.rank": [8, 8], "train.lora.dropout": [],
    }  # fmt: skip
    with pytest.raises(RecipeError) as error:
        read_space(space_file(tmp_path, content), recipe, ())
    for words in (
        "data.max_length: expected a field of `train`", "train.steps: cannot be searched", "it grows with the rank",
        "train.lora.rank: 8 given twice", "train.lora.dropout: an empty list", "train.learning_rate: 'x', expected a number",
        "did you mean 'train.lora.rank'",
    ):  # fmt: skip
        assert words in error.value.message, words
    with pytest.raises(RecipeError, match="empty"):
        read_space(space_file(tmp_path, {}), recipe, ())


def test_presets_that_this_model_has(recipe: Path) -> None:
    """Presets of the same layers are one; names that it does not have are refused."""
    shape = trial_planner(recipes.load(recipe), "", 1, Silent()).shape
    told = Told()
    assert shape and usable_targets(SearchSpace(), shape, told) == SearchSpace().targets and not told.notes
    attention = "q_proj+k_proj+v_proj+o_proj"
    both = SearchSpace(targets=("attention", attention))
    assert usable_targets(both, shape, told) == ("attention",) and "the same layers as attention" in told.notes[0]
    with pytest.raises(UsageError, match="no linear layer"):
        usable_targets(SearchSpace(targets=("query",)), shape, told)


def test_rungs_scale_steps_and_evaluations(recipe: Path, tmp_path: Path) -> None:
    facts, files = begin(tmp_path / "sweep"), TrialFiles(tmp_path / "sweep")
    point = SearchPoint(1e-4, "qv", 8)

    def loaded(level: int, *changes: str) -> recipes.Recipe:
        train = recipes.load(recipe, changes).train
        overrides = trial_overrides(TrialSpec(point, level, 42), train, facts.settings, files, 0.5)
        return recipes.load(recipe, [*changes, *overrides])

    steps = [loaded(level, "train.steps=90", "train.eval_steps=30").train for level in (0, 1, 2, FULL)]
    assert [(train.steps, train.eval_steps) for train in steps] == [(5, 2), (15, 5), (45, 15), (90, 30)]
    epochs = [loaded(level, "train.steps=null", "train.epochs=3").train.epochs for level in (0, 2, FULL)]
    assert epochs == [pytest.approx(1 / 3), 3, 3]
    assert loaded(FULL).data.train == str(files.all_rows) and loaded(0).name == "lr1e-4-qv-r8-rung0-seed42"


@pytest.mark.engine
def test_what_the_plan_refuses_never_starts(tmp_path: Path, recipe: Path) -> None:
    """Memory for rank 8 alone: rank 16 is an outcome that no process began, and rank 8 is recommended."""
    least = ["train.batch_size=1", "train.accumulation=1", "train.gradient_checkpointing=true"]  # nothing takes less
    loaded = recipes.load(recipe, least)
    shape = trial_planner(loaded, "", 1, Silent()).shape
    assert shape

    def total(rank: int, targets: str) -> int:
        lora = replace(loaded.train.lora, rank=rank, targets=targets)
        return planned_bytes(
            shape, settings_of(replace(loaded.train, lora=lora), loaded.data.max_length, "float32")
        ).total

    room = total(8, "all-linear")
    assert total(16, "qv") < room < total(16, "all-linear")
    facts = begin(tmp_path / "sweep", str(tmp_path / "a.db"))
    files = TrialFiles(Path(facts.folder))
    files.recipe.write_text(recipes.dump(loaded))
    planner = TrialPlanner(shape, GpuModel("a small GPU", int(room / 0.97) + 1, "float32"), 1.0)
    place = PlantedPlace(tmp_path / "log")
    loss = EvalLoss(4.0, 1.0, 1)
    plan = SweepLoop(open_ledger(str(tmp_path / "a.db")), files, planner, place, Path("base"), loss, 1, Silent()).run()
    refused = {key for key, outcome in plan.results.items() if outcome.status == "does not fit"}
    assert refused and all("-all-linear-r16-" in key for key in refused)
    assert not refused & set(begun(tmp_path / "log")) and set(begun(tmp_path / "log")) == plan.results.keys() - refused
    assert "a small GPU has" in plan.results[next(iter(refused))].problem
    assert all(point.targets == "qv" or point.rank < 16 for point in plan.front)


def test_what_training_does_in_pieces_is_not_refused(recipe: Path, tmp_path: Path) -> None:
    """The eight rows of a step that do not fit at once go in halves, as `train` has them."""
    path = write_config(tmp_path / "llama", LLAMA3_8B)
    loaded = recipes.load(recipe, [f"model.path={path}", "train.batch_size=8", "data.max_length=1024"])
    file = tmp_path / "llama.yaml"
    file.write_text(recipes.dump(loaded))
    refuse_too_large(loaded, "10", Silent())
    small, large, tiny = (trial_planner(loaded, gpu, 1, Silent()).plan(file, []) for gpu in ("10", "24", "4"))
    assert not small.misfit and small.memory < large.memory and not large.misfit
    assert "and 4 GiB has 4.3 GB" in tiny.misfit, "the control"


def run_on(folder: Path, texts: list[dict[str, object]], rate: float, base: BaseRecord) -> None:
    """A finished run on such rows."""
    folder.mkdir(parents=True)
    write_jsonl(folder / "eval.jsonl", texts)
    content = {
        "name": folder.name, "base": base.to_json(), "finished": True, "steps": 5,
        "metrics": {"base": {"eval_loss": 2.0, "perplexity": 7.4, "tokens": 9}},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(content))
    train = {"learning_rate": rate, "lora": {"rank": 32, "targets": "qv-mlp"}}
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"model": {"path": "b"}, "data": {"train": "t"}, "train": train})
    )


def test_runs_on_like_data_are_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = BaseRecord(id="org/base", fingerprint=Fingerprint("c" * 64, "t" * 64))
    code = [{"text": f"def f{n}(x):\n    return x + {n}  # a sum of two numbers"} for n in range(60)]
    run_on(tmp_path / "runs" / "like", rows("eval.jsonl", 60), 3e-4, base)
    run_on(tmp_path / "runs" / "other-data", code, 7e-4, base)
    run_on(
        tmp_path / "runs" / "other-base",
        rows("eval.jsonl", 60),
        9e-4,
        BaseRecord(id="x", fingerprint=Fingerprint("d" * 64, "u" * 64)),
    )
    (tmp_path / "runs" / "unfinished").mkdir()
    (tmp_path / "runs" / "unfinished" / "run.json").write_text("{}")
    new = data_figures(rows("train.jsonl", 60), 2.1)
    earlier = earlier_runs(base, new)
    assert [(run.name, run.near) for run in earlier] == [("runs/like", True), ("runs/other-data", False)]
    assert "near, distance 0." in earlier[0].words and "rank 32 on qv-mlp at 3e-4" in earlier[0].words
    assert first_points(earlier, SearchSpace()) == [SearchPoint(3e-4, "qv-mlp", 16)]
    assert first_points(earlier, SearchSpace(targets=("qv",))) == []


def test_distance_of_data() -> None:
    train, held_out = data_figures(rows("train.jsonl", 100), 2.0), data_figures(rows("eval.jsonl", 100), 2.0)
    other = data_figures([{"text": "Lorem ipsum dolor sit amet " * n} for n in range(1, 100)], 4.0)
    assert train.distance(train) == 0 < train.distance(held_out) < NEAR < train.distance(other) <= 1
    assert train.distance(other) == pytest.approx(other.distance(train))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"constraint": "speed"}, "constraint: 'speed', expected one of quality"), ({"jobs": 0}, "--jobs 0"), ({"fraction": 0.0}, "--fraction 0"),
        ({"margin": 1.0}, "--margin 1"), ({"on": "rayy"}, "--on rayy: unknown"), ({"name": "a/b"}, "--name"),
        pytest.param(
            {"overrides": ["train.method=ia3", "train.quantize=none"]}, "train.method: ia3", marks=pytest.mark.engine
        ),
        ({"storage": "nowhere/x.db"}, "--storage nowhere/x.db: No such file"), ({"storage": "/proc/x.db"}, "--storage /proc"),
        ({"overrides": ["train.from_adapter=runs/a"]}, "train.from_adapter: runs/a, whose rank and layers are as they"),
        ({"overrides": {"train.objective": "dpo"}}, "train.objective: dpo, and a sweep compares by the eval loss of sft"),
        ({"overrides": {"train.steps": {3}}}, r"overrides\['train.steps'\]: .*expected a value of YAML"),
        ({"join": "x.db", "space": "y"}, "--join takes"),
        ({"overrides": ["data.eval=null"]}, "holds no rows out"), ({"join": "x.db"}, "no storage of a sweep"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, object], message: str
) -> None:
    """Refused before anything is written, by the dry run in the same words; it refuses to join by itself."""
    monkeypatch.chdir(tmp_path)
    named = None if "join" in words else recipe
    with pytest.raises(UsageError, match=message) as swept:
        sweep(named, **words)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as planned:
        plan_sweep(SweepRequest(named, **words))  # type: ignore[arg-type]
    alike = (planned.value.message, planned.value.hint) == (swept.value.message, swept.value.hint)
    assert alike or (planned.value.message.startswith("--dry-run and --join") and message == "no storage of a sweep")
    assert not (tmp_path / "sweeps").exists()
