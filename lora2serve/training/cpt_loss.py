"""PEFT's CPT takes its loss from all logits; the trainer's head gives the same one without keeping them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import CPTConfig, PeftModel
    from torch import Tensor
    from transformers.utils import ModelOutput

LABEL = 4  # the type of a token that CPT takes a loss on, and its multiples; those of the text in front come before


def leave_loss_to_trainer() -> None:
    """Let CPT hand on what the head gave, for the labels that CPT chose: without decay the mean is the same."""
    from peft.tuners.cpt import CPTEmbedding

    CPTEmbedding.calculate_loss = staticmethod(_as_it_is)


def learn_every_label(model: PeftModel) -> None:
    """Let each label of a row count.

    CPT adds the largest type of the text in front to those of a row. Where that is no multiple of 4, as without
    ``cpt_tokens_type_mask``, no token of the row is a label then, and nothing is learned.
    """
    import torch

    forward = model._cpt_forward

    def with_types(
        input_ids: Tensor | None, inputs_embeds: Tensor | None, config: CPTConfig, *rest: object, **options: object
    ) -> ModelOutput:
        row = input_ids if input_ids is not None else inputs_embeds
        assert row is not None
        before = max(config.cpt_tokens_type_mask, default=0)
        types = torch.full(row.shape[:2], LABEL - before % LABEL, device=row.device)
        return forward(input_ids, inputs_embeds, config, *rest, **{"input_type_mask": types, **options})

    vars(model)["_cpt_forward"] = with_types


def _as_it_is(output: ModelOutput, *_: object) -> ModelOutput:
    return output
