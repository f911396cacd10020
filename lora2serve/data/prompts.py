"""What is scored: held-out rows of the run and general text, in token ids of the trained tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lora2serve.errors import DataError

Part = Literal["task", "general"]
Messages = Sequence[Mapping[str, str]]

# Conversations that find out what a template does beside the usual: a system turn, several turns, space at the edges,
# other scripts, and text that looks like markup.
PROBES: tuple[Messages, ...] = (
    ({"role": "user", "content": "Hello"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}),
    (
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ),
    ({"role": "user", "content": "Line one\n\nline two\twith a tab, 'quotes' and \"more\" {{ braces }}"},),
    ({"role": "user", "content": "Grüße aus Köln, 東京, Москва — 12 345,67 € 🙂"},),
)


@dataclass(frozen=True)
class Text:
    """One text to score."""

    part: Part
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Conversation:
    """One prompt as the trained model sees it: ``text`` is what its template renders, ``ids`` its tokens."""

    messages: Messages
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class PromptSet:
    """Everything that engines are asked."""

    sequences: tuple[Text, ...]
    conversations: tuple[Conversation, ...]  # for the tokens gate
    prompts: tuple[Conversation, ...]  # for the greedy answers
    stop: tuple[int, ...]  # the tokens at which the trained model stops
    bos: int | None
    vocab: int  # tokens the tokenizer knows
    window: int  # tokens of one sequence at most

    @property
    def positions(self) -> int:
        """Predicted tokens in all."""
        return sum(len(sequence.ids) - 1 for sequence in self.sequences)

    def longest(self, new_tokens: int) -> int:
        """Tokens that an engine must have room for: the longest text, or prompt with its answer."""
        texts = [len(sequence.ids) + 1 for sequence in self.sequences]
        asked = [len(one.ids) + new_tokens for one in (*self.conversations, *self.prompts)]
        return max([*texts, *asked])

    def save(self, path: Path) -> None:
        """As JSON, for a child process."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def load_saved(path: Path) -> PromptSet:
    """What ``save`` wrote."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    texts = tuple(Text(s["part"], tuple(s["ids"]), s["text"]) for s in raw["sequences"])
    conversations, prompts = (
        tuple(Conversation(c["messages"], c["text"], tuple(c["ids"])) for c in raw[key])
        for key in ("conversations", "prompts")
    )
    return PromptSet(texts, conversations, prompts, tuple(raw["stop"]), raw["bos"], raw["vocab"], raw["window"])


@dataclass(frozen=True)
class Amount:
    """How much to ask."""

    tokens: int = 2048  # scored, at least, where the data has as many; half of them task, half general
    window: int = 512  # tokens of one sequence at most
    prompts: int = 8  # greedy answers
    new_tokens: int = 32  # of one answer


def prepare(
    tokenizer: Any,
    eval_rows: Path | None,
    general: str | None,
    stop: Iterable[int],
    amount: Amount,
    most: int | None = None,
) -> PromptSet:
    """Tokenize held-out rows and general text. Rows are taken in order: the same run gives the same data.

    ``most`` is what the model has positions for; None where it has no limit. Longer texts are cut to it and to the
    window, prompts that leave no room for an answer are left out.
    """
    rows = _read(eval_rows) if eval_rows and eval_rows.is_file() else []
    text = _read(Path(general)) if general else _shipped()
    window = min(amount.window, most - 1) if most else amount.window  # engines want room for one token more
    task, more = _sequences(rows, text, tokenizer, replace(amount, window=window))
    room = (most or LONGEST) - amount.new_tokens
    own = _conversations((_opening(row) for row in rows), tokenizer, room, CONVERSATIONS)
    probes = _conversations(PROBES, tokenizer, room, CONVERSATIONS)
    asked = own or probes or _conversations((_opening(row) for row in text), tokenizer, room, CONVERSATIONS)
    conversations = {c.text: c for c in [*own, *probes]} or {c.text: c for c in asked}
    if not conversations:
        raise DataError(f"no prompt is shorter than {room} tokens", "parity.new_tokens leaves more room if it is less")
    return PromptSet(
        (*task, *more), tuple(conversations.values()), tuple(asked[: amount.prompts]),
        tuple(sorted(set(stop))), tokenizer.bos_token_id, len(tokenizer), window,
    )  # fmt: skip


CONVERSATIONS = 32  # held-out ones for the tokens gate
LONGEST = 4096  # tokens of one of them, where the model has no limit


def _sequences(
    rows: Sequence[Mapping[str, Any]], text: Sequence[Mapping[str, Any]], tokenizer: Any, amount: Amount
) -> tuple[list[Text], list[Text]]:
    """Half from the task, half general; where one of them is short, the rest from the other."""
    task = list(_until((_row(row, tokenizer, "task", amount.window) for row in rows), amount.tokens // 2))
    scored = sum(len(sequence.ids) - 1 for sequence in task)
    more = list(_until((_row(row, tokenizer, "general", amount.window) for row in text), amount.tokens - scored))
    scored += sum(len(sequence.ids) - 1 for sequence in more)
    if scored < amount.tokens:
        rest = (_row(row, tokenizer, "task", amount.window) for row in rows[len(task) :])
        task += _until(rest, amount.tokens - scored)
    if not task and not more:
        raise DataError("nothing to score: neither held-out rows nor general text", "name a set with parity.general")
    return task, more


def _conversations(openings: Iterable[Messages | str], tokenizer: Any, room: int, most: int) -> list[Conversation]:
    made = (found for opening in openings if (found := _conversation(opening, tokenizer)))
    return list(islice((one for one in made if len(one.ids) <= room), most))


def _until(sequences: Iterator[Text | None], tokens: int) -> Iterator[Text]:
    count = 0
    for sequence in sequences:
        if count >= tokens:
            return
        if sequence is not None:
            count += len(sequence.ids) - 1
            yield sequence


def _row(row: Mapping[str, Any], tokenizer: Any, part: Part, window: int) -> Text | None:
    """The whole row as training saw it, cut at ``window``; None where no token is left to predict."""
    if "messages" in row:
        if not tokenizer.chat_template:
            raise DataError("rows of messages, and the trained tokenizer has no chat template", "give rows of text")
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    elif "text" in row:
        text = row["text"]
        ids = tokenizer(text)["input_ids"]
    else:
        text = row["prompt"] + row["completion"]
        ids = [
            *tokenizer(row["prompt"])["input_ids"],
            *tokenizer(row["completion"], add_special_tokens=False)["input_ids"],
        ]
        ids += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids = tuple(ids[:window])
    return Text(part, ids, text) if len(ids) > 1 else None


def _opening(row: Mapping[str, Any]) -> Messages | str:
    """What a user would send: a conversation without its last answer, a prompt, or the first half of a text."""
    if "messages" in row:
        messages = list(row["messages"])
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return messages
    return str(row["prompt"]) if "prompt" in row else str(row["text"][: max(1, len(row["text"]) // 2)])


def _conversation(opening: Messages | str, tokenizer: Any) -> Conversation | None:
    """Rendered and tokenized; None where the template has no place for such turns."""
    if isinstance(opening, str):
        return Conversation((), opening, tuple(tokenizer(opening)["input_ids"]))
    if not opening or not tokenizer.chat_template:
        return None
    try:
        text = tokenizer.apply_chat_template(opening, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template raises what it likes to refuse a role
        return None
    return Conversation(opening, text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows of JSONL, or a plain text by paragraphs."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}", "expected JSONL rows or plain text") from None
    if path.suffix not in (".jsonl", ".json"):
        return [{"text": part.strip()} for part in content.split("\n\n") if part.strip()]
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from None
        if row is not None:
            if not isinstance(row, dict) or not {"messages", "prompt", "text"} & row.keys():
                raise DataError(f"{path}:{number}: expected messages, prompt + completion, or text")
            rows.append(row)
    return rows


def _shipped() -> list[dict[str, Any]]:
    content = resources.files("lora2serve.data").joinpath("general.txt").read_text(encoding="utf-8")
    return [{"text": part.strip()} for part in content.split("\n\n") if part.strip()]
