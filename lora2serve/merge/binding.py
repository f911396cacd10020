"""Bring together the names an adapter was trained with and the names on disk, in both directions.

Most of the time they are the same. Where they are not (multimodal prefixes, renamed layers, experts fused
by transformers 5 but stored one by one), transformers' own conversion mapping decides, applied to both
sides: what it calls alike is alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path

from lora2serve.adapters.adapter import Adapter, ParameterDelta
from lora2serve.adapters.deltas import Delta, ExpertLora, Lora
from lora2serve.adapters.meta_model import MetaModel, StoredParameter, Wrapped, meta_models, stores_transposed
from lora2serve.errors import MergeError
from lora2serve.merge.fused_experts import EXPERT, Layout, find_fused
from lora2serve.merge.mismatch import Mismatch, explain
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import TensorSpec


@dataclass
class LoadedClass:
    """A class of transformers, and which stored tensors become each of its parameters."""

    model: MetaModel
    sources: Mapping[str, list[StoredParameter]]
    _wrapped: dict[Path, dict[str, Wrapped]] = field(default_factory=dict)

    def wrapped(self, adapter: Adapter) -> dict[str, Wrapped]:
        """What PEFT's ``target_parameters`` adapt, by the adapter's names."""
        if adapter.path not in self._wrapped:
            self._wrapped[adapter.path] = self.model.wrapped_parameters(adapter)
        return self._wrapped[adapter.path]


class Binder:
    """Where each change of an adapter lands in a checkpoint."""

    def __init__(self, specs: Sequence[TensorSpec], config: JsonObject) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._config = config
        self._classes: list[LoadedClass] = []
        self._others = self._load_classes()

    def find(self, change: ParameterDelta, adapter: Adapter) -> list[tuple[str, Delta]]:
        """(stored weight, delta): one, several for fused experts, none if nothing fits."""
        if isinstance(change.delta, Lora) and self._is_transposed(change.parameter, adapter):
            change = replace(change, delta=replace(change.delta, transposed=True))
        if change.parameter in self._specs:
            return [(change.parameter, change.delta)]
        if adapter.config.get("target_parameters") and isinstance(change.delta, Lora):
            targets = self._find_parameter(change.parameter, change.delta, adapter)
            if targets:
                return targets
        if isinstance(change.delta, Lora) and (fused := self._find_expert(change.parameter, change.delta)):
            return [fused]
        sources = self._sources(change.parameter)
        if len(sources) == 1 and not sources[0].fused:
            return [(sources[0].stored, change.delta)]
        return self._unfuse(change.delta, sources)

    def stored_name(self, parameter: str) -> str | None:
        """The stored tensor that becomes ``parameter`` as it is; None where there is none."""
        if parameter in self._specs:
            return parameter
        sources = self._sources(parameter)
        return sources[0].stored if len(sources) == 1 and not sources[0].fused else None

    def stored_experts(self, parameter: str) -> Sequence[Sequence[str]]:
        """The stored tensors that each expert of a fused ``parameter`` is, joined row by row; one list for all experts
        where they are stored as one tensor. Empty where they become it in another way.
        """
        if stored := self.stored_name(parameter):
            return [[stored]]
        sources = self._sources(parameter)
        if any(not source.stacks for source in sources):
            return []
        ordered = sorted(sources, key=lambda source: (source.expert, source.part))
        return [[source.stored for source in group] for _, group in groupby(ordered, lambda source: source.expert)]

    def module_in_base(self, module: str) -> str:
        """The base's own name for a module that was trained in another class; ``module`` where the base knows it so."""
        plain = module.removesuffix(".base_layer")
        inside = f"{plain}."
        if plain in self._modules:
            return module
        own, *others = self._loaded()
        if any(name.startswith(inside) for name in own.sources):
            return module
        for name, sources in chain.from_iterable(each.sources.items() for each in others):
            if not name.startswith(inside):
                continue
            declared, rest = own.model.model_name(sources[0].stored), name.removeprefix(plain)
            if declared.endswith(rest):
                return declared.removesuffix(rest) + module.removeprefix(plain)
        return module

    @cached_property
    def _modules(self) -> set[str]:
        """Whatever holds a stored tensor, at any depth."""
        split = (name.split(".") for name in self._specs)
        return {".".join(parts[:n]) for parts in split for n in range(1, len(parts))}

    def mismatch(self, parameter: str) -> Mismatch:
        """Why ``find`` found nothing for it."""
        classes = [type(each.model.model).__name__ for each in self._loaded() if parameter in each.model]
        return explain(parameter, self._specs, self._sources(parameter), classes)

    def _is_transposed(self, parameter: str, adapter: Adapter) -> bool:
        """PEFT decides by each module's class; the ``fan_in_fan_out`` that it saves is that of the last one."""
        if self._config.get("auto_map"):  # no class that could be asked
            return bool(adapter.config.get("fan_in_fan_out"))
        module = parameter.removesuffix(".weight")
        return stores_transposed(self._config) and any(each.model.is_transposed(module) for each in self._loaded())

    def _sources(self, parameter: str) -> list[StoredParameter]:
        """The stored tensors that transformers loads into what the adapter calls ``parameter``."""
        for each in self._loaded():
            found = each.sources.get(parameter) or each.sources.get(each.model.model_name(parameter))
            if found:
                return found
        return []

    def _loaded(self) -> Iterator[LoadedClass]:
        """The classes that the base may be loaded as; each is made when those before it did not have the answer."""
        yield from self._classes
        for each in self._others:
            self._classes.append(each)
            yield each

    def _load_classes(self) -> Iterator[LoadedClass]:
        for model in map(MetaModel, meta_models(self._config)):
            grouped: dict[str, list[StoredParameter]] = defaultdict(list)
            for source in map(model.source, self._specs):
                if not self._classes or source.model_name in model:  # another class has no place for other towers
                    grouped[source.model_name].append(source)
            yield LoadedClass(model, grouped)

    def _find_expert(self, parameter: str, delta: Lora) -> tuple[str, Delta] | None:
        """One expert's LoRA, in the fused weight of all of them."""
        match = EXPERT.fullmatch(parameter)
        if match is None:
            return None

        def stored(name: str) -> TensorSpec | None:
            return self._specs.get(self.stored_name(name) or "")

        orders = (each.model.experts_order(match["owner"]) for each in self._loaded())
        transposed, interleaved = next((order for order in orders if order), (None, False))
        return find_fused(match, delta, stored, Layout(transposed, interleaved))

    def _find_parameter(self, name: str, delta: Lora, adapter: Adapter) -> list[tuple[str, Delta]]:
        """A change by PEFT's ``target_parameters``, whose keys name the module and not the parameter."""
        module = name.removesuffix(".weight")
        wrapped = next((found for each in self._loaded() if (found := each.wrapped(adapter).get(module))), None)
        if wrapped is None:
            return []
        if wrapped.experts == 1:
            plain = Lora(delta.a, delta.b, wrapped.scale)
            return [(source.stored, plain) for source in self._sources(wrapped.parameter)] or [
                (wrapped.parameter, plain)
            ] * (wrapped.parameter in self._specs)
        fused = ExpertLora(delta.a, delta.b, wrapped.scale, wrapped.experts, wrapped.swapped)
        if wrapped.parameter in self._specs:
            return [(wrapped.parameter, fused)]
        return self._unfuse(fused, self._sources(wrapped.parameter))

    def _unfuse(self, delta: Delta, sources: Sequence[StoredParameter]) -> list[tuple[str, Delta]]:
        """A delta of a fused expert weight, cut to the tensors it is stored as."""
        if not sources or not isinstance(delta, ExpertLora):
            return []
        stored = [self._specs[source.stored] for source in sources]
        if len(stored) == 1 and len(stored[0].shape) == 3:
            return [(stored[0].name, delta)]
        if delta.swapped or any(not source.stacks for source in sources):
            raise MergeError(
                f"{sources[0].model_name}: fused from {len(sources)} tensors in a way that is not known here",
                "merge with PEFT in memory, or train without target_parameters",
            )
        heights = {source.part: self._specs[source.stored].rows for source in sources}
        first = {part: sum(heights[p] for p in heights if p < part) for part in heights}
        return [
            (s.stored, ExpertLora(delta.a, delta.b, delta.scale, delta.experts, expert=s.expert, first=first[s.part]))
            for s in sources
        ]
