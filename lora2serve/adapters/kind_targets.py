"""Which export can hold which kind of adapter: one table for `train`, `export` and the docs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lora2serve.adapters import soft_prompt
from lora2serve.adapters.peft_methods import ALONE, NATIVE, THROUGH_PEFT, UNMERGEABLE_METHODS
from lora2serve.artifacts.manifest import ADAPTER_TARGETS
from lora2serve.errors import AdapterError, raise_all

MERGED_TARGETS = ("vllm", "gguf", "ollama", "lmstudio")
TARGETS = (*MERGED_TARGETS, *ADAPTER_TARGETS)
LORA = "LORA"
# What changes no matrix, so that no LoRA comes near it.
NO_MATRIX = ("BEFT", "LN_TUNING")

# merged: folded into the weights. prompt: as tokens of the vocabulary that begin every prompt. adapter: beside its
# base, as it is. lora: the same, as the nearest LoRA of a rank.
Way = Literal["merged", "prompt", "adapter", "lora", "no"]


def way(kind: str, target: str) -> Way:
    """How a target holds an adapter of PEFT's ``peft_type``."""
    if target in MERGED_TARGETS:
        return "prompt" if kind in soft_prompt.KINDS else "merged" if kind in (*NATIVE, *THROUGH_PEFT) else "no"
    if kind == LORA:
        return "adapter"
    nearest = target == "adapter" and kind in (*NATIVE, *THROUGH_PEFT) and kind not in NO_MATRIX
    return "lora" if nearest else "no"


def why_not(kind: str, target: str) -> str:
    """The reason of a "no", or of "lora"."""
    if kind in soft_prompt.KINDS:
        return f"{kind} is no LoRA, but tokens in front of a prompt"
    if kind in UNMERGEABLE_METHODS:
        return UNMERGEABLE_METHODS[kind]
    if kind in NO_MATRIX:
        return f"{kind} changes no matrix, and such an adapter holds LoRAs of matrices"
    return f"{kind} is not LoRA"


def way_out(kind: str, target: str) -> str:
    """What to do instead."""
    if kind not in (*NATIVE, *THROUGH_PEFT, *soft_prompt.KINDS):
        return ALONE
    return "--target vllm, gguf, ollama or lmstudio holds it in the model" if target in ADAPTER_TARGETS else ""


def serving_targets(kind: str) -> dict[Way, list[str]]:
    """The targets by how they hold it."""
    ways: dict[Way, list[str]] = {}
    for target in TARGETS:
        ways.setdefault(way(kind, target), []).append(target)
    return ways


def as_named(target: str) -> str:
    """A target as a user names it behind --target."""
    return "ollama --as adapter" if target == "ollama-adapter" else target


def refuse_targets(kinds: Sequence[tuple[str, str]], targets: Sequence[str], *, as_lora: bool) -> None:
    """AdapterError for each target that cannot hold an adapter: pairs of what it is called and its ``peft_type``.

    A target of another package is not known here. ``as_lora``: the nearest LoRA will do.
    """
    problems, hints = [], []
    for name, kind in kinds:
        for target in targets:
            if target in TARGETS and not _holds(kind, target, as_lora=as_lora):
                problems.append(f"{name}: {kind} cannot become --target {as_named(target)}: {why_not(kind, target)}")
                nearest = "--as-lora-rank R makes an approximate LoRA of it; " if way(kind, target) == "lora" else ""
                hints.append(nearest + way_out(kind, target))
    raise_all(problems, lambda text: AdapterError(text, "; ".join(dict.fromkeys(hints))))


def _holds(kind: str, target: str, *, as_lora: bool) -> bool:
    held = way(kind, target)
    return held in ("merged", "prompt", "adapter") or (held == "lora" and as_lora)
