"""One small protocol for every engine; one file each. All of them run in a worker process (see worker.py).

An engine is made by its options, all of them JSON. What an engine cannot show, it answers with None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lora2serve.data.rows import Message

Ids = Sequence[int]
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, object]]  # that the model may call, in OpenAI's form


@dataclass(frozen=True)
class Scores:
    """What an engine says of one sequence of n tokens: for each of its n - 1 predicted positions, or the last ones ...

    ``values``: ... (n-1, V) float32 logits or log-probabilities of all tokens, or with ``ids`` (n-1, k) int64 those of
    the k most likely, log-probabilities then, -1 in ``ids`` where there are fewer (a whole row: nothing is known there,
    and the position is left out); ``target`` is then the (n-1,) log-probability of the true next token, NaN where
    unknown.
    """

    values: NDArray[np.float32]
    ids: NDArray[np.int64] | None = None
    target: NDArray[np.float32] | None = None

    @classmethod
    def of_likeliest(cls, likeliest: Sequence[Mapping[int, float]], ids: Ids) -> Scores:
        """From the likeliest tokens of each position, token -> log-probability; an empty one: nothing is known."""
        width = max([1, *(len(candidates) for candidates in likeliest)])
        names = np.full((len(likeliest), width), -1, dtype=np.int64)
        values = np.full((len(likeliest), width), np.nan, dtype=np.float32)
        target = np.full(len(likeliest), np.nan, dtype=np.float32)
        for row, candidates in enumerate(likeliest):
            names[row, : len(candidates)], values[row, : len(candidates)] = list(candidates), list(candidates.values())
            target[row] = candidates.get(ids[len(ids) - len(likeliest) + row], np.nan)
        return cls(values, names, target)


class Engine(Protocol):
    """An engine with one model in it."""

    version: (
        str  # name and version of the engine, and the type it computes in; ``dtype`` is that type, where it has one
    )

    def render(self, messages: Messages, tools: Tools = ()) -> str | None:
        """The prompt as the engine's own template makes it, with the opening of the answer."""
        ...

    def prompt_ids(self, messages: Messages, text: str, tools: Tools = ()) -> list[int] | None:
        """The ids the engine feeds for that conversation, or for ``text`` where ``messages`` is empty."""
        ...

    def stop_ids(self) -> list[int] | None:
        """The ids at which the engine ends an answer by itself."""
        ...

    def score(self, sequences: Sequence[Ids], tail: int = 0) -> Iterator[Scores]:
        """Teacher-forced, one sequence at a time: memory is one sequence x V float32.

        With ``tail``, of the last so many positions of each alone: those are the rows of the answer, and the memory.
        """
        ...

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        """The likeliest continuations, without the stop token; penalties, stops and length as the export has them."""
        ...


ENGINES = {
    "peft": "lora2serve.parity_check.engines.peft_engine:Peft",
    "transformers": "lora2serve.parity_check.engines.transformers_engine:Transformers",
    "vllm": "lora2serve.parity_check.engines.vllm_engine:Vllm",
    "llama.cpp": "lora2serve.parity_check.engines.llama_cpp_engine:LlamaCpp",
    "vllm-server": "lora2serve.parity_check.engines.vllm_server_engine:VllmServer",
    "openai": "lora2serve.parity_check.engines.openai_engine:OpenAI",
    "ollama": "lora2serve.parity_check.engines.ollama_engine:Ollama",
    "settings": "lora2serve.parity_check.settings_gate:SettingsComparator",
    "tensors": "lora2serve.parity_check.tensor_gate:TensorComparator",  # no engines, but run like them
    "tokenizer": "lora2serve.parity_check.engines.tokenizer_engine:TokenizerEngine",
}
