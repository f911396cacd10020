"""A language model by transformers, also that of a model which sees and has no class for text alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def language_class(config: PretrainedConfig) -> type[AutoModelForCausalLM]:
    """What makes a causal language model of ``config``: that of Qwen2.5-VL, Mistral Small 3 and their kin has eyes."""
    import transformers

    kind = type(config)
    sees = kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "vision_config")
    alone = sees and kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    chosen: type[AutoModelForCausalLM] = (
        transformers.AutoModelForImageTextToText if alone else transformers.AutoModelForCausalLM
    )
    return chosen


def load_language_model(path: str | Path, **options: object) -> PreTrainedModel:
    """The model of a directory; ``options`` are those of ``from_pretrained``, whose errors come through."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(path))
    model: PreTrainedModel = language_class(config).from_pretrained(str(path), **options)
    return model


def weightless_language_model(config: PretrainedConfig, **options: object) -> PreTrainedModel:
    """The model of a config, with weights that mean nothing, on the device of the context."""
    model: PreTrainedModel = language_class(config).from_config(config, trust_remote_code=False, **options)
    return model
