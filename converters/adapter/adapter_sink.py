"""The sink: lint against the engine, choose how to say it plainly, write one PEFT directory. Nothing is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from converters.adapter import extract
from converters.adapter.extract import Extracted
from converters.adapter.normalize import EXPERTS, Normalized, normalize, split
from converters.safetensors import as_bytes, encode_header
from lora2serve.adapters.adapter import CONFIG, PREFIX, WEIGHTS, Adapter, open_adapter
from lora2serve.adapters.lint import Finding, lint
from lora2serve.artifacts.staging import StagedDir, as_json
from lora2serve.errors import ExportError
from lora2serve.exporting.settings_plan import PlannedSettings
from lora2serve.exporting.sinks import ExportFacts, ExportModel, ModelSource
from lora2serve.system.library_log import errors_only
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import Block, TensorSpec, torch_dtype

# What PEFT and vLLM need to load it again; the rest of the config is about training.
KEPT_KEYS = ("task_type", "revision", "peft_version", "target_parameters")
COMPARE_BLOCK = 1 << 22  # elements compared at a time


@dataclass(frozen=True)
class AdapterOptions:
    """``served_base``: the name the server gives the base. ``as_lora_rank``: extract a LoRA of that rank."""

    served_base: str | None = None
    as_lora_rank: int | None = None


class AdapterSink:
    """One adapter directory for ``vllm serve BASE --enable-lora --lora-modules NAME=DIR``."""

    Options: ClassVar[type[AdapterOptions]] = AdapterOptions
    quants: ClassVar[tuple[str, ...]] = ()
    default_quant: ClassVar[str | None] = None

    def __init__(self, model: ExportModel, out: StagedDir, options: AdapterOptions) -> None:
        self.wanted: Mapping[str, int] = {}  # the base is no part of the product
        self._out = out
        self._product, specs, self._config = _product(model, options)
        _refuse(lint(self._config, specs, model.config))
        if out.to_serve:
            engine_check(self._config)
        header = encode_header(specs)
        self._data_start = len(header)
        self._file = out.file(WEIGHTS, len(header) + sum(spec.nbytes for spec in self._product.specs))
        self._file.pwrite(header, 0)

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        """Never called: nothing is wanted of the merged model."""

    def finish(self) -> ExportFacts:
        offsets, offset = {}, self._data_start
        for spec in self._product.specs:
            offsets[spec.name] = offset
            offset += spec.nbytes
        for spec, value in self._product.tensors():
            self._file.pwrite(as_bytes(value.to(torch_dtype(spec.dtype))), offsets[spec.name])
        self._out.json(CONFIG, self._config)
        served = self._config["base_model_name_or_path"]
        return ExportFacts(rank=self._product.rank, served_base=served, details=self._product.report())

    def close(self) -> None:
        """Nothing is held open but the output's own file."""


def plan_settings(model: ExportModel, options: AdapterOptions) -> PlannedSettings:
    """The config, and what the manifest says of it."""
    product, _, config = _product(model, options)
    facts = ExportFacts(rank=product.rank, served_base=config["base_model_name_or_path"])
    return PlannedSettings({CONFIG: as_json(config)}, weights=(WEIGHTS,), facts=facts)


def _product(
    model: ExportModel, options: AdapterOptions
) -> tuple[Normalized | Extracted, Sequence[TensorSpec], dict[str, Any]]:
    """The adapter, its tensors under the base's own names, its config."""
    adapter = _only_adapter(model)
    product = _plan(model, adapter, options.as_lora_rank)
    specs = [_in_base(spec, model.source) for spec in product.specs]
    return product, specs, plain_config(adapter, product, specs, options.served_base or model.base)


def _in_base(spec: TensorSpec, source: ModelSource) -> TensorSpec:
    """The tensor under the base's own name: vLLM loads that class, and leaves out what it has no module for."""
    module, kind = split(spec.name)
    return replace(spec, name=f"{PREFIX}{source.module_in_base(module)}.{kind}")


