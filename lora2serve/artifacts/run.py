"""A run directory: where one fine-tune keeps its recipe, adapter, metrics, exports and reports.

runs/<name>/recipe.yaml     the recipe, fully resolved
            run.json        base identity, data hashes, versions, quantization, metrics
            adapter/        the PEFT adapter as trained, with its tokenizer
            eval.jsonl      the held-out rows, in normal form
            row_losses.jsonl  the loss of each of them after the training
            metrics.jsonl   one line per logged step
            samples.jsonl   answers to train.samples at each evaluation
            loss.png
            checkpoints/    the trainer's, for --resume
            exports/        <target>[-<quant>]/
            parity/         report.json and its pictures
runs/latest                 a link to the run that was finished last
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lora2serve.artifacts.json_record import read_text
from lora2serve.artifacts.run_record import RunRecord
from lora2serve.config.model_name import refuse_run_name
from lora2serve.errors import InputError, UsageError
from lora2serve.system import scratch
from lora2serve.system.small_files import write_text

ROOT = Path("runs")
LATEST = "latest"
RECORD = "run.json"
TRAINER_STATE = "trainer_state.json"  # of a checkpoint
CHECKPOINT = f"checkpoints/checkpoint-*/{TRAINER_STATE}"
WORTH_KEEPING = (CHECKPOINT, "adapter/adapter_config.json")  # what a run has once a training got somewhere
OTHER_KINDS = ("config.json", "adapter_config.json", "lora2serve.json")  # a model, an adapter, an export


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def eval_data(self) -> Path:
        return self.path / "eval.jsonl"

    @property
    def row_losses(self) -> Path:
        return self.path / "row_losses.jsonl"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    @property
    def parity(self) -> Path:
        return self.path / "parity"

    @property
    def record(self) -> RunRecord:
        """``run.json``; empty before the first ``save``."""
        path = self.path / RECORD
        return RunRecord.from_text(read_text(path), str(path)) if path.is_file() else RunRecord()

    def save(self, record: RunRecord) -> None:
        """Write ``run.json`` in one step."""
        write_text(self.path / RECORD, record.to_text())

    @property
    def has_checkpoint(self) -> bool:
        """Whether training got as far as saving a state to go on from: the trainer writes this file of it last."""
        return any(self.path.glob(CHECKPOINT))

    @property
    def resumable(self) -> str:
        """What continues a run that was interrupted; empty for one that is finished."""
        if self.record.finished or not self.has_checkpoint:
            return ""
        return f"interrupted: `lora2serve train --resume {self.path}` continues it"

    def list_exports(self) -> list[Path]:
        """Every published export of this run, by name."""
        return sorted(
            path.parent for path in self.exports.glob("*/lora2serve.json") if ".partial-" not in path.parent.name
        )


def create(name: str, root: Path = ROOT) -> Run:
    """A new run directory ``<root>/<name>``, or ``<name>-2`` and so on where one stands."""
    refuse_run_name(name, "run name")
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = root / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
            return Run(path)
        except FileExistsError:
            number += 1


def unfinished_before(run: Run, name: str) -> Run | None:
    """The last of the runs of that name that were made before this one, if training can go on there."""
    numbers = range(int(run.path.name.rpartition("-")[2]) - 1, 0, -1) if run.path.name != name else ()
    for number in numbers:
        earlier = Run(run.path.with_name(f"{name}-{number}" if number > 1 else name))
        with suppress(InputError):  # a broken run.json is no reason not to train
            if earlier.resumable:
                return earlier
    return None


def point_latest(run: Run) -> None:
    """Let ``latest`` beside the run point at it, in one step."""
    temporary = run.path.parent / f".{LATEST}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(run.path.name)
    os.replace(temporary, run.path.parent / LATEST)


@contextmanager
def kept_once_started(run: Run) -> Iterator[None]:
    """Let ``latest`` point at the run once it is whole; one that ends before its first checkpoint leaves nothing.

    One that is killed there is removed by the next command.
    """
    with scratch.claimed(run.path, unless=WORTH_KEEPING) as keep:
        yield
        point_latest(run)
        keep()


def latest(root: Path = ROOT) -> Run:
    """The run that was finished last; UsageError where there is none, or it was cut off."""
    link = root / LATEST
    if not link.exists():
        started = newest(root)
        first = (
            f"`lora2serve train --resume {started.path}` finishes that run" if started else "`lora2serve train` first"
        )
        raise UsageError(f"no {link} here", f"{first}, or name a run or an adapter")
    run = Run(root / link.resolve().name)
    refuse_cut_off(run.path)
    return run


def newest(root: Path = ROOT) -> Run | None:
    """The run at which training worked last, finished or not; None where there is none."""
    paths = [path.parent for path in root.glob("*/recipe.yaml") if not path.parent.is_symlink()]
    return Run(max(paths, key=_last_change)) if paths else None


def _last_change(run: Path) -> float:
    written = (run / name for name in (RECORD, "recipe.yaml", "metrics.jsonl", "checkpoints"))
    return max(path.stat().st_mtime for path in written if path.exists())


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory with a finished adapter."""
    return (path / RECORD).is_file() and (path / "adapter" / "adapter_config.json").is_file()


def refuse_cut_off(path: Path) -> None:
    """UsageError where ``path`` is a run whose training did not end; whatever else it is passes."""
    if is_cut_off(path):
        raise cut_off(path)


def is_cut_off(path: Path) -> bool:
    """Whether ``path`` is a run whose training did not end."""
    if not path.is_dir() or is_run(path) or any((path / name).is_file() for name in OTHER_KINDS):
        return False
    empty = path.resolve().parent.name == ROOT.name and not any(path.iterdir())
    return empty or ((path / "recipe.yaml").is_file() and not Run(path).record.finished)


def followed(path: Path) -> Path:
    """Where a link leads, as ``runs/latest`` does: a run has its own name, by whatever path it was named."""
    if not path.is_symlink():
        return path
    real = path.resolve()
    return path.with_name(real.name) if real.parent == path.parent.resolve() else real


def cut_off(path: Path) -> UsageError:
    """The error for a run whose training did not end, by its own name and not by that of the link."""
    path = followed(path)
    if Run(path).has_checkpoint:
        return UsageError(
            f"{path}: not a finished run (training was cut off, or goes on)",
            f"`lora2serve train --resume {path}` continues it",
        )
    return UsageError(
        f"{path}: not a finished run (training was cut off before its first checkpoint)",
        "train again (`lora2serve train`), or name another run",
    )
