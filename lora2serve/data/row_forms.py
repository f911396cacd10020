"""The forms that rows come in, and why a value is no row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lora2serve.config.objectives import SFT, Objective
from lora2serve.config.schema import show
from lora2serve.data.message_forms import (
    TEXT_ALONE,
    RowProblem,
    drops_nulls,
    learned,
    read_messages,
    read_template_arguments,
    read_tools,
)
from lora2serve.data.rows import (
    SIDES,
    ChatRow,
    CompletionRow,
    LabeledRow,
    Message,
    PreferenceRow,
    Row,
    TextRow,
    answered,
)

FORMS = (
    "a row is {messages: [{role, content}, ...]}, {conversations: [{from, value}, ...]}, {prompt, completion}, "
    "{instruction, input, output}, {question, answer} or {text}; data.columns maps other names"
)
CONVERSATIONS = ("messages", "conversations")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
NULLS = "nulls of tools and their arguments that are no JSON text"
BESIDE = ("system", "tools", "chat_template_kwargs")  # what only a conversation has
BY_RANK: tuple[tuple[str, ...], ...] = (*((key,) for key in CONVERSATIONS), *PAIRS, ("text",))
# Keys of rows for models that see or hear, as TRL and others name them.
NO_TEXT = ("image", "images", "video", "videos", "audio", "audios")
PREFERENCES: tuple[tuple[str, ...], ...] = (("prompt", *SIDES), SIDES)
PREFERENCE_FORMS = (
    "with train.objective: {objective} a row is {{prompt, chosen, rejected}}, each a text or turns, or {{chosen, "
    "rejected}}, conversations that begin alike; data.columns maps other names"
)


LABELED_FORMS = (
    "with train.objective: kto a row is {prompt, completion, label} or {messages, label}: whether the last answer is "
    "one to give, true or false; data.columns maps other names"
)
LABEL = "label"
LABELS: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}


def forms(objective: Objective | None) -> str:
    """What a row may be, for a hint."""
    if objective == "kto":
        return LABELED_FORMS
    return FORMS if objective in (None, SFT) else PREFERENCE_FORMS.format(objective=objective)


def parse_row(value: object) -> Row | str:
    """The row, or why ``value`` is none."""
    try:
        return RowReader().read(value)
    except RowProblem as problem:
        return str(problem)


@dataclass(frozen=True)
class RowReader:
    """Reads values as rows. ``columns`` are other names of keys (``data.columns``): ours -> the one in the data.

    ``objective``: what they are trained for, which decides what is a row; None where nothing is trained: all are.
    ``filled``: the values are of a table, which fills rows up with nulls. ``unread`` counts the rows that hold a key
    which nobody reads; ``present`` are the columns that any row has.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    filled: bool = False
    objective: Objective | None = None
    unread: Counter[str] = field(default_factory=Counter)
    present: set[str] = field(default_factory=set)

    def read(self, value: object) -> Row:
        """The row; RowProblem says why ``value`` is none. A key that holds null is as if it were not there."""
        if not isinstance(value, dict):
            raise RowProblem(f"a {type(value).__name__}, expected an object")
        renamed = self._renamed({str(key): item for key, item in value.items()})
        filled = {key: item for key, item in renamed.items() if item is not None}
        if seen := next((key for key in NO_TEXT if filled.get(key)), None):
            raise RowProblem(f"{seen}: {TEXT_ALONE}; leave the key out where the text needs none")
        names = self._form(filled or renamed)
        if not names:
            keys = show(", ".join(filled or value))[1:-1] or "none"
            raise RowProblem(f"keys {keys}, {self._expected(filled)}")
        row = self._row(filled, names)
        if self._is_labeled(row, filled):
            row, names = _labeled(row, filled), (*names, LABEL)
        if isinstance(task := filled.get("task"), str):
            row, names = replace(row, task=task), (*names, "task")
        beside = () if isinstance(row, TextRow) else (*BESIDE, *(["input"] if "instruction" in names else []))
        self.unread.update(filled.keys() - {*names, *beside})
        if beside and not self.filled and any(drops_nulls(filled, key) for key in names):
            self.unread[NULLS] += 1
        return row

    def _renamed(self, value: Mapping[str, object]) -> Mapping[str, object]:
        there = {ours: theirs for ours, theirs in self.columns.items() if theirs in value}
        self.present.update(there)
        others = {key: item for key, item in value.items() if key not in there.values()}
        return others | {ours: value[theirs] for ours, theirs in there.items()}

    def _form(self, value: Mapping[str, object]) -> tuple[str, ...]:
        """The keys of the form that ``value`` has: whole before partly, mapped by ``columns`` before the others."""
        preference = any(name in value for name in SIDES)
        preferred = PREFERENCES if preference else ()
        known = {None: (*BY_RANK, *PREFERENCES), "dpo": preferred}.get(self.objective, BY_RANK)
        whole = [names for names in known if all(name in value for name in names)]
        if self.objective not in (None, "dpo") and preference and not whole:
            return ()
        partly = [names for names in known if any(name in value for name in names)]
        ranked = sorted(whole or partly, key=lambda names: not any(name in self.columns for name in names))
        return ranked[0] if ranked else ()

    def _expected(self, value: Mapping[str, object]) -> str:
        if self.objective == "kto":
            return "expected prompt + completion + label (train.objective: kto)"
        if self.objective == "dpo":
            return f"expected prompt + chosen + rejected (train.objective: {self.objective})"
        if all(name in value for name in SIDES):
            return (
                "which is a preference: set train.objective: dpo, or train the chosen answers "
                "(data.columns: {completion: chosen})"
            )
        return "expected messages, prompt + completion, or text"

    def _row(self, value: Mapping[str, object], names: tuple[str, ...]) -> Row:
        if names == ("text",):
            return TextRow(_filled(value, "text"))
        if names in PREFERENCES:
            return self._preference(value)
        if len(names) == 1:
            return _chat(value, self._turns(names[0], value.get(names[0])), names[0])
        first, second = names
        if isinstance(value.get(first), list) or isinstance(value.get(second), list):
            return _chat(value, self._of_two(value, first, second), second)
        row = CompletionRow(_prompt(value, first), _filled(value, second))
        return _chat(value, turns(row), second) if any(value.get(key) for key in BESIDE) else row

    def _is_labeled(self, row: Row, value: Mapping[str, object]) -> bool:
        """Whether the row is read with its label: to be trained by it, or as it was written by a run that was."""
        if self.objective == "kto":
            return True
        if self.objective is not None or not isinstance(value.get(LABEL), bool):
            return False
        ends = isinstance(row, ChatRow) and len(row.messages) > 1 and row.messages[-1]["role"] == "assistant"
        return ends or isinstance(row, CompletionRow)

    def _preference(self, value: Mapping[str, object]) -> PreferenceRow:
        """Of texts, or of conversations where anything else stands in the row."""
        plain = all(isinstance(value.get(key), str) for key in ("prompt", *SIDES))
        if plain and not any(value.get(key) for key in BESIDE):
            prompt = _filled(value, "prompt")
            chosen, rejected = (CompletionRow(prompt, _filled(value, side)) for side in SIDES)
            row = PreferenceRow(chosen, rejected)
        else:
            answers = [self._side(value, side) for side in SIDES]
            one, other = both_conversations(self._before(value), *answers)
            row = PreferenceRow(_chat(value, one, SIDES[0]), _chat(value, other, SIDES[1]))
        if row.chosen == row.rejected:
            raise RowProblem("chosen and rejected are the same")
        return row

    def _before(self, value: Mapping[str, object]) -> list[Message] | None:
        prompt = value.get("prompt")
        if prompt is None:
            return None
        return self._turns("prompt", prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])

    def _side(self, value: Mapping[str, object], side: str) -> list[Message]:
        answer = value.get(side)
        turns = answer if isinstance(answer, list) else [{"role": "assistant", "content": _filled(value, side)}]
        return self._turns(side, turns)

    def _turns(self, key: str, value: object) -> list[Message]:
        return read_messages(key, value, self.columns)

    def _of_two(self, value: Mapping[str, object], first: str, second: str) -> list[Message]:
        """Turns before, of which none is learned, and those of the answer. Either may be a plain text."""
        before, after = value.get(first), value.get(second)
        prompt = self._turns(first, before if isinstance(before, list) else [{"role": "user", "content": before}])
        answer = self._turns(second, after if isinstance(after, list) else [{"role": "assistant", "content": after}])
        if not learned(answer):
            raise RowProblem(f"{second} has no assistant turn to learn from")
        return [*(without_loss(message) for message in prompt), *answer]


