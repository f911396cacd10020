"""From stored tensors to GGUF tensors: names, row orders, stacked experts; known from shapes alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.gguf.architectures import Architecture, Config, head_dim
from lora2serve.errors import ExportError
from lora2serve.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
EXPERT = re.compile(r"(?P<head>.*)\.(?P<block>block_sparse_moe|mlp)\.experts\.(?P<number>\d+)\.(?P<part>\w+)\.weight")


@dataclass(frozen=True)
class Place:
    """Where the rows of one stored tensor go: ``first`` is their first row in the GGUF tensor (in rows of ``ne0``)."""

    target: str
    shape: tuple[int, ...]  # of the whole GGUF tensor, the last one a row's length
    first: int = 0
    heads: int = 0  # > 0: rows are permuted within heads of that many rows
    add_one: bool = False


def lay_out(specs: Sequence[TensorSpec], config: Config, architecture: Architecture) -> dict[str, Place]:
    """Stored name -> place; ExportError lists every tensor that has none."""
    names = _name_map(architecture, config["num_hidden_layers"])
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    tied = bool(config.get("tie_word_embeddings")) or not any(spec.name == "lm_head.weight" for spec in specs)
    places, unknown = {}, []
    for spec in specs:
        if spec.name.endswith(IGNORED) or spec.name in architecture.drop or (tied and spec.name == "lm_head.weight"):
            continue
        place = _place(spec, names, config, architecture, experts)
        if place is None:
            unknown.append(spec.name)
        else:
            places[spec.name] = place
    if unknown:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ExportError(
            f"architecture {architecture.name}: no place in GGUF for {shown}", "serve it with --target vllm"
        )
    return places


def _place(spec: TensorSpec, names: Any, config: Config, architecture: Architecture, experts: int) -> Place | None:
    match = EXPERT.fullmatch(spec.name)
    if match:
        merged = f"{match['head']}.{match['block']}.experts.{match['part']}"
        target = _find(names, merged) or _find(names, f"{_layer(match['head'])}.feed_forward.experts.{match['part']}")
        if target is None:
            return None
        return Place(target + ".weight", (experts, *spec.shape), int(match["number"]) * spec.rows)
    name, _, leaf = spec.name.rpartition(".")
    target = _find(names, name)
    if target is None:
        return None
    heads = head_dim(config) if architecture.permuted and name.endswith(("q_proj", "k_proj")) else 0
    add_one = architecture.norm_shift and name.endswith("norm")
    return Place(f"{target}.{leaf}", spec.shape, 0, heads, add_one)


def _layer(head: str) -> str:
    return head.removeprefix("model.")


def _name_map(architecture: Architecture, layers: int) -> Any:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    return get_tensor_name_map(MODEL_ARCH(arch), layers)


def _find(names: Any, name: str) -> str | None:
    found = names.get_name(name)
    return str(found) if found else None


def together(spec: TensorSpec, place: Place) -> int:
    """How many rows must come at once: 1-D tensors are one row of the file; permuted rows come in whole heads."""
    if len(spec.shape) == 1:
        return max(1, spec.rows)
    return place.heads or 1


def rows_of(place: Place, spec: TensorSpec, rows: slice, block: Tensor) -> tuple[int, Tensor]:
    """The first row in the GGUF tensor of a block of stored rows, and its values there: (n, ne0) float32."""
    values = block.float()
    if place.heads:
        values = permute(values, place.heads)
    if place.add_one:
        values = values + 1
    columns = place.shape[-1]
    return place.first + rows.start * spec.row_numel // columns, values.reshape(-1, columns)


def permute(block: Tensor, height: int) -> Tensor:
    """Rows of whole heads from transformers' order (first halves, second halves) to llama.cpp's (pairs)."""
    shape = block.shape
    return block.reshape(-1, 2, height // 2, *shape[1:]).transpose(1, 2).reshape(shape)
