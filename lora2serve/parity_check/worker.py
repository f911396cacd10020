"""What a child process does for worker.py: ``python -m lora2serve.parity_check.worker IN OUT ENGINE OPTIONS``."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora2serve.data.prompts import Amount, PromptSet, load_saved, prepare
from lora2serve.errors import EngineError, Lora2ServeError
from lora2serve.parity_check import metrics
from lora2serve.parity_check.engine_process import EngineMissing
from lora2serve.parity_check.engines import Engine, Scores, make

Advance = Callable[[int], None]
LIKELIEST = 20  # of the reference, at each step of a greedy answer: vLLM's own tests take as many


class Reference:
    """A reference's logits on disk: (P, V) float32, read back one text at a time.

    Float32, because float16 moves a log-probability of -10 by up to 0.004: llama.cpp's 16-bit files have a noise floor
    of 5.5e-4 nats, which is the bound of the tightest format here. 2048 positions of a 128k vocabulary are 1.05 GB of
    disk. Not mapped into memory: every page that was looked at would count as this process's own.
    """

    def __init__(self, path: Path, data: PromptSet) -> None:
        self.path, self.data = path, data
        self.vocab = path.stat().st_size // 4 // data.positions

    def rows(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """For each text its (n-1, V) part and its (n-1,) true next tokens."""
        with self.path.open("rb") as file:
            for sequence in self.data.sequences:
                count = len(sequence.ids) - 1
                values = np.fromfile(file, dtype=np.float32, count=count * self.vocab)
                yield values.reshape(count, self.vocab), np.array(sequence.ids[1:])


def prepare_data(
    engine: Any, advance: Advance, *, out: str, eval_rows: str | None, general: str | None, amount: dict[str, int]
) -> int:
    """Token ids of everything that is scored, by the trained tokenizer; written to ``out``. Returns V."""
    rows = Path(eval_rows) if eval_rows else None
    asked = Amount(**amount)
    prepare(engine.tokenizer, rows, general, engine.stop_ids(), asked, engine.positions()).save(Path(out))
    return int(engine.vocab())


def write_reference(engine: Any, advance: Advance, *, data: str, out: str, positions: str) -> dict[str, Any]:
    """The tuned model's logits to ``out``, and how far its base is from it, by position, to ``positions``.

    A model without adapter has no base beside it: ``positions`` is then empty.
    """
    asked, found, vocab = load_saved(Path(data)), [], 0
    with Path(out).open("wb") as file:
        pairs = engine.pairs([sequence.ids for sequence in asked.sequences])
        for sequence, (tuned, base) in zip(asked.sequences, pairs, strict=True):
            vocab = tuned.values.shape[1]
            file.write(np.ascontiguousarray(tuned.values, dtype=np.float32).data)
            if base is not None:
                found.append(metrics.compare(tuned.values, base.values, np.array(sequence.ids[1:])))
            advance(len(sequence.ids) - 1)
    _save(Path(positions), {"base": found} if found else {})
    return {"version": engine.version, "vocab": vocab}


def likeliest(engine: Any, advance: Advance, *, data: str, new_tokens: int) -> list[Any]:
    """Greedy answers of a reference, with the likeliest tokens at each step."""
    return [
        list(pair) for pair in engine.likeliest([p.ids for p in load_saved(Path(data)).prompts], new_tokens, LIKELIEST)
    ]


def tokens(engine: Engine, advance: Advance, *, data: str) -> dict[str, Any]:
    """What the engine makes of every conversation."""
    found: dict[str, Any] = {"version": engine.version, "rendered": [], "ids": [], "stop": engine.stop_ids()}
    found["eos"] = engine.eos_id() if hasattr(engine, "eos_id") else None
    for conversation in load_saved(Path(data)).conversations:
        found["rendered"].append(engine.render(conversation.messages) if conversation.messages else None)
        found["ids"].append(engine.prompt_ids(conversation.messages, conversation.text))
        advance(1)
    return found


def score(engine: Engine, advance: Advance, *, data: str, references: dict[str, str], out: str) -> dict[str, Any]:
    """Compare the engine with every reference, position by position, into ``out``."""
    asked = load_saved(Path(data))
    opened = {name: Reference(Path(path), asked).rows() for name, path in references.items()}
    found: dict[str, list[metrics.Positions]] = {name: [] for name in references}
    whole = True
    for scores in engine.score([sequence.ids for sequence in asked.sequences]):
        for name, rows in opened.items():
            reference, targets = next(rows)
            found[name].append(_compare(reference, scores, targets))
        whole = whole and scores.ids is None
        advance(len(scores.values))
    if any(len(parts) != len(asked.sequences) for parts in found.values()):
        raise EngineError(f"{len(next(iter(found.values())))} of {len(asked.sequences)} sequences were scored")
    _save(Path(out), found)
    return {"version": engine.version, "whole": whole}


def compare(engine: Any, advance: Advance, *, export: str) -> Any:
    """The tensor gate's figures."""
    return engine.compare(Path(export), advance)


