"""The references: the trained model itself, measured once for all exports, one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora2serve.artifacts.parity_report import ReferenceInfo, ReferenceName, ScoredData
from lora2serve.data.prompts import Amount, PromptSet, load_saved
from lora2serve.errors import InputError
from lora2serve.parity_check import worker
from lora2serve.parity_check.engine_process import EngineProcess
from lora2serve.parity_check.metrics import Ints, Positions
from lora2serve.parity_check.trained_model import TrainedModel
from lora2serve.progress import Progress

SPARE = 1.1  # of the disk that the references need


class References:
    """The data that everybody is asked, and what the trained model says to it.

    ``files`` hold the logits, (P, V) float32 each; ``base`` is how far the model without adapter is from each, None
    where there is no adapter; ``greedy`` their answers. One model is in memory at a time, and only while it is asked.
    """

    def __init__(self, origin: TrainedModel, work: Path, logs: Path, progress: Progress, ask: str = "") -> None:
        self._origin, self._work, self._logs, self._progress, self._ask = origin, work, logs, progress, ask
        self.files: dict[ReferenceName, Path] = {}
        self.versions: dict[str, ReferenceInfo] = {}
        self.base: dict[str, Positions | None] = {}
        self.greedy: dict[str, Any] = {}
        self.said: dict[str, list[int]] = {}  # to the user's own question, by who
        for name in origin.references:
            with self._child("peft", self._options(name), f"reference-{name}") as child:
                if not self.files:
                    self._prepare(child)
                self._measure(name, child)
        lengths = [len(text.ids) - 1 for text in self.data.sequences]
        self.sequences: Ints = np.repeat(np.arange(len(lengths)), lengths)
        self.task = np.repeat([text.part == "task" for text in self.data.sequences], lengths)
        self._words = self._child("tokenizer", {"tokenizer": str(origin.tokenizer)}, "tokenizer")

    def close(self) -> None:
        """End the child that puts ids in words."""
        self._words.close()

    @property
    def path(self) -> Path:
        """Where the data lie, for engines."""
        return self._work / "data.json"

    def words(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Ids in words, by the trained tokenizer."""
        words: list[str] = self._words.call("text", ids=[list(part) for part in ids])
        return words

    def scored(self) -> ScoredData:
        """What was scored."""
        return ScoredData(
            positions=self.data.positions,
            asked=self._origin.settings.tokens,
            task=int(self.task.sum()),
            general=int((~self.task).sum()),
            sequences=len(self.data.sequences),
            conversations=len(self.data.conversations),
            prompts=len(self.data.prompts),
            window=self.data.window,
        )

    def _child(self, engine: str, options: Any, log: str) -> EngineProcess:
        return EngineProcess(engine, options, self._logs / f"{log}.log", self._origin.settings.limit)

    def _options(self, name: ReferenceName) -> dict[str, Any]:
        origin = self._origin
        return {
            "base": str(origin.base),
            "adapters": [str(path) for path in origin.adapters],
            "tokenizer": str(origin.tokenizer),
            "quantization": origin.quantization.to_json() if origin.quantization and name == "trained" else None,
            "trained_on": origin.run.record.device if origin.run else None,
        }

    def _prepare(self, child: EngineProcess) -> None:
        """Choose what is asked; InputError where the disk cannot hold the answers."""
        origin, settings = self._origin, self._origin.settings
        amount = Amount(settings.tokens, settings.window, settings.prompts, settings.new_tokens)
        place = {"out": str(self.path), "eval_rows": str(origin.rows) if origin.rows else None}
        with self._progress.track("loading the trained model", 1) as advance:
            vocab = child.call("prepare_data", advance, **place, general=settings.general, amount=vars(amount))
        self.data: PromptSet = load_saved(self.path)
        need = int(self.data.positions * vocab * 4 * len(origin.references) * SPARE)
        free = shutil.disk_usage(self._work).free
        if need > free:
            raise InputError(
                f"{self._work.parent}: {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed for the references' logits",
                "free some, or score less: parity.tokens in the recipe",
            )
        if self.data.positions < settings.tokens:
            self._progress.warn(
                f"{self.data.positions} tokens to score, {settings.tokens} were asked for: "
                "--data or parity.general brings more"
            )

    def _measure(self, name: ReferenceName, child: EngineProcess) -> None:
        self.files[name] = self._work / f"{name}.f32"
        positions, data = self._work / f"{name}.npz", str(self.path)
        with self._progress.track(f"reference: {name}", self.data.positions, "tokens") as advance:
            written = child.call(
                "write_reference", advance, data=data, out=str(self.files[name]), positions=str(positions)
            )
        self.versions[name] = ReferenceInfo.from_json(written, "write_reference")
        new_tokens = self._origin.settings.new_tokens
        self.greedy[name] = child.call("likeliest", data=data, new_tokens=new_tokens)
        self.base[name] = worker.load_positions(positions).get("base")
        if self._ask and name == self._origin.references[-1]:
            for who in ("base", "trained") if self._origin.adapters else ("trained",):
                alone = who == "base"
                self.said[who] = child.call("answer", prompt=self._ask, new_tokens=new_tokens, base=alone)
