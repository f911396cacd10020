"""The fold: a base and its adapters, seen as one model of plain weights.

    model = Merged(Dequantized(Checkpoint(path)), [open_adapter(adapter)], config)

Binding happens in the constructor: every change must find one weight of the right shape, every
adapter tensor must be used, and all that does not fit is reported together, before a weight is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from lora2serve.adapters.adapter import Adapter
from lora2serve.adapters.deltas import AdapterTensor, Delta, Lora, Replace
from lora2serve.adapters.peft_layers import PeftDelta, PeftLayers
from lora2serve.errors import MergeError, raise_all
from lora2serve.merge.binding import Binder
from lora2serve.merge.layout import MergedTensor, ModelLayout, lay_out, resize_vocabulary, settle_tie
from lora2serve.merge.mismatch import Mismatch
from lora2serve.merge.survival import Survival, squared_norm
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import ALL, FLOATS, Block, DType, Source, TensorSpec, all_finite, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


class Merged:
    """Base plus adapters. ``read`` gives float32 where something was folded or dequantized, else the stored type.

    ``config`` is that of the merged model; the one that is passed in stays as it is.
    """

    def __init__(
        self, base: Source, adapters: Sequence[Adapter], config: JsonObject, dtype: DType | None = None
    ) -> None:
        self.base, self.survival = base, Survival()
        self._read_whole = lru_cache(maxsize=2)(AdapterTensor.read)  # blocks of one weight come one after another
        specs = list(base.specs())
        own_config = settle_tie(base, deepcopy(dict(config)))
        self._names = Binder(specs, own_config)
        self._rows = {spec.name: spec.rows for spec in specs}
        layout = lay_out(specs, adapters, own_config, self._names.stored_name)
        deltas = self._bind(layout, adapters)
        tensors = _fold_shapes(layout.tensors, deltas, _casts(specs, dtype))
        self._tensors = {tensor.spec.name: tensor for tensor in tensors}
        self.config: JsonObject = resize_vocabulary(layout.config, tensors, {spec.name: spec for spec in specs})

    def specs(self) -> Sequence[TensorSpec]:
        return [tensor.spec for tensor in self._tensors.values()]

    def changed(self) -> list[str]:
        """The names of the tensors that an adapter changes."""
        return [name for name, tensor in self._tensors.items() if tensor.deltas]

    def deltas(self, name: str) -> Sequence[Delta]:
        """What the adapters do to one tensor, in order."""
        return self._tensors[name].deltas

    def tensor_of(self, parameter: str) -> str | None:
        """The merged tensor that a parameter of the trained model is; None where there is no such one."""
        return parameter if parameter in self._tensors else self._names.stored_name(parameter)

    def module_in_base(self, module: str) -> str:
        """The base's own name for a module that was trained in another class; ``module`` where the base knows it so."""
        return self._names.module_in_base(module)

    def before(self, name: str, rows: slice = ALL) -> Block:
        """Rows of the base that one tensor starts from."""
        return self.base.read(self._tensors[name].stored, rows)

    def read(self, name: str, rows: slice = ALL) -> Block:
        tensor = self._tensors[name]
        spec = tensor.spec
        start, stop, _ = rows.indices(spec.rows)
        if not tensor.deltas:
            block = self.base.read(tensor.stored, rows)
            _require_finite(block.values, name, "base")
            return block
        if spec.whole:
            return self._fold(tensor, slice(0, spec.rows))[start:stop]
        return self._fold(tensor, slice(start, stop))

    def _fold(self, tensor: MergedTensor, rows: slice) -> Block:
        import torch

        name, deltas = tensor.spec.name, tensor.deltas
        if isinstance(deltas[0], Replace):  # the base's rows do not matter, and there may be fewer of them
            stored = before = weight = deltas[0].apply(torch.empty(0), rows)
            _require_finite(weight, name, "adapter")
            deltas = deltas[1:]
            if not deltas:
                return Block(weight)
        else:
            stored = self._stored(tensor, rows)
            before = weight = stored.float()
        delta_norm = None
        if len(deltas) == 1 and isinstance(deltas[0], Lora) and deltas[0].magnitude is None:
            change = deltas[0].added(rows, self._read_whole(deltas[0].a))
            delta_norm = squared_norm(change)
            weight = change.add_(before)
        else:
            for delta in deltas:
                weight = delta.apply(weight, rows)
        on_grid = stored.dtype == torch_dtype(tensor.spec.dtype)
        rounded = self.survival.add(tensor.spec, before, weight, delta_norm, on_grid)
        if rounded is None:
            _require_finite(before, name, "base")
            _require_finite(weight, name, "adapter, or the sum of base and adapter")
        return Block(weight, rounded)

    def _stored(self, tensor: MergedTensor, rows: slice) -> Tensor:
        """Rows of the base, and zeros for those that the adapters bring."""
        import torch

        own = self._rows[tensor.stored]
        start, stop = min(rows.start, own), min(rows.stop, own)
        values = self.base.read(tensor.stored, slice(start, stop)).values
        more = rows.stop - rows.start - (stop - start)
        return torch.cat([values, values.new_zeros(more, *values.shape[1:])]) if more else values

    def _bind(self, layout: ModelLayout, adapters: Sequence[Adapter]) -> dict[str, list[Delta]]:
        """Deltas by the name of the weight they land in; what lands nowhere is an error that names it."""
        binder = Binder([tensor.spec for tensor in layout.tensors], layout.config)
        bound: dict[str, list[Delta]] = defaultdict(list)
        lost: list[Mismatch] = []
        for adapter, changes in zip(adapters, layout.changes, strict=True):
            for change in changes:
                targets = binder.find(change, adapter)
                if not targets:
                    lost.append(binder.mismatch(change.parameter))
                for name, delta in targets:
                    bound[name].append(delta)
                    if isinstance(delta, PeftDelta):
                        delta.layers.weights[change.parameter] = partial(self._weight_beside, name, delta.layers)
        if lost:
            total = sum(len(changes) for changes in layout.changes)
            hints = "; ".join(dict.fromkeys(mismatch.hint for mismatch in lost))
            raise_all(
                [f"{len(lost)} of {total} changes fit no weight of the base:", *dict.fromkeys(map(str, lost))],
                lambda text: MergeError(text, hints),
            )
        return bound

    def _weight_beside(self, name: str, layers: PeftLayers) -> Tensor:
        """A whole weight as it is before the deltas of ``layers``, for the bias that depends on it."""
        tensor = self._tensors[name]
        weight = self.base.read(tensor.stored).values.float()
        for delta in tensor.deltas:
            if isinstance(delta, PeftDelta) and delta.layers is layers:
                break
            weight = delta.apply(weight, slice(0, tensor.spec.rows))
        return weight


