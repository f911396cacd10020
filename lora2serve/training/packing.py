"""Whether rows that share a sequence see each other: asked of the model itself, before the first step.

Most models understand positions that begin again for a new row, some need to be given masks for each kind of attention.
What runs along a sequence (Mamba, linear attention, convolutions) sees a border only with kernels that may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from lora2serve.data.samples import Sample
from lora2serve.progress import Progress
from lora2serve.training.tiled_head import plain_model
from lora2serve.training.varlen_attention import apart, attend_apart, attend_together, can_attend

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

TOKENS = 48  # of each of the two rows: all their logits are looked at
ROUNDING = 1e-4  # of a log-probability in float32; between families that mix rows up, 0.005 was the least seen


def keep_apart(model: PreTrainedModel | PeftModel, rows: Sequence[Sample], progress: Progress) -> bool:
    """Whether ``rows`` may share a sequence; where the model needs masks for that, it makes them from now on.

    Two of the rows go through the model in one sequence and alone. The first row of a sequence cannot see the second,
    so what changes for it is rounding; where more changes for the second, it sees the first, or has wrong positions.
    """
    inner = plain_model(model)
    was_training = model.training
    model.eval()
    try:
        if _are_apart(inner, rows):
            return True
        masks = _mask_rows(inner)
        if _are_apart(inner, rows):
            return True
        masks.remove()
    finally:
        model.train(was_training)
    progress.warn(
        f"data.packing: rows that share a sequence would see each other in {type(inner).__name__}: they are not packed"
    )
    return False


def attend_by_document(model: PreTrainedModel | PeftModel, rows: Sequence[Sample]) -> bool:
    """Whether rows of one sequence attend by themselves, without a mask, and are what they are alone; then they do."""
    inner = plain_model(model)
    if not can_attend(inner):
        return False
    was_training = model.training
    model.eval()
    attend_apart(inner)
    try:
        if _are_apart(inner, rows):
            return True
    finally:
        model.train(was_training)
    attend_together(inner)
    return False


def _are_apart(model: PreTrainedModel, rows: Sequence[Sample]) -> bool:
    """Whether a row behind another one is what it is alone, but for the rounding that the one in front has, too."""
    import torch

    first, second = (row.input_ids[:TOKENS] for row in (rows[0], rows[-1]))
    alone = _log_probabilities(model, {"input_ids": torch.tensor([second])})
    try:
        behind = _log_probabilities(model, _in_one_sequence(first, second))[len(first) :]
        in_front = _log_probabilities(model, _in_one_sequence(second, first))[: len(second)]
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
        return False  # it does not take a sequence of several rows at all
    change, rounding = (float((each - alone).abs().max()) for each in (behind, in_front))
    return change <= 3 * rounding + ROUNDING


def _in_one_sequence(*rows: Sequence[int]) -> dict[str, object]:
    """What the trainer gives the model for rows that are packed."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    packed = {"input_ids": [token for row in rows for token in row], "seq_lengths": [len(row) for row in rows]}
    inputs: dict[str, object] = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([packed])
    del inputs["labels"]
    return inputs


def _log_probabilities(model: PreTrainedModel, inputs: Mapping[str, object]) -> Tensor:
    """(tokens, vocabulary) float32, by the way that the trainer goes, without scales and caps of the logits."""
    import torch

    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with torch.no_grad(), apart() if "cu_seq_lens_q" in moved else nullcontext():
        states = model.base_model(**moved, use_cache=False).last_hidden_state
        logits: Tensor = model.get_output_embeddings()(states)[0]
    return logits.float().log_softmax(-1)


def _mask_rows(model: PreTrainedModel) -> RemovableHandle:
    """Let ``model`` be given masks where positions begin again, by transformers' own rules for its kinds of layers."""
    import torch
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    create = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}

    def add_masks(
        module: Module, values: object, options: Mapping[str, Tensor | None]
    ) -> tuple[object, dict[str, object]]:
        ids, positions = options.get("input_ids"), options.get("position_ids")
        if ids is None or positions is None or options.get("attention_mask") is not None:
            return values, dict(options)
        embeddings = torch.empty(*ids.shape, 1, dtype=model.dtype, device=ids.device)  # its size and type are looked at
        masks = {
            kind: create[kind](config, embeddings, None, None, position_ids=positions) for kind in kinds & create.keys()
        }
        mask = masks if len(masks) > 1 else next(iter(masks.values()), None)
        return values, {**options, "attention_mask": mask}

    handle: RemovableHandle = model.base_model.register_forward_pre_hook(add_masks, with_kwargs=True)
    return handle
