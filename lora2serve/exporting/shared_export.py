"""``export --shards i/n``: several processes write one export, on one machine or on several that share a folder.

The tensors are dealt into parts. A process holds the lock of a part while it writes it, which ends with it, however it
ends; what is written and on the disk is on record in a file of its own. Whoever finds every part on record publishes.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lora2serve.artifacts import manifest, staging
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.shared_dir import SharedDir
from lora2serve.config.schema import show
from lora2serve.errors import ExportError, UsageError
from lora2serve.exporting import stream
from lora2serve.exporting.sinks import Exporter, ExportFacts, ExportModel, Sink
from lora2serve.progress import Progress
from lora2serve.system import file_lock
from lora2serve.system.small_files import JsonObject, plain_path
from lora2serve.weights.tensors import TensorSpec

PARTS = 8  # for each worker: so many pieces of its work may be left to others
TARGETS = ("vllm", "gguf", "ollama", "lmstudio")
PLAN, PUBLISH = "plan.json", "publish.lock"


@dataclass(frozen=True)
class WorkerPlace:
    """Worker ``number`` of ``count``, from 1 on: where it begins. Any of them does what is left of the others."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> WorkerPlace:
        """``2/3``; UsageError for anything else."""
        number, _, count = text.partition("/")
        if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= 10_000:
            return cls(int(number), int(count))
        raise UsageError(f"--shards {text}: expected WORKER/WORKERS, such as 2/3")


def refuse(outputs: Sequence[tuple[str, Exporter, object]], place: WorkerPlace) -> None:
    """UsageError for what several workers cannot write together; each output is a target, its class and its options."""
    word = f"--shards {place.number}/{place.count}"
    problems = [
        f"{word}: --target {target} is written by one process" for target, _, _ in outputs if target not in TARGETS
    ]
    for _, exporter, options in outputs:
        whole = getattr(exporter, "needs_whole_model", None)
        if whole and whole(options):
            problems.append(f"{word}: --quant {getattr(options, 'quant', None)} needs all weights in one process")
    if len(outputs) != 1:
        problems.append(f"{word}: one target and one type at a time, not {len(outputs)}")
    if problems:
        raise UsageError("\n".join(problems), f"targets of several workers: {', '.join(TARGETS)}; else leave it out")


def export(
    model: ExportModel, plan: stream.Plan, place: WorkerPlace, progress: Progress, *, overwrite: bool = False,
    threads: int | None = None,
) -> Export | None:  # fmt: skip
    """Write what is left of one export; it, once this process has published it, and None where others still work.

    ExportError where the folder beside it holds parts of another one. Nothing that is on record is written again.
    """
    target = plain_path(plan.out.absolute())
    out = SharedDir(target)
    with ExitStack() as stack:
        stack.callback(out.close)
        try:
            sink = plan.exporter(model, out, plan.options)
            stack.callback(sink.close)
            work = _SharedWork(model, plan, out, sink, progress, stream.threads_for(threads), place)
            if published := work.published():
                return published
            staging.refuse(target, overwrite=overwrite)
            if published := work.begin():
                return published
            progress.note(f"worker {place.number} of {place.count}: {len(work.parts)} parts in all")
            work.write_parts()
            return work.publish(overwrite) if work.all_there() else None
        except KeyboardInterrupt:
            if out.folder.exists():
                progress.note(f"{out.folder} keeps what is done: the same command goes on")
            raise
        except OSError as error:
            raise ExportError(
                f"{error.filename or target}: {error.strerror}",
                f"{out.folder} keeps what is done: the same command goes on, once there is room",
            ) from error


