"""Sweeps whose trials are trained: a small model with a few rows, and the demo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import lora2serve as api
from lora2serve.artifacts.run import Run, is_run
from lora2serve.errors import Lora2ServeError, SweepError
from lora2serve.evaluation.eval_records import items_path, read_items
from lora2serve.evaluation.suite import read_suite
from lora2serve.sweeping.sweep_suite import split_suite
from lora2serve.sweeping.trial_ledger import open_ledger
from lora2serve.sweeping.trial_process import ChildTrials, TrialOrder
from lora2serve.system.small_files import digest
from tests.conftest import lora2serve
from tests.support.commands import ROOT
from tests.support.registries import empty_database, running_postgres
from tests.support.runs import DEMO, make_chat_model, recipe_file, rows, write_jsonl
from tests.support.shared import once
from tests.sweeping.simulated_search import searched

pytestmark = [pytest.mark.engine, pytest.mark.slow]  # what make test has of it is planted: test_workers.py

SPACE = {"train.learning_rate": [1e-3, 4e-3], "train.lora.targets": ["qv"], "train.lora.rank": [4, 8]}


def prepare(folder: Path, count: int = 12, held_out: int = 24, **train: Any) -> None:
    """lora2serve.yaml and space.yaml for a small random model."""
    base = make_chat_model(folder / "base")
    data = {
        "train": str(write_jsonl(folder / "train.jsonl", rows("train.jsonl", count))),
        "eval": str(write_jsonl(folder / "eval.jsonl", rows("eval.jsonl", held_out))),
    }
    recipe_file(folder, base, data, **{"steps": 4, "quantize": "none", **train})
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep."""

    def make(folder: Path) -> None:
        prepare(folder)
        lora2serve("sweep", "--space", "space.yaml", "--name", "small", cwd=folder)

    return once(tmp_path_factory, "sweep", make) / "sweeps" / "small"


def front(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "front.json").read_text())
    return content


def test_every_trial_is_a_run(swept: Path) -> None:
    content = front(swept)
    assert all(line["status"] == "finished" and is_run(Path(line["run"])) for line in content["trials"])
    assert {Path(line["run"]).name for line in content["trials"]} == {path.name for path in (swept / "runs").iterdir()}
    keys = [line["key"] for line in content["trials"]]
    assert len(keys) == len(set(keys)) and sum("-full-seed" in key for key in keys) % 3 == 0
    run = Run(Path(content["recommended"]["run"]))
    losses = [json.loads(line) for line in run.row_losses.read_text().splitlines()]
    mean = sum(line["loss"] for line in losses) / sum(line["tokens"] for line in losses)
    assert run.record.metrics.tuned and mean == pytest.approx(run.record.metrics.tuned.eval_loss)
    assert not (run.path / "checkpoints").exists()


def test_the_recommended_recipe_gives_the_recommended_run(swept: Path, tmp_path: Path) -> None:
    """Byte for byte: a process that trained other trials before, and a new one, train the same."""
    lora2serve("train", swept / "recommended.yaml", "--name", "again", cwd=tmp_path)
    again, best = tmp_path / "runs" / "again", Path(front(swept)["recommended"]["run"])
    name = "adapter_model.safetensors"
    assert digest(again / "adapter" / name) == digest(best / "adapter" / name)
    other = next(path for path in (swept / "runs").iterdir() if "seed43" in path.name)
    assert digest(other / "adapter" / name) != digest(best / "adapter" / name), "the control"


def test_the_same_command_goes_on(swept: Path) -> None:
    """A finished sweep has nothing left to do; another question of that name is refused."""
    before = (swept / "front.json").read_bytes()
    out = lora2serve("sweep", "--space", "space.yaml", "--name", "small", cwd=swept.parents[1])
    assert out == f"{swept}/recommended.yaml\n" and (swept / "front.json").read_bytes() == before
    lora2serve("sweep", "--space", "space.yaml", "--name", "small", "--budget", "9", cwd=swept.parents[1], code=2)


