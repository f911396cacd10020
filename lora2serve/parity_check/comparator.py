"""Compare every export with the trained model, each in its real engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from lora2serve.artifacts import manifest
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import EngineVerdict, ParityVerdict
from lora2serve.artifacts.parity_report import (
    ComparisonResult,
    Gate,
    GreedyAnswer,
    Metric,
    ParityReport,
    PromptFigures,
    Question,
    ReferenceName,
    TensorError,
)
from lora2serve.errors import EngineError, Lora2ServeError, UsageError
from lora2serve.exporting import sinks, stream
from lora2serve.exporting.open_model import OpenOptions, open_plain
from lora2serve.parity_check import gates, settings_check, tensor_verdict, thresholds, worker
from lora2serve.parity_check.comparisons import Comparison, served_otherwise
from lora2serve.parity_check.engine_process import EngineMissing, EngineProcess
from lora2serve.parity_check.gates import Behavior
from lora2serve.parity_check.references import References
from lora2serve.parity_check.settings_check import GATES, GATES_OF_URL
from lora2serve.parity_check.settings_gate import SettingsResult
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
    if not comparisons:
        raise UsageError(f"{origin.name}: no exports to compare", "`lora2serve export --target ...` makes some")
    for comparison in comparisons:  # a threshold that does not exist is an error before the work
        thresholds.lookup(comparison.kind, origin.settings.thresholds)
    with _work_folder(origin.home) as work:
        checked = settings_check.before_engines(origin, comparisons, progress)
        rows = [settings_check.first_row(comparison, checked, origin.settings.require) for comparison in comparisons]
        if all(row.gate for row in rows):  # there is nothing to ask an engine
            report = ParityReport(run=origin.name, versions=manifest.versions(), rows=tuple(rows))
        else:
            report = _with_engines(origin, comparisons, checked, work, progress, ask)
    for comparison, row in zip(comparisons, report.rows, strict=True):
        if comparison.path:
            _record(Export.open(comparison.path), row)
    return report


def _with_engines(
    origin: TrainedModel, comparisons: Sequence[Comparison], checked: Mapping[Path, SettingsResult], work: Path,
    progress: Progress, ask: str,
) -> ParityReport:  # fmt: skip
    with closing(References(origin, work, progress, ask)) as references:
        with closing(Comparator(origin, references, work, progress, ask, checked)) as comparator:
            rows = tuple(comparator.compare(comparison) for comparison in comparisons)
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
WORST_TEXTS = 6  # shown token by token


class Comparator:
    """What compares exports with the references. Memory of this process: figures only."""

    def __init__(
        self, origin: TrainedModel, references: References, work: Path, progress: Progress, ask: str = "",
        checked: Mapping[Path, SettingsResult] = {},
    ) -> None:  # fmt: skip
        self.origin, self.references, self.work, self.progress, self.ask = origin, references, work, progress, ask
        self.settings, self.data, self._checked = origin.settings, references.data, checked
        self._tensor_gates: dict[Path, tuple[Gate, tuple[TensorError, ...]]] = {}
        self._reader: EngineProcess | None = None

    def close(self) -> None:
        """End the child that reads exports back."""
        if self._reader:
            self._reader.close()

    def _child(self, engine: str, options: Mapping[str, object], log: str) -> EngineProcess:
        return EngineProcess(engine, options, scratch.log_file(log), self.settings.limit)

    def compare(self, comparison: Comparison) -> ComparisonResult:
        """All gates of one comparison; what goes wrong becomes its verdict."""
        started, engine = time.monotonic(), comparison.engine
        row = settings_check.first_row(comparison, self._checked, self.settings.require)
        if row.gate:
            return row
        passed = list(row.gates)
        order = GATES if comparison.path else GATES_OF_URL
        log = f"{comparison.name}-{engine}"
        try:
            with self._child(engine, self._options(comparison), log) as child:
                row = self._through_gates(row, comparison, child, passed)
        except EngineMissing as error:
            unasked = f"prompts and answers in {engine}, which was not asked"
            row = replace(
                row,
                gates=(*passed, Gate("tokens", "missing", (), error.message, error.hint)),
                not_compared=(*row.not_compared, unasked),
            )
        except EngineError as error:
            name = order[min(len(passed), len(order) - 1)]
            row = replace(row, gates=(*passed, Gate(name, "failed", (), error.message, error.hint)))
        row = replace(row, seconds=round(time.monotonic() - started, 1))
        self.progress.note(f"{row.export} in {row.engine}: {row.status} ({row.seconds:.0f} s)")
        return row

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
            quant = {"float16": "F16", "float32": "F32"}.get(_dtype(base), "BF16")
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
        computed = served_otherwise(comparison, tokens.dtype)
        row = replace(row, version=tokens.version, computed=computed, reply=self._answer(child) if self.ask else "")
        passed.append(gates.tokens(self.data, tokens))
        if passed[-1].status == "met" and comparison.path:
            gate, worst = self._tensors(comparison.path, row.kind)
            passed.append(gate)
            row = replace(row, tensors=worst)
        if passed[-1].status not in ("met", "skipped"):
            order = GATES if comparison.path else GATES_OF_URL
            return replace(row, gates=(*passed, *(Gate(name, "skipped") for name in order[len(passed) :])))
        return self._behavior(row, child, passed)

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
        answers = child.call("generate", data=str(known.path), new_tokens=self.settings.new_tokens)
        measured: dict[str, Behavior] = {
            name: Behavior(
                positions, known.base[name], known.sequences, known.task,
                gates.greedy(known.greedy[name], answers, self.data.stop),
            )
            for name, positions in worker.load_positions(scored).items()
        }  # fmt: skip
        main = measured[row.reference]
        bounds = thresholds.lookup(row.kind, self.settings.thresholds)
        if any(setting.allowed for setting in row.settings):  # it answers as its user wants it to
            bounds = replace(bounds, first_difference=None)
        gate = gates.behavior(main, main.measure(), bounds, self._name_of, thresholds.noise(row.kind))
        beside = {name: _shown(other) for name, other in measured.items() if name != row.reference}
        return replace(
            row,
            gates=(*passed, gate),
            beside=beside,
            parts=self._parts(main),
            prompts=self._prompts(main),
            answers=self._answers(row.reference, main, answers),
        )

    def _name_of(self, position: int) -> str:
        number = int(self.references.sequences[position])
        inside = position - int(np.flatnonzero(self.references.sequences == number)[0])
        text = self.data.sequences[number]
        token = self.references.words([text.ids[inside + 1 : inside + 2]])[0]
        return f"{text.part} text {number} ({text.text[:40]!r}), position {inside + 1}, next token {token!r}"

    def _parts(self, measured: Behavior) -> dict[str, tuple[Metric, ...]]:
        parts = {}
        for part, rows in (("task", measured.task), ("general", ~measured.task)):
            if rows.any():
                of_part = replace(
                    measured, positions=measured.positions.take(rows),
                    base=measured.base.take(rows) if measured.base else None,
                    sequences=measured.sequences[rows], task=np.ones(int(rows.sum()), dtype=bool), greedy=None,
                )  # fmt: skip
                parts[part] = _shown(of_part)
        return parts

    def _prompts(self, measured: Behavior) -> tuple[PromptFigures, ...]:
        """The KL of every text by position; the worst texts also token by token."""
        lengths = [len(text.ids) - 1 for text in self.data.sequences]
        parts = np.split(measured.positions.kl, np.cumsum(lengths)[:-1])
        worst = set(sorted(range(len(parts)), key=lambda number: -parts[number].max())[:WORST_TEXTS])
        words = {n: self.references.words([[token] for token in self.data.sequences[n].ids]) for n in worst}
        return tuple(
            PromptFigures(text.part, text.text[:200], tuple(kl.tolist()), tuple(words.get(number, ())))
            for number, (text, kl) in enumerate(zip(self.data.sequences, parts, strict=True))
        )

    def _answers(
        self, reference: ReferenceName, measured: Behavior, answers: Sequence[Sequence[int]]
    ) -> tuple[GreedyAnswer, ...]:
        assert measured.greedy is not None
        expected = self.references.words([tokens for tokens, _ in self.references.greedy[reference]])
        got = self.references.words(answers)
        prompts = [prompt.question for prompt in self.data.prompts]
        return tuple(GreedyAnswer(*parts) for parts in zip(prompts, expected, got, measured.greedy.parts, strict=True))


def _dtype(base: Path) -> str:
    from lora2serve.weights.checkpoint import read_config

    config = read_config(base)
    return str(config.get("dtype") or config.get("torch_dtype"))


def _shown(measured: Behavior) -> tuple[Metric, ...]:
    return tuple(Metric(name, figure.value, figure.low, figure.high) for name, figure in measured.measure().items())


def _record(export: Export, row: ComparisonResult) -> None:
    """Into the export's manifest: whether it is met, and the figures in each engine that was asked."""

    def value(name: str) -> float | None:
        metric = row.check(name)
        return metric.value if metric else None

    verdict = EngineVerdict(
        status=row.status,
        reference=row.reference,
        version=row.version,
        mean_kl=value("mean_kl"),
        p999_kl=value("p999_kl"),
        top1=value("top1"),
        equal_answers=value("equal_answers"),
        retention=value("retention"),
    )
    before = export.manifest.parity.engines if export.manifest.parity else {}
    engines = {**before, row.engine: verdict}
    statuses = {verdict.status for verdict in engines.values()} - {"missing"}
    export.with_parity(ParityVerdict(met=statuses == {"met"}, engines=engines))
