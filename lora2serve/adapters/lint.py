"""Can vLLM serve this adapter as it is, beside others on one base? Each rule by name, with the way out.

The rules are those of vLLM 0.32.0: ``vllm/lora/peft_helper.py`` (config), ``lora/lora_model.py`` and
``lora/utils.py`` (tensor names), ``config/lora.py`` (ranks), ``lora/layers/logits_processor.py`` (vocabulary).
Reads headers only; needs neither torch nor vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora2serve.adapters.kind_targets import Way, way
from lora2serve.adapters.peft_methods import ALONE
from lora2serve.adapters.vllm_support import lora_class
from lora2serve.config import lora_inits
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import TensorSpec

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks
HEAD_LIMIT = 258048  # tokens that the LoRA kernel of the head can hold

CLASSIFIER = re.compile(r"(?:^|\.)(score|classifier)\.(weight|bias)$")  # the only modules that may be trained in full

# What gets the adapter served: `export --target adapter` by itself, the same with --as-lora-rank, only a merge,
# tokens of the vocabulary, nothing before PEFT has made a plain LoRA of it, or PEFT alone.
Fix = Literal["export", "extract", "merge", "prompt", "convert", "peft"]
WAY_OUT: dict[Fix, str] = {
    "export": "export --target adapter rewrites it, without loss",
    "extract": "export --target vllm merges it; --target adapter --as-lora-rank R makes an approximate plain LoRA",
    "merge": "export --target vllm merges it",
    "prompt": "export --target vllm holds it as tokens in front of every prompt",
    "peft": ALONE,
    "convert": "no export can hold it: save it as a plain LoRA by PEFT's "
    "save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL)",
}


@dataclass(frozen=True)
class Finding:
    """One rule that the adapter breaks."""

    rule: str
    message: str
    fix: Fix

    @property
    def way_out(self) -> str:
        """The command that gets it served."""
        return WAY_OUT[self.fix]


def lint(config: JsonObject, tensors: Sequence[TensorSpec], base: JsonObject) -> list[Finding]:
    """Every broken rule. ``tensors`` may be empty, before training; ``base`` is the base's config.json."""
    kind = str(config.get("peft_type", "LORA"))
    if kind != "LORA":
        return [Finding("method", f"{kind} is not LoRA", _fix_of(kind))]
    return [
        *_config_rules(config),
        *_rank_rules(config),
        *_tensor_rules(tensors, base),
        *_model_rules(config, tensors, base),
    ]


def _fix_of(kind: str) -> Fix:
    """Of another kind than LoRA, by the table of kinds and targets."""
    if way(kind, "adapter") == "lora":
        return "extract"
    fixes: dict[Way, Fix] = {"merged": "merge", "prompt": "prompt"}
    return fixes.get(way(kind, "vllm"), "peft")


def next_rank(rank: int) -> int | None:
    """The smallest rank of the engine's list that holds ``rank``; None above the largest."""
    return next((allowed for allowed in RANKS if allowed >= rank), None)


def max_lora_rank(rank: int) -> int:
    """vLLM's ``--max-lora-rank`` that holds ``rank``; its largest where none does."""
    return next_rank(rank) or RANKS[-1]


def ranks(config: JsonObject) -> list[int]:
    """``r`` and every rank of ``rank_pattern``."""
    return [int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values())]


def _config_rules(config: JsonObject) -> Iterator[Finding]:
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if missing:
        yield Finding("fields", f"adapter_config.json lacks {', '.join(missing)}", "export")
    flags: tuple[tuple[str, str, str, Fix], ...] = (
        ("dora", "use_dora", "DoRA rescales each row of the base, which the LoRA kernels do not", "extract"),
        ("lora-bias", "lora_bias", "lora_bias puts a bias on B", "merge"),
        ("alora", "alora_invocation_tokens", "activated LoRA switches on in mid-prompt", "merge"),
        ("layer-replication", "layer_replication", "layer_replication is another architecture", "merge"),
        ("bdlora", "use_bdlora", "block-diagonal LoRA", "extract"),
        ("qalora", "use_qalora", "QALoRA pools its input", "extract"),
    )
    yield from (Finding(rule, words, fix) for rule, key, words, fix in flags if config.get(key))
    if config.get("bias", "none") != "none":
        yield Finding("bias", f"bias={config['bias']!r}: trained biases have no place in an adapter", "merge")
    init = lora_inits.init_of(config)
    if init and init not in lora_inits.BASE_UNCHANGED:
        message = f"init_lora_weights={init!r} took a part of the base into the adapter"
        yield Finding("init", message, "export" if lora_inits.is_repeatable(init) else "convert")
    saved = [name for name in config.get("modules_to_save") or [] if name not in ("classifier", "score")]
    if saved:
        yield Finding("modules-to-save", f"trained in full: {', '.join(saved)}", "extract")
    if config.get("trainable_token_indices"):
        yield Finding("trained-tokens", "single tokens of the embedding were trained", "extract")


