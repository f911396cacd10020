"""Ended by the kernel at any moment, and many processes at once: nothing half, nothing lost, one history.

When a process ends is drawn in seconds of its own work, so that it is the same on a busy machine: SIGPROF, which nothing
handles, ends it as SIGKILL does.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from lora2serve import Lora2ServeError, Registry
from lora2serve.errors import UsageError
from tests.support.registries import add_export, forked, make_run
from tests.support.shared import once

RUNS = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nobody writes into them."""

    def make(folder: Path) -> None:
        for seed in range(RUNS + 4):
            add_export(make_run(folder / f"run-{seed}", seed))

    folder = once(tmp_path_factory, "killed-runs", make)
    return [folder / f"run-{seed}" for seed in range(RUNS + 4)]


def work_until(seconds: float, location: str, runs: list[Path], seed: int) -> None:
    """Adds, promotes, rolls back and collects at random, until it is ended after so much work."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    chance = random.Random(seed)
    with Registry(location) as registry:
        while True:
            with suppress(Lora2ServeError):  # a version that is not there yet, or no longer
                number = chance.randint(1, RUNS)
                match chance.randint(0, 9):
                    case 0 | 1 | 2:
                        registry.add(chance.choice(runs[:RUNS]), name="m")
                    case 3 | 4 | 5:
                        registry.promote(f"m@{number}", chance.choice(("champion", "staging")))
                    case 6 | 7:
                        registry.rollback("m")
                    case 8:
                        registry.path(f"m@{number}")
                    case 9:
                        registry.gc(keep=2)


def kill_at_random(location: str, runs: list[Path], times: int) -> int:
    """How many versions there are after so many kills, between which all must be whole."""
    chance = random.Random(7)
    with Registry(location) as registry:
        registry.add(runs[0], name="m")
        for round_number in range(times):
            seconds = chance.uniform(0.005, 0.25)
            child = forked(lambda seed=round_number, end=seconds: work_until(end, location, runs, seed))  # type: ignore[misc]
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGPROF
            registry.verify()
        for version in registry.versions("m"):
            if version.state != "collected":
                assert (registry.path(version.reference) / "adapter" / "adapter_model.safetensors").is_file()
        registry.gc(keep=1)
        count = registry.verify()
        root = Path(registry._open().database.content or location)
        assert not list(root.glob("partial/*")), "what was killed leaves nothing behind a gc"
    return count


def test_kills(location: str, runs: list[Path]) -> None:
    assert kill_at_random(location, runs, 4) >= 1  # how many more are added by then depends on the machine


@pytest.mark.slow
def test_200_kills(location: str, runs: list[Path]) -> None:
    assert kill_at_random(location, runs, 200) > RUNS // 2


@pytest.mark.parametrize("removed", [pytest.param(0, marks=pytest.mark.slow), 8, 16])
def test_a_gc_that_ends_amid_its_work(location: str, runs: list[Path], removed: int) -> None:
    """After so many files are gone: what can be had is whole, and nothing of the rest is left by the next one."""

    def collect() -> None:
        left = [removed]
        unlink = os.unlink

        def counted(*words: Any, **options: Any) -> None:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            unlink(*words, **options)

        os.unlink = counted  # type: ignore[assignment]
        with Registry(location) as registry:
            registry.gc(keep=1)

    with Registry(location) as registry:
        for run in runs[:3]:
            registry.path(registry.add(run, name="m").reference)
        views = registry.path("m@1").parent
    assert os.WTERMSIG(os.waitpid(forked(collect), 0)[1]) == signal.SIGKILL
    with Registry(location) as registry:
        registry.verify()
        again = registry.path(registry.add(runs[0], name="m").reference)
        assert (again / "adapter" / "adapter_model.safetensors").is_file()
        registry.gc(keep=1)
        states = {version.folder: version.state for version in registry.versions("m")}
        assert {path.name for path in views.glob("m-*")} <= {
            name for name, state in states.items() if state == "active"
        }


@pytest.mark.parametrize(("processes", "turns"), [(3, 8), pytest.param(8, 50, marks=pytest.mark.slow)])
def test_promotions_at_once(location: str, runs: list[Path], processes: int, turns: int) -> None:
    """Each process moves the alias between two versions of its own, so that every promotion is a move."""
    with Registry(location) as registry:
        for run in (*runs[: 2 * processes], runs[0]):
            registry.add(run, name="m")

        together = get_context("fork").Barrier(processes)

        def promote(first: int) -> None:
            with Registry(location) as own:
                together.wait(60)
                for turn in range(turns):
                    own.promote(f"m@{first + turn % 2}", why=f"{first}: {turn}")
                    time.sleep(0.001)  # on a busy machine one would be done before the next gets a core

        children = [forked(lambda first=2 * number + 1: promote(first)) for number in range(processes)]  # type: ignore[misc]
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes
        moves = [event for event in registry.history("m") if event.kind == "promote"]
        assert len(moves) == processes * turns
        assert [event.old for event in moves[1:]] == [event.new for event in moves[:-1]], "one after another"
        writers = [event.why.partition(":")[0] for event in moves]
        assert sum(one != other for one, other in pairwise(writers)) > processes, "the control: they took turns"
        for first in range(1, 2 * processes, 2):
            own = [event.why for event in moves if event.why.startswith(f"{first}: ")]
            assert own == [f"{first}: {turn}" for turn in range(turns)]
        assert registry.verify() == 2 * processes and registry.aliases("m") == {"champion": moves[-1].new}


@pytest.mark.parametrize("turns", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_adding_and_collecting_at_once(location: str, runs: list[Path], turns: int) -> None:
    """What one process adds while others collect has its files; what is collected is added again."""

    def work(seed: int) -> None:
        chance = random.Random(seed)
        with Registry(location) as own:
            for _ in range(turns):
                if chance.random() < 0.3:
                    own.gc(keep=1)
                else:
                    version = own.add(chance.choice(runs[:5]), name="m")
                    with suppress(UsageError):  # collected since
                        file = own.path(version.reference) / "adapter" / "adapter_model.safetensors"
                        assert file.is_file() or own.get(version.reference).state == "collected"

    with Registry(location) as registry:
        registry.add(runs[0], name="m")
    children = [forked(lambda seed=seed: work(seed)) for seed in range(4)]  # type: ignore[misc]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    with Registry(location) as registry:
        assert registry.verify() == len(registry.versions("m")) <= 5, "the same content is one version, whoever adds it"


def test_the_control_of_verify(location: str, runs: list[Path]) -> None:
    """A lost event and an alias that was moved by hand are seen."""
    from sqlalchemy import text

    with Registry(location) as registry:
        for run in runs[:2]:
            registry.add(run, name="m")
        registry.promote("m@1")
        with registry._open().database.writing() as connection:
            connection.execute(text("UPDATE alias SET number = 2"))
        with pytest.raises(Lora2ServeError, match="m@champion: points to 2, and by the events to 1"):
            registry.verify()
        with registry._open().database.writing() as connection:
            connection.execute(text("DELETE FROM file WHERE number = 2"))
        with pytest.raises(Lora2ServeError, match="m@2: has no files"):
            registry.verify()