def _fold_shapes(
    tensors: Iterable[MergedTensor], deltas: Mapping[str, Sequence[Delta]], casts: Mapping[DType, DType]
) -> list[MergedTensor]:
    """The tensors with their deltas, and the specs that follow; every shape that does not fit at once."""
    folded, problems = [], []
    for tensor in tensors:
        spec, own = tensor.spec, tuple(deltas.get(tensor.spec.name, ()))
        shape = spec.shape
        try:
            for delta in own:
                shape = delta.shape(shape)
        except ValueError as error:
            problems.append(f"{spec.name}: {error}")
            continue
        whole = spec.whole or any(delta.whole for delta in own)
        spec = TensorSpec(spec.name, shape, casts.get(spec.dtype, spec.dtype), whole)
        folded.append(replace(tensor, spec=spec, deltas=own))
    raise_all(problems, MergeError)
    return folded


def _casts(specs: Sequence[TensorSpec], dtype: DType | None) -> dict[DType, DType]:
    """Which type becomes ``dtype``: the float type that most of the model is in. The others stay as they are."""
    if dtype is None:
        return {}
    total: dict[DType, int] = defaultdict(int)
    for spec in specs:
        if spec.dtype in FLOATS:
            total[spec.dtype] += spec.numel
    return {max(total, key=lambda kind: total[kind]): dtype} if total else {}


def _require_finite(values: Tensor, name: str, origin: str) -> None:
    if values.is_floating_point() and values.element_size() > 1 and not all_finite(values):
        raise MergeError(
            f"{name}: NaN or infinity, from the {origin}", "such weights give nonsense: train or fetch again"
        )
