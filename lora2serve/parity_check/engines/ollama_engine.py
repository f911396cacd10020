"""A running Ollama, by its REST API: the export is created there under a name of its own, asked, and removed.

Ollama takes text and gives text. So a position is scored by sending its prefix as text, where that text gives the same
ids again, and tokens come back by what they print; positions of which nothing is known are left out of the figures.
The 20 likeliest tokens bound the KL from below (see ``metrics.compare_top``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from lora2serve.artifacts.manifest import Manifest
from lora2serve.errors import EngineError
from lora2serve.parity_check import own_sampling
from lora2serve.parity_check.engines import Ids, Messages, Scores, Tools
from lora2serve.parity_check.installed_engines import ollama_version
from lora2serve.progress import Silent
from lora2serve.serving import ollama
from lora2serve.system.json_values import Json, JsonValue, at, objects

TOP = 20  # the most that Ollama shows
LEAST = 0.5  # share of positions that must be known
LIKELIEST = {"temperature": 0, "seed": 0}  # of an answer, whose penalties and stops are those of the Modelfile
GREEDY = {**LIKELIEST, "repeat_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0, "stop": []}


class Ollama:
    """``export`` is an Ollama export's directory, ``tokenizer`` the trained one's; the server is OLLAMA_HOST's."""

    def __init__(self, export: str, tokenizer: str, window: int) -> None:
        from transformers import AutoTokenizer

        self.client = ollama.OllamaClient()
        self.version = f"ollama {ollama_version(self.client)}"
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.model = f"lora2serve-parity-{_mark(Path(export))}"
        self._options = {**GREEDY, "num_ctx": window}
        self._own = own_sampling.of_modelfile(Path(export) / "Modelfile")
        ollama.create(self.client, Path(export), self.model, Silent())

    def close(self) -> None:
        """Remove the model; its blobs go with it where nothing else holds them."""
        with suppress(EngineError):
            self.client.delete(self.model)

    def render(self, messages: Messages, tools: Tools = ()) -> str | None:
        """What the model is fed: the server's prompt, and the BOS that llama.cpp puts before it.

        None with tools: the server writes their JSON in its own order.
        """
        if tools:
            return None
        text = self.client.render(self.model, messages)
        bos = str(self.tokenizer.bos_token or "")
        return bos + text if self._adds_bos and not text.startswith(bos) else text

    def prompt_ids(self, messages: Messages, text: str, tools: Tools = ()) -> list[int] | None:
        """The ids of that prompt, as many as the server counts; None where it counts only what is not in its cache."""
        if tools:
            return None
        once = {**self._options, "num_predict": 1}
        if messages:
            text = self.client.render(self.model, messages)
            count = self.client.chat(self.model, messages, options=once).get("prompt_eval_count")
        else:
            count = self.client.generate(self.model, text, options=once).get("prompt_eval_count")
        ids, bos = self._ids(text), self.tokenizer.bos_token_id
        more = _int(count) - len(ids)
        if more == 0:
            return ids
        if more == 1 and bos is not None:
            return [bos, *ids]
        if more == -1 and ids[:1] == [bos]:
            return ids[1:]
        if more < 0:
            return None
        raise EngineError(f"Ollama feeds {count} tokens where the trained tokenizer has {len(ids)}: {text[:60]!r}")

    def stop_ids(self) -> list[int] | None:
        """The end tokens of the GGUF and the stop words that are tokens."""
        model = self.client.show(self.model)
        ids = {at(model, "model_info", f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
        for word in re.findall(r'^stop\s+(".*")\s*$', str(model.get("parameters", "")), re.M):
            with suppress(ValueError):
                ids.add(self.tokenizer.convert_tokens_to_ids(json.loads(word)))
        return sorted(number for number in ids if isinstance(number, int))

    def score(self, sequences: Sequence[Ids], tail: int = 0) -> Iterator[Scores]:
        positions = known = 0
        for ids in sequences:
            first = len(ids) - tail if tail else 1
            likeliest = [self._next(list(ids[:end])) for end in range(first, len(ids))]
            positions, known = positions + len(likeliest), known + sum(map(bool, likeliest))
            yield Scores.of_likeliest(likeliest, ids)
        if known < LEAST * positions and not tail:
            raise EngineError(f"Ollama shows tokens for {known} of {positions} positions only")

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        return [self._continue(list(ids), new_tokens) for ids in prompts]

    def _next(self, prefix: list[int]) -> dict[int, float]:
        """The likeliest next tokens with their log-probabilities; empty where they cannot be asked for or named.

        The server says nothing of a token that ends the answer, nor of a part of a character.
        """
        text = self._text(prefix)
        if text is None:
            return {}
        answer = self.client.generate(
            self.model, text, options={**self._options, "num_predict": 1}, logprobs=True, top_logprobs=TOP
        )
        if "logprobs" not in answer and answer.get("done_reason") != "stop" and answer.get("response"):
            raise EngineError(f"{self.version} gives no log-probabilities", "update Ollama to 0.12.11 or newer")
        top = objects(at(answer, "logprobs", 0, "top_logprobs"))
        named = [(self._names.get(_piece(token)), float(str(token["logprob"]))) for token in top]
        if not named or max(named, key=lambda pair: pair[1])[0] is None:
            return {}
        return {name: value for name, value in named if name is not None}

    def _continue(self, prompt: list[int], new_tokens: int) -> list[int]:
        text = self._text(prompt)
        if text is None:
            raise EngineError(f"the prompt {self.tokenizer.decode(prompt)[:60]!r} gives other tokens when read as text")
        likeliest = {**LIKELIEST, "num_ctx": self._options["num_ctx"], "num_predict": self._own.most(new_tokens)}
        answer = self.client.generate(self.model, text, options=likeliest, logprobs=True)
        response = str(answer["response"])
        named = [self._names.get(_piece(token)) for token in objects(answer.get("logprobs"))]
        ids = [name for name in named if name is not None]
        if self.tokenizer.decode(ids) == response and len(ids) == len(named):
            return ids
        whole = self._ids(text + response)
        return whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._ids(response)

    def _text(self, ids: list[int]) -> str | None:
        """The text that the server reads as these ids: without BOS where it adds that itself."""
        if self._adds_bos:
            if ids[:1] != [self.tokenizer.bos_token_id]:
                return None
            ids = ids[1:]
        text = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""
        return text if text and self._ids(text) == ids else None

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _adds_bos(self) -> bool:
        """Asked of the server: it counts one token more than the tokenizer gives."""
        ids = self._ids("Hello")
        answer = self.client.generate(self.model, "Hello", options={**self._options, "num_predict": 1})
        return _int(answer.get("prompt_eval_count")) == len(ids) + 1

    @cached_property
    def _names(self) -> Mapping[str, int]:
        """What a token prints -> its id, where one token alone prints it and prints it whole."""
        special = set(self.tokenizer.all_special_ids)
        count = len(self.tokenizer)
        words = [self._printed(number) if number not in special else "" for number in range(count)]
        times = Counter(words)
        return {word: number for number, word in enumerate(words) if word and times[word] == 1 and "\ufffd" not in word}

    def _printed(self, number: int) -> str:
        """SentencePiece's mark of a space is lost in a token decoded alone."""
        word = str(self.tokenizer.convert_ids_to_tokens(number) or "")
        if word.startswith("▁"):
            return word.replace("▁", " ")
        return str(self.tokenizer.decode([number], clean_up_tokenization_spaces=False))


def _mark(export: Path) -> str:
    """The same for the same files, so that a killed run leaves one model at most."""
    files = json.dumps(Manifest.read(export).to_json()["files"], sort_keys=True)
    return hashlib.sha256(files.encode()).hexdigest()[:12]


def _piece(token: Json) -> str:
    """By its bytes, where the server gives them: its ``token`` may have lost some."""
    raw = token.get("bytes")
    if isinstance(raw, list) and raw:
        return bytes(byte for byte in raw if isinstance(byte, int)).decode("utf-8", "replace")
    return str(token.get("token", ""))


def _int(value: JsonValue) -> int:
    return value if isinstance(value, int) else 0
