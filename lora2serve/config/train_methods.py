"""What ``train.method`` may name: PEFT's methods, by its own names in small letters, and one of ours."""

from __future__ import annotations

from collections.abc import Mapping

LORA = "lora"
# Layers on or beside those of the base, which stays as it is.
LAYERS = (
    "adalora", "adamss", "beft", "boft", "c3a", "deft", "delora", "fourierft", "frod", "glora",
    "gralora", "hira", "hra", "ia3", "lily", "ln_tuning", "loha", "lokr", "miss", "oft", "osf", "peanut", "psoft",
    "pvera", "randlora", "road", "shira", "supertuning", "tinylora", "trainable_tokens", "unilora", "vblora", "vera",
    "waveft", "bottleneck",
)  # fmt: skip
OWN: Mapping[str, str] = {"bottleneck": "lora2serve.bottleneck"}  # not in PEFT -> the module that registers it there
PROMPTS = ("prompt_tuning", "p_tuning", "cpt")  # learned vectors in front of the embedded row
STATES = ("prefix_tuning", "cartridge")  # learned keys and values in front of those of the row, in every layer
TRAINABLE = (LORA, *LAYERS, *PROMPTS, *STATES)
UNTRAINABLE: Mapping[str, str] = {
    "adaption_prompt": "it takes the place of the model whose head the trainer takes the loss from",
    "multitask_prompt_tuning": "each row would have to name its task by a number: train one prompt_tuning for each",
    "poly": "each row would have to name its task by a number: train one lora for each",
    "shadow": "it trains a second model beside the base",
    "xlora": "it mixes LoRAs that are trained already: `lora2serve export --adapter A --adapter B --combine` does, too",
}
# Those whose layers compute with packed 4-bit weights; the others need the base in 16 or 32 bits.
ON_FOUR_BITS = (
    LORA, "adalora", "beft", "boft", "bottleneck", "c3a", "fourierft", "gralora", "hira", "ia3", "lily",
    "ln_tuning", "miss", "oft", "pvera", "randlora", "road", "shira", "trainable_tokens", "vblora", "vera", "waveft",
    *PROMPTS, *STATES,
)  # fmt: skip
