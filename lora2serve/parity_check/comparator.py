"""Compare every export with the trained model, each in its real engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from lora2serve.artifacts import manifest
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.parity_report import (
    ComparisonResult,
    Gate,
    ParityReport,
    Question,
    TensorError,
)
from lora2serve.errors import EngineError, Lora2ServeError
from lora2serve.exporting import sinks, stream
from lora2serve.exporting.open_model import OpenOptions, open_plain
from lora2serve.parity_check import gates, row_figures, settings_check, tensor_verdict, thresholds, worker
from lora2serve.parity_check.comparisons import Comparison, refuse_impossible, served_otherwise, stored_dtype
from lora2serve.parity_check.engine_process import EngineMissing, EngineProcess
from lora2serve.parity_check.equal_files import opens_the_same
from lora2serve.parity_check.gates import Behavior, EngineAnswers
from lora2serve.parity_check.references import References
from lora2serve.parity_check.tensor_verdict import TensorFigures
from lora2serve.parity_check.trained_model import TrainedModel
from lora2serve.progress import Progress, Silent
from lora2serve.system import scratch


def check(
    origin: TrainedModel, comparisons: Sequence[Comparison], *, progress: Progress, ask: str = ""
) -> ParityReport:
    """The report on all comparisons, which ``comparisons.py`` plans; ``ask`` is a prompt that all of them answer, too.

    A missing or dying engine is a row; only what cannot be begun raises.
    """
    refuse_impossible(origin, comparisons)
    with _work_folder(origin.home) as work:
        checked = settings_check.before_engines(origin, comparisons, progress)
        rows = [settings_check.first_row(origin, comparison, checked) for comparison in comparisons]
        if all(row.gate for row in rows):  # there is nothing to ask an engine
            report = ParityReport(run=origin.name, versions=manifest.versions(), rows=tuple(rows))
        else:
            report = _with_engines(origin, list(zip(comparisons, rows, strict=True)), work, progress, ask)
    for comparison, row in zip(comparisons, report.rows, strict=True):
        if comparison.path:
            row_figures.record(Export.open(comparison.path), row)
    return report


def _with_engines(
    origin: TrainedModel, comparisons: Sequence[tuple[Comparison, ComparisonResult]], work: Path, progress: Progress,
    ask: str,
) -> ParityReport:  # fmt: skip
    """``comparisons``: each with its row, which has the settings gate."""
    with closing(References(origin, work, progress, ask)) as references:
        with closing(Comparator(origin, references, work, progress, ask)) as comparator:
            rows = tuple(comparator.compare(comparison, row) for comparison, row in comparisons)
        question = _question(references, rows, ask)
    return ParityReport(
        run=origin.name,
        data=references.scored(),
        references=references.versions,
        versions=manifest.versions(),
        question=question,
        rows=rows,
    )


@contextmanager
def _work_folder(home: Path) -> Iterator[Path]:
    """Where the logits lie, on the disk of the report: they are too large for TMPDIR."""
    work = home / f".work-{uuid4().hex[:12]}"
    with scratch.filled(home), scratch.claimed(work):
        work.mkdir()
        yield work


def _question(references: References, rows: Sequence[ComparisonResult], ask: str) -> Question:
    """The user's own question and who answers what."""
    if not ask:
        return Question()
    texts = references.words(list(references.answers.values()))
    answers = {who: text.strip() for who, text in zip(references.answers, texts, strict=True)}
    return Question(ask, answers | {f"{row.export} in {row.engine}": row.reply for row in rows if row.version})


WORST = 20  # tensors in the report