def plain_config(
    adapter: Adapter, product: Normalized | Extracted, specs: Sequence[TensorSpec], served_base: str
) -> dict[str, Any]:
    """``adapter_config.json`` of the product: what it takes to load it, and nothing about training."""
    alpha = product.scale * product.rank
    return {
        "peft_type": "LORA",
        **{key: adapter.config[key] for key in KEPT_KEYS if adapter.config.get(key) is not None},
        "base_model_name_or_path": served_base,
        "r": product.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": _targets(adapter, specs),
        "bias": "none",
        "inference_mode": True,
    }


def _targets(adapter: Adapter, specs: Sequence[TensorSpec]) -> list[str]:
    """The modules by their full names; fused experts are no modules to PEFT but ``target_parameters``."""
    names = sorted({split(spec.name)[0] for spec in specs})
    fused = adapter.config.get("target_parameters")
    return [name for name in names if not (fused and EXPERTS.search(name))]


def engine_check(config: JsonObject) -> None:
    """Ask the installed vLLM's own checker, ``PEFTHelper.validate_legal``; without vLLM the lint stands alone."""
    try:
        with errors_only("vllm.triton_utils"):  # of its build for CPUs: that Triton is not used
            from vllm.config.lora import LoRAConfig
            from vllm.lora.peft_helper import PEFTHelper
    except ImportError:
        return
    try:
        PEFTHelper.from_dict(dict(config)).validate_legal(LoRAConfig(max_lora_rank=config["r"]))
    except ValueError as error:
        raise ExportError(f"vLLM refuses the adapter: {error}", "export --target vllm merges it") from None


def _only_adapter(model: ExportModel) -> Adapter:
    count = max(1, len(model.lineage.adapters))
    if model.adapter is None or count != 1:
        raise ExportError(
            f"--target adapter: {count if model.adapter else 'no'} adapters, expected one",
            "combine them with --combine",
        )
    return open_adapter(model.adapter)


def _plan(model: ExportModel, adapter: Adapter, rank: int | None) -> Normalized | Extracted:
    if rank is not None:
        return extract.plan(model, adapter, rank)
    findings = lint(adapter.config, _without_copies(model, adapter), model.config)
    _refuse([finding for finding in findings if finding.fix != "export"])
    if any(finding.rule == "init" for finding in findings):
        return extract.plan(model, adapter, None)
    return normalize(adapter)


def _without_copies(model: ExportModel, adapter: Adapter) -> list[TensorSpec]:
    """The adapter's tensors without those that PEFT saved along and that are the base's own, value by value."""
    source = model.source
    changed = [
        part.name
        for name, part in adapter.full.items()
        if (stored := source.tensor_of(name)) is None or not _same(source, stored, adapter, part.name)
    ]
    copies = {part.name for part in adapter.full.values()} - set(changed)
    renamed = [name.replace(".base_layer.", ".") for name in changed]  # vLLM would skip these without a word
    specs = [spec for spec in adapter.tensors.specs() if spec.name not in copies and spec.name not in changed]
    return [*specs, *(TensorSpec(name, (), "F32") for name in renamed)]


def _same(source: ModelSource, name: str, adapter: Adapter, key: str) -> bool:
    import torch

    spec = adapter.tensors.spec(key)
    step = max(1, COMPARE_BLOCK // max(1, spec.row_numel))
    blocks = (slice(start, min(start + step, spec.rows)) for start in range(0, spec.rows, step))
    mine, theirs = adapter.tensors.read, source.before
    return all(torch.equal(theirs(name, rows).values.float(), mine(key, rows).values.float()) for rows in blocks)


def _refuse(findings: Sequence[Finding]) -> None:
    if findings:
        message = "\n".join(f"vLLM does not serve this adapter ({f.rule}): {f.message}" for f in findings)
        raise ExportError(message, findings[0].way_out)
