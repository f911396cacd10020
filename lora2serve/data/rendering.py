"""How a row is written for the model: the one place for token ids and which of them are learned.

Training, parity and calibration all come here, so that what is compared is what was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lora2serve.data.chat_turns import LearnedTurn, learned_turns
from lora2serve.data.rows import ChatRow, CompletionRow, LabeledRow, Message, PreferenceRow, Row, TextRow, answered
from lora2serve.data.served_template import ChatTemplate
from lora2serve.data.template_losses import template_losses
from lora2serve.data.text_encoder import GrowingText, TextEncoder
from lora2serve.data.tokenizer import encode
from lora2serve.errors import DataError

IGNORE = -100  # the label that no loss looks at (torch.nn.CrossEntropyLoss)


@dataclass
class RenderedSample:
    """What the model is trained on at once; ``labels`` has ``IGNORE`` where no loss is taken.

    ``text`` is all of it, ``learned`` the texts that a loss is taken on, in order.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    learned: list[str] = field(default_factory=list)

    def add(self, turn: LearnedTurn, prompt: list[int], answer: list[int]) -> None:
        """A turn whose prompt begins with all that is here; ``prompt`` are the ids that it has beyond that."""
        self.text = turn.prompt + turn.answer
        self.labels += [IGNORE] * len(prompt) + answer
        self.ids += prompt + answer
        self.learned.append(turn.answer)


@dataclass(frozen=True)
class RenderedRow:
    """The samples of a row, and what the chat template leaves out of it."""

    samples: list[RenderedSample]
    losses: frozenset[str] = frozenset()


@dataclass
class Renderer:
    """Writes rows with one tokenizer and its chat template."""

    template: ChatTemplate
    encoder: TextEncoder = field(init=False)

    def __post_init__(self) -> None:
        self.encoder = TextEncoder(self.template.tokenizer)

    def render(self, row: Row, *, completion_only: bool = True) -> RenderedRow:
        """The samples of a row. With ``completion_only`` a loss is taken on the answers, or on the completion.

        A conversation gives one sample for each turn that is learned; turns that a server would see with the same ids
        before them share one. Without ``completion_only`` it is one sample, of which all is learned but answers of
        weight 0. Two answers to a prompt are two samples, the chosen one first.
        """
        if isinstance(row, PreferenceRow):
            sides = [self.render(side, completion_only=completion_only) for side in row.sides]
            return RenderedRow([sample for side in sides for sample in side.samples], sides[0].losses | sides[1].losses)
        if isinstance(row, LabeledRow):
            return self.render(row.answer, completion_only=completion_only)
        if isinstance(row, ChatRow):
            turns = list(learned_turns(row, self.template)) if completion_only else []
            losses = frozenset(template_losses(row, turns, self.template))
            return RenderedRow(self._samples(turns) if completion_only else [self._whole(row)], losses)
        if isinstance(row, TextRow):
            return RenderedRow([self._text(row.text)])
        return RenderedRow([self._completion(row, completion_only)])

    def _samples(self, turns: Sequence[LearnedTurn]) -> list[RenderedSample]:
        samples: list[RenderedSample] = []
        if turns:
            self.encoder.prepare(turns[-1].prompt + turns[-1].answer)
        text = GrowingText(self.encoder)
        for turn in turns:
            prompt = text.go_on(turn.prompt) if samples else None
            if prompt is None:
                samples.append(RenderedSample())
                prompt = text.begin(turn.prompt)
            samples[-1].add(turn, prompt, text.answer(turn.answer))
        return samples

    def _whole(self, row: ChatRow) -> RenderedSample:
        """All of a conversation is learned, but for the answers of weight 0."""
        chat = self.template.serve(row)
        text = chat.render()
        ids = self.encoder.encode(text)
        labels, learned, done = list(ids), list[str](), 0
        for number, message in enumerate(row.messages):
            if message.get("weight", 1):
                continue
            before = chat.beginning(number, generation_prompt=True) if number else ""
            after = chat.beginning(number + 1)
            first, last = (self.encoder.encode(part) for part in (before, after))
            if not text.startswith(after) or [first, last] != [ids[: len(first)], ids[: len(last)]]:
                raise DataError(
                    f"messages[{number}]: weight 0, and the chat template writes this answer otherwise later on: it "
                    "cannot be left out of a whole conversation", "leave data.completion_only out",
                )  # fmt: skip
            labels[len(first) : len(last)] = [IGNORE] * (len(last) - len(first))
            learned.append(text[done : len(before)])
            done = len(after)
        return RenderedSample(text, ids, labels, [part for part in (*learned, text[done:]) if part])

    def _text(self, text: str) -> RenderedSample:
        """With the tokens that the tokenizer puts around a text, unless it begins and ends with them already."""
        tokenizer = self.template.tokenizer
        bos = tokenizer.bos_token
        ids = encode(tokenizer, text, special=not (bos and text.startswith(bos)))
        ids += [] if self.template.ends.closes(text) else self._end
        return RenderedSample(text, ids, list(ids), [text])

    def _completion(self, row: CompletionRow, completion_only: bool) -> RenderedSample:
        """Prompt and completion apart, as a server has them."""
        prompt = encode(self.template.tokenizer, row.prompt)
        completion = [*self.encoder.alone(row.completion), *self._end]
        ignored = [IGNORE] * len(prompt) if completion_only else list(prompt)
        learned = row.completion if completion_only else row.prompt + row.completion
        return RenderedSample(row.prompt + row.completion, prompt + completion, ignored + completion, [learned])

    @property
    def _end(self) -> list[int]:
        end = self.template.tokenizer.eos_token_id
        return [] if end is None else [end]


def opening(row: Row) -> Sequence[Message] | str:
    """What a user would send: a conversation without its last answer, a prompt, or the first half of a text."""
    row = answered(row)
    if isinstance(row, ChatRow):
        messages = list(row.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return messages
    return row.prompt if isinstance(row, CompletionRow) else row.text[: max(1, len(row.text) // 2)]
