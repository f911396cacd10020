"""Attention of documents that share one row, each by itself: no mask, and no work for pairs that do not see each other.

On a GPU by ``torch.nn.attention.varlen`` (FlashAttention, 16 bits, compute capability 8 and above), elsewhere by SDPA
of one document after the other. The borders come from TRL's collator (``cu_seq_lens_q``); a batch without them, in an
evaluation or while answering, goes transformers' own way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "varlen"  # among transformers' implementations of attention
KINDS = {"full_attention", "sliding_attention"}  # of layers
WIDEST = 256  # head of FlashAttention
_APART: ContextVar[bool] = ContextVar("apart", default=False)


def can_attend(model: PreTrainedModel) -> bool:
    """Whether the attention of ``model`` is nothing but SDPA of causal layers, with or without a window."""
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    drops = [getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop", "attn_dropout")]
    return (
        config._attn_implementation == "sdpa"
        and bool(getattr(model, "_supports_flash_attn", False))
        and model._can_set_attn_implementation()
        and kinds <= KINDS
        and not any(drops)
        and not getattr(config, "attention_chunk_size", None)
        and (device.type != "cuda" or _has_kernel(config.head_dim if hasattr(config, "head_dim") else 0))
    )


def _has_kernel(head: int | None) -> bool:
    if torch.cuda.get_device_capability()[0] < 8 or (head or 0) > WIDEST:
        return False
    try:
        from torch.nn.attention import varlen
    except ImportError:  # before torch 2.10
        return False
    return hasattr(varlen, "varlen_attn")


def attend_apart(model: PreTrainedModel) -> None:
    """Let ``model`` attend so from now on."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)


def attend_together(model: PreTrainedModel) -> None:
    """Take that back."""
    model.set_attn_implementation("sdpa")


@contextmanager
def apart() -> Iterator[None]:
    """While it lasts, rows with borders get no mask; in an evaluation or an answer each gets its own, as ever."""
    before = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(before)


def _mask(*values: object, **options: object) -> Tensor | None:
    mask: Tensor | None = None if _APART.get() else sdpa_mask(*values, **options)
    return mask


def varlen_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, **options: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """(1, tokens, heads, size) of query (1, heads, tokens, size), key and value (1, groups, tokens, size).

    cu_seq_lens_q: (documents + 1,) int32, where each begins, and the end of the last.
    sliding_window: how many tokens one sees, itself among them.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **options
        )
        return output
    if query.is_cuda:
        assert max_length_q is not None
        states = _by_kernel(query[0], key[0], value[0], cu_seq_lens_q, max_length_q, scaling, sliding_window)
    else:
        states = _one_by_one(query, key, value, cu_seq_lens_q, scaling, sliding_window)
    return states[None], None


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    sixteen = torch.get_autocast_dtype("cuda") if query.dtype == torch.float32 else query.dtype
    query, key, value = (states.transpose(0, 1).to(sixteen) for states in (query, key, value))
    left = -1 if window is None else window - 1
    output = varlen_attn(
        query, key, value, borders, borders, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=True
    )
    assert isinstance(output, Tensor)
    return output


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    places = borders.tolist()
    outputs = []
    for start, end in pairwise(places):
        mask = None
        if window is not None and end - start > window:
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
            mask = (distance >= 0) & (distance < window)
        states, keys, values = (each[:, :, start:end] for each in (query, key, value))
        shared = query.shape[1] != key.shape[1]
        outputs.append(
            scaled_dot_product_attention(
                states, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=shared
            )
        )
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)
