"""PEFT's names for ``init_lora_weights``, by what each does to the base (``peft/tuners/lora/config.py``)."""

from __future__ import annotations

import re
from collections.abc import Mapping

BASE_UNCHANGED = ("gaussian", "eva", "orthogonal", "mica")  # the base stays as it was
REPEATABLE = ("pissa", "olora")  # took a part of the base into the adapter; PEFT repeats that whenever it puts it on
UNREPEATABLE = ("corda", "loftq", "lora_ga", "pissa_niter")  # the same, from data or random numbers that are gone

# What a recipe may name: those that need no data of their own.
WITHOUT_BASE = ("default", "gaussian")  # that do not look at the weights of the base
TRAINABLE = (*WITHOUT_BASE, "orthogonal", "olora", "pissa", "pissa_niter_N")


def init_of(config: Mapping[str, object]) -> str:
    """``init_lora_weights`` of an adapter_config.json where it is a name, in small letters; else ``""``."""
    init = config.get("init_lora_weights")
    return init.lower() if isinstance(init, str) else ""


def is_trainable(init: str) -> bool:
    """Whether a recipe may name it: ``pissa_niter_16`` counts as ``pissa_niter_N``."""
    return re.sub(r"(?<=niter_)\d+", "N", init) in TRAINABLE


def is_repeatable(init: str) -> bool:
    """Whether what it took from the base can be computed again from the base."""
    return init.startswith(REPEATABLE) and not init.startswith(UNREPEATABLE)


def changes_base(init: str) -> bool:
    """Whether it took a part of the base into the adapter."""
    return init.startswith((*REPEATABLE, *UNREPEATABLE))
