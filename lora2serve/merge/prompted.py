"""A model with a soft prompt as tokens of its vocabulary: each learned vector is a row behind those of the embedding.

Put in front of a prompt they give what PEFT computes, to the last bit: PEFT puts the vectors themselves there. The head
gets a row for each, too, since engines have one size for both: the mean of its rows. A token's logit is then the mean
of all, and its probability at most that of a token among V, mostly far less: a row of zeros would have the highest
logit where all others are negative. Embedding and head are no longer tied, where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lora2serve.adapters.deltas import Delta
from lora2serve.adapters.meta_model import meta_model
from lora2serve.adapters.soft_prompt import SoftPrompt
from lora2serve.errors import MergeError
from lora2serve.merge.layout import HEAD, untied
from lora2serve.merge.merged import Merged
from lora2serve.merge.survival import Survival
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import ALL, Block, TensorSpec, row_blocks

if TYPE_CHECKING:
    from torch import Tensor

# Whose engines take the head from the embedding, whatever the config says (vLLM 0.32: gemma2.py, commandr.py).
HEAD_IS_EMBEDDING = ("gemma2", "cohere", "cohere2")
NEVER = -1e4  # of a head's bias, where it has one: no probability is left


@dataclass(frozen=True)
class _Table:
    """A tensor with a row for each token: those of ``start``, then those of the soft prompt."""

    spec: TensorSpec
    start: str
    added: Callable[[], Tensor]


class Prompted:
    """``model``, which nothing else was folded into, with a soft prompt: a model source as ``Merged`` is."""

    def __init__(self, model: Merged, prompt: SoftPrompt) -> None:
        self._model, self._prompt = model, prompt
        if model.config.get("model_type") in HEAD_IS_EMBEDDING:
            raise MergeError(
                f"{model.config['model_type']} has no head of its own in vLLM and llama.cpp, which a soft prompt needs",
                "serve the adapter by `lora2serve serve --engine peft`",
            )
        embedding, head, self._scale = _tables_of(model)
        width = embedding.shape[-1]
        if prompt.vectors.shape[-1] != width:
            raise MergeError(
                f"the soft prompt is for a model of width {prompt.vectors.shape[-1]}, the base has {width}",
                "name its base with --base",
            )
        self.first = embedding.rows  # the id of its first token
        self._head = head.name if head else embedding.name
        self._tables = {embedding.name: _Table(self._grown(embedding), embedding.name, self._vectors)}
        head_name = head.name if head else HEAD
        self._tables[head_name] = _Table(self._grown(head or embedding, head_name), self._head, self._mean)
        bias = next((spec for spec in model.specs() if spec.name == f"{head_name.removesuffix('weight')}bias"), None)
        if bias:
            self._tables[bias.name] = _Table(self._grown(bias), bias.name, self._never)
        self._refuse_others(embedding)
        self.config: JsonObject = _with_vocabulary(untied(model.config), self.first + prompt.count)

    @property
    def survival(self) -> Survival:
        return self._model.survival

    def specs(self) -> Sequence[TensorSpec]:
        specs = {spec.name: spec for spec in self._model.specs()}
        return list((specs | {name: table.spec for name, table in self._tables.items()}).values())

    def changed(self) -> list[str]:
        return list(self._tables)

    def deltas(self, name: str) -> Sequence[Delta]:
        """None: rows are added, and no weight is changed."""
        return ()

    def tensor_of(self, parameter: str) -> str | None:
        return parameter if parameter in self._tables else self._model.tensor_of(parameter)

    def module_in_base(self, module: str) -> str:
        return self._model.module_in_base(module)

    def before(self, name: str, rows: slice = ALL) -> Block:
        """The base's rows; zeros where it has none."""
        table = self._tables.get(name)
        if table is None:
            return self._model.before(name, rows)
        return self._rows(table, rows, self._model.before, lambda: table.added() * 0)

    def read(self, name: str, rows: slice = ALL) -> Block:
        table = self._tables.get(name)
        if table is None:
            return self._model.read(name, rows)
        return self._rows(table, rows, self._model.read, table.added)

    def _rows(
        self, table: _Table, rows: slice, read: Callable[[str, slice], Block], added: Callable[[], Tensor]
    ) -> Block:  # fmt: skip
        import torch

        start, stop, _ = rows.indices(table.spec.rows)
        if stop <= self.first:
            return read(table.start, slice(start, stop))
        behind = added()[max(0, start - self.first) : stop - self.first]
        if start >= self.first:
            return Block(behind.contiguous())
        return Block(torch.cat([read(table.start, slice(start, self.first)).values.float(), behind]))

    def _grown(self, spec: TensorSpec, name: str = "") -> TensorSpec:
        shape = (self.first + self._prompt.count, *spec.shape[1:])
        return TensorSpec(name or spec.name, shape, spec.dtype, spec.whole)

    def _vectors(self) -> Tensor:
        return self._prompt.read() / self._scale

    def _mean(self) -> Tensor:
        return self._mean_row.expand(self._prompt.count, -1)

    @cached_property
    def _mean_row(self) -> Tensor:
        """(width,) float32: of the head's rows, summed in float64."""
        import torch

        spec = next(spec for spec in self._model.specs() if spec.name == self._head)
        total = torch.zeros(spec.shape[-1], dtype=torch.float64)
        for rows in row_blocks(spec):
            total += self._model.read(self._head, rows).values.sum(0, dtype=torch.float64)
        return (total / spec.rows).float()

    def _never(self) -> Tensor:
        import torch

        return torch.full((self._prompt.count,), NEVER)

    def _refuse_others(self, embedding: TensorSpec) -> None:
        """Gemma 3n and its like have a second embedding, by which a token is known in every layer."""
        others = [
            spec.name
            for spec in self._model.specs()
            if spec.name not in self._tables and spec.shape[:1] == embedding.shape[:1] and "embed" in spec.name
        ]
        if others:
            raise MergeError(f"a soft prompt cannot become tokens of this model: {', '.join(others)} knows them, too")


def _tables_of(model: Merged) -> tuple[TensorSpec, TensorSpec | None, float]:
    """Embedding and head, None where that is the embedding, and by what the embedding multiplies its rows.

    MergeError for a model in which they cannot be found.
    """
    bare = meta_model(model.config)
    specs = {spec.name: spec for spec in model.specs()}
    names = {module: name for name, module in bare.named_modules()}
    table, head = bare.get_input_embeddings(), bare.get_output_embeddings()
    stored = [model.tensor_of(f"{names[module]}.weight") if module in names else None for module in (table, head)]
    embedding = specs.get(stored[0] or "")
    if embedding is None or head is None or len(embedding.shape) != 2:
        raise MergeError(
            f"{type(bare).__name__}: no embedding and head that a soft prompt could become rows of",
            "serve the adapter by `lora2serve serve --engine peft`",
        )
    return embedding, specs.get(stored[1] or ""), float(getattr(table, "scalar_embed_scale", 1.0))


def _with_vocabulary(config: JsonObject, size: int) -> JsonObject:
    if "vocab_size" in config:
        return {**config, "vocab_size": size}
    text = config.get("text_config")
    return {**config, "text_config": {**text, "vocab_size": size}} if isinstance(text, dict) else config
