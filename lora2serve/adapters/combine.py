"""Several adapters made one, by PEFT's own ``add_weighted_adapter``, without the base's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora2serve.adapters.adapter import Adapter, open_adapter
from lora2serve.adapters.meta_model import meta_model_of, peft_config
from lora2serve.adapters.peft_layers import weightless
from lora2serve.adapters.peft_methods import UNMERGEABLE, VARIANTS, needs_peft
from lora2serve.config.lora_inits import init_of
from lora2serve.errors import MergeError, raise_all
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.checkpoint import Checkpoint


def combine(
    adapters: Sequence[Path],
    base: Checkpoint,
    method: str,
    weights: Sequence[float],
    density: float,
    out: Path,
) -> Path:
    """Write the combination of ``adapters`` as a PEFT directory below ``out``; the directory.

    ``cat`` and ``svd`` (at full rank) keep the sum of the deltas; ``linear`` combines A and B apart, which is another
    thing; ``ties`` and ``dare`` drop all but a share of ``density`` of the values (arXiv 2306.01708, 2311.03099).
    Anything in an adapter that PEFT's combination would leave out is an error that names it.
    """
    import torch

    if len(weights) != len(adapters):
        raise MergeError(f"{len(weights)} weights for {len(adapters)} adapters", "give one weight for each --adapter")
    opened = [open_adapter(path) for path in adapters]
    raise_all([problem for adapter in opened for problem in _left_out(adapter, base)], _refusal)
    names = [f"a{number}" for number in range(len(opened))]
    adapted = _put_on(opened, names, base.config)
    options = {"density": density} if "ties" in method or "dare" in method else {}
    torch.manual_seed(0)  # DARE drops at random: the same input gives the same model
    try:
        adapted.add_weighted_adapter(names, list(weights), "combined", combination_type=method, **options)
    except ValueError as error:
        raise MergeError(
            f"--combine {method}: {str(error).splitlines()[0]}", "adapters of different ranks: use cat or svd"
        ) from error
    # without the embeddings, which are zeros here
    adapted.save_pretrained(str(out), selected_adapters=["combined"], save_embedding_layers=False)
    return out / "combined"


def _refusal(text: str) -> MergeError:
    return MergeError(text, "without --combine the adapters are folded in full, one after another")


def _left_out(adapter: Adapter, base: Checkpoint) -> Iterator[str]:
    """What ``add_weighted_adapter`` combines wrongly or not at all: anything but plain A and B."""
    config, path = adapter.config, adapter.path
    if not adapter.is_lora:
        yield f"{path}: {adapter.method}: PEFT combines LoRA only"
        return
    if needs_peft(adapter):
        odd = next((key for key in VARIANTS if config.get(key)), f"init_lora_weights {init_of(config)!r}")
        yield f"{path}: {odd}: its A and B alone are not what was trained"
    for key in (*UNMERGEABLE, "layer_replication", "target_parameters"):
        if config.get(key):
            yield f"{path}: {key} is lost when adapters are combined"
    kinds = {kind for layer in adapter.layers.values() for kind in layer.parts}
    if "lora_magnitude_vector" in kinds:
        yield f"{path}: DoRA's magnitudes are lost when adapters are combined"
    if "trainable_tokens_delta" in kinds:
        yield f"{path}: trained tokens are lost when adapters are combined"
    for name, part in adapter.full.items():
        if not _is_copy(name, part.read(), base):
            yield f"{path}: {name} was trained in full, which is lost when adapters are combined"


def _is_copy(name: str, value: Any, base: Checkpoint) -> bool:
    """PEFT saves an embedding that LoRA is on as a whole, though it is still the base's."""
    import torch

    return name in base and torch.equal(base.read(name).values.float(), value)


def _put_on(adapters: Sequence[Adapter], names: Sequence[str], config: JsonObject) -> Any:
    """The adapters' A and B on a model without weights."""
    from peft import get_peft_model, set_peft_model_state_dict

    adapted: Any = None
    for name, adapter in zip(names, adapters, strict=True):
        chosen = peft_config(adapter)
        if adapted is None:
            adapted = get_peft_model(weightless(meta_model_of(adapter, config)), chosen, adapter_name=name)
        else:
            adapted.add_adapter(name, chosen)
        parts = [part for layer in adapter.layers.values() for part in layer.parts.values()]
        set_peft_model_state_dict(adapted, {part.name: part.read() for part in parts}, adapter_name=name)
    return adapted
