"""``train.samples``: the prompts of a recipe as the model is asked them; no library of the training is loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora2serve.data.rows import ChatRow, Row, answered
from lora2serve.data.served_template import ChatTemplate
from lora2serve.data.tokenizer import encode
from lora2serve.errors import TrainError, first_line


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt of the recipe, and the ids that the model is fed."""

    text: str
    ids: Sequence[int]


def sample_prompts(texts: Sequence[str], rows: Sequence[Row], template: ChatTemplate) -> list[SamplePrompt]:
    """As ``rows`` are trained: opening turns of the user where there are conversations, else as they stand.

    TrainError for one that the chat template refuses.
    """
    tokenizer = template.tokenizer
    if not any(isinstance(answered(row), ChatRow) for row in rows):
        return [SamplePrompt(text, encode(tokenizer, text)) for text in texts]
    prompts = []
    for number, text in enumerate(texts):
        chat = template.serve(ChatRow([{"role": "user", "content": text}]))
        try:
            rendered = chat.render(generation_prompt=True)
        except Exception as error:  # a template raises what it likes
            raise TrainError(f"train.samples[{number}]: the chat template refuses it: {first_line(error)}") from error
        prompts.append(SamplePrompt(text, encode(tokenizer, rendered, special=False)))
    return prompts
