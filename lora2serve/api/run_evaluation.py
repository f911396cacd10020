"""What ``train`` scores once it has trained, as the recipe's ``evaluate`` says: before and after, on each suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora2serve.artifacts.run import Run
from lora2serve.config.recipe import HELD_OUT_ROWS, EvaluateRecipe
from lora2serve.errors import Lora2ServeError
from lora2serve.progress import Progress


def read_suites(recipe: EvaluateRecipe) -> tuple[Path | None, ...]:
    """The files of the suites, None for the held-out rows; what is wrong with one is raised before a training."""
    suites = tuple(None if name == HELD_OUT_ROWS else Path(name) for name in recipe.suites)
    for path in filter(None, suites):
        from lora2serve.evaluation.suite import read_suite

        read_suite(path, recipe.limit)
    return suites


def evaluate_run(run: Run, suites: Sequence[Path | None], limit: int | None, progress: Progress) -> None:
    """Score a run beside its base. What fails is a warning: the run is trained all the same."""
    for suite in suites:
        from lora2serve.api.evaluate_model import evaluate
        from lora2serve.evaluation.report.eval_page import verdict

        try:
            result = evaluate(run.path, against="base", suite=suite, limit=limit, progress=progress)
        except Lora2ServeError as error:
            progress.warn(f"not evaluated on {suite or HELD_OUT_ROWS}: {error.message}")
            continue
        progress.note(f"{verdict(result.report)} See {result.page}")
