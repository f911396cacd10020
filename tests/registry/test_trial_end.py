"""The end of a trial: what live traffic decided moves an alias only where it still is what was tested."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lora2serve import Registry
from lora2serve.errors import GateNotMet, UsageError
from tests.support.registries import add_trial

NAME = "medical-qa"


@pytest.fixture
def tested(registry: Registry, tmp_path: Path) -> Registry:
    """Version 1 is the champion, 2 the challenger; the parity of 3 is not proven."""
    add_trial(registry, tmp_path, NAME)
    return registry


def test_only_what_was_tested_moves(tested: Registry) -> None:
    assert not tested.end_trial(NAME, "promote", champion=2, challenger=2, why="x")
    assert not tested.end_trial(NAME, "rollback", champion=1, challenger=3, why="x")
    assert not tested.end_trial(NAME, "rollback", champion=1, challenger=2, why="x", aliases=("champion", "staging"))
    with pytest.raises(UsageError, match="outcome: 'stop', expected one of stop-shadow, rollback, promote"):
        tested.end_trial(NAME, "stop", champion=1, challenger=2, why="x")  # type: ignore[arg-type]
    assert tested.aliases(NAME) == {"champion": 1, "challenger": 2}
    assert tested.end_trial(NAME, "promote", champion=1, challenger=2, why="better")
    assert not tested.end_trial(NAME, "promote", champion=1, challenger=2, why="again")
    assert tested.aliases(NAME) == {"champion": 2, "challenger": 2}
    assert tested.rollback(NAME).number == 1
    assert tested.end_trial(NAME, "stop-shadow", champion=1, challenger=2, why="worse")
    assert tested.aliases(NAME) == {"champion": 1, "challenger": 1}
    event = tested.history(NAME)[-1]
    assert (event.kind, event.alias, event.old, event.new, event.why) == ("stop-shadow", "challenger", 2, 1, "worse")
    assert tested.verify() == 3


def test_gates_hold_for_what_traffic_promotes(tested: Registry) -> None:
    tested.promote(f"{NAME}@3", "challenger", force=True, why="to see")
    with pytest.raises(GateNotMet, match="cannot become champion: parity"):
        tested.end_trial(NAME, "promote", champion=1, challenger=3, why="better")
    assert tested.aliases(NAME) == {"champion": 1, "challenger": 3}


def test_of_several_at_once_one_acts(tested: Registry) -> None:
    done: list[bool] = []

    def end() -> None:
        location = tested.location.url if tested.location.folder is None else tested.location.folder
        with Registry(location, author="gateway") as registry:
            done.append(registry.end_trial(NAME, "rollback", champion=1, challenger=2, why="worse"))

    threads = [threading.Thread(target=end) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [False] * 4 + [True]
    assert [event.kind for event in tested.history(NAME)].count("rollback") == 1