@dataclass
class _SharedWork:
    """One worker's view of the export."""

    model: ExportModel
    plan: stream.Plan
    out: SharedDir
    sink: Sink
    progress: Progress
    threads: int
    place: WorkerPlace
    parts: list[list[TensorSpec]] = field(init=False)

    def __post_init__(self) -> None:
        specs = [spec for spec in self.model.source.specs() if spec.name in self.sink.wanted]
        self.parts = _dealt(specs, PARTS * self.place.count)

    def published(self) -> Export | None:
        """The export of this very plan that is in its place, and was written by several."""
        if self.out.path.exists() or not (self.out.target / manifest.NAME).is_file():
            return None
        there = Export.open(self.out.target)
        facts = {**there.manifest.to_json(), **self._record()["export"]}
        if facts != there.manifest.to_json():
            return None
        self.progress.note(f"{self.out.target}: published already")
        if self.out.folder.exists():  # of a worker that was killed between the two
            self._remove_folder()
        return there

    def _record(self) -> dict[str, JsonObject]:
        """What all workers must agree on."""
        content = stream.manifest_of(self.model, self.plan, ExportFacts()).to_json()
        export = {key: value for key, value in content.items() if value not in (None, {}, [])}
        files = {name: file.size for name, file in self.out.files.items()}
        return {"export": export, "files": files, "workers": {"count": self.place.count}}

    def begin(self) -> Export | None:
        """Take part in it; the export instead, where another worker has published it since."""
        try:
            self._follow_plan()
            if published := self.published():
                return published
            self.out.begin()
        except FileNotFoundError:
            if self.out.folder.exists():
                raise
        if (self.out.folder / PLAN).exists():
            return None
        if self.out.folder.exists():  # made anew, by this process
            self._remove_folder()
        if published := self.published():
            return published
        raise ExportError(f"{self.out.folder}: removed while it was in use", "start the worker again")

    def _follow_plan(self) -> None:
        """It is the one that the others follow, or the first."""
        self.out.folder.mkdir(parents=True, exist_ok=True)
        path, record = self.out.folder / PLAN, self._record()
        if not _put_first(path, json.dumps(record)):
            theirs = json.loads(path.read_text(encoding="utf-8"))
            different = [
                f"{key}: {show(own.get(key))} here, {show(known.get(key))} in {self.out.folder}"
                for own, known in ((record[section], theirs[section]) for section in record)
                for key in sorted({*own, *known})
                if own.get(key) != known.get(key)
            ]
            if different:
                raise ExportError(
                    "\n".join(different), "give all workers the same options and machines, or remove that folder"
                )

    def write_parts(self) -> None:
        """Those of nobody, beginning with our own; until all are on record or held by others."""
        first = (self.place.number - 1) * len(self.parts) // self.place.count
        order = [*range(first, len(self.parts)), *range(first)]
        while sum(self._write(number) for number in order):  # until nothing is left of those that have ended, either
            pass

    def _write(self, number: int) -> bool:
        """Whether there was something to do, and it is done."""
        if self._done(number).exists():
            return False
        try:
            with file_lock.locked(self.out.folder / f"part-{number}.lock"):
                if self._done(number).exists():
                    return False
                self._write_locked(number)
                return True
        except BlockingIOError:
            return False
        except FileNotFoundError:
            if self.out.folder.exists():
                raise
            return False  # it was published in between

    def _write_locked(self, number: int) -> None:
        part = self.parts[number]
        before = {name: file.written for name, file in self.out.files.items()}
        label = f"part {number + 1} of {len(self.parts)}"
        stream.feed(self.model, [self.sink], self.progress, self.threads, part, label)
        written = {name: file.written - before[name] for name, file in self.out.files.items()}
        for name, count in written.items():
            if count:
                self.out.files[name].sync()
        sums = self.model.source.survival.sums([spec.name for spec in part])
        _put(self._done(number), json.dumps({"written": written, "survival": sums}))

    def _done(self, number: int) -> Path:
        return self.out.folder / f"part-{number}.json"

    def all_there(self) -> bool:
        """Whether every part is on record; else who goes on is said."""
        missing = sum(not self._done(number).exists() for number in range(len(self.parts)))
        target, count = self.out.target, len(self.parts)
        if not self.out.folder.exists():
            self.progress.note(f"another worker has published {target}")
        elif missing:
            self.progress.note(f"{missing} of {count} parts are held by other workers; the last publishes {target}")
        return not missing

    def publish(self, overwrite: bool) -> Export | None:
        """By one of those that find it complete."""
        try:
            with file_lock.locked(self.out.folder / PUBLISH):
                return self._publish(overwrite)
        except (BlockingIOError, FileNotFoundError):
            self.progress.note(f"another worker publishes {self.out.target}")
            return None

    def _publish(self, overwrite: bool) -> Export:
        records = [json.loads(self._done(number).read_text(encoding="utf-8")) for number in range(len(self.parts))]
        for name, file in self.out.files.items():
            written = file.constant + sum(record["written"].get(name, 0) for record in records)
            if written != file.size:
                raise ExportError(f"{name}: {written} bytes of {file.size} were written", "remove that folder")
        survival = self.model.source.survival
        for record in records:
            survival.take(record["survival"])
        facts = self.sink.finish()
        for warning in (*survival.check(), *facts.warnings):
            self.progress.warn(warning)
        sealed = self.out.seal(stream.manifest_of(self.model, self.plan, facts))
        with staging.claimed_target(self.out.target, overwrite=overwrite):
            export = Export(self.out.swap(), sealed)
        self._remove_folder()
        return export

    def _remove_folder(self) -> None:
        """In one step for the others, who might take it for an export that begins."""
        away = staging.partial_of(self.out.target)
        self.out.folder.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def _dealt(specs: Sequence[TensorSpec], count: int) -> list[list[TensorSpec]]:
    """In their order, into at most so many parts of about the same size."""
    total, done = sum(spec.nbytes for spec in specs), 0
    parts: dict[int, list[TensorSpec]] = {}
    for spec in specs:
        parts.setdefault(done * count // max(1, total), []).append(spec)
        done += spec.nbytes
    return list(parts.values())


def _put(path: Path, content: str) -> None:
    """The file is there whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def _put_first(path: Path, content: str) -> bool:
    """The same, unless it is there; whether it was not."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    temporary.write_text(content, encoding="utf-8")
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    return True
