"""What a sweep judges by instead of a loss: one part for all trials, and one for the end, which no trial has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from lora2serve.config.recipe import HELD_OUT_ROWS
from lora2serve.data.data_sets import DataSets
from lora2serve.errors import DataError, InputError, UsageError, did_you_mean
from lora2serve.evaluation.harness_options import HarnessOptions
from lora2serve.evaluation.overlap import compare, questions
from lora2serve.evaluation.suite import Suite, read_suite
from lora2serve.evaluation.suite_run import metric_names
from lora2serve.progress import Progress
from lora2serve.sweeping.sweep_quality import Quality
from lora2serve.sweeping.trial_files import FEWEST_HELD_OUT, TrialFiles, halves, split_held_out, write_rows
from lora2serve.system import scratch

if TYPE_CHECKING:
    from lora2serve.sweeping.sweep_tasks import TaskPart

Part = Literal["search", "final"]
PARTS: tuple[Part, Part] = ("search", "final")


class SuiteOrder(TypedDict):
    """Which items are to be answered: of a suite's file or of tasks (``harness``, a ``HarnessOptions``) this ``part``,
    or all of a file of rows that is the part already.
    """

    path: str
    part: Part | None
    sha256: str  # of the part
    harness: Mapping[str, object] | None


def suite_quality(named: str, sets: DataSets, progress: Progress) -> Quality:
    """Of ``--suite``: a file, or ``held-out`` for the recipe's own held-out rows.

    InputError where the suite asks what is trained on, UsageError where it is too small to be split.
    """
    if named == HELD_OUT_ROWS:
        if sets.held_out is None:
            raise UsageError("--suite held-out: the recipe holds no rows out", "set data.eval_split: 0.1, or data.eval")
        return _of_held_out(sets, progress)
    if not Path(named).is_file():
        near = did_you_mean(named, [HELD_OUT_ROWS])
        raise UsageError(f"--suite {named}: no such file{near}", "a suite's YAML, a file of rows, or held-out")
    suite = read_suite(Path(named))
    overlap = compare(questions(suite), sets.train.rows)
    if overlap.same:
        raise InputError(f"{named}: {overlap.text}", "leave those out of the suite, or of the training rows")
    for note in (*suite.notes, *([f"{named}: {overlap.text}"] if overlap.text else [])):
        progress.note(note)
    search, final = split_suite(suite)
    return _quality(suite.name, search, final, str(Path(named).absolute()))


def _of_held_out(sets: DataSets, progress: Progress) -> Quality:
    """``held-out``, read as a trial will read the rows that the sweep is to write."""
    with scratch.temporary_folder("held-out") as folder:
        files = [Path(folder) / f"{part}.jsonl" for part in PARTS]
        for file, rows in zip(files, split_held_out(sets), strict=True):
            write_rows(file, rows)
        try:
            search, final = map(read_suite, files)
        except DataError as error:
            raise DataError(_without(error.message, folder), error.hint) from None
    for note in (*search.notes, *final.notes):
        progress.note(_without(note, folder))
    return _quality(HELD_OUT_ROWS, search, final, "")


def _without(text: str, folder: str) -> str:
    """A message on files of a folder that is gone when it is read."""
    return text.replace(f"{folder}/", "--suite held-out: ")


def split_suite(suite: Suite) -> tuple[Suite, Suite]:
    """Items for the search, and those for the end; a group, or the same question twice, is not torn apart."""
    keys = [item.group or item.prompt_sha256 for item in suite.items]
    if len(set(keys)) < FEWEST_HELD_OUT:
        raise UsageError(
            f"{suite.source}: {len(set(keys))} different questions or groups, expected {FEWEST_HELD_OUT} at least: "
            "half of them are for the end", "add items",
        )  # fmt: skip
    search, final = halves(keys)
    return _some(suite, search), _some(suite, final)


def suite_order(quality: Quality, files: TrialFiles, part: Part) -> SuiteOrder | None:
    """What a trial is to answer; None where the eval loss is what counts."""
    if not quality.of_suite:
        return None
    sha256 = quality.search_sha256 if part == "search" else quality.final_sha256
    harness = quality.harness.to_json() if quality.harness else None
    if quality.path or harness:
        return SuiteOrder(path=quality.path, part=part, sha256=sha256, harness=harness)
    rows = files.search_rows if part == "search" else files.final_rows
    return SuiteOrder(path=str(rows), part=None, sha256=sha256, harness=None)


def read_part(order: SuiteOrder) -> Suite | TaskPart:
    """Those items; InputError where they are others than when the sweep began."""
    if order["harness"] is not None:
        from lora2serve.sweeping.sweep_tasks import read_task_part

        options = HarnessOptions.from_json(order["harness"], "tasks")
        return read_task_part(options, final=order["part"] == "final", sha256=order["sha256"])
    suite = read_suite(Path(order["path"]))
    if order["part"]:
        suite = split_suite(suite)[order["part"] == "final"]
    if suite.sha256 != order["sha256"]:
        raise InputError(
            f"{order['path']}: changed since the sweep began, and scores of other suites do not compare",
            "put it back, or begin another sweep with --name",
        )
    return suite


def _quality(name: str, search: Suite, final: Suite, path: str) -> Quality:
    metric = next(iter(metric_names(search)))
    return Quality(name, metric, path, search.sha256, final.sha256)


def _some(suite: Suite, numbers: Sequence[int]) -> Suite:
    return replace(suite, items=tuple(suite.items[number] for number in numbers))
