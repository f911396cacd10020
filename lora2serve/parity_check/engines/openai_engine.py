"""Any server that speaks OpenAI's completions API: vLLM, llama.cpp's server, a gateway before them.

Positions are scored by one request for each prefix, with the likeliest next tokens in the answer. That works on every
such server and with adapters; what is not among them bounds the KL from below (see ``metrics.compare_top``). A small
vocabulary is shown whole.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from http import HTTPStatus
from typing import Any

import numpy as np

from lora2serve.data.rows import THOUGHT_KEYS
from lora2serve.errors import EngineError
from lora2serve.parity_check.engine_process import EngineMissing
from lora2serve.parity_check.engines import Ids, Messages, Scores, Tools
from lora2serve.parity_check.engines.chat_engine import AnswerOptions, End, Say
from lora2serve.system.http import HttpClient, HttpStatus, InvalidAnswer, Unreachable
from lora2serve.system.json_values import Json, JsonValue, at, objects

AT_ONCE = 16  # requests under way
TOPS = (256, 20, 5)  # likeliest tokens to ask for: more than most servers grant, vLLM's default limit, OpenAI's
MOST_STOPS = 4  # words that end a text: as many as OpenAI's API takes
PATIENCE = 120.0  # seconds that the server may be silent
WAITS = (1.0, 4.0)  # seconds before a busy server is asked again
REFUSED = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)  # it does not take the request as it is
BUSY = (  # the server, or the gateway before it, may answer later
    HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT,
)  # fmt: skip


class OpenAI:
    """``url`` is the server's address, with or without ``/v1``; ``tokenizer`` the trained one's directory.

    The tokenizer is needed for ids only, not to chat. A key is taken from OPENAI_API_KEY.
    """

    def __init__(self, url: str, tokenizer: str, model: str | None = None) -> None:
        self._http = HttpClient(url.rstrip("/").removesuffix("/v1"), patience=PATIENCE, key_variable="OPENAI_API_KEY")
        self.root = self._http.address
        self._tokenizer = tokenizer
        self._ids: Mapping[str, int] | None = None
        served = [str(entry.get("id")) for entry in objects(self._ask("GET", "/v1/models").get("data"))]
        if not served or (model is not None and model not in served):
            raise EngineError(f"{self.root} has no model {model or 'at all'!r}", f"it serves: {', '.join(served)}")
        self.model = model or served[0]
        self.served = () if model else served  # what else may be asked for
        self._top = 0  # as many as the server grants; known after the first answer
        self.version = f"{self.model} at {self.root}"

    @cached_property
    def tokenizer(self) -> Any:
        """The trained one."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._tokenizer)

    def render(self, messages: Messages, tools: Tools = ()) -> str | None:
        """Servers show ids, not text."""
        return None

    def prompt_ids(self, messages: Messages, text: str, tools: Tools = ()) -> list[int] | None:
        """By vLLM's ``/tokenize``; None where the server has no such thing."""
        prompt: dict[str, object] = {"messages": list(messages)} if messages else {"prompt": text}
        prompt |= {"tools": list(tools)} if tools else {}
        try:
            tokens = self._ask("POST", "/tokenize", {"model": self.model, **prompt}).get("tokens")
        except EngineError:
            return None
        ids = [token for token in tokens if isinstance(token, int)] if isinstance(tokens, list) else []
        return ids if isinstance(tokens, list) and ids and len(ids) == len(tokens) else None

    def stop_ids(self) -> list[int] | None:
        return None

    def score(self, sequences: Sequence[Ids], tail: int = 0) -> Iterator[Scores]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for ids in sequences:
                if tail and not self._takes(list(ids[:-1])):
                    yield _scores([{}] * tail, ids, len(self.tokenizer))
                    continue
                first = len(ids) - tail if tail else 1
                likeliest = list(pool.map(self._next, [list(ids[:end]) for end in range(first, len(ids))]))
                yield _scores(likeliest, ids, len(self.tokenizer))

    def _takes(self, prefix: list[int]) -> bool:
        """Whether the server has room for so long a text; it may be started with less than the model's context."""
        try:
            self._next(prefix)
        except HttpStatus as error:
            if error.status not in REFUSED:
                raise
            return False
        return True

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda ids: self._continue(list(ids), new_tokens), prompts))

    def continue_text(self, text: str, new_tokens: int, stops: Sequence[str]) -> str:
        """The likeliest continuation in words, without the tokenizer; it may end before the first of ``stops``."""
        body: dict[str, object] = {
            "model": self.model, "prompt": text, "max_tokens": new_tokens, "temperature": 0,
        }  # fmt: skip
        body |= {"stop": list(stops[:MOST_STOPS])} if stops else {}
        said = at(self._ask("POST", "/v1/completions", body), "choices", 0, "text")
        if not isinstance(said, str):
            raise InvalidAnswer(f"{self.root}/v1/completions: an answer without text")
        return said

    def reply(self, messages: Messages, options: AnswerOptions, say: Say) -> End:
        """As ``ChatEngine``; what the options leave open is the server's."""
        settings = {"max_tokens": options.max_tokens, "temperature": options.temperature}
        body: dict[str, object] = {"model": self.model, "messages": list(messages), "stream": True}
        body |= {name: value for name, value in settings.items() if value is not None}
        for event in self._http.events("/v1/chat/completions", body):
            if event.get("error"):
                raise EngineError(f"{self.root}: {at(event, 'error', 'message') or event['error']}")
            choice = at(event, "choices", 0)
            part = at(choice, "delta") or at(choice, "message")  # the latter of a server that does not stream
            for name in THOUGHT_KEYS:
                if isinstance(thought := at(part, name), str):
                    say(thought, thought=True)
                    break
            if isinstance(text := at(part, "content"), str):
                say(text)
            if reason := at(choice, "finish_reason"):
                return "length" if reason == "length" else "stop"
        return "stop"

    def _next(self, prefix: list[int]) -> dict[int, float]:
        """The likeliest next tokens with their log-probabilities."""
        top = at(self._complete(prefix, 1), "logprobs", "top_logprobs", 0)
        if not isinstance(top, dict):
            raise EngineError(f"{self.root} answers without log-probabilities", "start it with logprobs allowed")
        named = {
            self._id(text): float(value) if isinstance(value, int | float) else np.nan for text, value in top.items()
        }
        return {token: value for token, value in named.items() if token is not None}

    def _continue(self, prompt: list[int], new_tokens: int) -> list[int]:
        texts = at(self._complete(prompt, new_tokens), "logprobs", "tokens")
        named = [self._id(str(text)) for text in texts] if isinstance(texts, list) else []
        ids = [token for token in named if token is not None]
        stops = {self.tokenizer.eos_token_id, *(self.tokenizer.all_special_ids or [])}
        return ids[:-1] if ids and ids[-1] in stops else ids

    def _complete(self, prompt: list[int], tokens: int) -> JsonValue:
        """The first choice, with as many of the likeliest tokens as the server grants."""
        body: dict[str, object] = {
            "model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "seed": 0,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        tops = [self._top] if self._top else [min(top, len(self.tokenizer)) for top in TOPS]
        for top in tops:
            try:
                choice = at(self._ask("POST", "/v1/completions", {**body, "logprobs": top}), "choices", 0)
            except HttpStatus as error:
                if error.status not in REFUSED or top == tops[-1]:
                    raise
                continue
            self._top = top
            break
        if not isinstance(choice, dict):
            raise InvalidAnswer(f"{self.root}/v1/completions: an answer without choices")
        return choice

    def _id(self, text: str) -> int | None:
        """``token_id:17``, as vLLM says it, or a token's text where just one token has it."""
        if text.startswith("token_id:"):
            return int(text.removeprefix("token_id:"))
        if self._ids is None:
            words = self.tokenizer.batch_decode([[number] for number in range(len(self.tokenizer))])
            times = Counter(words)
            self._ids = {word: number for number, word in enumerate(words) if times[word] == 1}
        return self._ids.get(text)

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Json:
        """The answer as JSON; a server that is busy is asked again."""
        for wait in WAITS:
            try:
                return self._ask_once(method, path, body)
            except HttpStatus as error:
                if error.status not in BUSY:
                    raise
                time.sleep(wait)
        return self._ask_once(method, path, body)

    def _ask_once(self, method: str, path: str, body: Mapping[str, object] | None) -> Json:
        try:
            return self._http.call(method, path, body)
        except Unreachable as error:
            raise EngineMissing(error.message, error.hint) from None


def _scores(rows: Sequence[Mapping[int, float]], ids: Ids, vocab: int) -> Scores:
    """All tokens where the server showed all, or else the likeliest."""
    width = max(len(row) for row in rows)
    if all(len(row) >= vocab and max(row) < width for row in rows):
        whole = np.full((len(rows), width), np.nan, dtype=np.float32)
        for number, row in enumerate(rows):
            whole[number, list(row)] = list(row.values())
        return Scores(whole)
    return Scores.of_likeliest(rows, ids)