def test_a_trial_that_is_killed_is_an_outcome(swept: Path, tmp_path: Path) -> None:
    """Its child ends by SIGKILL, or cannot read the base: the others do not see it, and no folder is left."""
    trials = ChildTrials()

    def order(name: str, *overrides: str, base: Path = swept.parents[1] / "base") -> TrialOrder:
        return TrialOrder(
            recipe=str(swept / "recipe.yaml"), overrides=[*overrides], run=str(tmp_path / name), base=str(base),
            base_loss=None, quick=True, final_rows=None, suite=None,
        )  # fmt: skip

    def kill() -> None:
        while not (tmp_path / "a" / "metrics.jsonl").exists():
            time.sleep(0.05)
        trials.workers._running[0].send_signal(signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    killed = trials.run(order("a", "train.steps=100000"))
    assert killed.status == "failed" and "SIGKILL" in killed.problem and not (tmp_path / "a").exists()
    failed = trials.run(order("b", base=tmp_path))
    assert failed.status == "failed" and str(tmp_path) in failed.problem and not (tmp_path / "b").exists()
    good = trials.run(order("c", "train.steps=1"))
    assert good.finished and is_run(tmp_path / "c"), "the control"
    with pytest.raises(SweepError, match="the base cannot be measured"):
        trials.measure(swept / "recipe.yaml", tmp_path, [swept / "rows" / "final.jsonl"])
    trials.close()


def choices(folder: Path, count: int = 24) -> Path:
    """A suite of the demo's questions, each with its answer and two of others, by log-likelihood."""
    pairs = [[turn["content"] for turn in row["messages"][-2:]] for row in rows("eval.jsonl", count)]
    answers = list(dict.fromkeys(answer for _, answer in pairs))
    items = [
        {"prompt": question, "choices": [answers[(answers.index(answer) + n) % len(answers)] for n in range(3)],
         "expected": answer}
        for question, answer in pairs
    ]  # fmt: skip
    write_jsonl(folder / "choice.jsonl", items)
    (folder / "choice.yaml").write_text("rows: choice.jsonl\nscorer: choice\n")
    return folder / "choice.yaml"


def test_a_suite_judges(tmp_path: Path) -> None:
    """No rows are held out. Every trial has the scores that ``evaluate`` gives its run, the base those of the base."""
    prepare(tmp_path)
    text = (tmp_path / "lora2serve.yaml").read_text()
    content = yaml.safe_load(text)
    del content["data"]["eval"]
    (tmp_path / "lora2serve.yaml").write_text(yaml.safe_dump(content))
    suite = choices(tmp_path)
    lora2serve("sweep", "--space", "space.yaml", "--name", "small", cwd=tmp_path, code=2)  # nothing to judge by
    lora2serve("sweep", "--space", "space.yaml", "--name", "small", "--suite", suite, cwd=tmp_path)
    ledger = open_ledger(str(tmp_path / "sweeps" / "small" / "sweep.db"))
    parts = dict(zip(("search", "final"), split_suite(read_suite(suite)), strict=True))
    lines = suite.with_suffix(".jsonl").read_text().splitlines()
    files = {}
    for part, asked in parts.items():
        write_jsonl(tmp_path / f"{part}.jsonl", [json.loads(lines[int(item.name) - 1]) for item in asked.items])
        files[part] = tmp_path / f"{part}.yaml"
        files[part].write_text(f"rows: {part}.jsonl\nscorer: choice\n")
    results = ledger.read().results
    chosen = [next(key for key in results if mark in key) for mark in ("full-seed42", "full-seed43", "rung")]
    for key in chosen:
        part = "final" if "full" in key else "search"
        done = api.evaluate(results[key].run, against="base", suite=files[part], out=tmp_path / key)
        items, of_base = (read_items(items_path(record)) for record in done.records)
        assert [1 - item.score for item in items] == [*results[key].losses.sums] and len(items) == 12
        facts = ledger.facts
        known = facts.base_final if part == "final" else facts.base_search
        assert [1 - item.score for item in of_base] == [*known.sums]
    content = front(tmp_path / "sweeps" / "small")
    assert content["quality"]["suite"] == "choice" and content["base_eval_loss"] is None
    assert "12 items of choice" in content["recommended"]["reason"][0]
    out = lora2serve("sweep", "--space", "space.yaml", "--name", "small", "--suite", suite, cwd=tmp_path)
    assert out.endswith("recommended.yaml\n"), "the same command has nothing left to do"
    suite.write_text("rows: choice.jsonl\nscorer: exact\n")  # another question
    lora2serve("sweep", "--space", "space.yaml", "--name", "small", "--suite", suite, cwd=tmp_path, code=2)


def test_held_out_rows_judge_by_their_answers(tmp_path: Path) -> None:
    """As a suite, beside their eval loss; two trials at a time, and a budget."""
    prepare(tmp_path, held_out=8)
    words = ("--space", "space.yaml", "--name", "small", "--suite", "held-out", "--jobs", "2", "--budget", "6")
    lora2serve("sweep", *words, cwd=tmp_path)
    facts = open_ledger(str(tmp_path / "sweeps" / "small" / "sweep.db")).facts
    content = front(tmp_path / "sweeps" / "small")
    assert content["quality"]["metric"] == "acc" and content["base_eval_loss"] == pytest.approx(facts.base_rows.mean)
    assert all(value in (0.0, 1.0) for value in (*facts.base_search.sums, *facts.base_final.sums))
    for line in content["trials"]:
        assert line["objectives"]["loss"] <= 1
        tuned = Run(Path(line["run"])).record.metrics.tuned
        assert tuned and tuned.eval_loss > 1, "the control: a loss of names is more than any share"


def tried(storage: str) -> int:
    """Trials that were begun; none where there is no sweep yet."""
    try:
        return len(open_ledger(storage).read().tried)
    except Lora2ServeError:
        return 0


def killed_and_joined(folder: Path, storage: str, *words: str, during: int) -> dict[str, Any]:
    """front.json of a sweep that is killed in that trial and goes on, with another worker that joins it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def start(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "lora2serve", "sweep", *words], cwd=folder, env=environment)

    first = start(*words)
    while tried(storage) < during:
        assert first.poll() is None
        time.sleep(0.5)
    first.kill()
    first.wait()
    before = set(open_ledger(storage).read().results)
    assert len(before) == during - 1
    workers = [start(*words)]
    time.sleep(1)
    workers.append(start("--join", storage))
    assert [worker.wait() for worker in workers] == [0, 0]
    trials = open_ledger(storage).study.trials
    done = [trial.user_attrs["spec"] for trial in trials if "outcome" in trial.user_attrs]
    assert len(done) == len(set(done)), "none was run twice"
    content = front(Path(open_ledger(storage).facts.folder))
    assert before <= {line["key"] for line in content["trials"]}
    check_whole(storage, content)
    return content


def check_whole(storage: str, content: dict[str, Any]) -> None:
    """The finished trials are those that an undisturbed search has, and the front is that of brute force."""
    ledger = open_ledger(storage)
    results, facts = ledger.read().results, ledger.facts
    by_key = {line["key"]: line for line in content["trials"]}
    again = searched(lambda spec: results[spec.key], facts.space, facts.settings)  # from nothing, by these outcomes
    assert set(again.results) == set(results) == set(by_key)
    assert all(line["status"] == "finished" for line in by_key.values())
    whole = [line for line in content["trials"] if line["level"] >= 0 and line["share"] == 1.0]
    values = {line["key"]: tuple(line["objectives"].values()) for line in whole}
    brute = {
        key for key, own in values.items()
        if not any(all(a <= b for a, b in zip(o, own, strict=True)) and o != own for o in values.values())
    }  # fmt: skip
    assert {line["key"] for line in whole if line["on_front"]} == brute
    assert content["recommended"]["reason"] and content["recommended"]["words"]


def test_the_demo_killed_and_joined(tmp_path: Path) -> None:
    """3 rates x 2 presets x 2 ranks on 60 rows. SIGKILL in the fourth trial, and a second worker."""
    write_jsonl(tmp_path / "train.jsonl", rows("train.jsonl", 60))
    write_jsonl(tmp_path / "eval.jsonl", rows("eval.jsonl", 40))
    data = {"train": "train.jsonl", "eval": "eval.jsonl"}
    recipe_file(tmp_path, DEMO / "base", data, steps=18, batch_size=8)
    space = {
        "train.learning_rate": [1e-3, 2e-3, 4e-3],
        "train.lora.targets": ["qv", "all-linear"],
        "train.lora.rank": [8, 16],
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    storage = str(tmp_path / "sweeps" / "demo" / "sweep.db")
    content = killed_and_joined(tmp_path, storage, "--space", "space.yaml", "--name", "demo", during=4)
    whole = [line for line in content["trials"] if line["level"] >= 0 and line["share"] == 1.0]
    assert len(content["trials"]) >= 12 and all(line["objectives"]["loss"] < content["base_loss"] for line in whole)


def test_in_postgres_killed_and_joined(tmp_path: Path) -> None:
    """The same by a database."""
    prepare(tmp_path)
    with running_postgres() as server:
        storage = empty_database(server, "sweep")
        words = ("--space", "space.yaml", "--name", "small", "--storage", storage)
        killed_and_joined(tmp_path, storage, *words, during=3)
    assert not list((tmp_path / "sweeps" / "small").glob("sweep.*")), "nothing of it lies in a file"


def test_on_rays_test_cluster(tmp_path: Path) -> None:
    """Two nodes of one core each: both train, and the sweep ends as it does without Ray."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    prepare(tmp_path)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False},
    )
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    try:
        os.environ["RAY_ADDRESS"] = cluster.address
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, "-m", "lora2serve", "sweep", "--space", "space.yaml", "--name", "small", "--on", "ray"]
        subprocess.run(words, cwd=tmp_path, env=environment, check=True)
    finally:
        os.environ.pop("RAY_ADDRESS")
        ray.shutdown()
        cluster.shutdown()
    check_whole(str(tmp_path / "sweeps" / "small" / "sweep.db"), front(tmp_path / "sweeps" / "small"))
