"""A storage and its workers: killed, joined, told what failed. The trials are planted, all else is real."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora2serve.errors import SweepError, UsageError
from lora2serve.planning.gpus import GpuModel
from lora2serve.progress import Silent
from lora2serve.sweeping import trial_ledger
from lora2serve.sweeping.gpu_leases import leased_gpu
from lora2serve.sweeping.search_space import SearchPoint
from lora2serve.sweeping.sweep_loop import SweepLoop
from lora2serve.sweeping.trial_ledger import (
    create_ledger,
    has_sweep,
    open_ledger,
    own_worker,
    spec_from_json,
    spec_to_json,
)
from lora2serve.sweeping.trial_record import TrialOutcome, TrialSpec
from tests.support.registries import empty_database, running_postgres
from tests.sweeping.planted_sweep import SPACE, begin, begun, process, work

SPEC = TrialSpec(
    SearchPoint(2e-4, "qv", 8, (("train.lora.dropout", 0.1), ("train.lora.modules_to_save", ("a",)))), 1, 42
)
WIDE = replace(SPACE, others={"train.lora.dropout": (0.0, 0.1), "train.lora.modules_to_save": ((), ("a",))})
_numbers = itertools.count()


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "journal", pytest.param("postgres", marks=pytest.mark.engine)])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty storage of each kind."""
    if request.param == "postgres":
        return empty_database(request.getfixturevalue("postgres"), f"sweeps{next(_numbers)}")
    return str(tmp_path / {"sqlite": "sweep.db", "journal": "sweep.journal"}[request.param])


def finished(location: str) -> set[str]:
    return set(open_ledger(location).read().results)


@pytest.mark.engine  # starts processes
def test_a_killed_sweep_goes_on(location: str, tmp_path: Path) -> None:
    """SIGKILL in the fourth trial: afterwards the same trials are finished as without it, and only that one twice."""
    begin(tmp_path / "whole", str(tmp_path / "whole.db"))
    work(str(tmp_path / "whole.db"), tmp_path / "whole.log")
    begin(tmp_path / "killed", location)
    log = tmp_path / "killed.log"
    child = process(location, log, 0.2)
    while len(begun(log)) < 4:
        time.sleep(0.01)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL and len(finished(location)) == 3
    work(location, log)
    assert finished(location) == finished(str(tmp_path / "whole.db"))
    assert {key: count for key, count in Counter(begun(log)).items() if count > 1} == {begun(log)[3]: 2}
    assert len(finished(location)) > 8, "the control: there was more to do"


