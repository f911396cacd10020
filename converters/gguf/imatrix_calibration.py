"""An importance matrix from data: sums of squared activations per input column, in the model as trained.

What llama.cpp's ``llama-imatrix`` counts in its own graph (``tools/imatrix/imatrix.cpp``), counted by hooks in
transformers, with the adapter unfolded. As there, the head is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from converters.gguf import imatrix
from converters.gguf.row_map import RowMap, RowMaps
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel
from lora2serve.progress import Progress
from lora2serve.weights.language_model import load_language_model

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.hooks import RemovableHandle

    Counter: TypeAlias = Callable[[Module, tuple[Tensor, ...]], None]
    ExpertCounter: TypeAlias = Callable[[Module, tuple[Tensor, ...], dict[str, Tensor]], None]

MAX_TOKENS = 50_000  # about a hundred of llama.cpp's chunks, its own advice
EXPERTS_PATH = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?experts")


class Sums:
    """``sums``: tensor -> (experts or 1, columns) float64; ``counts``: tensor -> (experts or 1,)."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, expert: int = 0, experts: int = 1) -> None:
        """Count rows (n, columns) of the input of one weight."""
        import torch

        if name not in self.sums:
            self.sums[name] = torch.zeros(experts, values.shape[-1], dtype=torch.float64)
            self.counts[name] = torch.zeros(experts)
        self.sums[name][expert] += values.double().square().sum(dim=0).cpu()
        self.counts[name][expert] += len(values)


def calibrate(
    model: ExportModel, sequences: Sequence[Sequence[int]], dataset: str, out: Path, progress: Progress
) -> Path:
    """Write the matrix of ``model`` on these token ids to ``out``, in llama.cpp's GGUF format."""
    import torch

    loaded = _load(model)
    sums = Sums()
    if not list(_hook(loaded, _targets(model), sums)):
        raise ExportError("--calibrate: found no linear module that GGUF knows", "give --imatrix FILE")
    used = list(_within(sequences, MAX_TOKENS))
    with progress.track("calibrate", sum(map(len, used))) as advance, torch.no_grad():
        for ids in used:
            loaded(torch.tensor([list(ids)]))
            advance(len(ids))
    partial = out.with_suffix(".partial")
    imatrix.write(
        partial,
        {name: values.float().numpy() for name, values in sums.sums.items()},
        {name: counts.numpy() for name, counts in sums.counts.items()},
        dataset,
        sum(map(len, used)),
    )
    return partial.replace(out)


def _load(model: ExportModel) -> Module:
    """The base in float32 with the adapter in PEFT's own layers."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    count = len(model.lineage.adapters)
    if count > 1:
        raise ExportError(f"--calibrate: {count} adapters, expected one", "give --imatrix FILE")
    base = load_language_model(model.lineage.base.path, dtype=torch.float32)
    if model.adapter is None:
        plain: Module = base.eval()
        return plain
    from peft import PeftModel
    from safetensors import safe_open

    with safe_open(model.adapter / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.endswith("embed_tokens.weight")]  # noqa: SIM118 (no dict)
        rows = [file.get_slice(name).get_shape()[0] for name in names]
    if rows and rows[0] != base.get_input_embeddings().weight.shape[0]:  # tokens were added at training
        base.resize_token_embeddings(rows[0], mean_resizing=False)
    adapted: Module = PeftModel.from_pretrained(base, str(model.adapter)).eval()
    return adapted


def _targets(model: ExportModel) -> dict[str, list[RowMap]]:
    """Module -> the GGUF tensors that its outputs lie in, whose columns are its inputs."""
    with RowMaps(model) as row_maps:
        targets = {spec.name: row_maps.of(spec.name) for spec in model.source.specs()}
    return {_known_as(name.removesuffix(".weight")): names for name, names in targets.items()}


def _known_as(path: str) -> str:
    """A module by one name, in a checkpoint, in transformers and under PEFT."""
    plain = path.removeprefix("base_model.model.").replace(".base_layer", "").replace("language_model.", "")
    return plain.removeprefix("model.")


def _hook(loaded: Module, targets: Mapping[str, Sequence[RowMap]], sums: Sums) -> Iterator[RemovableHandle]:
    """Hooks on every module whose weight has a place in the GGUF; of those that are fused there, one is enough."""
    seen = {"output.weight", "token_embd.weight"}
    for path, module in loaded.named_modules():
        name = _known_as(path)
        if ".lora_" in name or name in seen:
            continue
        fed = [] if hasattr(module, "num_embeddings") else targets.get(name, [])
        experts = EXPERTS_PATH.fullmatch(name)
        if fed:
            seen.add(name)
            for row_map in (row_map for row_map in fed if row_map.target not in seen):
                seen.add(row_map.target)
                yield module.register_forward_pre_hook(_counter(sums, row_map))
        elif experts and getattr(module, "gate_up_proj", None) is not None:
            seen.add(name)
            prefix = f"blk.{experts[1]}.ffn"
            yield module.register_forward_pre_hook(_expert_counter(sums, prefix), with_kwargs=True)


def _counter(sums: Sums, row_map: RowMap) -> Counter:
    def count(module: Module, inputs: tuple[Tensor, ...]) -> None:
        fed = inputs[0].flatten(0, -2)
        sums.add(row_map.target, fed if row_map.inputs is None else fed[:, row_map.inputs.to(fed.device)])

    return count


def _expert_counter(sums: Sums, prefix: str) -> ExpertCounter:
    """Stacked experts: (tokens, hidden) and which experts each token goes to."""

    def count(module: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        hidden, chosen = [*inputs, *named.values()][:2]
        hidden, chosen = hidden.flatten(0, -2), chosen.flatten(0, -2)
        experts = int(module.gate_up_proj.shape[0])
        for expert in range(experts):
            rows = hidden[(chosen == expert).any(dim=-1)]
            if len(rows):
                for part in ("gate", "up"):
                    sums.add(f"{prefix}_{part}_exps.weight", rows, expert, experts)
                sums.add(f"{prefix}_down_exps.weight", _inside(module, expert, rows), expert, experts)

    return count


def _inside(module: Any, expert: int, rows: Tensor) -> Tensor:
    """What the down projection of one expert gets."""
    from torch.nn.functional import linear

    if hasattr(module, "_apply_gate") and hasattr(module, "gate_up_proj_bias"):  # gpt-oss: the input axis first
        gated: Tensor = module._apply_gate(rows @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert])
        return gated
    gate, up = linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
    inside: Tensor = module.act_fn(gate) * up
    return inside


def _within(sequences: Sequence[Sequence[int]], budget: int) -> Iterator[Sequence[int]]:
    for ids in sequences:
        if budget <= 0:
            return
        if len(ids) > 1:
            yield ids[:budget]
            budget -= len(ids)
