"""What a worker process does for engine_process.py: an engine, and the jobs that ask it."""

from __future__ import annotations

import pkgutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora2serve.data.prompts import Conversation, PromptOptions, PromptSet, Reading, load_saved, prepare
from lora2serve.errors import EngineError
from lora2serve.parity_check import metrics
from lora2serve.parity_check.engines import ENGINES, Scores
from lora2serve.parity_check.token_pieces import token_pieces
from lora2serve.system.worker_protocol import Link

LIKELIEST = 20  # of the reference, at each step of a greedy answer


class SavedLogits:
    """A reference's logits on disk: (P, V) float32, read back one text at a time.

    Float32, because float16 moves a log-probability of -10 by up to 0.004: llama.cpp's 16-bit files have a noise floor
    of 5.5e-4 nats, which is the bound of the tightest format here. 2048 positions of a 128k vocabulary are 1.05 GB of
    disk. Not mapped into memory: every page that was looked at would count as this process's own.
    """

    def __init__(self, path: Path, data: PromptSet) -> None:
        self.path, self.data = path, data
        self.vocab = path.stat().st_size // 4 // sum(tail for _, tail in _scored(data))

    def rows(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """For each text its (n-1, V) part and its (n-1,) true next tokens; of the long one, the last, its tail's."""
        with self.path.open("rb") as file:
            for ids, tail in _scored(self.data):
                values = np.fromfile(file, dtype=np.float32, count=tail * self.vocab)
                yield values.reshape(tail, self.vocab), np.array(ids[-tail:])


class EngineWorker:
    """An engine by name, made by its options. Its public methods are the jobs; paths come as strings."""

    def __init__(self, link: Link, engine: str, options: Mapping[str, object]) -> None:
        self._link = link
        self._engine: Any = pkgutil.resolve_name(ENGINES[engine])(**options)  # each job asks what its engines have
        link.advance(0)

    def close(self) -> None:
        """End the engine where it has something to end."""
        if hasattr(self._engine, "close"):
            self._engine.close()

    def prepare_data(
        self, out: str, eval_rows: str | None, general: str | None, amount: dict[str, int], reading: dict[str, Any]
    ) -> int:
        """Token ids of everything that is scored, by the trained tokenizer; written to ``out``. Returns V.

        ``reading`` is how the training read its rows, as ``Reading`` has it.
        """
        engine, rows = self._engine, Path(eval_rows) if eval_rows else None
        prompts = prepare(
            engine.tokenizer, rows, general, engine.stop_ids(), PromptOptions(**amount), engine.positions(),
            Reading(**reading),
        )  # fmt: skip
        vocab, soft = int(engine.vocab()), engine.soft_prompt
        ids = tuple(range(vocab, vocab + len(soft)))
        replace(prompts, prefix=ids, prefix_text="".join(soft)).save(Path(out))
        return vocab

    def write_reference(self, data: str, out: str, positions: str) -> dict[str, object]:
        """The tuned model's logits to ``out``, and how far its base is from it, by position, to ``positions``.

        A model without adapter has no base to compare with: ``positions`` is then empty.
        """
        prompts, measured, vocab = load_saved(Path(data)), list[metrics.Positions](), 0
        with Path(out).open("wb") as file:
            pairs = self._engine.pairs([sequence.ids for sequence in prompts.sequences])
            for sequence, (tuned, base) in zip(prompts.sequences, pairs, strict=True):
                vocab = tuned.values.shape[1]
                file.write(np.ascontiguousarray(tuned.values, dtype=np.float32).data)
                if base is not None:
                    measured.append(metrics.compare(tuned.values, base.values, np.array(sequence.ids[1:])))
                self._link.advance(len(sequence.ids) - 1)
            if prompts.long:
                (tuned,) = self._engine.score([prompts.long.ids], prompts.long.tail)
                file.write(np.ascontiguousarray(tuned.values, dtype=np.float32).data)
        _save(Path(positions), {"base": measured} if measured else {})
        return {"version": self._engine.version, "vocab": vocab}

    def likeliest(self, data: str, new_tokens: int) -> list[tuple[list[int], list[list[tuple[int, float]]]]]:
        """Greedy answers of a reference, with the likeliest tokens at each step."""
        prompts = [prompt.ids for prompt in load_saved(Path(data)).prompts]
        return list(self._engine.likeliest(prompts, new_tokens, LIKELIEST))

    def tokens(self, data: str) -> dict[str, object]:
        """What the engine makes of every conversation."""
        engine, rendered, ids = self._engine, [], []
        stop = engine.stop_ids()
        eos = engine.eos_id() if hasattr(engine, "eos_id") else None
        dtype = getattr(engine, "dtype", None)
        prompts = load_saved(Path(data))
        for conversation in map(prompts.exported, prompts.conversations):
            text = engine.render(conversation.messages, conversation.tools) if conversation.messages else None
            rendered.append(text)
            ids.append(_prompt_ids(engine, conversation, as_planned=text in (None, conversation.text)))
            self._link.advance(1)
        return {"version": engine.version, "rendered": rendered, "ids": ids, "stop": stop, "eos": eos, "dtype": dtype}

    def score(self, data: str, references: dict[str, str], out: str) -> dict[str, object]:
        """Compare the engine with every reference, position by position, into ``out``."""
        prompts = load_saved(Path(data))
        logits = {name: SavedLogits(Path(path), prompts).rows() for name, path in references.items()}
        measured: dict[str, list[metrics.Positions]] = {name: [] for name in references}
        whole = True
        for scores in self._scores(prompts):
            for name, rows in logits.items():
                reference, targets = next(rows)
                measured[name].append(_compare(reference, scores, targets))
            whole = whole and scores.ids is None
            self._link.advance(len(scores.values))
        count, texts = len(next(iter(measured.values()))), len(_scored(prompts))
        if count != texts:
            raise EngineError(f"{count} of {texts} sequences were scored")
        _save(Path(out), measured)
        return {"version": self._engine.version, "whole": whole}

    def _scores(self, prompts: PromptSet) -> Iterator[Scores]:
        """Of every text, and of the long one's tail."""
        if prompts.prefix:  # what predicts its tokens is no answer of the model
            for ids, tail in _scored(prompts):
                for scores in self._engine.score([[*prompts.prefix, *ids]], tail):
                    yield _without(scores, prompts.prefix)
            return
        yield from self._engine.score([sequence.ids for sequence in prompts.sequences])
        if prompts.long:
            yield from self._engine.score([prompts.long.ids], prompts.long.tail)

    def settings(self, export: str) -> object:
        """The settings gate's verdict."""
        return self._engine.check(Path(export)).to_json()

    def compare(self, export: str, measure: bool) -> object:
        """The tensor gate's figures; None where the target has no reader. ``measure``: even where all is equal."""
        found = self._engine.compare(Path(export), self._link.advance, measure=measure)
        return found.to_json() if found else None

    def generate(self, data: str, new_tokens: int) -> dict[str, object]:
        """Greedy answers to every prompt, one at a time, and the engine's time for them."""
        answers, seconds = list[list[int]](), 0.0
        prompts = load_saved(Path(data))
        for prompt in map(prompts.exported, prompts.prompts):
            started = time.perf_counter()
            answers += self._engine.generate([prompt.ids], new_tokens)
            seconds += time.perf_counter() - started
            self._link.advance(1)
        return {"ids": answers, "seconds": seconds}

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """A text's tokens in words, by the trained tokenizer."""
        return token_pieces(self._engine.tokenizer.decode, ids)

    def text(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Ids in words, by the trained tokenizer."""
        return [self._engine.tokenizer.decode(list(part)) for part in ids]

    def answer(self, prompt: str, new_tokens: int, base: bool = False) -> list[int]:
        """One answer to one prompt, as an opening user turn; with ``base``, of the model without its adapter."""
        engine = self._engine
        ids = engine.prompt_ids([{"role": "user", "content": prompt}], "")
        answers: list[list[int]] = (engine.generate_base if base else engine.generate)([ids], new_tokens)
        return answers[0]


def _without(scores: Scores, prefix: Sequence[int]) -> Scores:
    """The logits of a soft prompt's tokens, which are in no answer, as none; but where one is the likeliest of all."""
    if scores.ids is not None:
        return scores
    values, columns = np.array(scores.values), list(prefix)
    before = values[:, columns]
    values[:, columns] = -np.inf
    values[:, columns] = np.where(before > values.max(axis=1, keepdims=True), before, -np.inf)
    return replace(scores, values=values)


def _scored(prompts: PromptSet) -> list[tuple[tuple[int, ...], int]]:
    """Each text that is scored, and how many positions at its end are: all, but of the long one, which is the last."""
    texts = [(sequence.ids, len(sequence.ids) - 1) for sequence in prompts.sequences]
    return [*texts, (prompts.long.ids, prompts.long.tail)] if prompts.long else texts


def _prompt_ids(engine: Any, conversation: Conversation, *, as_planned: bool) -> list[int] | None:
    """None where the engine refuses a prompt that is not the planned one, such as one too long for it."""
    try:
        ids: list[int] | None = engine.prompt_ids(conversation.messages, conversation.text, conversation.tools)
    except Exception:
        if as_planned:
            raise
        return None
    return ids


def _compare(reference: NDArray[np.float32], scores: Scores, targets: NDArray[np.int64]) -> metrics.Positions:
    if scores.ids is not None and scores.target is not None:
        return metrics.compare_top(reference, scores.ids, scores.values, scores.target, targets)
    return metrics.compare(reference, scores.values, targets)


def _save(path: Path, positions: dict[str, list[metrics.Positions]]) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    for name, parts in positions.items():
        joined = metrics.join(parts)
        arrays |= {f"{name}.{field}": getattr(joined, field) for field in metrics.FIELDS}
    np.savez(path, allow_pickle=False, **arrays)


def load_positions(path: Path) -> dict[str, metrics.Positions]:
    """What ``score`` and ``write_reference`` saved, by reference."""
    with np.load(path) as arrays:
        names = {key.rsplit(".", 1)[0] for key in arrays}
        return {name: metrics.Positions(**{f: arrays[f"{name}.{f}"] for f in metrics.FIELDS}) for name in names}
