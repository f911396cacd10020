"""``registry ... --dry-run``: lines that say what would change, the same exit codes, and nothing on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora2serve import Registry
from lora2serve.cli import run
from lora2serve.cli.registry import registry as registry_group
from tests.support.registries import add_export, add_trial, make_run

COMMANDS = ("add", "promote", "rollback", "unset", "retire", "sync", "gc")


def test_commands_that_have_it() -> None:
    for name in COMMANDS:
        assert any("--dry-run" in option.opts for option in registry_group.commands[name].params), name


def test_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA2SERVE_REGISTRY", str(tmp_path / "registry"))
    new = make_run(tmp_path / "new", 9)
    add_export(new)

    def printed(*words: str, code: int = 0) -> tuple[str, str]:
        assert run(["registry", *words]) == code
        seen = capsys.readouterr()
        return seen.out, seen.err

    first = "m@1: a new version\nadd m@1\nexport m@1: vllm\nscore m@1: heldout\nstore m@1: 7 files\n"
    nothing = "dry run: nothing was changed\n"
    assert printed("add", "new", "--name", "m", "--dry-run") == (first, nothing)
    assert not (tmp_path / "registry").exists()

    with Registry() as registry:
        add_trial(registry, tmp_path, "m")
        count = len(registry.history())
        assert printed("add", "run-0", "--name", "m", "--dry-run") == ("m@1: there already\n", "nothing would change\n")
        assert printed("add", "new", "--name", "m", "--dry-run")[0] == first.replace("m@1", "m@4")
        gates = "gate state: met: active\ngate parity: met: vllm\ngate base: met: org/base, m@1 is of org/base\n"
        words = ("promote", "m@2", "--why", "a\nb", "--dry-run")
        assert printed(*words) == (f"{gates}promote m@champion 1 -> 2: a\\nb\n", nothing)
        out, err = printed("promote", "m@3", "--dry-run", code=3)
        assert (out, err) == printed("promote", "m@3", code=3) and err.startswith("error: m@3 cannot become champion")
        assert out == "" and printed("promote", "m@3", "--dry-run", "--json", code=3) == ("", err)
        assert (
            "(past parity: vllm: parity was not run)"
            in printed("promote", "m@3", "--force", "--why", "x", "--dry-run")[0]
        )
        assert printed("unset", "m@challenger", "--dry-run") == ("unset m@challenger 2 -> -\n", nothing)
        assert printed("retire", "m@3", "--why", "old", "--dry-run") == ("retire m@3: old\n", nothing)
        assert printed("rollback", "m", "--dry-run", code=2) == printed("rollback", "m", code=2)
        planned = json.loads(printed("promote", "m@2", "--dry-run", "--json")[0])
        assert (
            planned["aliases"] == ["challenger", "champion"] and [one["met"] for one in planned["gates"]] == [True] * 3
        )
        assert [(one["kind"], one["old"], one["new"]) for one in planned["events"]] == [("promote", 1, 2)]
        assert len(registry.history()) == count and not list((tmp_path / "registry").glob("versions"))

        assert printed("promote", "m@2") == ("m@2\n", "")
        done = json.loads(printed("promote", "m@2", "--json")[0])
        assert done == json.loads(printed("show", "m@2", "--json")[0]), "of the command itself the version alone"
        assert printed("rollback", "m", "--why", "worse", "--dry-run") == (
            "rollback m@champion 2 -> 1: worse\n",
            nothing,
        )
        printed("rollback", "m", "--why", "worse")
        assert printed("history", "m")[0].splitlines()[-1].endswith(" rollback m@champion 2 -> 1: worse"), (
            "as it was said"
        )
