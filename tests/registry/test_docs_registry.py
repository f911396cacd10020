"""The life of one adapter in docs/registry.md: each command runs, and prints what the page says."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from lora2serve import Registry
from lora2serve.cli import cli
from lora2serve.registry.periods import last_period
from lora2serve.registry.tables import metadata
from lora2serve.registry.where_clause import parse_where
from tests.support.registries import add_export, make_run, scores

PAGE = (Path(__file__).parents[2] / "docs" / "registry.md").read_text(encoding="utf-8")
LIFE, PRINTED = re.findall(r"```\n(.*?)```", PAGE.split("## The life of one adapter")[1], re.S)[:2]


def test_the_life_of_one_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORA2SERVE_REGISTRY", raising=False)
    for seed, name in enumerate(("first", "second")):
        add_export(make_run(tmp_path / "runs" / name, seed, rank=4 << seed))
    measured, _ = last_period("quarter")
    shutil.copy(scores(tmp_path / "made", 0.81, created=measured), "medqa.json")
    commands = LIFE.splitlines()
    assert len(commands) == 10
    printed = []
    for line in commands:
        done = CliRunner().invoke(cli, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        printed += done.stdout.splitlines()
    lines = [re.escape(line).replace(r"\.\.\.", ".*") + "\n" for line in PRINTED.splitlines()]
    pattern = "".join("(?:.*\n)*?" if line == ".*\n" else line for line in lines)
    assert re.fullmatch(pattern, "\n".join(printed) + "\n"), printed
    assert not re.fullmatch(pattern.replace("rollback", "promote"), "\n".join(printed) + "\n"), "the control"

    names: dict[str, object] = {}
    block = re.findall(r"```python\n(.*?)```", PAGE, re.S)[0]
    exec(compile(block, "docs/registry.md", "exec"), names)
    assert names["directory"] == Path("registry/versions/medical-qa-2").absolute()


def test_what_would_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORA2SERVE_REGISTRY", raising=False)
    with Registry() as registry:
        for seed, value in enumerate((0.8, 0.81)):
            run = make_run(tmp_path / f"run-{seed}", seed)
            add_export(run)
            scores(run.path / "evals", value, created="2026-07-01T00:00:00Z")
            registry.add(run.path, name="medical-qa")
        registry.promote("medical-qa@1")
    Path("registry/gates.yaml").write_text("suites: {medqa.acc: 0.01}\n")
    command, printed = re.findall(r"```\n(.*?)```", PAGE.split("## What would change")[1], re.S)[:2]
    done = CliRunner().invoke(cli, shlex.split(command)[1:], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, printed)


def test_what_the_page_names() -> None:
    for text in re.findall(r"--where '(.*?)'", PAGE):
        parse_where(text)
    tables = re.findall("`(\\w+)`", PAGE.split("the tables are")[1].split(".\n")[0])
    assert {*tables, "setting"} == set(metadata.tables)
