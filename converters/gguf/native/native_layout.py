"""From stored tensors to GGUF tensors: names, row orders, stacked experts; known from shapes alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.gguf.native.architectures import Architecture, Config, head_dim
from lora2serve.errors import ExportError
from lora2serve.weights.tensors import TensorSpec

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
    half: int | None = None  # 0 or 1: every other value of the last axis, from that one on
    transposed: bool = False  # the last two axes change places


def lay_out(specs: Sequence[TensorSpec], config: Config, architecture: Architecture) -> dict[str, tuple[Place, ...]]:
    """Stored name -> places; ExportError lists every tensor that has none."""
    names = name_map(architecture, config["num_hidden_layers"])
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    tied = bool(config.get("tie_word_embeddings")) or not any(spec.name == "lm_head.weight" for spec in specs)
    places: dict[str, Any] = {}
    unknown = []
    for spec in specs:
        if spec.name.endswith(IGNORED) or spec.name in architecture.drop or (tied and spec.name == "lm_head.weight"):
            continue
        found = _fused_experts(spec, names) if architecture.fused_experts else ()
        place = None if found else _place(spec, names, config, architecture, experts)
        if found or place:
            places[spec.name] = found or (place,)
        else:
            unknown.append(spec.name)
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
        target = find(names, merged) or find(names, f"{_layer(match['head'])}.feed_forward.experts.{match['part']}")
        if target is None:
            return None
        return Place(target + ".weight", (experts, *spec.shape), int(match["number"]) * spec.rows)
    name, _, leaf = spec.name.rpartition(".")
    target = find(names, name)
    if target is None:
        return None
    heads = head_dim(config) if architecture.permuted and name.endswith(("q_proj", "k_proj")) else 0
    add_one = architecture.norm_shift and name.endswith("norm")
    return Place(f"{target}.{leaf}", spec.shape, 0, heads, add_one)


def _fused_experts(spec: TensorSpec, names: Any) -> tuple[Place, ...]:
    """gpt-oss: stacked experts, input axis first, gate and up in turns; attention sinks, which have no suffix."""
    head, _, leaf = spec.name.rpartition(".")
    if leaf == "sinks":
        return (Place(f"{find(names, spec.name)}.weight", spec.shape),)
    if not head.endswith(".experts"):
        return ()
    part, bias = leaf.removesuffix("_bias"), leaf.endswith("_bias")
    halves: dict[str, int | None] = {"gate_proj": 0, "up_proj": 1} if part == "gate_up_proj" else {part: None}
    width = spec.shape[-1] // len(halves)
    shape = (spec.shape[0], width) if bias else (spec.shape[0], width, spec.shape[1])
    suffix = "bias" if bias else "weight"
    return tuple(
        Place(f"{find(names, f'{head}.{name}')}.{suffix}", shape, half=half, transposed=not bias)
        for name, half in halves.items()
    )


def _layer(head: str) -> str:
    return head.removeprefix("model.")


def name_map(architecture: Architecture, layers: int) -> Any:
    """gguf's own map of module names."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    return get_tensor_name_map(MODEL_ARCH(arch), layers)


def find(names: Any, name: str) -> str | None:
    """The GGUF name of a module, without suffix."""
    found = names.get_name(name)
    return str(found) if found else None


def together(spec: TensorSpec, places: Sequence[Place]) -> int:
    """How many rows must come at once: 1-D tensors are one row of the file; permuted rows come in whole heads."""
    if len(spec.shape) == 1:
        return max(1, spec.rows)
    return max(place.heads or 1 for place in places)


def rows_of(place: Place, spec: TensorSpec, rows: slice, block: Tensor) -> tuple[int, Tensor]:
    """The first row in the GGUF tensor of a block of stored rows, and its values there: (n, ne0) float32."""
    values = block.float()
    if place.half is not None:
        values = values[..., place.half :: 2]
    if place.transposed:
        values = values.transpose(-1, -2)
    if place.heads:
        values = permute(values, place.heads)
    if place.add_one:
        values = values + 1
    columns = place.shape[-1]
    each = spec.row_numel // (1 if place.half is None else 2)  # values of one stored row
    return place.first + rows.start * each // columns, values.reshape(-1, columns)


def permute(block: Tensor, height: int) -> Tensor:
    """Rows of whole heads from transformers' order (first halves, second halves) to llama.cpp's (pairs)."""
    shape = block.shape
    return block.reshape(-1, 2, height // 2, *shape[1:]).transpose(1, 2).reshape(shape)
