"""Which weights are quantized, which stay as they are, and which vLLM fuses into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from converters.vllm.compressed.expert_stacks import ExpertStack, find_stacks
from converters.vllm.compressed.schemes import Scheme
from lora2serve.adapters.meta_model import stores_transposed
from lora2serve.errors import ExportError
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import FLOATS, TensorSpec

# Linear layers lie in numbered blocks of the text model; embeddings and heads lie outside.
DECODER_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
OTHER_TOWER = re.compile(r"(^|[._])(vision|visual|vit|image|audio|speech|projector|mtp|encoder)([._]|$)")
# Routers, gates (of shared experts, of linear attention), norms and embeddings inside a block stay as they are.
NEVER_QUANTIZED = re.compile(
    r"(^|\.)([a-z_]*gate|[a-z_]*router|[a-z_]*embed[a-z_]*|[a-z_]*norm|altup|conv1d|in_proj_(a|b|ba))(\.|$)"
)
EMBEDDING = re.compile(r"(^|\.)([a-z_]*embed[a-z_]*|wte|wpe)(\.|$)")  # no linear layer: no target of the config
# vLLM loads the parts of each into one parameter (``packed_modules_mapping`` of its models; w1 and w3 of its experts).
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("c_fc_0", "c_fc_1"),
)
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Selection:
    """The weights to quantize, by name, with the scheme as it fits this model."""

    scheme: Scheme
    weights: Mapping[str, TensorSpec]
    stacks: Mapping[str, ExpertStack]  # stored tensor -> those of the weights that lie in it
    fused: Mapping[str, tuple[str, ...]]  # weight -> all weights of its fused parameter, itself among them
    ignore: tuple[str, ...]  # modules that stay as they are, for the config


def select(specs: Sequence[TensorSpec], config: JsonObject, scheme: Scheme) -> Selection:
    """What to quantize; ExportError, with every problem at once, where the scheme does not fit the model."""
    text = config.get("text_config") or config
    kind = str(text.get("model_type"))
    if stores_transposed(config):
        raise ExportError(
            f"{kind}: its weights are stored transposed (Conv1D), unlike those of compressed-tensors", PLAIN_HINT
        )
    stacks = stacks_in(specs, config)
    weights = {weight.name: weight for spec in specs for weight in _weights_in(spec, stacks)}
    fused = _fused(weights)
    fitted = _fit(scheme, weights.values())
    problems = [
        f"{spec.name}: experts in one tensor; {UNREAD.get(kind, UNKNOWN)}"
        for spec in _stacked(specs)
        if spec.name not in stacks
    ]
    problems += _misfits(fitted, weights, fused)
    if not weights and not problems:
        problems = ["no linear layer that vLLM would quantize"]
    if problems:
        more = [f"... and {len(problems) - NAMES_SHOWN} more"] if len(problems) > NAMES_SHOWN else []
        raise ExportError("\n".join([*problems[:NAMES_SHOWN], *more]), PLAIN_HINT)
    matrices = [s.name.removesuffix(".weight") for s in specs if s.name.endswith(".weight") and len(s.shape) == 2]
    ignore = [name for name in matrices if f"{name}.weight" not in weights and not EMBEDDING.search(name)]
    return Selection(fitted, weights, stacks, fused, tuple(dict.fromkeys([*ignore, "lm_head"])))


PLAIN_HINT = "export it in 16 bits, without --quant"
UNKNOWN = "how this model type's are taken apart is not known"
UNREAD = {"gpt_oss": "vLLM 0.32 reads no compressed-tensors for those of gpt-oss, and would leave them out silently"}


def stacks_in(specs: Sequence[TensorSpec], config: JsonObject) -> dict[str, ExpertStack]:
    """Stored name -> the experts in that tensor, where it is known how they lie."""
    return find_stacks(list(_stacked(specs)), config.get("text_config") or config)


def _weights_in(spec: TensorSpec, stacks: Mapping[str, ExpertStack]) -> Iterator[TensorSpec]:
    """The matrices to quantize in one stored tensor."""
    if spec.name in stacks:
        for weights in stacks[spec.name].weights():
            yield from weights
    elif _is_linear(spec):
        yield spec


def _is_linear(spec: TensorSpec) -> bool:
    module = spec.name.removesuffix(".weight")
    inside = (
        spec.name.endswith(".weight") and len(spec.shape) == 2 and spec.dtype in FLOATS and DECODER_LAYER.search(module)
    )
    return bool(inside) and not OTHER_TOWER.search(module) and not NEVER_QUANTIZED.search(module)


def _stacked(specs: Iterable[TensorSpec]) -> Iterator[TensorSpec]:
    for spec in specs:
        module = spec.name.removesuffix(".weight")
        if (
            len(spec.shape) == 3
            and DECODER_LAYER.search(module)
            and not (NEVER_QUANTIZED.search(module) or OTHER_TOWER.search(module))
        ):
            yield spec


def _fused(weights: Mapping[str, TensorSpec]) -> dict[str, tuple[str, ...]]:
    groups = {}
    for name in weights:
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        parts = next((part for part in FUSED if last in part), (last,))
        together = tuple(f"{parent}.{part}.weight" for part in parts)
        groups[name] = tuple(other for other in together if other in weights)
    return groups


def _fit(scheme: Scheme, weights: Iterable[TensorSpec]) -> Scheme:
    """The scheme with the largest group that divides the columns of every weight."""
    columns = {spec.shape[1] for spec in weights}
    for group in (scheme.group, *scheme.finer):
        if group and not any(count % group for count in columns):
            return replace(scheme, group=group)
    return scheme


def _misfits(scheme: Scheme, weights: Mapping[str, TensorSpec], fused: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    for name, spec in weights.items():
        out, into = spec.shape
        if scheme.group and scheme.rows == 1 and into % scheme.group:
            yield f"{name}: {into} columns, expected a multiple of {min(scheme.group, *scheme.finer, scheme.group)}"
        if scheme.rows > 1 and len(fused[name]) > 1 and out % scheme.rows:
            yield f"{name}: {out} rows, expected a multiple of {scheme.rows}, as vLLM fuses it with its neighbors"
