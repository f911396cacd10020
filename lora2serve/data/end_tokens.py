"""The tokens at which a server ends an answer, and the one by which a chat template closes a turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora2serve.data.rows import THOUGHT_KEYS
from lora2serve.data.tokenizer import Tokenizer

ANSWER, THOUGHT = "Zebra 8417", "Okapi 2963"  # what no template writes by itself
Messages = Sequence[Mapping[str, object]]
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


def find_answer_end(render: Callable[[Messages], str], tokens: Iterable[str]) -> str | None:
    """The first of ``tokens`` behind the answer; None where the template closes an answer with none of them.

    ``render`` gives a conversation as text. What follows the last answer counts; only where nothing does, what follows
    an earlier one: gpt-oss ends the last with another token. A token that closes thoughts as well ends no answer.
    """
    longest_first = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    for content in (str, _part):
        question, answer = _message("user", "?", content), _message("assistant", ANSWER, content)
        for messages in ([question, answer], [question, answer, question]):
            try:
                _, found, rest = render(messages).rpartition(ANSWER)
            except Exception:  # a template raises what it likes to refuse a conversation
                break
            rest = rest.lstrip()
            if found and rest:
                end = next((token for token in longest_first if rest.startswith(token)), None)
                return None if end and end in _after_thoughts(render, question, answer) else end
    return None


def _after_thoughts(
    render: Callable[[Messages], str], question: Mapping[str, object], answer: Mapping[str, object]
) -> str:
    """What stands between the thoughts and the answer; empty where the template knows none."""
    thoughtful = {**answer, **dict.fromkeys(THOUGHT_KEYS, THOUGHT)}
    try:
        _, found, rest = render([question, thoughtful]).partition(THOUGHT)
    except Exception:  # as above
        return ""
    return rest.rpartition(ANSWER)[0] if found else ""


def _message(role: str, text: str, content: Callable[[str], object]) -> dict[str, object]:
    return {"role": role, "content": content(text)}


def _part(text: str) -> list[dict[str, str]]:
    """Content as models with other senses than text want it."""
    return [{"type": "text", "text": text}]
