"""What keeps recipes from sharing a base is said before anything is loaded, all of it at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import lora2serve
from lora2serve.artifacts.run import Run
from lora2serve.config.recipe import Recipe, load
from lora2serve.errors import RecipeError
from lora2serve.sweeping import many_runs
from lora2serve.sweeping.shared_trainings import refuse_differences
from tests.support.commands import Ask, asking
from tests.support.runs import make_chat_model, recipe_file


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ask:
    return asking(tmp_path, monkeypatch, capfd)


def loaded(folder: Path, **train: object) -> Recipe:
    return load(recipe_file(folder, folder, {"train": "rows.jsonl"}, **train))


def test_all_differences_at_once(tmp_path: Path) -> None:
    first, second = loaded(tmp_path / "a"), loaded(tmp_path / "b", quantize="none", lora={"init": "pissa"})
    third = loaded(tmp_path / "a", trackers=["wandb", "tensorboard"])
    third = replace(third, model=replace(third.model, revision="main"))
    with pytest.raises(RecipeError) as raised:
        refuse_differences([("a.yaml", first), ("b.yaml", second), ("c.yaml", third)])
    lines = raised.value.message.splitlines()
    assert lines == [
        f"model.path: {tmp_path / 'a'} in a.yaml, c.yaml; {tmp_path / 'b'} in b.yaml",
        "model.revision: none in a.yaml, b.yaml; main in c.yaml",
        "train.quantize: nf4 in a.yaml, c.yaml; none in b.yaml",
        "train.lora.init: pissa in b.yaml takes a part of the base out, which is shared",
        "train.trackers: wandb in c.yaml has one training of a process at a time",
    ]
    other = loaded(tmp_path / "a", steps=9, learning_rate=1e-4, method="ia3", trackers=["tensorboard"])
    refuse_differences([("a.yaml", first), ("other.yaml", other)])


def test_options_that_do_not_go_together(tmp_path: Path, ask: Ask) -> None:
    for name in "ab":
        recipe_file(tmp_path / name, tmp_path / name, {"train": "rows.jsonl"})
    both = ["a/lora2serve.yaml", "b/lora2serve.yaml"]
    refused = ask(["train", *both, "--share-base"])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "model.path: " in refused.stderr and "leave --share-base out" in refused.stderr
    refused = ask(["train", *both, "--share-base", "--jobs", "2", "--gpus", "2"])
    assert refused.returncode == 2
    assert "--share-base and --jobs 2" in refused.stderr and "--gpus: of one training" in refused.stderr
    refused = ask(["train", both[0], "--share-base"])
    assert refused.returncode == 2 and "--share-base: of several recipes, and 1 is named" in refused.stderr


def test_the_plan_refuses_what_the_training_would(tmp_path: Path, ask: Ask) -> None:
    base = make_chat_model(tmp_path / "base")
    recipe_file(tmp_path / "a", base, {"train": "rows.jsonl"})
    recipe_file(tmp_path / "b", base, {"train": "rows.jsonl"}, quantize="none")
    both = ["a/lora2serve.yaml", "b/lora2serve.yaml"]
    for name in ("a", "b"):
        (tmp_path / name / "rows.jsonl").write_text('{"text": "one"}\n' * 2)
    refused = ask(["train", *both, "--share-base", "--dry-run"])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "train.quantize: nf4 in a/lora2serve.yaml; none in b/lora2serve.yaml" in refused.stderr
    refused = ask(["train", both[0], "none.yaml", "--dry-run"])
    assert (refused.returncode, refused.stdout) == (2, ""), "no plan before an error"
    planned = ask(["train", *both, "--dry-run", "--json"])
    assert planned.returncode == 0, planned.stderr
    assert [training["method"] for training in json.loads(planned.stdout)] == ["qlora", "lora"]


def test_a_run_is_resumed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another name, too: two trainings would write into it."""
    run = Run(tmp_path / "run")
    recipe_file(run.path, tmp_path, {"train": "rows.jsonl"}).rename(run.recipe)
    (tmp_path / "other").symlink_to(run.path)
    monkeypatch.setattr(many_runs, "unfinished", lambda name: Run(Path(name)))
    names = [str(run.path), str(tmp_path / "other")]
    with pytest.raises(RecipeError, match="other: named twice"):
        many_runs.load_all(names, [], resume=True)
    assert len(many_runs.load_all(names[:1], [], resume=True)) == 1
    assert len(many_runs.load_all([str(run.recipe)] * 2, [])) == 2, "a recipe makes a run each time"


def test_arguments_that_do_not_go_together() -> None:
    for options, problem in (
        ({"jobs": 2, "share_base": True}, "share_base and jobs"),
        ({"resume": True}, "resume: of trainings on one base"),
        ({"gpus": 2}, "gpus: 2, expected at least 1, with on"),
        ({"on": "ray", "share_base": True}, "Ray says what runs where"),
    ):
        with pytest.raises(lora2serve.Lora2ServeError, match=problem):
            lora2serve.train_many(["a.yaml", "b.yaml"], **options)  # type: ignore[arg-type]
