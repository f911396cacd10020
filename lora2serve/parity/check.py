"""Compare every export with the trained model, each in its real engine."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora2serve import manifest
from lora2serve.errors import EngineError, UsageError
from lora2serve.parity import gates, jobs, thresholds
from lora2serve.parity.data import Amount, Data, load_saved
from lora2serve.parity.gates import Behaviour, Check, Gate
from lora2serve.parity.report import Answer, PromptFigures, Report, Row
from lora2serve.parity.subjects import ReferenceName, Subject
from lora2serve.parity.worker import Child, EngineMissing
from lora2serve.progress import Progress
from lora2serve.recipe import ParityRecipe
from lora2serve.run import Run


def check(
    run: Run, subjects: Sequence[Subject], *, base: Path, settings: ParityRecipe, progress: Progress, ask: str = ""
) -> Report:
    """The report on all subjects, which ``subjects.py`` makes; ``ask`` is a prompt that all of them answer beside.

    A missing or dying engine is a row; only what cannot be begun raises.
    """
    if not subjects:
        raise UsageError(f"{run.path}: no exports to compare", "`lora2serve export --target ...` makes some")
    for subject in subjects:  # a name that does not exist is said before the work
        thresholds.lookup(thresholds.kind_of(subject.about), settings.thresholds)
    run.parity.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".work-", dir=run.parity))
    try:
        with Bench(run, base, work, settings, progress, ask) as bench:
            rows = [bench.examine(subject) for subject in subjects]
            report = Report(
                run.name, bench.about(), bench.versions, tuple(rows), manifest.versions(), bench.asked(rows)
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for subject, row in zip(subjects, rows, strict=True):
        if subject.path:
            _record(subject.path, row)
    return report


WORST = 20  # tensors in the report


class Bench:
    """The references, measured once, and what compares subjects with them.

    Disk: two references of positions x V x 4 bytes. Memory of this process: figures only.
    """

    def __init__(
        self, run: Run, base: Path, work: Path, settings: ParityRecipe, progress: Progress, ask: str = ""
    ) -> None:
        self.run, self.work, self.settings, self.progress, self.ask = run, work, settings, progress, ask
        self.versions: dict[str, Any] = {}
        self._log = work / "logs"
        self._log.mkdir()
        quantization = run.record.get("quantization")
        options = {"base": str(base), "adapter": str(run.adapter), "tokenizer": str(run.adapter)}
        self._options: dict[ReferenceName, dict[str, Any]] = {"original": options}
        if quantization:
            self._options["trained"] = {**options, "quantization": quantization}
        self._children: dict[str, Child] = {}
        self._base: dict[str, Any] = {}
        self._greedy: dict[str, Any] = {}
        self._base_path, self._compared = base, dict[Path, Any]()

    def __enter__(self) -> Bench:
        first = next(iter(self._options))
        try:
            for name in self._options:
                self._children[name] = self._child("peft", self._options[name], f"reference-{name}")
            amount = Amount(self.settings.tokens, self.settings.window, self.settings.prompts)
            rows = str(self.run.eval_data) if self.run.eval_data.is_file() else None
            place = {"out": str(self._data_path), "eval_rows": rows, "general": self.settings.general}
            self._children[first].call("prepare_data", None, **place, amount=vars(amount))
            self.data: Data = load_saved(self._data_path)
            for name in self._options:
                self._measure(name)
        except BaseException:
            self.__exit__()
            raise
        lengths = [len(text.ids) - 1 for text in self.data.sequences]
        self.sequences = np.repeat(np.arange(len(lengths)), lengths)
        self.task = np.repeat([text.part == "task" for text in self.data.sequences], lengths)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            child.close()

    @property
    def _data_path(self) -> Path:
        return self.work / "data.json"

    def _child(self, engine: str, options: Any, log: str) -> Child:
        return Child(engine, options, self._log / f"{log}.log", self.settings.limit)

    def _measure(self, name: ReferenceName) -> None:
        child = self._children[name]
        place = {"out": str(self.work / f"{name}.f32"), "positions": str(self.work / f"{name}.npz")}
        with self.progress.track(f"reference: {name}", self.data.positions, "tokens") as advance:
            self.versions[name] = child.call("write_reference", advance, data=str(self._data_path), **place)
        self._greedy[name] = child.call("likeliest", data=str(self._data_path), new_tokens=self.settings.new_tokens)
        self._base[name] = jobs.load_positions(self.work / f"{name}.npz")["base"]

    def about(self) -> dict[str, Any]:
        """What was scored."""
        parts = {part: int((self.task == (part == "task")).sum()) for part in ("task", "general")}
        return {
            "positions": self.data.positions,
            **parts,
            "sequences": len(self.data.sequences),
            "conversations": len(self.data.conversations),
            "prompts": len(self.data.prompts),
        }

    def asked(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The prompt of ``ask`` and who answers what."""
        if not self.ask:
            return {}
        child = next(iter(self._children.values()))
        said = {who: self._answer(child, base=who == "base") for who in ("base", "trained")}
        said |= {f"{row.export} in {row.engine}": row.said for row in rows}
        return {"prompt": self.ask, "answers": said}

    def _answer(self, child: Child, **how: Any) -> str:
        ids = child.call("answer", prompt=self.ask, new_tokens=self.settings.new_tokens, **how)
        return self._words([ids])[0].strip()

    def examine(self, subject: Subject) -> Row:
        """All gates of one subject; what goes wrong becomes its verdict."""
        started = time.monotonic()
        kind = thresholds.kind_of(subject.about)
        required = subject.engine in self.settings.require
        reference: ReferenceName = subject.reference if subject.reference in self._options else "original"
        row = Row(subject.name, subject.target, kind, subject.engine, "", reference, (), required=required)
        passed: list[Gate] = []
        log = f"{subject.name}-{subject.engine}".replace("/", "_")
        try:
            with self._child(subject.engine, subject.options, log) as child:
                row = self._through_gates(row, subject, child, passed)
        except EngineMissing as error:
            row = replace(row, gates=(*passed, Gate("tokens", "missing", (), error.message, error.hint)))
        except EngineError as error:
            name = gates.NAMES[min(len(passed), len(gates.NAMES) - 1)]
            row = replace(row, gates=(*passed, Gate(name, "failed", (), error.message, error.hint)))
        return replace(row, seconds=round(time.monotonic() - started, 1))

    def _through_gates(self, row: Row, subject: Subject, child: Child, passed: list[Gate]) -> Row:
        said = child.call("tokens", data=str(self._data_path))
        row = replace(row, version=said["version"], said=self._answer(child) if self.ask else "")
        passed.append(gates.tokens(self.data, said))
        if passed[-1].status == "met" and subject.path:
            gate, worst = self._tensors(subject.path, row.kind)
            passed.append(gate)
            row = replace(row, tensors=worst)
        if passed[-1].status not in ("met", "skipped"):
            return replace(row, gates=(*passed, *(Gate(name, "skipped") for name in gates.NAMES[len(passed) :])))
        return self._behaviour(row, subject, child, passed)

    def _tensors(self, export: Path, kind: str) -> tuple[Gate, tuple[dict[str, Any], ...]]:
        """The tensor gate, once for each export, and its worst tensors."""
        if export not in self._compared:
            options = {"run": str(self.run.path), "base": str(self._base_path), "export": str(export)}
            with self._child("tensors", options, f"{export.name}-tensors") as child:
                self._compared[export] = child.call("compare")
        found = self._compared[export]
        if found is None:
            return Gate("tensors", "skipped"), ()
        gate = gates.tensors(found, thresholds.lookup(kind, self.settings.thresholds))
        return gate, tuple(found["tensors"][:WORST])

    def _behaviour(self, row: Row, subject: Subject, child: Child, passed: list[Gate]) -> Row:
        scored = self.work / "scored.npz"
        place = {name: str(self.work / f"{name}.f32") for name in self._options}
        with self.progress.track(f"{row.export} in {row.engine}", self.data.positions, "tokens") as advance:
            child.call("score", advance, data=str(self._data_path), references=place, out=str(scored))
        answers = child.call("generate", data=str(self._data_path), new_tokens=self.settings.new_tokens)
        measured: dict[str, Behaviour] = {
            name: Behaviour(
                positions, self._base[name], self.sequences, self.task,
                gates.greedy(self._greedy[name], answers, self.data.stop),
            )
            for name, positions in jobs.load_positions(scored).items()
        }  # fmt: skip
        main = measured[row.reference]
        bounds = thresholds.lookup(row.kind, self.settings.thresholds)
        gate = gates.behaviour(main, main.measure(), bounds, self._name_of)
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
        number = int(self.sequences[position])
        inside = position - int(np.flatnonzero(self.sequences == number)[0])
        text = self.data.sequences[number]
        token = self._words([text.ids[inside + 1 : inside + 2]])[0]
        return f"{text.part} text {number} ({text.text[:40]!r}), position {inside + 1}, next token {token!r}"

    def _words(self, ids: Sequence[Sequence[int]]) -> list[str]:
        words: list[str] = next(iter(self._children.values())).call("text", ids=[list(part) for part in ids])
        return words

    def _parts(self, measured: Behaviour) -> dict[str, tuple[Check, ...]]:
        found = {}
        for part, where in (("task", measured.task), ("general", ~measured.task)):
            if where.any():
                one = replace(
                    measured, positions=measured.positions.take(where), base=measured.base.take(where),
                    sequences=measured.sequences[where], task=np.ones(int(where.sum()), dtype=bool), greedy=None,
                )  # fmt: skip
                found[part] = _shown(one)
        return found

    def _prompts(self, measured: Behaviour) -> tuple[PromptFigures, ...]:
        return tuple(
            PromptFigures(text.part, text.text[:200], tuple(measured.positions.kl[self.sequences == number].tolist()))
            for number, text in enumerate(self.data.sequences)
        )

    def _answers(
        self, reference: ReferenceName, measured: Behaviour, answers: Sequence[Sequence[int]]
    ) -> tuple[Answer, ...]:
        assert measured.greedy is not None
        expected = self._words([tokens for tokens, _ in self._greedy[reference]])
        got = self._words(answers)
        asked = [prompt.messages[-1]["content"] if prompt.messages else prompt.text for prompt in self.data.prompts]
        return tuple(Answer(*four) for four in zip(asked, expected, got, measured.greedy.parts, strict=True))


def _shown(measured: Behaviour) -> tuple[Check, ...]:
    """Figures without a verdict."""
    return tuple(Check(name, f.value, f.low, f.high) for name, f in measured.measure().items())


KEPT = ("mean_kl", "p999_kl", "top1", "equal_answers", "retention")


def _record(path: Path, row: Row) -> None:
    """Into the export's manifest: whether it is met, and the figures in each engine that was asked."""
    figures = {name: found.value for name in KEPT if (found := row.check(name))}
    said = {"status": row.status, "reference": row.reference, "version": row.version, **figures}
    before = (manifest.read(path).get("parity") or {}).get("engines") or {}
    engines = {**before, row.engine: said}
    statuses = {str(one["status"]) for one in engines.values()} - {"missing"}
    manifest.update(path, parity={"met": statuses == {"met"}, "engines": engines})
