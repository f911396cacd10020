"""The references: the trained model itself, measured once for all exports, one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora2serve.artifacts.parity_report import ON_FULL_PRECISION, TRAINED, ReferenceInfo, ReferenceName, ScoredData
from lora2serve.data.prompts import PromptSet, load_saved
from lora2serve.errors import InputError
from lora2serve.parity_check import worker
from lora2serve.parity_check.engine_process import EngineProcess
from lora2serve.parity_check.metrics import Ints, Positions
from lora2serve.parity_check.trained_model import TrainedModel
from lora2serve.progress import Progress
from lora2serve.system import scratch

SPARE = 1.1  # of the disk that the references need


class References:
    """The data that every engine is asked, and what the trained model answers.

    ``files`` hold the logits, (P, V) float32 each; ``base`` is how far the model without adapter is from each, None
    where there is no adapter; ``greedy`` their answers. One model is in memory at a time, and only while it is asked.
    """

    def __init__(self, origin: TrainedModel, work: Path, progress: Progress, ask: str = "") -> None:
        self._origin, self._work, self._progress, self._ask = origin, work, progress, ask
        self.files: dict[ReferenceName, Path] = {}
        self.versions: dict[str, ReferenceInfo] = {}
        self.base: dict[str, Positions | None] = {}
        self.greedy: dict[str, Any] = {}
        self.answers: dict[str, list[int]] = {}  # to the user's own question, by the model
        for name in origin.references:
            with self._worker("peft", origin.peft_options(name), f"reference-{name}") as engine:
                if not self.files:
                    self._prepare(engine)
                self._measure(name, engine)
        lengths = [len(text.ids) - 1 for text in self.data.sequences]
        self.sequences: Ints = np.repeat(np.arange(len(lengths)), lengths)
        self.task = np.repeat([text.part == "task" for text in self.data.sequences], lengths)
        self._tokenizer = self._worker("tokenizer", {"tokenizer": str(origin.tokenizer)}, "tokenizer")

    def close(self) -> None:
        """End the worker that decodes ids."""
        self._tokenizer.close()

    @property
    def path(self) -> Path:
        """The file of the data, for engines."""
        return self._work / "data.json"

    def words(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Ids as text, by the trained tokenizer."""
        texts: list[str] = self._tokenizer.call("text", ids=[list(item) for item in ids])
        return texts

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The tokens of one text as they stand in it; see ``token_pieces``."""
        pieces: list[str] = self._tokenizer.call("pieces", ids=list(ids))
        return pieces

    def scored(self) -> ScoredData:
        """What was scored."""
        return ScoredData(
            positions=self.data.positions,
            requested=self._origin.settings.tokens,
            task=int(self.task.sum()),
            general=int((~self.task).sum()),
            sequences=len(self.data.sequences),
            conversations=len(self.data.conversations),
            prompts=len(self.data.prompts),
            window=self.data.window,
            long=len(self.data.long.ids) if self.data.long else 0,
            context=self.data.long.context if self.data.long else None,
        )

    def _worker(self, engine: str, options: Mapping[str, object], log: str) -> EngineProcess:
        return EngineProcess(engine, options, scratch.log_file(log), self._origin.settings.limit)

    def _prepare(self, engine: EngineProcess) -> None:
        """Choose what is asked; InputError where the disk cannot hold the answers."""
        origin, settings = self._origin, self._origin.settings
        rows = str(origin.rows) if origin.rows else None
        with self._progress.track("loading the trained model", 1) as advance:
            vocab = engine.call(
                "prepare_data", advance, out=self.path, eval_rows=rows, general=settings.general,
                amount=vars(origin.amount), reading=vars(origin.reading),
            )  # fmt: skip
        self.data: PromptSet = load_saved(self.path)
        if self.data.note:
            self._progress.note(self.data.note)
        tail = self.data.long.tail if self.data.long else 0
        need = int((self.data.positions + tail) * vocab * 4 * len(origin.references) * SPARE)
        free = shutil.disk_usage(self._work).free
        if need > free:
            raise InputError(
                f"{self._work.parent}: {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed for the references' logits",
                "make room on the disk, or score less: parity.tokens in the recipe",
            )
        long = self.data.long
        if long and long.context and not long.whole:
            self._progress.note(
                f"the long text has {len(long.ids)} of the model's {long.context} tokens: parity.long has more compared"
            )
        if self.data.positions < settings.tokens:
            self._progress.warn(
                f"{self.data.positions} tokens to score, {settings.tokens} were requested: "
                "--data or parity.general adds more"
            )

    def _measure(self, name: ReferenceName, engine: EngineProcess) -> None:
        self.files[name] = self._work / f"{name}.f32"
        positions, data = self._work / f"{name}.npz", str(self.path)
        with self._progress.track(f"reference: {name}", self.data.positions, "tokens") as advance:
            written = engine.call(
                "write_reference", advance, data=data, out=str(self.files[name]), positions=str(positions)
            )
        self.versions[name] = ReferenceInfo.from_json(written, "write_reference")
        new_tokens = self._origin.settings.new_tokens
        self.greedy[name] = engine.call("likeliest", data=data, new_tokens=new_tokens)
        self.base[name] = worker.load_positions(positions).get("base")
        if self._ask:
            last = name == self._origin.references[-1]
            who = {TRAINED if last else ON_FULL_PRECISION: False}
            for model, alone in ({"base": True} | who if last and self._origin.adapters else who).items():
                self.answers[model] = engine.call("answer", prompt=self._ask, new_tokens=new_tokens, base=alone)
