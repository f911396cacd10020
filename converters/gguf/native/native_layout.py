"""From stored tensors to GGUF tensors: names, row orders, stacked experts; known from shapes alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.gguf.native.architectures import Architecture, Config, head_dim
from lora2serve.errors import ExportError
from lora2serve.weights.tensors import TensorSpec

if TYPE_CHECKING:
    from gguf import TensorNameMap
    from torch import Tensor

IGNORED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
EXPERT = re.compile(r"(?P<head>.*)\.(?P<block>block_sparse_moe|mlp)\.experts\.(?P<number>\d+)\.(?P<part>\w+)\.weight")


@dataclass(frozen=True)
class Placement:
    """Where the rows of one stored tensor go: ``first`` is their first row in the GGUF tensor (in rows of ``ne0``)."""

    target: str
    shape: tuple[int, ...]  # of the whole GGUF tensor, the last one a row's length
    first: int = 0
    head_rows: int = 0  # > 0: rows are permuted within heads of that many rows
    add_one: bool = False
    half: int | None = None  # 0 or 1: every other value of the last axis, from that one on
    transposed: bool = False  # the last two axes change places


Placements = dict[str, tuple[Placement, ...]]  # of each stored tensor, by its name


def place_tensors(specs: Sequence[TensorSpec], config: Config, architecture: Architecture) -> Placements:
    """Every tensor's placements; ExportError lists every tensor that has none."""
    names = name_map(architecture, config["num_hidden_layers"])
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    tied = bool(config.get("tie_word_embeddings")) or not any(spec.name == "lm_head.weight" for spec in specs)
    placements: Placements = {}
    unknown = []
    for spec in specs:
        if spec.name.endswith(IGNORED) or spec.name in architecture.drop or (tied and spec.name == "lm_head.weight"):
            continue
        fused = _fused_experts(spec, names) if architecture.fused_experts else ()
        single = None if fused else _placement(spec, names, config, architecture, experts)
        if fused or single:
            placements[spec.name] = (single,) if single else fused
        else:
            unknown.append(spec.name)
    if unknown:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ExportError(
            f"architecture {architecture.name}: GGUF has no tensor for {shown}", "serve it with --target vllm"
        )
    return placements


def _placement(
    spec: TensorSpec, names: TensorNameMap, config: Config, architecture: Architecture, experts: int
) -> Placement | None:
    match = EXPERT.fullmatch(spec.name)
    if match:
        merged = f"{match['head']}.{match['block']}.experts.{match['part']}"
        target = find(names, merged) or find(
            names, f"{match['head'].removeprefix('model.')}.feed_forward.experts.{match['part']}"
        )
        if target is None:
            return None
        return Placement(target + ".weight", (experts, *spec.shape), int(match["number"]) * spec.rows)
    name, _, leaf = spec.name.rpartition(".")
    target = find(names, name)
    if target is None:
        return None
    head_rows = head_dim(config) if architecture.permuted and name.endswith(("q_proj", "k_proj")) else 0
    add_one = architecture.norm_shift and name.endswith("norm")
    return Placement(f"{target}.{leaf}", spec.shape, 0, head_rows, add_one)


def _fused_experts(spec: TensorSpec, names: TensorNameMap) -> tuple[Placement, ...]:
    """gpt-oss: stacked experts, input axis first, gate and up in turns; attention sinks, which have no suffix."""
    head, _, leaf = spec.name.rpartition(".")
    if leaf == "sinks":
        return (Placement(f"{find(names, spec.name)}.weight", spec.shape),)
    if not head.endswith(".experts"):
        return ()
    part, bias = leaf.removesuffix("_bias"), leaf.endswith("_bias")
    halves: dict[str, int | None] = {"gate_proj": 0, "up_proj": 1} if part == "gate_up_proj" else {part: None}
    width = spec.shape[-1] // len(halves)
    shape = (spec.shape[0], width) if bias else (spec.shape[0], width, spec.shape[1])
    suffix = "bias" if bias else "weight"
    return tuple(
        Placement(f"{find(names, f'{head}.{name}')}.{suffix}", shape, half=half, transposed=not bias)
        for name, half in halves.items()
    )


def name_map(architecture: Architecture, layers: int) -> TensorNameMap:
    """gguf's own map of module names."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    return get_tensor_name_map(MODEL_ARCH(arch), layers)


def find(names: TensorNameMap, module: str) -> str | None:
    """The GGUF name of a module, without suffix."""
    name = names.get_name(module)
    return str(name) if name else None


def rows_needed(spec: TensorSpec, placements: Sequence[Placement]) -> int:
    """How many rows must come at once: 1-D tensors are one row of the file; permuted rows come in whole heads."""
    if len(spec.shape) == 1:
        return max(1, spec.rows)
    return max(placement.head_rows or 1 for placement in placements)


def rows_of(placement: Placement, spec: TensorSpec, rows: slice, block: Tensor) -> tuple[int, Tensor]:
    """The first row in the GGUF tensor of a block of stored rows, and its values there: (n, ne0) float32."""
    values = block.float()
    if placement.half is not None:
        values = values[..., placement.half :: 2]
    if placement.transposed:
        values = values.transpose(-1, -2)
    if placement.head_rows:
        values = permute(values, placement.head_rows)
    if placement.add_one:
        values = values + 1
    columns = placement.shape[-1]
    each = spec.row_numel // (1 if placement.half is None else 2)  # values of one stored row
    return placement.first + rows.start * each // columns, values.reshape(-1, columns)


def permute(block: Tensor, height: int) -> Tensor:
    """Rows of whole heads from transformers' order (first halves, second halves) to llama.cpp's (pairs)."""
    shape = block.shape
    return block.reshape(-1, 2, height // 2, *shape[1:]).transpose(1, 2).reshape(shape)
