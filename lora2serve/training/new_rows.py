"""The rows of new tokens in embedding and head: the base gets those that it lacks, and PEFT trains them alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from lora2serve.data.new_tokens import KEY, NewTokens
from lora2serve.errors import TrainError
from lora2serve.training.lora_targets import suffixes

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel


def grow(model: PreTrainedModel, rows: int) -> None:
    """Let embedding and head have at least so many rows; those that they lack are the mean of the others.

    TrainError for a model whose tables do not grow together.
    """
    tables = _tables(model)
    before = tables[0].shape[0]
    if rows <= before:
        return
    if problem := _why_not(model, before):
        raise TrainError(f"{KEY}: {type(model).__name__} {problem}", "name tokens that the base has, or leave it out")
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for table in _tables(model):
            table[before:] = table[:before].mean(0, dtype=torch.float32).to(table.dtype)


def refuse_common_base(tokens: NewTokens, *, shared: bool, sharded: bool) -> None:
    """TrainError where the base that would grow is not this training's alone."""
    if tokens.ids and shared:
        raise TrainError(f"{KEY}: rows are added to the base, and others train on it", "leave --share-base out")
    if tokens.ids and sharded:
        raise TrainError(f"{KEY}: rows are added to the base, and each process has a part", "set train.parallel: ddp")


def _why_not(model: PreTrainedModel, rows: int) -> str:
    """Why no rows can be added; empty where they can."""
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if head is None or head.weight.shape[0] != rows:
        return "has a head of other tokens than its embedding"
    others = [name for name, item in model.named_modules() if _is_table(item, rows) and item is not embedding]
    return f"has another embedding of all tokens, {others[0]}" if others else ""


def _is_table(module: Module, rows: int) -> bool:
    return isinstance(module, torch.nn.Embedding) and module.num_embeddings == rows


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """The weights of the embedding and of the head, one where they are tied: (rows, width)."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return list({id(module.weight): module.weight for module in modules if module is not None}.values())


def trained_rows(model: PreTrainedModel, ids: Sequence[int], targets: Sequence[str]) -> dict[str, list[int]]:
    """PEFT's ``trainable_token_indices`` for the embedding, and for the head where it is not tied to it.

    targets: modules that the recipe adapts or trains in full. TrainError where one is such a table, and for a head that
    PEFT computes without its bias.
    """
    head = model.get_output_embeddings()
    modules = [model.get_input_embeddings()] + ([head] if head is not None and len(_tables(model)) > 1 else [])
    names = dict(model.named_modules())
    paths = [next(name for name, module in names.items() if module is table) for table in modules]
    if getattr(head, "bias", None) is not None:
        raise TrainError(
            f"{KEY}: the head of {type(model).__name__} has a bias, beside which PEFT trains no rows", "leave it out"
        )
    for path in [name for name, module in names.items() if module in (model.get_input_embeddings(), head)]:
        if clash := [name for name in targets if path == name or path.endswith(f".{name}")]:
            raise TrainError(f"{KEY}: rows of {clash[0]}, and train.lora adapts all of it", "leave one of them out")
    return {suffixes([path], list(names))[0]: list(ids) for path in paths}


def start_rows(model: PeftModel, tokens: NewTokens) -> None:
    """Let rows that were added start as the mean of all, whatever the base's padding has there.

    From here on PEFT saves the rows alone, where it would save a table that has grown whole. TrainError where it does
    not tie the rows of embedding and head as the base does.
    """
    from peft.utils.other import TrainableTokensWrapper

    inner = model.get_base_model()
    head = inner.get_output_embeddings()
    for table in (inner.get_input_embeddings(), head):
        if not isinstance(table, TrainableTokensWrapper):
            raise TrainError(f"{KEY}: {type(inner).__name__}: its config does not say that head and embedding are tied")
        adapter = table.token_adapter
        if adapter.tied_adapter is None:
            base, values = adapter.base_layer.weight, adapter.trainable_tokens_delta["default"]
            own = base[list(tokens.ids)].sum(0, dtype=torch.float32)
            mean = (base.sum(0, dtype=torch.float32) - own) / (base.shape[0] - len(tokens.ids))
            values.data[tokens.known :] = mean.to(values.dtype)
    head.register_parameter("bias", None)  # TRL's head asks for it
    vars(model)["save_pretrained"] = partial(model.save_pretrained, save_embedding_layers=False)
