"""The turns of a conversation that are learned, each as it is served: the prompt that a server sends, and the answer.

A prompt is the conversation so far with the template's opening of an answer. The answer is what the template writes
after it once the assistant has spoken. Some templates write history otherwise than they open an answer (a thought that
is opened for the model and left out of what was said); there the opening wins, and the answer is put behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lora2serve.data.rows import ChatRow, Message
from lora2serve.data.served_template import STAND_IN, ChatTemplate, ServedChat, as_served, thought_of, without_thought
from lora2serve.errors import DataError

THOUGHT_MARKS = (  # what opens a thought and what ends it, of templates that do not write thoughts in history
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)


@dataclass(frozen=True)
class LearnedTurn:
    """``answer`` is learned after ``prompt``, up to and with the token that ends it; ``number`` is the message's."""

    number: int
    prompt: str
    answer: str


def learned_turns(row: ChatRow, template: ChatTemplate) -> Iterator[LearnedTurn]:
    """Every turn of the assistant, apart from those of weight 0."""
    chat = template.serve(row)
    for number, message in enumerate(row.messages):
        if message["role"] == "assistant" and message.get("weight", 1):
            yield _Turn(row, chat, number).learned()


@dataclass(frozen=True)
class _Turn:
    """One turn of a conversation."""

    row: ChatRow
    chat: ServedChat
    number: int

    def learned(self) -> LearnedTurn:
        """The prompt and the answer; DataError where the template does not write the answer at all."""
        prompt, whole = self._prompt(), self.chat.beginning(self.number + 1)
        if whole.startswith(prompt):
            answer = self._closed(prompt, whole[len(prompt) :])
        else:
            answer = self._after_a_thought(prompt) or self._behind_opening(prompt)
        return LearnedTurn(self.number, prompt, self._ended(prompt, answer))

    @property
    def _message(self) -> Message:
        return self.row.messages[self.number]

    def _prompt(self) -> str:
        """What a server sends. Templates that want a user first have no prompt for an assistant who speaks first."""
        try:
            return self.chat.beginning(self.number, generation_prompt=True)
        except Exception:
            if self.number:
                raise
            return self._header()

    def _written(self, message: Message) -> str:
        """The conversation up to this turn, with that message in its place."""
        return self.chat.render([*self.chat.messages[: self.number], as_served(message)])

    def _header(self) -> str:
        """All that the template writes before the words of an answer here."""
        one, other = (
            self._written({"role": "assistant", "content": text}) for text in (f"A{STAND_IN}", f"B{STAND_IN}")
        )
        return one[: _common(one, other)]

    def _closed(self, prompt: str, answer: str) -> str:
        """With the thought ended that the prompt opens, where the template leaves that to the model."""
        end = _end_of_thought(prompt)
        return f"{thought_of(self._message)}{end}{answer}" if end and end.strip() not in answer else answer

    def _ended(self, prompt: str, answer: str) -> str:
        """Up to and with its end: the one that is written when the conversation goes on, where there is none yet."""
        ends = self.chat.template.ends
        if ends.place(answer) >= 0:
            return ends.cut(answer)
        if not ends.texts:
            raise DataError(
                "the chat template writes no end of an answer, and neither tokenizer nor generation config names one",
                "set eos_token_id in the base's generation_config.json",
            )
        try:
            further = self.chat.render([*self.chat.messages[: self.number + 1], as_served(self._next_message())])
        except Exception:  # a template raises what it likes: of a turn that is not in the data, too
            return answer + ends.texts[0]
        going_on = further[len(prompt + answer) :] if further.startswith(prompt + answer) else ""
        return answer + (ends.leading(going_on) or ends.texts[0])

    def _next_message(self) -> Message:
        """What stands behind this turn, or might."""
        if self.number + 1 < len(self.row.messages):
            return self.row.messages[self.number + 1]
        return {"role": "tool" if self._message.get("tool_calls") else "user", "content": STAND_IN}

    def _after_a_thought(self, prompt: str) -> str:
        """The answer behind an opened thought, by a template that writes thoughts; empty by one that does not."""
        thought, message = split_thought(self._message)
        written = self._written({**message, "reasoning_content": STAND_IN})
        opening = prompt + STAND_IN
        return thought + written[len(opening) :] if written.startswith(opening) else ""

    def _behind_opening(self, prompt: str) -> str:
        """The answer without what the template writes before it in place of the opening that is served."""
        thought, message = split_thought(self._message)
        written, header = self._written(message), self._header()
        start = _common(written, header)
        served, history = _parting(prompt, header, str(self.row.messages[self.number - 1].get("content") or ""))
        end = _end_of_thought(prompt)
        if start < history:  # a call, say, of a template that opens a thought before words only
            start = _tag_start(prompt, written, _common(prompt, written))
            if not end or prompt[start:].strip() not in (opened for opened, _ in THOUGHT_MARKS):
                raise DataError(
                    f"messages[{self.number}]: the chat template writes this answer in another place",
                    "train with data.completion_only: false, or use prompt + completion rows",
                )
        if end:
            return f"{thought}{end}{written[start:]}"
        left = written[history:]  # some of which may stand at the end of the prompt already
        double = next((n for n in range(start - history, 0, -1) if served.endswith(left[:n])), 0)
        return left[double:]


def _parting(prompt: str, header: str, last: str) -> tuple[str, int]:
    """Where the opening that is served parts from ``header``, the one in history: the rest of the first, and the place
    in the second. Where history itself differs, the opening is what follows the ``last`` message.
    """
    same = _tag_start(prompt, header, _common(prompt, header))
    if header.endswith(prompt[same:]):
        return "", len(header)
    if not last.strip() or last.strip() not in prompt[same:]:
        return prompt[same:], same
    opening = prompt[prompt.rindex(last.strip()) + len(last.strip()) :]
    for length in range(len(opening), 0, -1):
        place = header.rfind(opening[:length])
        if place >= 0:
            cut = _tag_start(opening, header[place:], length)
            return opening[cut:], place + cut
    return opening, len(header)


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def _tag_start(one: str, other: str, place: int) -> int:
    """``place``, or where the tag begins that it stands inside of, such as ``<think>`` beside ``</think>``."""
    if place >= min(len(one), len(other)):
        return place
    for opened, ended in ("<>", "[]"):
        start = one.rfind(opened, 0, place)
        if start >= 0 and ended not in one[start:place] and ended in one[place:]:
            return start
    return place


def _end_of_thought(prompt: str) -> str:
    """What ends the thought that a prompt leaves open; empty where it opens none."""
    words = prompt.rstrip()
    for opened, ended in THOUGHT_MARKS:
        if words.endswith(opened):
            lines = prompt.endswith("\n")
            return f"\n{ended}\n\n" if lines else ended
    return ""


def split_thought(message: Message) -> tuple[str, Message]:
    """The thoughts of a turn, beside its content or at the start of it, and the turn without them."""
    plain, content = without_thought(message), message.get("content") or ""
    for opened, ended in THOUGHT_MARKS:
        before, mark, after = content.partition(ended)
        if mark:
            inside = before.strip().removeprefix(opened).strip("\n")
            return inside, {**plain, "content": after.lstrip("\n")}
    return thought_of(message), plain