def _labeled(row: Row, value: Mapping[str, object]) -> LabeledRow:
    """With its label; of a conversation the last answer has it, and no other is learned."""
    label = value.get(LABEL)
    if str(label).lower() not in LABELS:
        raise RowProblem(f"{LABEL} is {show(label)}, expected true or false")
    answer = answered(row)
    if isinstance(answer, TextRow):
        raise RowProblem("text has no prompt, expected prompt + completion + label (train.objective: kto)")
    if isinstance(answer, ChatRow):
        *before, last = answer.messages
        if last["role"] != "assistant" or not before:
            raise RowProblem("the conversation does not end with the answer that has the label")
        answer = replace(answer, messages=[*(without_loss(message) for message in before), last])
    return LabeledRow(answer, LABELS[str(label).lower()])


def both_conversations(
    prompt: list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message]]:
    """Both as whole conversations, of which the last turn is learned; RowProblem where that is not all they differ in.

    ``prompt`` stands before both, or they begin with it already.
    """
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    if prompt is None or same:
        prompt, before = prompt or chosen[:same], chosen[:same]
        if not before:
            raise RowProblem("no prompt, and chosen and rejected do not begin alike")
        if before[-len(prompt) :] != prompt:
            raise RowProblem("chosen and rejected begin with other turns than prompt")
        prompt, chosen, rejected = before, chosen[same:], rejected[same:]
    for side, answer in zip(SIDES, (chosen, rejected), strict=True):
        if [turn["role"] for turn in answer] != ["assistant"]:
            roles = ", ".join(turn["role"] for turn in answer)
            raise RowProblem(f"{side} has the turns {roles} after the prompt, expected one of the assistant")
    if prompt[-1]["role"] == "assistant":
        raise RowProblem("the prompt ends with a turn of the assistant, expected one that is answered")
    before = [without_loss(message) for message in prompt]
    return [*before, *chosen], [*before, *rejected]


