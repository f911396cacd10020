"""What a launcher says of a process: read, or refused with all that is wrong."""

from __future__ import annotations

import os

import pytest

from lora2serve.errors import UsageError
from lora2serve.system.launcher import Launch, hidden, is_first, launch

MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_what_launchers_set() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **MEETING}
    assert launch(torchrun) == Launch(5, 8, 1, 4)
    assert launch({"RANK": "1", "WORLD_SIZE": "2", **MEETING}) == Launch(1, 2, 0, 1), "one process a machine"
    assert launch({"RANK": "0", "WORLD_SIZE": "1"}) == Launch(0, 1, 0, 1)
    assert launch({}) is None
    assert launch({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}) is None


@pytest.mark.parametrize(
    ("environment", "problems"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR: not set, and 2 processes need it", "MASTER_PORT: not set"]),
        ({"WORLD_SIZE": "2", **MEETING}, ["RANK: not set, expected a number"]),
        ({"RANK": "x", "WORLD_SIZE": "-1"}, ["RANK=x: expected a number", "WORLD_SIZE=-1: expected a number"]),
        ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "MASTER_PORT": "abc"}, ["MASTER_PORT=abc: expected a port"]),
        ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "MASTER_PORT": "70000"}, ["MASTER_PORT=70000: expected a port"]),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEETING}, ["RANK=2: expected less than WORLD_SIZE=2"]),
        ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "ACCELERATE_USE_FSDP": "true"}, ["ACCELERATE_USE_FSDP: not supported"]),
    ],
)  # fmt: skip
def test_what_cannot_be(environment: dict[str, str], problems: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        launch(environment)
    lines = error.value.message.splitlines()
    assert [line.startswith(problem) for line, problem in zip(lines, problems, strict=True)] == [True] * len(lines)


def test_hidden_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_first()
    with hidden():
        assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")
