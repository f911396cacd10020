"""Several adapters made one, by PEFT's own ``add_weighted_adapter``, without the base's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lora2serve.errors import MergeError
from lora2serve.peft_layers import weightless
from lora2serve.skeleton import meta_model

Method = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"
]
METHODS: tuple[str, ...] = get_args(Method)


def combine(
    adapters: Sequence[Path],
    config: Mapping[str, Any],
    method: str,
    weights: Sequence[float],
    density: float,
    out: Path,
) -> Path:
    """Write the combination of ``adapters`` as a PEFT directory below ``out``; the directory.

    ``cat`` and ``svd`` (at full rank) keep the sum of the deltas; ``linear`` combines A and B apart, which is another
    thing; ``ties`` and ``dare`` drop all but a share of ``density`` of the values (arXiv 2306.01708, 2311.03099).
    """
    import torch
    from peft import PeftModel

    if len(weights) != len(adapters):
        raise MergeError(f"{len(weights)} weights for {len(adapters)} adapters", "give one weight for each --adapter")
    model = weightless(meta_model(config))
    names = [f"a{number}" for number in range(len(adapters))]
    adapted = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name=names[0])
    for name, path in zip(names[1:], adapters[1:], strict=True):
        adapted.load_adapter(str(path), adapter_name=name)
    given = {"density": density} if "ties" in method or "dare" in method else {}
    torch.manual_seed(0)  # DARE drops at random: the same input gives the same model
    try:
        adapted.add_weighted_adapter(names, list(weights), "combined", combination_type=method, **given)
    except ValueError as error:
        raise MergeError(
            f"--combine {method}: {str(error).splitlines()[0]}", "adapters of different ranks: use cat or svd"
        ) from error
    adapted.save_pretrained(str(out), selected_adapters=["combined"])
    return out / "combined"
