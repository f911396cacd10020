"""PEFT's configuration of the recipe's adapter, with what the model must say: its projections, norms, embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.adapters.target_presets import named
from lora2serve.config.method_options import PATH, config_class, read_options
from lora2serve.config.recipe import TrainRecipe
from lora2serve.config.train_methods import LORA, PROMPTS, STATES
from lora2serve.errors import TrainError, first_line
from lora2serve.training.lora_targets import (
    attention_modules,
    linear_modules,
    other_towers,
    refuse_unknown,
    suffixes,
    targets,
)
from lora2serve.training.model import lora_config
from lora2serve.training.ways_back import FUSED, KEYS_AND_VALUES, back_projections, bottleneck_modules

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

VIRTUAL_TOKENS = 20  # as in PEFT's examples
UNKNOWN_STEPS = 1 << 40  # of AdaLoRA, until the rows are counted: ``rank_budget``


def adapter_config(
    model: PreTrainedModel, recipe: TrainRecipe, base: Path, new_tokens: Sequence[int] = ()
) -> PeftConfig:
    """Of the recipe's method, for ``model``, which is that of the directory ``base``.

    new_tokens: ids of ``data.new_tokens``, whose rows a LoRA trains beside it.
    TrainError for a module that the model does not have, and for options that PEFT does not put together.
    """
    if recipe.method == LORA:
        return lora_config(model, recipe, new_tokens)
    chosen = config_class(recipe.method)
    options = read_options(recipe.method, recipe.options, [])
    known = chosen.__dataclass_fields__
    if recipe.method in (*PROMPTS, *STATES):
        options = _in_front(recipe.method, options, base)
    elif "target_modules" in known:
        options = {**options, **_targets(model, recipe.method, options)}
    if "exclude_modules" in known and "exclude_modules" not in options:
        options["exclude_modules"] = other_towers(model)
    if recipe.method == "adalora":
        options["total_step"] = UNKNOWN_STEPS
    _refuse_numbers(model, options)
    saved = options.get("modules_to_save")
    if isinstance(saved, Sequence):
        refuse_unknown(f"{PATH}.modules_to_save", list(saved), [name for name, _ in model.named_modules()])
    try:
        made: PeftConfig = chosen(task_type="CAUSAL_LM", **options)
    except (ValueError, TypeError) as error:
        raise TrainError(f"{PATH}: {first_line(error)}") from error
    return made


def _refuse_numbers(model: PreTrainedModel, options: Mapping[str, object]) -> None:
    """TrainError for tokens that the model does not have, and for none or too many in front of a prompt."""
    rows = model.get_input_embeddings().weight.shape[0]
    for name in ("cpt_token_ids", "token_indices"):
        ids = options.get(name)
        wrong = [n for n in ids if isinstance(n, int) and not 0 <= n < rows] if isinstance(ids, Sequence) else []
        if wrong:
            raise TrainError(f"{PATH}.{name}: {wrong[0]}, expected ids of tokens, 0 to {rows - 1}")
    count = options.get("num_virtual_tokens")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNKNOWN_STEPS
    if isinstance(count, int) and not 0 < count < most:
        raise TrainError(
            f"{PATH}.num_virtual_tokens: {count}, expected 1 to {most - 1}",
            "they take places of the model's context, as the tokens of a prompt do",
        )


def _in_front(method: str, options: Mapping[str, object], base: Path) -> dict[str, object]:
    """Of what comes before a row: how long it is, and by which tokenizer its first text is read."""
    counted = {} if method == "cpt" else {"num_virtual_tokens": VIRTUAL_TOKENS}
    text = {"tokenizer_name_or_path": str(base)} if options.get("prompt_tuning_init") == "TEXT" else {}
    return {**counted, **text, **options}


def _targets(model: PreTrainedModel, method: str, options: Mapping[str, object]) -> dict[str, object]:
    """``target_modules``, and what else follows from the model's modules."""
    wanted, key = options.get("target_modules"), f"{PATH}.target_modules"
    find: Mapping[str, Callable[[PreTrainedModel], dict[str, object]]] = {
        "ia3": ia3_modules, "ln_tuning": _norms, "trainable_tokens": _embedding,
    }  # fmt: skip
    if wanted is None and method == "bottleneck":
        return _bottlenecks(model, str(options.get("kind", "houlsby")))
    if wanted is None and method in find:
        return find[method](model)
    if method in ("ln_tuning", "bottleneck"):  # modules that are no linear layers
        names = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, Sequence) else []
        refuse_unknown(key, names, [name for name, _ in model.named_modules()])
        return {}
    preset = wanted if isinstance(wanted, str) else tuple(wanted) if isinstance(wanted, Sequence) else "all-linear"
    names = targets(model, preset, key)
    if method == "ia3" and "feedforward_modules" not in options:
        paths = linear_modules(model)
        back = set(back_projections(model, paths))
        return {
            "target_modules": names,
            "feedforward_modules": [n for n in names if back.issuperset(named(paths, [n]))],
        }
    return {"target_modules": names}


def ia3_modules(model: PreTrainedModel) -> dict[str, object]:
    """What IA3's paper scales: keys and values of the attention, and what goes into the way back from the MLP."""
    paths = linear_modules(model)
    attention = attention_modules(model, paths)
    scaled = [path for path in attention if path.rsplit(".", 1)[-1] in (*KEYS_AND_VALUES, *FUSED)]
    if not scaled:
        leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
        raise TrainError(
            "train.method: ia3 finds no keys and values of an attention in this model",
            f"name {PATH}.target_modules, and those that scale their input in {PATH}.feedforward_modules, "
            f"of {', '.join(leaves)}",
        )
    back = suffixes(back_projections(model, paths), paths)
    return {"target_modules": [*suffixes(scaled, paths), *back], "feedforward_modules": back}


def _norms(model: PreTrainedModel) -> dict[str, object]:
    """Every norm of the language model."""
    import re

    towers = other_towers(model)
    modules = dict(model.named_modules())
    norms = [
        name
        for name, module in modules.items()
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None
        and not (towers and re.fullmatch(towers, name))
    ]  # fmt: skip
    return {"target_modules": suffixes(norms, [name for name in modules if name])}


def _bottlenecks(model: PreTrainedModel, kind: str) -> dict[str, object]:
    found = bottleneck_modules(model, kind)
    if not found:
        raise TrainError(
            "train.method: bottleneck finds no way out of an MLP in this model", f"name {PATH}.target_modules"
        )
    return {"target_modules": found}


def _embedding(model: PreTrainedModel) -> dict[str, object]:
    table = model.get_input_embeddings()
    return {"target_modules": [next(name for name, module in model.named_modules() if module is table)]}
