"""What a comparison asks: held-out rows of the run and general text, in token ids of the trained tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Literal

from lora2serve.data.data_sets import DataSet, read_file
from lora2serve.data.long_text import LongText, make_long
from lora2serve.data.rendering import Renderer, opening
from lora2serve.data.rows import ChatRow, Message, Row, TextRow, answered
from lora2serve.data.served_template import ChatTemplate, served_tool
from lora2serve.data.tokenizer import Tokenizer, encode
from lora2serve.errors import DataError

Part = Literal["task", "general"]
CONVERSATIONS = 32  # held-out ones for the tokens gate
LONGEST_PROMPT = 4096  # tokens of one of them, where the model has no limit

CLOCK: Mapping[str, object] = {
    "type": "function",
    "function": {
        "name": "time_in_city",
        "description": "What time it is in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# Conversations that find out what a template does beside the usual: a system turn, several turns and many, tools, space
# at the edges, other scripts, and text that looks like markup.
PROBES: tuple[ChatRow, ...] = (
    ChatRow([{"role": "user", "content": "Hello"}]),
    ChatRow([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]),
    ChatRow(
        [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Two"},
            {"role": "user", "content": "Three"},
        ]
    ),
    ChatRow([{"role": "user", "content": "Line one\n\nline two\twith a tab, 'quotes' and \"more\" {{ braces }}"}]),
    ChatRow([{"role": "user", "content": "Grüße aus Köln, 東京, Москва — 12 345,67 € 🙂"}]),
    ChatRow(
        [
            {"role": role, "content": f"{word} turn"}
            for role, word in zip(
                ("user", "assistant") * 6,
                ("First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh"),
                strict=False,
            )
        ]
    ),
    ChatRow([{"role": "user", "content": "What time is it in Köln?"}], tools=[CLOCK]),
)


@dataclass(frozen=True)
class ScoredText:
    """One text to score."""

    part: Part
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Conversation:
    """One prompt as the trained model sees it: ``text`` is what its template renders, ``ids`` its tokens."""

    messages: Sequence[Message]
    text: str
    ids: tuple[int, ...]
    tools: Sequence[Mapping[str, object]] = ()  # where the template shows them

    @property
    def question(self) -> str:
        """The last turn, or the whole text, as a report shows it."""
        return self.messages[-1]["content"] or "" if self.messages else self.text


@dataclass(frozen=True)
class PromptSet:
    """Everything that engines are asked."""

    sequences: tuple[ScoredText, ...]
    conversations: tuple[Conversation, ...]  # for the tokens gate
    prompts: tuple[Conversation, ...]  # for the greedy answers
    stop: tuple[int, ...]  # the tokens at which the trained model stops
    bos: int | None
    vocab: int  # tokens the tokenizer knows
    window: int  # tokens of one sequence at most
    long: LongText | None = None
    note: str = ""  # how the rows were read, where that is a question
    prefix: tuple[int, ...] = ()  # the tokens that stand for a soft prompt, in front of all that an export gets
    prefix_text: str = ""

    def exported(self, prompt: Conversation) -> Conversation:
        """A prompt as an export must make it."""
        return replace(prompt, text=self.prefix_text + prompt.text, ids=(*self.prefix, *prompt.ids))

    @property
    def positions(self) -> int:
        """Predicted tokens in all."""
        return sum(len(sequence.ids) - 1 for sequence in self.sequences)

    def longest(self, new_tokens: int) -> int:
        """Tokens that an engine must have room for: the longest text, or prompt with its answer."""
        texts = [len(sequence.ids) + 1 for sequence in self.sequences]
        texts += [len(self.long.ids) + 1] if self.long else []
        answered = [len(prompt.ids) + new_tokens for prompt in (*self.conversations, *self.prompts)]
        return len(self.prefix) + max([*texts, *answered])

    def save(self, path: Path) -> None:
        """As JSON, for a child process."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def load_saved(path: Path) -> PromptSet:
    """What ``save`` wrote."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    texts = tuple(ScoredText(s["part"], tuple(s["ids"]), s["text"]) for s in raw["sequences"])
    conversations, prompts = (
        tuple(Conversation(c["messages"], c["text"], tuple(c["ids"]), c["tools"] or ()) for c in raw[key])
        for key in ("conversations", "prompts")
    )
    long = LongText(tuple(raw["long"]["ids"]), raw["long"]["tail"], raw["long"]["context"]) if raw["long"] else None
    stop = tuple(raw["stop"])
    return PromptSet(
        texts, conversations, prompts, stop, raw["bos"], raw["vocab"], raw["window"], long, raw["note"],
        tuple(raw["prefix"]), raw["prefix_text"],
    )  # fmt: skip


@dataclass(frozen=True)
class PromptOptions:
    """How much to ask."""

    tokens: int = 2048  # scored, at least, where the data has as many; half of them task, half general
    window: int = 512  # tokens of one sequence at most
    long: int = 2048  # of the long text, at most; 0: none
    prompts: int = 8  # greedy answers
    new_tokens: int = 32  # of one answer


@dataclass(frozen=True)
class Reading:
    """How a training read its rows (``data.form``, ``data.columns``), and the day that its template printed.

    ``own_rows``: the held-out rows are those that the run kept, which are in their form already.
    """

    form: str = "chat"
    columns: Mapping[str, str] = field(default_factory=dict)
    day: str | None = None  # YYYY-MM-DD
    own_rows: bool = False


def prepare(
    tokenizer: Tokenizer,
    eval_rows: Path | None,
    general: str | None,
    stop: Iterable[int],
    amount: PromptOptions,
    most: int | None = None,
    reading: Reading | None = None,
) -> PromptSet:
    """Tokenize held-out rows and general text. Rows are taken in order: the same run gives the same data.

    ``most`` is what the model has positions for; None where it has no limit. Longer texts are cut to it and to the
    window, prompts that leave no room for an answer are left out. ``reading`` is how the training read its rows. Where
    a chat template prints the date, texts and prompts have the day of the training; conversations have today's, as
    engines write them.
    """
    reading = reading or Reading()
    rows, note = _held_out(eval_rows, tokenizer, reading) if eval_rows and eval_rows.is_file() else (None, "")
    text = read_file(Path(general), reading.columns, plain_text=True) if general else _shipped()
    text = text.in_form(reading.form, tokenizer.chat_template)
    window = min(amount.window, most - 1) if most else amount.window  # engines want room for one token more
    stops = tuple(sorted(set(stop)))
    today = ChatTemplate(tokenizer, stops)
    trained = replace(today, day=date.fromisoformat(reading.day)) if reading.day else today
    sequences = _sequences(rows, text, Renderer(trained), replace(amount, window=window))
    room = (most or LONGEST_PROMPT) - amount.new_tokens
    starts: list[Sequence[ChatRow | str]] = [
        [_start(row) for row in rows.rows] if rows else [], PROBES, [_start(row) for row in text.rows],
    ]  # fmt: skip
    served = [_conversations(part, today, room) for part in starts]
    asked = next((part for part, found in zip(starts, served, strict=True) if found), [])
    conversations = {c.text: c for c in [*served[0], *served[1]] or served[2]}
    if not conversations:
        raise DataError(f"no prompt is shorter than {room} tokens", "parity.new_tokens leaves more room if it is less")
    return PromptSet(
        sequences, tuple(conversations.values()), tuple(_conversations(asked, trained, room)[: amount.prompts]),
        stops, tokenizer.bos_token_id, len(tokenizer), window,
        make_long([sequence.ids for sequence in sequences], amount.long, most), note,
    )  # fmt: skip


def read_held_out(path: Path, reading: Reading) -> DataSet:
    """The rows of a file as they stand there; DataError names those that are none."""
    return read_file(path, {} if reading.own_rows else reading.columns, plain_text=True)


def _held_out(path: Path, tokenizer: Tokenizer, reading: Reading) -> tuple[DataSet, str]:
    """The rows of a file as the training would have read them, and what is to be said of that."""
    rows = read_held_out(path, reading)
    if reading.own_rows:
        return rows, ""
    return rows.in_form(reading.form, tokenizer.chat_template), rows.note_of_form(reading.form, tokenizer.chat_template)


def _sequences(
    rows: DataSet | None, text: DataSet, renderer: Renderer, amount: PromptOptions
) -> tuple[ScoredText, ...]:
    """Half from the task, half general; where one of them is short, the rest from the other."""
    own = _scored(rows, renderer, "task", amount.window) if rows else iter(())
    task = list(_until(own, amount.tokens // 2))
    scored = sum(len(sequence.ids) - 1 for sequence in task)
    more = list(_until(_scored(text, renderer, "general", amount.window), amount.tokens - scored))
    scored += sum(len(sequence.ids) - 1 for sequence in more)
    task += _until(own, amount.tokens - scored)
    if not task and not more:
        raise DataError("nothing to score: no held-out rows and no general text", "name a set with parity.general")
    return (*task, *more)


def _scored(data: DataSet, renderer: Renderer, part: Part, window: int) -> Iterator[ScoredText]:
    """Rows as training saw them, cut at ``window``; without those that leave no token to predict."""
    for index, row in enumerate(data.rows):
        try:
            samples = renderer.render(row).samples
        except DataError as error:
            raise DataError(f"{data.where(index)}: {error.message}", error.hint) from None
        for sample in samples:
            if len(sample.ids[:window]) > 1:
                yield ScoredText(part, tuple(sample.ids[:window]), sample.text)


def _until(sequences: Iterator[ScoredText], tokens: int) -> Iterator[ScoredText]:
    """The next ones, until so many tokens are scored."""
    count = 0
    while count < tokens and (sequence := next(sequences, None)):
        count += len(sequence.ids) - 1
        yield sequence


def _conversations(openings: Iterable[ChatRow | str], template: ChatTemplate, room: int) -> list[Conversation]:
    """The first ones that leave room for an answer, and whose turns the template knows."""
    rendered = (_conversation(start, template) for start in openings)
    return list(islice((prompt for prompt in rendered if prompt and len(prompt.ids) <= room), CONVERSATIONS))


def _start(row: Row) -> ChatRow | str:
    """What a user would send, with the tools of its row."""
    start, row = opening(row), answered(row)
    return start if isinstance(start, str) else ChatRow(start, row.tools if isinstance(row, ChatRow) else None)


def _conversation(start: ChatRow | str, template: ChatTemplate) -> Conversation | None:
    """Rendered and tokenized; None where the template refuses such turns, or shows nothing of the tools it is to try.

    Tools that a template does not show are left out.
    """
    tokenizer, messages = template.tokenizer, [] if isinstance(start, str) else list(start.messages)
    if isinstance(start, str):
        return Conversation([], start, tuple(encode(tokenizer, start)))
    if not messages or not tokenizer.chat_template:
        return None
    try:
        text = template.serve(start).render(generation_prompt=True)
        shown = bool(start.tools) and text != template.serve(ChatRow(messages)).render(generation_prompt=True)
    except Exception:  # a template raises what it likes to refuse a role
        return None
    if start in PROBES and start.tools and not shown:
        return None
    tools = [served_tool(tool) for tool in start.tools or ()] if shown else ()
    return Conversation(messages, text, tuple(encode(tokenizer, text, special=False)), tools)


def _shipped() -> DataSet:
    """The general text that the package brings."""
    content = resources.files("lora2serve.data").joinpath("general.txt").read_text(encoding="utf-8")
    rows: list[Row] = [TextRow(part.strip()) for part in content.split("\n\n") if part.strip()]
    return DataSet(rows, "general.txt", "", list(range(1, len(rows) + 1)))
