"""Any server that speaks OpenAI's completions API: vLLM, llama.cpp's server, a gateway before them.

Positions are scored by one request for each prefix, with the likeliest next tokens in the answer. That works on every
such server and with adapters; what is not among them bounds the KL from below (see ``metrics.compare_top``). A small
vocabulary is shown whole.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lora2serve.errors import EngineError
from lora2serve.parity_check.engine_process import EngineMissing
from lora2serve.parity_check.engines import Ids, Messages, Scores

AT_ONCE = 16  # requests under way
TOPS = (256, 20, 5)  # likeliest tokens to ask for: more than most servers grant, vLLM's default limit, OpenAI's
TIMEOUT = 120.0  # seconds for one request
WAITS = (1.0, 4.0)  # seconds before a busy server is asked again


class Refused(EngineError):
    """The server does not take the request as it is."""


class Busy(EngineError):
    """The server, or the gateway before it, may answer later."""


class OpenAI:
    """``url`` is the server's address, with or without ``/v1``; ``tokenizer`` the trained one's directory.

    A key is taken from OPENAI_API_KEY.
    """

    def __init__(self, url: str, tokenizer: str, model: str | None = None) -> None:
        from transformers import AutoTokenizer

        self.root = url.rstrip("/").removesuffix("/v1")
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self._ids: Mapping[str, int] | None = None
        served = [one["id"] for one in self._ask("GET", "/v1/models")["data"]]
        if model is not None and model not in served:
            raise EngineError(f"{url} has no model {model!r}", f"it serves: {', '.join(served)}")
        self.model = model or served[0]
        self._top = 0  # as many as the server grants; known after the first answer
        self.version = f"{self.model} at {self.root}"

    def render(self, messages: Messages) -> str | None:
        """Servers show ids, not text."""
        return None

    def prompt_ids(self, messages: Messages, text: str) -> list[int] | None:
        """By vLLM's ``/tokenize``; None where the server has no such thing."""
        asked: dict[str, Any] = {"messages": list(messages)} if messages else {"prompt": text}
        try:
            answer = self._ask("POST", "/tokenize", {"model": self.model, **asked})
        except EngineError:
            return None
        tokens = answer.get("tokens")
        return [int(token) for token in tokens] if tokens and isinstance(tokens[0], int) else None

    def stop_ids(self) -> list[int] | None:
        return None

    def score(self, sequences: Sequence[Ids]) -> Iterator[Scores]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for ids in sequences:
                found = list(pool.map(self._next, [list(ids[:end]) for end in range(1, len(ids))]))
                yield _scores(found, ids, len(self.tokenizer))

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda ids: self._continue(list(ids), new_tokens), prompts))

    def _next(self, prefix: list[int]) -> dict[int, float]:
        """The likeliest next tokens with their log-probabilities."""
        answer = self._complete(prefix, 1)
        said = (answer.get("logprobs") or {}).get("top_logprobs") or []
        if not said:
            raise EngineError(f"{self.root} answers without log-probabilities", "start it with logprobs allowed")
        named = {self._id(text): np.nan if value is None else value for text, value in said[0].items()}
        return {token: float(value) for token, value in named.items() if token is not None}

    def _continue(self, prompt: list[int], new_tokens: int) -> list[int]:
        answer = self._complete(prompt, new_tokens)
        named = [self._id(text) for text in (answer.get("logprobs") or {}).get("tokens") or []]
        ids = [token for token in named if token is not None]
        stops = {self.tokenizer.eos_token_id, *(self.tokenizer.all_special_ids or [])}
        return ids[:-1] if ids and ids[-1] in stops else ids

    def _complete(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        given = {
            "model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "seed": 0,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        tops = [self._top] if self._top else [min(top, len(self.tokenizer)) for top in TOPS]
        for top in tops:
            try:
                choice: dict[str, Any] = self._ask("POST", "/v1/completions", {**given, "logprobs": top})["choices"][0]
            except Refused:
                if top == tops[-1]:
                    raise
                continue
            self._top = top
            break
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

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer as JSON; a server that is busy is asked again."""
        for wait in WAITS:
            try:
                return self._ask_once(method, path, body)
            except Busy:
                time.sleep(wait)
        return self._ask_once(method, path, body)

    def _ask_once(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.root + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode("utf-8", "replace").split())[:200]
            hint = "OPENAI_API_KEY holds the server's key" if error.code in (401, 403) else ""
            kind = Refused if error.code in (400, 422) else Busy if error.code in (429, 502, 503, 504) else EngineError
            raise kind(f"{self.root}{path} answers {error.code}: {said}", hint) from None
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise EngineMissing(f"{self.root}: no answer ({reason})", "check the address, and that it runs") from None
        except ValueError as error:
            raise EngineError(f"{self.root}{path}: no JSON in the answer ({error})") from None


def _scores(found: Sequence[Mapping[int, float]], ids: Ids, vocab: int) -> Scores:
    """All tokens where the server showed all, or else the likeliest."""
    width = max(len(one) for one in found)
    if all(len(one) >= vocab and max(one) < width for one in found):
        whole = np.full((len(found), width), np.nan, dtype=np.float32)
        for row, one in enumerate(found):
            whole[row, list(one)] = list(one.values())
        return Scores(whole)
    return Scores.of_likeliest(found, ids)
