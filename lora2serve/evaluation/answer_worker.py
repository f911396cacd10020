"""What a worker process does for an evaluation: an engine that answers as it serves, and says how likely texts are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import numpy as np

from lora2serve.data.rows import Message
from lora2serve.errors import EngineError
from lora2serve.evaluation.answerer import EngineAnswer, Turns
from lora2serve.parity_check.chat_worker import ChatWorker
from lora2serve.parity_check.engines import Engine, Ids, Scores
from lora2serve.parity_check.engines.chat_engine import AnswerOptions, End, Say
from lora2serve.parity_check.metrics import log_softmax

FIRST = 20  # likeliest first tokens that are told


class Reply(Protocol):
    """As ``ChatEngine.reply``."""

    def __call__(self, messages: Sequence[Message], options: AnswerOptions, say: Say) -> End: ...


class AnswerWorker(ChatWorker):
    """As for a conversation, one question after the other. Its public methods are the jobs."""

    def answer(self, messages: Turns, max_tokens: int, temperature: float, base: bool) -> EngineAnswer:
        """``text``, ``end``, ``seconds``, ``first`` (seconds to its first words) and ``tokens``, or the ``error``."""
        of_base: Reply | None = getattr(self._engine, "reply_base", None)
        reply: Reply = of_base if base and of_base else self._engine.reply
        pieces: list[str] = []
        first, started = 0.0, time.perf_counter()

        def say(text: str, *, thought: bool = False) -> None:
            nonlocal first
            if text and not first:
                first = time.perf_counter() - started
            if not thought:
                pieces.append(text)

        try:
            end = reply(cast("Sequence[Message]", messages), AnswerOptions(max_tokens, temperature), say)
        except EngineError as error:
            return {"error": error.message, "hint": error.hint}
        seconds = time.perf_counter() - started
        text = "".join(pieces)
        return {"text": text, "end": end, "seconds": seconds, "first": first or seconds, "tokens": self._count(text)}

    def likelihoods(self, messages: Turns, texts: Sequence[str], base: bool) -> EngineAnswer:
        """``values``: the log-probability of each text as the whole beginning of an answer, or the ``error``."""
        started = time.perf_counter()
        try:
            prompt, opening = self._prompt(cast("Sequence[Message]", messages))
            values = [
                self._likelihood(prompt, self._continuation(opening, prompt, text), base=base)[0] for text in texts
            ]
        except EngineError as error:
            return {"error": error.message, "hint": error.hint}
        return {"values": values, "seconds": time.perf_counter() - started}

    def first_tokens(self, messages: Turns, base: bool) -> dict[str, float]:
        """The likeliest first tokens of an answer with their log-probabilities; empty where the engine shows none."""
        if getattr(self._engine, "_tokenizer", None) == "":
            return {}
        try:
            prompt, _ = self._prompt(cast("Sequence[Message]", messages))
            scores = self._score([*prompt, prompt[-1]], 1, base=base)
        except EngineError:
            return {}
        if scores.ids is None:
            values = log_softmax(scores.values)[0]
            best = np.argsort(-values)[:FIRST]
            return {self._piece(int(token)): float(values[token]) for token in best}
        known = scores.ids[0] >= 0
        pairs = zip(scores.ids[0][known].tolist(), scores.values[0][known].tolist(), strict=True)
        return {self._piece(token): value for token, value in sorted(pairs, key=lambda pair: -pair[1])[:FIRST]}

    def _prompt(self, messages: Sequence[Message]) -> tuple[list[int], str | None]:
        """The ids of a conversation with the opening of an answer, and its text where the engine shows it."""
        engine = self._scoring
        text = engine.render(messages)
        content = str(messages[-1]["content"])
        templated = text is not None or hasattr(engine, "served")  # a server has its own
        ids = engine.prompt_ids(messages if templated else [], content)
        if not ids:
            raise EngineError(f"{engine.version} shows no token ids", "an export, or a server of vLLM, does")
        return list(ids), text

    def _continuation(self, opening: str | None, prompt: list[int], text: str) -> list[int]:
        """The ids of ``text`` behind a prompt."""
        whole = self._ids(opening + text) if opening is not None else []
        ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._ids(text)
        if not ids:
            raise EngineError(f"{text!r} has no tokens")
        return ids

    def _likelihood(self, prompt: Ids, continuation: Ids, *, base: bool) -> tuple[float, bool]:
        """The log-probability of a continuation, and whether it is the likeliest at each step."""
        scores = self._score([*prompt, *continuation], len(continuation), base=base)
        if scores.ids is not None and scores.target is not None:
            if np.isnan(scores.target).any():
                raise EngineError(
                    f"{self._engine.version} shows the likeliest tokens only, and a choice is not among them",
                    "evaluate the export in another engine",
                )
            best = scores.values == np.nanmax(scores.values, axis=1, keepdims=True)
            greedy = all(scores.ids[row][best[row]][0] == token for row, token in enumerate(continuation))
            return float(scores.target.astype(np.float64).sum()), greedy
        values = log_softmax(scores.values[-len(continuation) :])
        chosen = values[np.arange(len(continuation)), list(continuation)]
        return float(chosen.sum()), bool((values.argmax(axis=1) == list(continuation)).all())

    def _score(self, ids: Ids, tail: int, *, base: bool) -> Scores:
        with self._without_adapter(base):
            (scores,) = self._scoring.score([list(ids)], tail)
        return scores

    @contextmanager
    def _without_adapter(self, base: bool) -> Iterator[None]:
        if base and getattr(self._engine, "adapters", None):
            with getattr(self._engine, "model").disable_adapter():  # noqa: B009
                yield
        else:
            yield

    @property
    def _scoring(self) -> Engine:
        """Every engine that answers says how likely texts are, too."""
        return cast("Engine", self._engine)

    def _ids(self, text: str) -> list[int]:
        """Of a text as it stands, markup and all, with nothing before it."""
        llama_cpp = getattr(self._engine, "llm", None)
        if llama_cpp is not None:
            return list(llama_cpp.tokenize(text.encode(), add_bos=False, special=True))
        if getattr(self._engine, "_tokenizer", None) == "":
            raise EngineError(f"{self._engine.version}: its tokenizer is not here", "evaluate an export: it has one")
        return list(getattr(self._engine, "tokenizer")(text, add_special_tokens=False)["input_ids"])  # noqa: B009

    def _piece(self, token: int) -> str:
        """A token as the vocabulary has it, whatever the engine calls it."""
        llama_cpp = getattr(self._engine, "llm", None)
        if llama_cpp is not None:
            return str(llama_cpp._model.token_get_text(token))
        return str(getattr(self._engine, "tokenizer").convert_ids_to_tokens(token))  # noqa: B009

    def _count(self, text: str) -> int | None:
        """Tokens of an answer; None where the engine has no tokenizer here."""
        try:
            return len(self._ids(text))
        except EngineError:  # a server that is asked by its address alone
            return None
