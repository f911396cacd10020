"""Calibrated schemes by llm-compressor, loaded by its path in an environment of its own, which has no lora2serve.

AWQ: https://arxiv.org/abs/2306.00978; GPTQ: https://arxiv.org/abs/2210.17323. Both write the compressed-tensors format
(pack-quantized, 4 bits in groups along the input): AWQ with zero points, GPTQ symmetric. NVFP4 for weights and
activations: the library's preset, whose one static value a layer is the largest input that the data showed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

TOGETHER = 8192  # tokens in one forward


class ParentLink(Protocol):
    """What this worker needs of its link to the parent."""

    def advance(self, done: int) -> None:
        """Say that the job goes on, and how much of it is done."""
        ...


class CompressorWorker:
    """The one job."""

    def __init__(self, link: ParentLink) -> None:
        self._advance = link.advance

    def compress(self, model: str, out: str, quant: str, tokens: str, group: int, ignore: list[str]) -> dict[str, str]:
        """Quantize the model directory ``model`` into ``out``; ``tokens`` is a JSON file of rows of token ids.

        Advances by 1 for the model loaded, for each decoder layer and for the rest. Returns versions.
        """
        import compressed_tensors
        import llmcompressor
        import torch

        rows = json.loads(Path(tokens).read_text(encoding="utf-8"))
        loaded, dtype = _load(model)
        self._advance(1)
        data: Any = torch.utils.data.DataLoader(list(batches(rows)), batch_size=None)  # type: ignore[arg-type]
        recipe = _recipe(quant, group, ignore, self._advance)
        llmcompressor.oneshot(model=loaded, recipe=recipe, dataset=data, pipeline="sequential")
        _cast(loaded, dtype)
        loaded.save_pretrained(out, save_compressed=True)
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
        return {
            "llmcompressor": llmcompressor.__version__,
            "compressed-tensors": compressed_tensors.__version__,
            "device": device,
        }


def batches(rows: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
    """Rows of one length together, so that nothing is padded, cut or mixed; (n, length) int64 each."""
    import torch

    by_length: dict[int, list[Sequence[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for length, alike in sorted(by_length.items()):
        step = max(1, TOGETHER // length)
        for start in range(0, len(alike), step):
            ids = torch.tensor(alike[start : start + step])
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _load(model: str) -> tuple[Any, Any]:
    """The model, and the type that it is stored in. In float32 on a CPU, where few have a fast bfloat16."""
    import torch
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    dtype = config.dtype or torch.bfloat16
    if torch.accelerator.is_available():
        wanted = dtype
    else:
        wanted = torch.float32
        IntermediatesCache.pin_memory = lambda *_, **__: None  # 0.14.0.1 pins for a GPU also where there is none
    with load_quantizable_moe():
        loaded = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=wanted)
    loaded.config.dtype = dtype
    return loaded, dtype


def _cast(model: Any, dtype: Any) -> None:
    """Into the type that it is stored in; the scales over whole tensors stay float32, as in the library's own files."""
    scales = {name: value.data for name, value in model.named_parameters() if name.endswith("global_scale")}
    model.to(dtype)
    for name, value in scales.items():
        model.get_parameter(name).data = value


def _recipe(quant: str, group: int, ignore: list[str], advance: Callable[[int], None]) -> list[Any]:
    from llmcompressor.modifiers import Modifier
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier

    class AdvanceModifier(Modifier):  # type: ignore[misc]
        """Stands behind the others and says when they are done with a part of the model."""

        def on_initialize(self, state: Any, **_: Any) -> bool:
            return True

        def on_finalize(self, state: Any, **_: Any) -> bool:
            return True

        def on_sequential_epoch_end(self, state: Any, event: Any, **_: Any) -> None:
            advance(1)

    if quant == "nvfp4-w4a4":
        return [QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=ignore), AdvanceModifier()]
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": quant == "gptq"}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ignore}
    if quant == "gptq":
        return [GPTQModifier(**groups), AdvanceModifier()]
    return [AWQModifier(), QuantizationModifier(**groups), AdvanceModifier()]
