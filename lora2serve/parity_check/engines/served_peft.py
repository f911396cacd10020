"""Adapters of one kind on one base in memory, each under its name: what ``serve --engine peft`` answers with."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora2serve.adapters.adapter import open_adapter, read_config
from lora2serve.adapters.soft_prompt import KINDS, soft_prompt_of
from lora2serve.data.rows import Message
from lora2serve.errors import EngineError, first_line
from lora2serve.parity_check.engines.chat_engine import LONGEST_ANSWER, AnswerOptions, End, TokenText, prompt
from lora2serve.parity_check.engines.peft_engine import Peft
from lora2serve.parity_check.trained_model import TOKENIZER
from lora2serve.training.generation import stream

BASE = "base"  # the model without an adapter


@dataclass(frozen=True)
class Prompt:
    """A conversation, or else a text or ids that are continued."""

    messages: Sequence[Message] = ()
    text: str = ""
    ids: Sequence[int] = ()


@dataclass(frozen=True)
class Answered:
    """How an answer ended, and its tokens."""

    end: End
    prompt_tokens: int
    tokens: int


class StoppedAnswer(Exception):
    """Raised by who gets the words of an answer and wants no more of them."""


class ServedPeft:
    """``base`` with each of ``adapters``, name -> PEFT directory, in the type that this device computes in.

    One answer is made at a time. EngineError for adapters that PEFT does not hold together.
    """

    def __init__(self, base: str, adapters: Mapping[str, str]) -> None:
        paths = list(adapters.values())
        refuse_mixture(adapters)
        engine = Peft(base, paths[:1], _tokenizer(paths[0], base), as_served=True)
        self._lock, self._model = threading.Lock(), engine.model
        self._engines: dict[str, Peft] = {}
        for number, (name, path) in enumerate(adapters.items()):
            if number:
                try:
                    self._model.load_adapter(path, _part(number))
                except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
                    message = f"{path}: PEFT does not hold it beside {paths[0]} ({first_line(error)})"
                    raise EngineError(message, "start a server for each") from error
            self._engines[name] = _with(engine, _tokenizer(path, base), path)
        self._parts = {name: _part(number) for number, name in enumerate(adapters)}
        self._engines[BASE] = _with(engine, base, None)
        self._model.eval()

    @property
    def models(self) -> tuple[str, ...]:
        """As requests name them, the base last."""
        return tuple(self._engines)

    def answer(
        self, model: str, asked: Prompt, options: AnswerOptions, stops: Sequence[str], say: Callable[[str], None]
    ) -> Answered:
        """``say`` gets each piece of the answer to ``asked``, up to the first of ``stops``.

        EngineError for a prompt that is too long or that the chat template refuses. What ``say`` raises ends it.
        """
        engine = self._engines[model]
        most = engine.positions() or LONGEST_ANSWER * 8
        ids = _ids(engine, asked, most)
        text, tokens, ends = TokenText(engine.tokenizer_text, stops), list[int](), engine.stop_ids() or []
        limit = min(options.max_tokens or LONGEST_ANSWER, most - len(ids))

        def each(token: int) -> None:
            tokens.append(token)
            if token not in ends:
                say(text.add(token))
            if text.stopped:
                raise _StopWord

        with self._lock, self._active(model):
            try:
                stream(self._model, engine.tokenizer, ids, limit, ends, options.temperature, each)
            except _StopWord:
                pass
            except StoppedAnswer:
                return Answered("stop", len(ids), len(tokens))
        say(text.rest())
        cut = len(tokens) == limit and tokens[-1] not in ends and not text.stopped
        return Answered("length" if cut else "stop", len(ids), len(tokens))

    @contextmanager
    def _active(self, model: str) -> Iterator[None]:
        if model == BASE:
            with self._model.disable_adapter():
                yield
        else:
            self._model.set_adapter(self._parts[model])
            yield


class _StopWord(Exception):
    """The answer has one of the words that end it."""


def _part(number: int) -> str:
    """What the engine calls its adapters."""
    return f"part{number}"


def _with(engine: Peft, tokenizer: str, adapter: str | None) -> Peft:
    """The same model with another tokenizer, and what its adapter puts in front."""
    from transformers import AutoTokenizer

    view = copy.copy(engine)
    view.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    opened = open_adapter(Path(adapter)) if adapter else None
    view.soft_prompt = soft_prompt_of(opened).tokens if opened and opened.method in KINDS else ()
    return view


def _tokenizer(adapter: str, base: str) -> str:
    return adapter if (Path(adapter) / TOKENIZER).is_file() else base


def refuse_mixture(adapters: Mapping[str, str]) -> None:
    """EngineError for several kinds, which PEFT does not lay on one base, and for other vocabularies."""
    kinds = {name: str(read_config(Path(path)).get("peft_type", "LORA")) for name, path in adapters.items()}
    if len(set(kinds.values())) > 1:
        each = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise EngineError(f"adapters of several kinds on one base: {each}", "start a server for each kind")
    tokens = {name: read_config(Path(path)).get("trainable_token_indices") for name, path in adapters.items()}
    if len({str(indices) for indices in tokens.values()}) > 1:
        each = ", ".join(name for name, indices in tokens.items() if indices)
        raise EngineError(f"adapters with tokens of their own: {each}", "start a server for each")


def _ids(engine: Peft, asked: Prompt, most: int) -> list[int]:
    """Of the prompt; EngineError where it leaves no room for an answer."""
    if asked.messages:
        return prompt(engine, asked.messages, most)
    ids = list(asked.ids) or engine.prompt_ids([], asked.text) or []
    vocabulary = engine.vocab()
    if not ids or len(ids) >= most or not all(0 <= token < vocabulary for token in ids):
        raise EngineError(f"the prompt has {len(ids)} tokens, expected 1 to {most - 1} of {vocabulary:,}")
    return ids
