"""A judge: a model behind a URL that is asked which of two answers is better, in both orders."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora2serve.errors import EngineError
from lora2serve.system.http import HttpClient, check_address
from lora2serve.system.json_values import at, objects

if TYPE_CHECKING:
    from lora2serve.evaluation.suite import SuiteItem

PATIENCE = 120.0  # seconds
CRITERION = "Which answer is better: more correct, and no less complete?"
VERDICT = re.compile(r"\b(A|B|tie)\b", re.IGNORECASE)
LONGEST = 16  # tokens of its answer


class Judge:
    """``model`` is its name at the address, the first that is listed by default. A key is taken from OPENAI_API_KEY."""

    def __init__(self, url: str, model: str | None, criterion: str) -> None:
        check_address(url)
        self._http = HttpClient(url.rstrip("/").removesuffix("/v1"), patience=PATIENCE, key_variable="OPENAI_API_KEY")
        self._model, self._criterion = model, criterion or CRITERION

    def score(self, answer: str, item: SuiteItem) -> float:
        """1 where the answer beats the expected one in both orders, 0 where it loses both.

        The position biases a judge: one that names the same position in both orders has seen a tie, 0.5.
        """
        reference = item.expected[0]
        if answer.strip() == reference.strip():
            return 0.5
        first = self._ask(item.question, answer, reference)
        second = self._ask(item.question, reference, answer)
        return ({"a": 1.0, "b": 0.0}.get(first, 0.5) + {"b": 1.0, "a": 0.0}.get(second, 0.5)) / 2

    def _ask(self, question: str, first: str, second: str) -> str:
        """a, b or tie."""
        text = (
            f"{self._criterion}\n\nQuestion:\n{question}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n"
            "Reply with one word: A, B or tie."
        )
        body = {"model": self._name(), "messages": [{"role": "user", "content": text}]}
        reply = self._http.call(
            "POST", "/v1/chat/completions", {**body, "temperature": 0, "max_tokens": LONGEST, "seed": 0}
        )
        said = str(at(reply, "choices", 0, "message", "content") or "")
        match = VERDICT.search(said)
        if match is None:
            raise EngineError(
                f"the judge {self._name()} says {said[:60]!r}, expected A, B or tie", "choose another model"
            )
        return match[1].lower()

    def _name(self) -> str:
        if self._model is None:
            served = [str(entry.get("id")) for entry in objects(self._http.call("GET", "/v1/models").get("data"))]
            if not served:
                raise EngineError(f"{self._http.address} has no model at all")
            self._model = served[0]
        return self._model