class Comparator:
    """What compares exports with the references. Memory of this process: figures only."""

    def __init__(
        self, origin: TrainedModel, references: References, work: Path, progress: Progress, ask: str = ""
    ) -> None:
        self.origin, self.references, self.work, self.progress, self.ask = origin, references, work, progress, ask
        self.settings, self.data = origin.settings, references.data
        self._asked: list[tuple[Comparison, ComparisonResult]] = []  # through all gates
        self._tensor_gates: dict[Path, tuple[Gate, tuple[TensorError, ...]]] = {}
        self._reader: EngineProcess | None = None

    def close(self) -> None:
        """End the child that reads exports back."""
        if self._reader:
            self._reader.close()

    def _child(self, engine: str, options: Mapping[str, object], log: str) -> EngineProcess:
        return EngineProcess(engine, options, scratch.log_file(log), self.settings.limit)

    def compare(self, comparison: Comparison, row: ComparisonResult) -> ComparisonResult:
        """All gates of one comparison, of which ``row`` has that of the settings; what goes wrong becomes its verdict.

        An engine that has been asked with equal files is not asked again.
        """
        if row.gate:
            return row
        started, passed = time.monotonic(), list(row.gates)
        twin = next((done for other, done in self._asked if _answers_alike(comparison, row, other, done)), None)
        try:
            if twin:
                row = self._as_twin(row, comparison, twin, passed)
            else:
                with self._child(
                    comparison.engine, self._options(comparison), f"{comparison.name}-{comparison.engine}"
                ) as child:
                    row = self._through_gates(row, comparison, child, passed)
        except EngineMissing as error:
            unasked = f"prompts and answers in {comparison.engine}, which was not asked"
            row = replace(
                row,
                gates=(*passed, Gate("tokens", "missing", (), error.message, error.hint)),
                not_compared=(*row.not_compared, unasked),
            )
        except EngineError as error:
            name = comparison.gates[min(len(passed), len(comparison.gates) - 1)]
            row = replace(row, gates=(*passed, Gate(name, "failed", (), error.message, error.hint)))
        row = replace(row, seconds=round(time.monotonic() - started, 1))
        if row.answers and not twin:
            self._asked.append((comparison, row))
        self.progress.note(f"{row.title}: {row.status} ({row.seconds:.0f} s)")
        return row

    def _as_twin(
        self, row: ComparisonResult, comparison: Comparison, twin: ComparisonResult, passed: list[Gate]
    ) -> ComparisonResult:
        """A row with what the engine answered for the export with equal files, and with its own tensors."""
        by_name = {gate.name: gate for gate in twin.gates}
        passed.append(by_name["tokens"])
        row = self._with_tensors(row, comparison, passed)
        row = replace(row, version=twin.version, computed=twin.computed, reply=twin.reply, same_files=twin.export)
        if passed[-1].status not in ("met", "skipped"):
            return _without_later(row, comparison, passed)
        return replace(
            row,
            gates=(*passed, by_name["behaviour"]),
            not_compared=(*row.not_compared, *self._unasked(row, by_name["behaviour"])),
            beside=twin.beside,
            parts=twin.parts,
            prompts=twin.prompts,
            answers=twin.answers,
            speed=twin.speed,
        )

    def _unasked(self, row: ComparisonResult, behavior: Gate) -> tuple[str, ...]:
        """What the engine could not be asked for, in words."""
        known = self.data.long is None or any(check.name == "long_kl" for check in behavior.checks)
        return () if known else (f"the long text in {row.engine}, which does not take it",)

    def _options(self, comparison: Comparison) -> dict[str, object]:
        """What makes the engine: with room for the longest text, and the base as GGUF where an adapter needs it."""
        options = dict(comparison.options)
        if "window" in options:
            options["window"] = self.data.longest(self.settings.new_tokens)
        if comparison.target == "gguf-adapter":
            options["model"] = str(self._base_gguf())
        return options

    def _base_gguf(self) -> Path:
        """The served base as GGUF, in its own type, so that nothing but the adapter is in question."""
        folder = self.work / "base"
        if not folder.is_dir():
            base, gguf = self.origin.base, sinks.find("gguf")
            quant = {"float16": "F16", "float32": "F32"}.get(stored_dtype(base), "BF16")
            plan = stream.Plan("gguf", gguf, gguf.Options(quant=quant), folder)
            try:
                stream.export(open_plain(base, base.name, OpenOptions()), [plan], Silent())
            except Lora2ServeError as error:
                raise EngineError(f"llama.cpp: the base cannot be written as GGUF: {error.message}") from None
        return next(folder.rglob("*.gguf"))

    def _through_gates(
        self, row: ComparisonResult, comparison: Comparison, child: EngineProcess, passed: list[Gate]
    ) -> ComparisonResult:
        label = f"{row.export} in {row.engine}: loading, prompts"
        with self.progress.track(label, len(self.data.conversations)) as advance:
            answer = child.call("tokens", advance, data=str(self.references.path))
        tokens = gates.EngineTokens.from_json(answer, f"{row.engine}: tokens")
        window = self.data.longest(self.settings.new_tokens)
        computed = served_otherwise(comparison, tokens.dtype, self.origin.base, window)
        row = replace(row, version=tokens.version, computed=computed, reply=self._answer(child) if self.ask else "")
        passed.append(gates.tokens(self.data, tokens))
        if passed[-1].status == "met":
            row = self._with_tensors(row, comparison, passed)
        if passed[-1].status not in ("met", "skipped"):
            return _without_later(row, comparison, passed)
        return self._behavior(row, child, passed)

    def _with_tensors(self, row: ComparisonResult, comparison: Comparison, passed: list[Gate]) -> ComparisonResult:
        """The row with its worst tensors, where it has files; their gate is added to ``passed``."""
        if comparison.path is None:
            return row
        gate, worst = self._tensors(comparison.path, row.kind)
        passed.append(gate)
        return replace(row, tensors=worst)

    def _answer(self, child: EngineProcess) -> str:
        ids = child.call("answer", prompt=self.ask, new_tokens=self.settings.new_tokens)
        return self.references.words([ids])[0].strip()

    def _tensors(self, export: Path, kind: str) -> tuple[Gate, tuple[TensorError, ...]]:
        """The tensor gate, once for each export, and its worst tensors."""
        if export not in self._tensor_gates:
            if self._reader is None:
                self._reader = self._child("tensors", {"origin": self.origin.json()}, "tensors")
            try:
                bounded = any("tensor_nmse" in bounds for bounds in self.settings.thresholds.values())
                differences = self._reader.call("compare", export=str(export), measure=bounded)
            except EngineError:  # it ended with its child; the next export gets another
                self._reader = None
                raise
            self._tensor_gates[export] = self._tensor_gate(differences, kind)
        return self._tensor_gates[export]

    def _tensor_gate(self, differences: Any, kind: str) -> tuple[Gate, tuple[TensorError, ...]]:
        if differences is None:  # the target has no reader
            return Gate("tensors", "skipped"), ()
        found = TensorFigures.from_json(differences, "compare")
        bounds = thresholds.lookup(kind, self.settings.thresholds)
        return tensor_verdict.tensors(found, bounds), found.tensors[:WORST]

    def _behavior(self, row: ComparisonResult, child: EngineProcess, passed: list[Gate]) -> ComparisonResult:
        known, scored = self.references, self.work / "scored.npz"
        files = {name: str(path) for name, path in known.files.items()}
        with self.progress.track(f"{row.export} in {row.engine}", self.data.positions, "tokens") as advance:
            child.call("score", advance, data=str(known.path), references=files, out=str(scored))
        generated = child.call("generate", data=str(known.path), new_tokens=self.settings.new_tokens)
        answers = EngineAnswers.from_json(generated, f"{row.engine}: generate")
        end = len(known.sequences)  # behind them, those of the long text
        measured: dict[str, Behavior] = {
            name: Behavior(
                positions.take(slice(end)), known.base[name], known.sequences, known.task,
                gates.greedy(known.greedy[name], answers.ids, self.data.stop),
                positions.take(slice(end, None)) if self.data.long else None,
            )
            for name, positions in worker.load_positions(scored).items()
        }  # fmt: skip
        main = measured[row.reference]
        bounds = thresholds.lookup(row.kind, self.settings.thresholds)
        if any(setting.allowed for setting in row.settings):  # it answers as its user wants it to
            bounds = replace(bounds, first_difference=None)
        name_of = partial(row_figures.position_name, known)
        gate = gates.behavior(main, main.measure(), bounds, name_of, thresholds.noise(row.kind))
        return replace(
            row,
            gates=(*passed, gate),
            not_compared=(*row.not_compared, *self._unasked(row, gate)),
            beside={name: row_figures.shown(other) for name, other in measured.items() if name != row.reference},
            parts=row_figures.by_part(main),
            prompts=row_figures.by_text(main, known),
            answers=row_figures.answers(main, known, answers.ids, row.reference),
            speed=answers.speed,
        )


def _answers_alike(comparison: Comparison, row: ComparisonResult, other: Comparison, done: ComparisonResult) -> bool:
    """Whether the engine would answer, and be judged, as for ``done``."""
    judged_alike = any(s.allowed for s in row.settings) == any(s.allowed for s in done.settings)
    return judged_alike and opens_the_same(comparison, other)


def _without_later(row: ComparisonResult, comparison: Comparison, passed: Sequence[Gate]) -> ComparisonResult:
    """The row that ends with the last gate: the others are skipped."""
    return replace(row, gates=(*passed, *(Gate(name, "skipped") for name in comparison.gates[len(passed) :])))