@pytest.mark.engine
def test_two_workers_never_run_one_trial_twice(location: str, tmp_path: Path) -> None:
    """Both do some, together all, and what they find is what one finds."""
    begin(tmp_path / "alone", str(tmp_path / "alone.db"))
    alone = work(str(tmp_path / "alone.db"), tmp_path / "alone.log")
    begin(tmp_path / "both", location)
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    children = [process(location, log, 0.05, jobs) for log, jobs in zip(logs, (1, 2), strict=True)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    done = [begun(log) for log in logs]
    assert all(done), "each did some"
    assert max(Counter([*done[0], *done[1]]).values()) == 1
    assert {*done[0], *done[1]} == finished(location) == set(alone.results)


def test_claims(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim holds against others, ends with its worker, with silence on another machine, and with Ctrl-C."""
    import optuna

    begin(tmp_path / "sweep", location, space=WIDE)
    first, second = open_ledger(location), open_ledger(location)
    assert first.claim(SPEC) and not second.claim(SPEC)
    assert second.read().running == {SPEC.key: own_worker()}
    first.give_up(SPEC)
    assert second.read().running == {} and second.claim(SPEC), "the control"
    second.give_up(SPEC)
    monkeypatch.setattr(trial_ledger, "own_worker", lambda: f"{os.uname().nodename}:{os.getpid()}:1")
    assert first.claim(SPEC)
    assert SPEC.key not in second.read().running, "a process of that number began at another time"
    begun_trial = optuna.trial.Trial(first.study, first._trial_id(first._claims.pop(SPEC.key)))
    begun_trial.set_user_attr(trial_ledger.OUTCOME, TrialOutcome().to_text())  # and it was killed before it said so
    assert SPEC.key not in second.read().results and second.claim(SPEC)
    monkeypatch.setattr(trial_ledger, "own_worker", lambda: "elsewhere:1:1")
    other = replace(SPEC, seed=43)
    assert first.claim(other) and other.key in second.read().running
    monkeypatch.setattr(trial_ledger, "SILENT", 0.2)
    monkeypatch.setattr(trial_ledger, "BEAT", 0.0)
    time.sleep(0.3)
    first.show_life()
    assert other.key in second.read().running, "it shows life"
    time.sleep(0.3)
    assert other.key not in second.read().running and second.claim(other)


def test_a_trial_as_it_lies_in_a_storage() -> None:
    assert spec_from_json(spec_to_json(SPEC)) == SPEC
    assert (
        SPEC.point.overrides(2.0)["train.lora.alpha"] == 16 and SPEC.point.overrides(2.0)["train.lora.dropout"] == 0.1
    )


def test_what_failed_is_tried_again_and_memory_is_told(location: str, tmp_path: Path) -> None:
    import optuna

    begin(tmp_path / "sweep", location, space=WIDE)
    ledger = open_ledger(location)
    specs = {status: replace(SPEC, seed=n) for n, status in enumerate(("failed", "out of memory", "does not fit"))}
    for status, spec in specs.items():
        assert ledger.claim(spec)
        ledger.finish(spec, TrialOutcome(status, "why", memory=10**9))  # type: ignore[arg-type]
    states = {trial.number: trial.state for trial in ledger.study.trials}
    assert [*states.values()] == [optuna.trial.TrialState.FAIL, *[optuna.trial.TrialState.COMPLETE] * 2]
    assert [trial.constraints for trial in ledger.study.trials] == [{"memory": -1.0}, {"memory": 1.0}, {"memory": 1.0}]
    assert ledger.study.best_trials == [], "infeasible"
    assert ledger.retry_failed() == 1 and ledger.retry_failed() == 0
    assert set(ledger.read().results) == {specs["out of memory"].key, specs["does not fit"].key}
    assert ledger.claim(specs["failed"]) and not ledger.claim(specs["does not fit"])


def test_a_storage_that_is_none(tmp_path: Path) -> None:
    facts = begin(tmp_path / "sweep", str(tmp_path / "a.db"))
    with pytest.raises(UsageError, match=r"has a sweep 'sweep' already"):
        create_ledger(str(tmp_path / "a.db"), facts)
    create_ledger(str(tmp_path / "a.db"), replace(facts, name="other"))
    with pytest.raises(UsageError, match=r"which sweep\? sweeps there: sweep, other"):
        open_ledger(str(tmp_path / "a.db"))
    assert open_ledger(str(tmp_path / "a.db"), "other").facts.name == "other"
    with pytest.raises(UsageError, match="no storage of a sweep"):
        open_ledger(str(tmp_path / "nothing.db"))
    (tmp_path / "text.db").write_text("no database at all, but a text that is long enough" * 99)
    with pytest.raises(SweepError, match=r"text\.db"):
        open_ledger(str(tmp_path / "text.db"))
    with pytest.raises(SweepError, match=r"postgresql://127\.0\.0\.1:1/none"):
        open_ledger("postgresql://somebody:secret@127.0.0.1:1/none")


def test_a_driver_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna names it in the cause of its own error only."""
    for module in [name for name in sys.modules if name.split(".")[0] == "psycopg"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SweepError, match="psycopg is not installed") as refused:
        has_sweep("postgresql://127.0.0.1:1/none", "demo")
    assert "lora2serve[registry]" in refused.value.hint


class FailingPlace:
    """No trial that begins gives a loss."""

    def run(self, order: object) -> TrialOutcome:
        return TrialOutcome("failed", "the disk is full")

    def measure(self, recipe: object, base: object, files: object, suites: object = ()) -> list[object]:
        return []

    def stop(self) -> None: ...

    def close(self) -> None: ...


def test_a_sweep_without_a_loss_ends(tmp_path: Path) -> None:
    from lora2serve.artifacts.run_record import EvalLoss
    from lora2serve.sweeping.trial_files import TrialFiles
    from lora2serve.sweeping.trial_plans import TrialPlanner

    begin(tmp_path / "sweep", str(tmp_path / "a.journal"))
    ledger = open_ledger(str(tmp_path / "a.journal"))
    planner = TrialPlanner(None, GpuModel("none", 1), 1.0)
    loop = SweepLoop(
        ledger, TrialFiles(tmp_path / "sweep"), planner, FailingPlace(), Path("base"), EvalLoss(4.0, 1.0, 1), 1, Silent()  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises(SweepError, match="the first 3 trials gave no loss; the last: failed: the disk is full"):
        loop.run()
    assert len(ledger.read().results) == 3


def test_one_gpu_for_one_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with leased_gpu(("0", "1")) as one, leased_gpu(("0", "1")) as other:
        assert {one, other} == {"0", "1"}
    with leased_gpu(("1",)) as again:
        assert again == "1"
    with leased_gpu(()) as nothing:
        assert nothing is None
