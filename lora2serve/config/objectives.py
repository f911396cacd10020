"""What ``train.objective`` may name, and ``train.preference``: the fields of TRL's configuration of that objective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, cast

from lora2serve.config import lora_inits
from lora2serve.config.bounds import Bound, Positive, Range
from lora2serve.config.method_options import schema_class, yaml_value
from lora2serve.config.schema import build, show
from lora2serve.config.train_methods import LAYERS, LORA
from lora2serve.errors import did_you_mean

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from lora2serve.config.recipe import Recipe

Objective = Literal["sft", "dpo", "kto"]
SFT: Objective = "sft"
PATH = "train.preference"
# What the run itself says, or what has no use with an adapter: models, rows, lengths, a reference of its own.
SET_HERE = (
    "learning_rate", "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "dataset_num_proc", "max_length",
    "truncation_mode", "padding_free", "pad_to_multiple_of", "precompute_ref_log_probs", "precompute_ref_batch_size",
    "activation_offloading", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "pad_token",
)  # fmt: skip
BOUNDS: Mapping[str, Bound] = {
    "beta": Positive(1e3),
    "ld_alpha": Range(0.0, 1.0),
    "label_smoothing": Range(0.0, 0.499),
    "discopop_tau": Positive(1e3),
    "desirable_weight": Positive(1e3),
    "undesirable_weight": Positive(1e3),
}
# Losses of TRL that are a mean over pairs, each by itself: whatever pairs go through the model with it.
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm",
)  # fmt: skip
WHOLE_BATCH: Mapping[str, str] = {
    "aot": "it sorts the pairs of a batch, which go through the model in pieces here",
    "aot_unpaired": "it sorts the answers of a batch, which go through the model in pieces here",
    "sft": "its mean is over the tokens of a batch, which goes through the model in pieces here",
}
WITHOUT_DIVERGENCE = "apo_zero_unpaired"
LABEL_LOSSES = ("kto", WITHOUT_DIVERGENCE)  # of kto; but for the latter they estimate a divergence over a batch
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")


def config_class(objective: Objective) -> type[TrainingArguments]:
    """TRL's configuration of an objective."""
    from trl import DPOConfig, KTOConfig, SFTConfig

    return cast("type[TrainingArguments]", {"sft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig}[objective])


def option_names(objective: Objective) -> list[str]:
    """The fields of ``train.preference``."""
    from transformers import TrainingArguments

    chosen = config_class(objective)
    base = {item.name for item in fields(TrainingArguments)}
    own = [item.name for item in fields(chosen) if item.name not in base and item.name not in SET_HERE]
    return own


def read_preference(objective: Objective, options: Mapping[str, object], problems: list[str]) -> dict[str, object]:
    """The fields as TRL takes them; ``problems`` gets a line for each that its class does not have or not so.

    Without TRL nothing is checked: training says what is not installed.
    """
    if objective == SFT or find_spec("trl") is None:
        return dict(options)
    before = len(problems)
    built = build(_options_class(objective), dict(options), problems, path=PATH)
    values = {name: yaml_value(getattr(built, name)) for name in options if hasattr(built, name)}
    if len(problems) == before:
        problems += _of_numbers(values)
        problems += _of_label_loss(values) if objective == "kto" else _of_loss(values)
    return values


@cache
def _options_class(objective: Objective) -> type[object]:
    return schema_class(config_class(objective), option_names(objective))


def problems_of_objective(recipe: Recipe) -> list[str]:
    """What of a recipe its objective rules out, one line each."""
    train = recipe.train
    if train.objective == SFT:
        names = ", ".join(map(show, train.preference))
        return [f"{PATH}: {names}, expected none with train.objective: sft"] if names else []
    problems = list(_of_other_sections(recipe))
    read_preference(train.objective, train.preference, problems)
    return problems


def _of_other_sections(recipe: Recipe) -> Iterator[str]:
    train, data, objective = recipe.train, recipe.data, recipe.train.objective
    if data.packing:
        yield f"data.packing: true, but {objective} compares whole answers: leave it out"
    if not data.completion_only:
        yield f"data.completion_only: false, but {objective} compares answers, and not their prompt: leave it out"
    if train.method not in (LORA, *LAYERS):
        yield (
            f"train.method: {train.method}, but {objective} compares with the base, the adapter switched off: expected "
            "lora or another method of layers"
        )
    if train.from_adapter:
        yield (
            f"train.from_adapter: {train.from_adapter}, but {objective} compares with the base, the adapter off: "
            "name its merged export in model.path (`lora2serve export --target vllm`)"
        )
    if lora_inits.changes_base(train.lora.init):
        yield (
            f"train.lora.init: {train.lora.init}, but {objective} compares with the base, of which that init takes a "
            "part out: set default or gaussian"
        )
    if objective == "kto" and train.batch_size == 1 and train.preference.get("loss_type") != WITHOUT_DIVERGENCE:
        yield "train.batch_size: 1, but kto compares the rows of a batch with each other's answers: expected 2 at least"
    if train.lora.dropout and train.preference.get("disable_dropout", True) is True:
        yield (
            f"train.lora.dropout: {train.lora.dropout}, but {objective} computes without dropout: leave it out, or set "
            f"{PATH}.disable_dropout: false"
        )


def _of_numbers(values: Mapping[str, object]) -> Iterator[str]:
    for name in sorted(values.keys() & BOUNDS.keys()):
        if reason := BOUNDS[name].problem(values[name]):
            yield f"{PATH}.{name}: {show(values[name])}, {reason}"


def _of_label_loss(values: Mapping[str, object]) -> Iterator[str]:
    loss = values.get("loss_type", LABEL_LOSSES[0])
    if loss not in LABEL_LOSSES:
        near = did_you_mean(str(loss), LABEL_LOSSES)
        yield f"{PATH}.loss_type: {show(loss)}, expected one of {', '.join(LABEL_LOSSES)}{near}"


def _of_loss(values: Mapping[str, object]) -> Iterator[str]:
    """What TRL would say only in the first step, or never."""
    losses, weights = values.get("loss_type") or ["sigmoid"], values.get("loss_weights")
    assert isinstance(losses, list)
    for name in losses:
        if name in WHOLE_BATCH:
            yield f"{PATH}.loss_type: {name} is not trained here: {WHOLE_BATCH[name]}"
        elif name not in LOSSES:
            yield f"{PATH}.loss_type: {show(name)}, expected one of {', '.join(LOSSES)}{did_you_mean(name, LOSSES)}"
    if isinstance(weights, list) and len(weights) != len(losses):
        yield f"{PATH}.loss_weights: {len(weights)} numbers, expected one for each loss_type: {len(losses)}"
    divergence = values.get("f_divergence_type", DIVERGENCES[0])
    if divergence not in DIVERGENCES:
        near = did_you_mean(str(divergence), DIVERGENCES)
        yield f"{PATH}.f_divergence_type: {show(divergence)}, expected one of {', '.join(DIVERGENCES)}{near}"
    elif divergence != DIVERGENCES[0] and not set(losses) <= set(WITH_DIVERGENCE):
        yield f"{PATH}.f_divergence_type: {divergence}, expected {DIVERGENCES[0]} with loss_type: {', '.join(losses)}"
    if "exo_pair" in losses and not values.get("label_smoothing"):
        yield f"{PATH}.label_smoothing: missing: exo_pair needs more than 0, such as 0.001"
