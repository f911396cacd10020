"""PEFT's CPT takes its loss from all logits; the trainer's head gives the same one without keeping them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers.utils import ModelOutput


def leave_loss_to_trainer() -> None:
    """Let CPT hand on what the head gave, for the labels that CPT chose: without decay the mean is the same."""
    from peft.tuners.cpt import CPTEmbedding

    CPTEmbedding.calculate_loss = staticmethod(_as_it_is)


def _as_it_is(output: ModelOutput, *_: object) -> ModelOutput:
    return output