def generate(engine: Engine, advance: Advance, *, data: str, new_tokens: int) -> list[list[int]]:
    """Greedy answers to every prompt."""
    answers = []
    for prompt in load_saved(Path(data)).prompts:
        answers += engine.generate([prompt.ids], new_tokens)
        advance(1)
    return answers


def text(engine: Any, advance: Advance, *, ids: Sequence[Sequence[int]]) -> list[str]:
    """Ids in words, by the trained tokenizer."""
    return [engine.tokenizer.decode(list(part)) for part in ids]


def answer(engine: Any, advance: Advance, *, prompt: str, new_tokens: int, base: bool = False) -> list[int]:
    """One answer to one prompt, as an opening user turn; with ``base``, of the model without its adapter."""
    ids = engine.prompt_ids([{"role": "user", "content": prompt}], "")
    made: list[list[int]] = engine.generate_base([ids], new_tokens) if base else engine.generate([ids], new_tokens)
    return made[0]


def _compare(reference: NDArray[np.float32], scores: Scores, targets: NDArray[np.int64]) -> metrics.Positions:
    if scores.ids is not None and scores.target is not None:
        return metrics.compare_top(reference, scores.ids, scores.values, scores.target, targets)
    vocab = min(reference.shape[1], scores.values.shape[1])  # padding of the vocabulary is no token
    return metrics.compare(reference[:, :vocab], scores.values[:, :vocab], targets)


def _save(path: Path, found: dict[str, list[metrics.Positions]]) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    for name, parts in found.items():
        joined = metrics.join(parts)
        arrays |= {f"{name}.{field}": getattr(joined, field) for field in metrics.FIELDS}
    np.savez(path, allow_pickle=False, **arrays)


def load_positions(path: Path) -> dict[str, metrics.Positions]:
    """What ``score`` and ``write_reference`` saved, by reference."""
    with np.load(path) as arrays:
        names = {key.rsplit(".", 1)[0] for key in arrays}
        return {name: metrics.Positions(**{f: arrays[f"{name}.{f}"] for f in metrics.FIELDS}) for name in names}


JOBS: dict[str, Callable[..., Any]] = {
    job.__name__: job
    for job in (prepare_data, write_reference, likeliest, tokens, compare, score, generate, text, answer)
}


def main(asked: int, answers: int, name: str, options: str) -> None:
    """Load the engine, then do jobs until the parent closes the pipe."""
    with os.fdopen(asked, encoding="utf-8") as lines, os.fdopen(answers, "w", encoding="utf-8") as out:

        def say(message: dict[str, Any]) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        engine: Any = None
        for line in lines:
            call = json.loads(line)
            try:
                if engine is None:
                    engine = make(name, json.loads(options))
                    say({"advance": 0})
                say(
                    {"result": JOBS[call["job"]](engine, lambda done: say({"advance": int(done)}), **call["arguments"])}
                )
            except Exception as error:
                traceback.print_exc()
                say(_told(error))
                break
        if engine is not None and hasattr(engine, "close"):
            engine.close()


def _told(error: Exception) -> dict[str, Any]:
    missing = isinstance(error, EngineMissing | ModuleNotFoundError)
    if isinstance(error, Lora2ServeError):
        return {"error": error.message, "hint": error.hint, "missing": missing}
    first = (str(error).strip().splitlines() or ["no message"])[0][:300]
    said = f"not installed ({first})" if missing else f"{type(error).__name__}: {first}"
    return {"error": said, "hint": "", "missing": missing}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
    os._exit(0)  # engines with threads of their own would hang here
