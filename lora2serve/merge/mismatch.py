"""Why a change of an adapter fits no weight of a base, and what to do about it: one reason for each, the true one."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lora2serve.adapters.meta_model import StoredParameter
from lora2serve.errors import did_you_mean

HEADS = re.compile(r"(^|\.)(score|classifier|qa_outputs|v_head|value_head)\.")
LAYER = re.compile(r"(^|\.)(layers|h|blocks|block)\.(\d+)\.")
OTHER_BASE = "this adapter belongs to another base: name it with --base"
IN_MEMORY = "merge it with PEFT in memory, and export the merged model"


@dataclass(frozen=True)
class Mismatch:
    """One change that lands nowhere."""

    parameter: str
    reason: str
    hint: str

    def __str__(self) -> str:
        return f"{self.parameter}: {self.reason}"


def explain(
    parameter: str, stored: Collection[str], sources: Sequence[StoredParameter], classes: Sequence[str]
) -> Mismatch:
    """``sources``: the stored tensors that become the parameter; ``classes``: those of transformers that have it."""
    if HEADS.search(parameter):
        return Mismatch(
            parameter,
            "the adapter brings a head for classes or values, the base is a language model without one",
            "--base names the classifier it was trained on: a model saved with its head",
        )
    if sources:
        shown = ", ".join(source.stored for source in sources[:2]) + (", ..." if len(sources) > 2 else "")
        count = f"{len(sources)} tensors" if len(sources) > 1 else "a tensor of another form"
        return Mismatch(parameter, f"the base stores it as {count} ({shown}), which this change is not for", IN_MEMORY)
    layers = [int(match[3]) for name in stored if (match := LAYER.search(name))]
    layer = LAYER.search(parameter)
    if layer and layers and int(layer[3]) > max(layers):
        return Mismatch(parameter, f"the adapter changes layer {layer[3]}, the base has {max(layers) + 1}", OTHER_BASE)
    if classes:
        return Mismatch(
            parameter,
            f"transformers loads no stored weight into it as {classes[0]}: it was trained on random values",
            "train again in the base's own class",
        )
    near = did_you_mean(parameter, stored)
    return Mismatch(parameter, f"the adapter changes it, the base has no such weight{near}", OTHER_BASE)
