"""The presets of ``train.lora.targets``, over the names of a model's linear layers, and what none of them contains."""

from __future__ import annotations

from collections.abc import Sequence

QV = ("q_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "in_proj_qkv")
# What sees and hears, and what leads from there into the language model.
OTHER_TOWERS = ("vision", "visual", "audio", "image", "multi_modal", "connector")


def preset_modules(preset: str, paths: Sequence[str], attention: Sequence[str] = ()) -> list[str]:
    """Those of ``paths``, the linear layers of a model, that a preset means.

    attention: those of the attention, where their names do not say so.
    """
    attention = [path for path in paths if "attn" in path or "attention" in path] or list(attention)
    qv = [path for path in paths if path.rsplit(".", 1)[-1] in QV]
    in_attention = set(attention)
    return {
        "qv": qv,
        "attention": attention,
        "qv-mlp": qv + [path for path in paths if path not in in_attention],
        "all-linear": list(paths),
    }[preset]


def in_other_tower(path: str) -> bool:
    """Whether a module belongs to what sees or hears beside a language model, which training on text does not run."""
    return any(tower in path for tower in OTHER_TOWERS)


def named(paths: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Those of ``paths`` that the names of an adapter's configuration mean."""
    return [path for path in paths if any(f".{path}".endswith(f".{target}") for target in targets)]