def as_conversation(row: CompletionRow) -> ChatRow:
    """The prompt as the user's turn, the completion as the answer."""
    return ChatRow(turns(row), task=row.task, source=row.source)


def turns(row: CompletionRow) -> list[Message]:
    """The two turns of a prompt and its completion."""
    return [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]


def without_loss(message: Message) -> Message:
    """A turn that is there to be read."""
    return {**message, "weight": 0} if message["role"] == "assistant" else message


def _chat(value: Mapping[str, object], messages: list[Message], key: str) -> ChatRow:
    system = value.get("system")
    if system:
        if not isinstance(system, str):
            raise RowProblem(f"system is {show(system)}, expected text")
        if messages[0]["role"] == "system":
            raise RowProblem("system, and a system turn in the conversation: expected one of the two")
        messages = [{"role": "system", "content": system}, *messages]
    if not learned(messages):
        raise RowProblem(f"{key} has no assistant turn to learn from")
    tools = read_tools(value["tools"]) if value.get("tools") else None
    return ChatRow(messages, tools, read_template_arguments(value.get("chat_template_kwargs") or {}))


def _prompt(value: Mapping[str, object], key: str) -> str:
    """The prompt; alpaca's ``input`` stands under its instruction."""
    prompt, more = value.get(key), value.get("input") if key == "instruction" else None
    for name, text in ((key, prompt), ("input", more or "")):
        if not isinstance(text, str):
            raise RowProblem(f"{name} is {show(text)}, expected text")
    return f"{prompt}\n{more}" if more else str(prompt)


def _filled(value: Mapping[str, object], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or (not text and key == "text"):
        raise RowProblem(f"{key} is {show(text)}, expected text")
    if not text:
        raise RowProblem(f"{key} is empty")
    return text
