"""The loss of each token by a model's own forward, without the logits of all of them at once.

What comes before the head runs once. The rest of the forward, whatever it does to the logits (a bias, a scale, a cap),
then runs on a few of its states at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora2serve.data.rendering import IGNORE

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

TILE = 1 << 24  # logits at once: 110 tokens of a vocabulary of 152k, 64 MiB in float32


def token_losses(model: PreTrainedModel | PeftModel, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """(N,) float32 negative log-likelihoods in nats of the N labeled tokens, row after row.

    ids, mask, labels: (rows, length), padded on the right, on the model's device. The first label of a row has nothing
        before it to be predicted from, and does not count.
    """
    import torch

    from lora2serve.training.base_parts import head_gathered

    inner = plain_model(model)
    config = inner.config.get_text_config()
    # the loss of routers is no part of it
    options = {"output_router_logits": False} if hasattr(config, "output_router_logits") else {}
    labeled = labels[:, 1:] != IGNORE
    targets = labels[:, 1:][labeled]
    losses = [torch.empty(0, device=ids.device)]
    with torch.no_grad(), head_gathered(inner), _states_before_head(inner) as states:
        model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
        hidden = states.whole[:, -ids.shape[1] :][:, :-1][labeled]  # without a soft prompt's, which come before
        count = max(1, TILE // config.vocab_size)
        for start in range(0, len(targets), count):
            states.tile = hidden[None, start : start + count]
            logits = model(input_ids=ids[:1, :1], use_cache=False, **options).logits[0]
            wanted = targets[start : start + count]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none"))
    return torch.cat(losses)


def plain_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model itself, with the layers of an adapter in it."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


class _States:
    """What a model hands to its head: kept on the first call, and then a tile of it instead."""

    whole: Tensor  # (rows, length, width)
    tile: Tensor | None = None  # (1, N, width)

    def __init__(self) -> None:
        self._kind: type[ModelOutput]
        self._inside = False

    def instead_of(self, own: Callable[..., ModelOutput]) -> Callable[..., ModelOutput]:
        """The forward of a module, which on the first call gives the states of first tokens alone, and then tiles."""

        def forward(*values: object, **options: object) -> ModelOutput:
            if self._inside:
                return own(*values, **options)
            if self.tile is not None:
                return self._kind(last_hidden_state=self.tile)
            self._inside = True
            try:
                output = own(*values, **options)
            finally:
                self._inside = False
            self.whole, self._kind = output.last_hidden_state, type(output)
            return self._kind(last_hidden_state=self.whole[:, :1])

        return forward


@contextmanager
def _states_before_head(model: PreTrainedModel) -> Iterator[_States]:
    """Between the head and what comes before it, for a forward of the whole and those of its tiles.

    OPT and its like do not call their body, but the decoder inside: whichever is called first is all before the head.
    """
    states = _States()
    modules = list({id(module): module for module in (model.base_model, model.get_decoder())}.values())
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = states.instead_of(module.forward)
    try:
        yield states
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
