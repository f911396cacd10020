"""lm-evaluation-harness as a library of tasks: its questions and scores, our engines.

Nothing of its own loading is used, which changes the vocabulary of a model to fit the tokenizer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Protocol

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lora2serve.errors import EngineError
from lora2serve.evaluation.answerer import TaskAnswerer
from lora2serve.progress import Advance

LONGEST = 2048  # tokens of a text, where the engine names no limit
NEW_TOKENS = 256  # of an answer, where the task does not say how many

Windows = Sequence[tuple[object, list[int], list[int]]]


class TaskRequest(Protocol):
    """What the harness asks: its ``args`` are a context and a continuation, a text, or a context and settings."""

    args: tuple[object, ...]


class EngineLM(TemplateLM):  # type: ignore[misc]
    """The harness's model, answered for by an engine; ``base``: without its adapter."""

    def __init__(self, engine: TaskAnswerer, *, base: bool, advance: Advance) -> None:
        super().__init__()
        self._engine, self._base, self._advance = engine, base, advance
        self._seconds: dict[tuple[str, ...], float] = {}  # by what was asked
        self._only_text = engine.only_text()
        ends = {} if self._only_text else engine.special_tokens()
        self._end, self._begin, self._longest = ends.get("eos"), ends.get("bos"), ends.get("longest") or LONGEST
        self._chats: dict[str, list[dict[str, str]]] = {}  # of an engine that takes no text of a template

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self._end is None:
            raise EngineError("its tokenizer has no token that ends a text")
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is scored behind."""
        return self.eot_token_id if self._begin is None else self._begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: object) -> list[int]:
        """By the engine's tokenizer; what is written by a chat template gets no second BOS."""
        return self._engine.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """By the engine's template, as it is served; a server that is only told words gets the turns themselves."""
        if self._only_text:
            if not add_generation_prompt:
                raise EngineError(
                    "this task begins the answers (gen_prefix), which a server takes not", "an export does"
                )
            key = json.dumps(chat_history, ensure_ascii=False)
            self._chats[key] = chat_history
            return key
        text = self._engine.render(chat_history, add_generation_prompt)
        if text is None:
            raise EngineError("this engine shows no chat template", "evaluate without --chat, or an export")
        return text

    @property
    def tokenizer_name(self) -> str:
        """The harness keys its caches by it; we have none."""
        return "lora2serve"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """As the engine has it."""
        return ""

    def loglikelihood(self, requests: Sequence[TaskRequest], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The harness's, without its bar: there is one of ours."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Windows, **_options: object) -> list[tuple[float, bool]]:
        found = []
        for asked, context, continuation in requests:
            begin = time.perf_counter()
            whole = [*context, *continuation][-(self._longest + 1) :]
            begun = whole[: len(whole) - len(continuation)]
            value, greedy = self._engine.continuation(begun, continuation, self._base)
            if math.isnan(value):
                raise EngineError("the log-likelihood of a continuation is not a number", "look at its weights")
            self._keep_seconds(asked, begin)
            found.append((value, greedy))
            self._advance(1)
        return found

    def loglikelihood_rolling(self, requests: Sequence[TaskRequest], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that do not overlap but for one token."""
        sums = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(str(request.args[0])), prefix_token=self.prefix_token_id,
                max_seq_len=self._longest, context_len=1,
            )  # fmt: skip
            parts = [(request.args, *make_disjoint_window(window)) for window in windows]
            sums.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return sums

    def generate_until(self, requests: Sequence[TaskRequest], disable_tqdm: bool = False) -> list[str]:
        """The likeliest continuation, cut at the first of the task's stop words."""
        answers = []
        for request in requests:
            begin = time.perf_counter()
            context, given = request.args
            settings = given if isinstance(given, dict) else {}
            if settings.get("do_sample") and settings.get("temperature"):
                raise EngineError("this task draws answers by chance", "its generation_kwargs: do_sample: false")
            until, new_tokens = settings.get("until") or [], int(settings.get("max_gen_toks") or NEW_TOKENS)
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            if self._only_text:
                turns = self._chats.get(str(context), [])
                text = self._engine.continue_words(str(context), turns, new_tokens, stops)
            else:
                ids = self.tok_encode(str(context))[-max(1, self._longest - new_tokens) :]
                text = self._engine.continue_text(ids, new_tokens, self._base)
            for stop in stops:
                text = text.split(stop, maxsplit=1)[0]
            self._keep_seconds(request.args, begin)
            answers.append(text)
            self._advance(1)
        return answers

    def seconds_of(self, requests: object) -> float:
        """How long the answers to one item's requests took together, by their ``args``."""
        listed = requests if isinstance(requests, list | tuple) else []
        return sum(self._seconds.get(_texts_of(asked), 0.0) for asked in listed)

    def _keep_seconds(self, asked: object, begin: float) -> None:
        key = _texts_of(asked)
        self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - begin


def _texts_of(asked: object) -> tuple[str, ...]:
    """A context and what continues it; settings are the same for all."""
    return tuple(part for part in asked if isinstance(part, str)) if isinstance(asked, list | tuple) else ()
