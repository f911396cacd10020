"""What each of PEFT's methods needs to be merged, by name: natively, through PEFT's own layer, or not at all.

Every method of the installed PEFT stands in one of these tables: ``tests/adapters/test_peft_methods.py`` counts them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora2serve.config import lora_inits
from lora2serve.errors import AdapterError

if TYPE_CHECKING:
    from lora2serve.adapters.adapter import Adapter

NATIVE = ("LORA", "LN_TUNING", "TRAINABLE_TOKENS")
# Merged through PEFT's layer, and held to PEFT's own merge. A method that is not here is refused by name: it might
# read more of the base than one module, and be wrong without a word.
THROUGH_PEFT = (
    "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LOHA",
    "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA",
    "UNILORA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
PROMPT_METHODS = (
    "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
)  # fmt: skip
UNMERGEABLE_METHODS = {
    **dict.fromkeys(PROMPT_METHODS, "it has no weights that could be merged"),
    **dict.fromkeys(("PREFIX_TUNING", "CARTRIDGE"), "its keys and values stand in each layer, and no tokens make them"),
    "BOTTLENECK": "what it adds is no linear function of what a layer gets",
    "LILY": "PEFT has no merge for it",
    "POLY": "it mixes its skills anew for each task",
    "SHADOW": "what it adds depends on the input",
    "XLORA": "it mixes its adapters anew for each token",
    "FROD": "it decomposed the layers of the base together, which cannot be repeated layer by layer",
    "ADAMSS": "it clustered the base's weights from a random start, which cannot be repeated",
}
# Their merge changes the bias too, or nothing else; GLoRA's bias depends on the weight.
BIASED = ("BEFT", "GLORA", "IA3", "ROAD")
BIAS_ALONE = ("BEFT",)

ALONE = "no target can hold it: `lora2serve serve --engine peft` serves it; a LoRA goes into every target"
# LoRA variants whose merge is PEFT's own; the rest of LoRA is folded natively.
VARIANTS = ("use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config")
UNMERGEABLE = {
    "alora_invocation_tokens": "activated LoRA switches on in mid-prompt",
    "arrow_config": "Arrow chooses among adapters for each token",
}


def needs_peft(adapter: Adapter) -> bool:
    """Whether PEFT's own layer must do the merge."""
    if adapter.method not in NATIVE:
        return True
    config = adapter.config
    return any(config.get(key) for key in VARIANTS) or lora_inits.changes_base(lora_inits.init_of(config))


def rebases(adapter: Adapter) -> bool:
    """Whether putting the adapter on takes a part of the base's values into it."""
    if adapter.method != "LORA":
        return adapter.method in ("OSF", "PSOFT")
    return lora_inits.changes_base(lora_inits.init_of(adapter.config)) or bool(adapter.config.get("kasa_config"))


def has_bias(module: object) -> bool:
    """Whether a module of a model adds one."""
    return getattr(module, "bias", None) is not None


def changes_bias(adapter: Adapter) -> bool:
    """Whether the merge changes the bias of a module beside its weight."""
    return adapter.method in BIASED or (adapter.method == "LORA" and bool(adapter.config.get("lora_bias")))


def refuse_unmergeable(adapter: Adapter) -> None:
    """AdapterError for what no merge can hold, with the way out."""
    path, method = adapter.path, adapter.method
    if method in UNMERGEABLE_METHODS:
        raise AdapterError(f"{path}: {method} cannot be merged: {UNMERGEABLE_METHODS[method]}", ALONE)
    if method not in (*NATIVE, *THROUGH_PEFT):
        raise AdapterError(
            f"{path}: peft_type is {method!r}, expected one of {', '.join(sorted((*NATIVE, *THROUGH_PEFT)))}",
            "merge it with PEFT in memory, then export the merged model",
        )
    for key, why in UNMERGEABLE.items():
        if adapter.config.get(key):
            raise AdapterError(f"{path}: {key}: {why}, so it cannot be merged", ALONE)
    init = lora_inits.init_of(adapter.config)
    if lora_inits.changes_base(init) and not lora_inits.is_repeatable(init):
        raise AdapterError(
            f"{path}: init_lora_weights {init!r} changed the base: that cannot be repeated",
            "save it as a plain LoRA by PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL)",
        )
    if init and init not in (*lora_inits.BASE_UNCHANGED, *lora_inits.REPEATABLE):
        expected = ", ".join(sorted((*lora_inits.BASE_UNCHANGED, *lora_inits.REPEATABLE)))
        raise AdapterError(
            f"{path}: init_lora_weights is {init!r}, expected true, false or one of {expected}",
            "unknown to lora2serve: merge with PEFT in memory, then export the merged model",
        )
