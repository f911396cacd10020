"""The tokens at which a server ends an answer, and the one by which a chat template closes a turn."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora2serve.data.tokenizer import Tokenizer

TEXT_PARTS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class EndTokens:
    """``texts`` of the tokens that end an answer, the tokenizer's own first."""

    texts: tuple[str, ...]

    def place(self, answer: str) -> int:
        """Where the first of them ends in ``answer``; -1 without one."""
        ends = [(answer.find(text), len(text)) for text in self.texts if text in answer]
        return sum(min(ends)) if ends else -1

    def cut(self, answer: str) -> str:
        """``answer`` up to and with the first of them, and the space behind it."""
        place = self.place(answer)
        if place < 0:
            return answer
        space = len(answer[place:]) - len(answer[place:].lstrip())
        return answer[: place + space]

    def closes(self, text: str) -> bool:
        """Whether ``text`` ends with one of them, apart from space."""
        return text.rstrip().endswith(self.texts)

    def leading(self, text: str) -> str:
        """What stands at the start of ``text`` up to and with one of them; empty where something else comes first."""
        space = len(text) - len(text.lstrip())
        return next((text[: space + len(end)] for end in self.texts if text.startswith(end, space)), "")


def end_tokens(tokenizer: Tokenizer, stop_ids: Iterable[int]) -> EndTokens:
    """Those of the tokenizer and ``stop_ids``."""
    own = tokenizer.eos_token_id
    ids = dict.fromkeys([*([own] if own is not None else []), *stop_ids])
    texts = tokenizer.convert_ids_to_tokens([token for token in ids if token < len(tokenizer)])
    return EndTokens(tuple(text for text in texts if text))


def stop_ids(model: Path) -> list[int]:
    """What the generation config and the config of a model directory name as the end of an answer."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = model / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        parts = [content, *(content.get(part) for part in TEXT_PARTS)] if isinstance(content, dict) else []
        for part in parts:
            named = part.get("eos_token_id") if isinstance(part, dict) else None
            ids += [token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)]
    return list(dict.fromkeys(ids))


def closing_token(tail: str, tokenizer: Tokenizer) -> str:
    """The last special token in ``tail``, which a chat template writes behind an answer; empty without one."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content in tail}
    return max(names, key=lambda name: (tail.rindex(name), len(name)), default="")