def _rank_rules(config: JsonObject) -> Iterator[Finding]:
    if not isinstance(config.get("r"), int):
        return
    all_ranks = ranks(config)
    if min(all_ranks) <= 0:
        yield Finding("rank", f"rank {min(all_ranks)}, expected at least 1", "merge")
    elif next_rank(max(all_ranks)) is None:
        yield Finding("rank", f"rank {max(all_ranks)} is above the engine's largest, {RANKS[-1]}", "extract")


def _tensor_rules(tensors: Sequence[TensorSpec], base: JsonObject) -> Iterator[Finding]:
    unsupported = [spec.name for spec in tensors if not _is_lora_tensor(spec.name)]
    if unsupported:
        more = f" and {len(unsupported) - 3} more" if len(unsupported) > 3 else ""
        yield Finding("tensors", f"no LoRA weights: {', '.join(unsupported[:3])}{more}", "extract")
    odd = [spec.name for spec in tensors if ".lora_" in spec.name and len(spec.shape) > 2]
    if odd:
        yield Finding("tensors", f"LoRA on a convolution: {odd[0]}", "merge")
    heads = {match[1]: match[2] for spec in tensors if (match := CLASSIFIER.search(spec.name))}
    weights = {match[1] for spec in tensors if (match := CLASSIFIER.search(spec.name)) and match[2] == "weight"}
    if len(heads) > 1:
        yield Finding(
            "modules-to-save", f"{len(heads)} heads trained in full, one at most: {', '.join(heads)}", "merge"
        )
    if set(heads) - weights:
        yield Finding(
            "modules-to-save", f"{', '.join(sorted(set(heads) - weights))}: a bias without its weight", "merge"
        )
    vocabulary = _text(base).get("vocab_size")
    for spec in tensors:
        if spec.name.endswith("lora_embedding_A") and vocabulary and spec.shape[-1] != vocabulary:
            words = f"{spec.name} is for {spec.shape[-1]} tokens, the base has {vocabulary}"
            yield Finding("embedding-vocabulary", words, "merge")


def _model_rules(config: JsonObject, tensors: Sequence[TensorSpec], base: JsonObject) -> Iterator[Finding]:
    architecture = (base.get("architectures") or [""])[0]
    support = lora_class(architecture)
    if not architecture or support is None:  # a class the table does not know: the engine's generic one takes LoRA
        return
    if not support.lora:
        yield Finding("model", f"{architecture} takes no LoRA in vLLM", "merge")
        return
    vocabulary = int(_text(base).get("vocab_size") or 0)
    named = {_module(spec.name) for spec in tensors} or _targets(config)  # the tensors are the truth
    for part in ("embed_tokens", "lm_head"):
        if part in named and part not in support.embeddings:
            yield Finding("target-modules", f"{architecture} takes no LoRA on {part}", "merge")
        elif part == "lm_head" and part in named and vocabulary > HEAD_LIMIT:
            words = f"LoRA on a head of {vocabulary} tokens, {HEAD_LIMIT} at most"
            yield Finding("head-vocabulary", words, "merge")


def _is_lora_tensor(name: str) -> bool:
    """vLLM's ``parse_fine_tuned_lora_name``, and the base's embeddings that PEFT saves along, which it skips."""
    if re.search(r"\.(embed_tokens|lm_head)\.base_layer\.weight$", name):
        return True
    parts = name.split(".")
    if parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
        return True
    if len(parts) < 2 or parts[-1] not in ("weight", "bias"):
        return False
    return (parts[-2] in ("lora_A", "lora_B") and parts[-1] == "weight") or parts[-2] in ("score", "classifier")


def _module(name: str) -> str:
    """``lm_head`` for ``base_model.model.lm_head.lora_A.weight``."""
    return re.split(r"\.lora_", name)[0].rsplit(".", 1)[-1]


def _targets(config: JsonObject) -> set[str]:
    named = config.get("target_modules") or []
    return {str(name).rsplit(".", 1)[-1] for name in ([named] if isinstance(named, str) else named)}


def _text(base: JsonObject) -> JsonObject:
    text = base.get("text_config")
    return text if isinstance(text, Mapping) and "vocab_size" not in base else base
