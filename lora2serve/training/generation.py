"""Answers of a model in transformers, as it is served: its own settings, its end tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from lora2serve.data.end_tokens import find_answer_end
from lora2serve.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

Likeliest = list[list[tuple[int, float]]]


def greedy(
    model: PreTrainedModel | PeftModel, tokenizer: Tokenizer, ids: Sequence[int], new_tokens: int, stop: Sequence[int],
    top: int = 0,
) -> tuple[list[int], Likeliest]:  # fmt: skip
    """The likeliest continuation up to a stop token, as the model's own generation config has it but for chance.

    Penalties, forced and suppressed tokens, stop strings and a smaller length are its own. With it, for each step (the
    stop's too), the ``top`` likeliest tokens and by how many nats each is less likely than the first.
    """
    options = {"do_sample": False, "output_scores": top > 0, "return_dict_in_generate": True}
    out = model.generate(**_prompt(model, tokenizer, ids, new_tokens, stop), **options)
    tokens = out.sequences[0, len(ids) :].tolist()
    steps: Likeliest = []
    for scores in out.scores if top else ():
        values, names = scores[0].float().topk(min(top, scores.shape[-1]))
        steps.append([(int(name), float(gap)) for name, gap in zip(names, values[0] - values, strict=True)])
    return tokens[:-1] if tokens and tokens[-1] in stop else tokens, steps


def stream(
    model: PreTrainedModel | PeftModel, tokenizer: Tokenizer, ids: Sequence[int], new_tokens: int, stop: Sequence[int],
    temperature: float | None, each: Callable[[int], None],
) -> None:  # fmt: skip
    """``each`` gets one new token after the other, a stop token too; what it raises ends the answer.

    ``temperature`` 0 takes the likeliest; None leaves it to the model's own generation config, as all else is.
    """
    chance = {} if temperature is None else {"do_sample": temperature > 0, "temperature": temperature or None}
    prompt = {**_prompt(model, tokenizer, ids, new_tokens, stop), "max_new_tokens": new_tokens}
    model.generate(**prompt, **chance, streamer=_NewTokens(each))


class _NewTokens:
    """A streamer of transformers, which gives the prompt first."""

    def __init__(self, each: Callable[[int], None]) -> None:
        self._each, self._seen_prompt = each, False

    def put(self, value: Tensor) -> None:
        """The next token, of shape (1,), or the prompt's."""
        if self._seen_prompt:
            self._each(int(value.item()))
        self._seen_prompt = True

    def end(self) -> None:
        """Nothing is held back."""


def _prompt(
    model: PreTrainedModel | PeftModel, tokenizer: Tokenizer, ids: Sequence[int], new_tokens: int, stop: Sequence[int]
) -> dict[str, object]:
    """What ``generate`` is given for every answer to one prompt."""
    import torch

    own = model.generation_config
    inputs = torch.tensor([list(ids)], device=model.device)
    return {
        "input_ids": inputs,
        "attention_mask": torch.ones_like(inputs),
        "num_beams": 1,
        "max_new_tokens": min(own.max_new_tokens or new_tokens, new_tokens),
        "eos_token_id": list(stop) or None,
        "pad_token_id": stop[0] if stop else 0,
        "tokenizer": tokenizer if own.stop_strings else None,
        "use_cache": True,
    }


def stop_ids(model: PreTrainedModel | PeftModel, tokenizer: Tokenizer) -> list[int]:
    """The end tokens of the generation config and of the tokenizer, and the one that closes an answer."""
    named = model.generation_config.eos_token_id
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id, _closing_id(tokenizer)}
    return sorted(cast("int", token) for token in ids if token is not None)


def _closing_id(tokenizer: Tokenizer) -> int | None:
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    if not tokenizer.chat_template or not added:
        return None
    end = find_answer_end(lambda messages: tokenizer.apply_chat_template(messages, tokenize=False), added)
    return added[end] if end else None
