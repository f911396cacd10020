"""front.json, report.html and recommended.yaml, each whole or not there."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path

from lora2serve.config import recipe as recipes
from lora2serve.config.recipe import dump
from lora2serve.sweeping.report.sweep_page import render
from lora2serve.sweeping.sweep_facts import SweepFacts
from lora2serve.sweeping.sweep_report import ChoiceLine, SweepReport
from lora2serve.sweeping.trial_files import TrialFiles
from lora2serve.system.small_files import write_text

WIDTH = 116


def write_result(result: SweepReport, facts: SweepFacts, files: TrialFiles) -> None:
    """All of them; the recipe that they begin with is a file for a moment, as recipes are read from files."""
    write_text(files.front, result.to_text())
    write_text(files.page, render(result))
    write_text(files.recommended, recommended(result.recommended, facts, files))


def recommended(choice: ChoiceLine, facts: SweepFacts, files: TrialFiles) -> str:
    """The recipe that was swept, with what is recommended, and why, in its first lines."""
    original = files.folder / f".original-{os.getpid()}.yaml"  # two workers may end at the same time
    write_text(original, facts.recipe)
    changed = recipes.load(original, _as_overrides(choice.settings))
    original.unlink()
    reason = textwrap.wrap(" ".join(choice.reason), WIDTH)
    head = [
        f"lora2serve train {_shown(files.recommended)}",
        f"Of the sweep {facts.name}, for {choice.constraint}:",
        *reason,
    ]
    return "".join(f"# {line}\n" for line in head) + dump(changed)


def _as_overrides(settings: Mapping[str, object]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
