"""How far an export may be from the trained model: one table, by format.

Sources. [lcpp] the KL tables of llama.cpp's tools/perplexity (Llama 2 7B and Llama 3 8B on wikitext-2): about 2.5 times
the worse of the two. [nmse] llama.cpp's examples/model-conversion, which passes a conversion at 1e-2 and calls 1e-4
typical. [vllm] the rule of vLLM's own model tests, but tighter: at the first difference, the two tokens are a near-tie.
[own] proposed here and calibrated on the models at hand; docs/parity.md has what was measured. A KL of K spreads
log-probabilities by about sqrt(2 K); rounding moves their mean by up to a fifth of it, which bounds the perplexity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from lora2serve.artifacts.manifest import Manifest
from lora2serve.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Thresholds:
    """Bounds for the end of the confidence interval that is worse; None does not gate.

    ``artifacts/metric_table.py`` knows which of them are lower bounds.
    """

    mean_kl: float | None = None  # nats, at most
    p999_kl: float | None = None  # nats, at most
    top1: float | None = None  # share, at least
    top1_but_ties: float | None = None  # share, at least
    ln_ppl_ratio: float | None = None  # at most, of the absolute value
    nmse: float | None = None  # at most, where the engine shows all logits
    retention: float | None = None  # KL(tuned, export) / KL(tuned, base) on task data, at most
    first_difference: float | None = None  # share of greedy answers that are equal, or part at a near-tie
    tensor_nmse: float | None = None  # of the worst tensor, at most; ten times as much of the worst 256 values in it

    def by_figure(self) -> dict[str, float | None]:
        """Each figure of a report that may be judged -> its bound."""
        return {**vars(self), "long_kl": self.mean_kl}


NAMES = tuple(field.name for field in fields(Thresholds))

_FP32 = Thresholds(
    mean_kl=1e-6, top1_but_ties=1.0, ln_ppl_ratio=1e-5, nmse=1e-8, retention=1e-3, first_difference=1.0, tensor_nmse=0.0
)
_BF16 = Thresholds(
    1e-3, 0.02, 0.99, None, 0.002, 1e-4, 0.1, 1.0, 0.0
)  # [nmse], [vllm], [own]: bf16 rounds the merged sum
_F16 = Thresholds(5e-4, 0.01, 0.993, None, 0.002, 1e-4, 0.1, 1.0, 0.0)  # [lcpp] BF16 against FP16 x 20, [nmse]
_BF16_GGUF = replace(_F16, top1=0.985)  # [own] llama.cpp rounds activations to bf16 too: 99.5 % against itself
_Q8 = Thresholds(0.004, 0.1, 0.965, None, 0.018, None, 0.1, 0.75, 1e-4)  # [lcpp] 0.00136, 97.67 %
_Q6 = Thresholds(0.014, 0.3, 0.945, None, 0.033, None, 0.2, 0.75, 1.5e-3)  # [lcpp] 0.00545, 96.03 %
_Q5 = Thresholds(0.03, 0.6, 0.92, None, 0.049, None, 0.3, 0.75, 6e-3)  # [lcpp] 0.01076, 96.5 %
_Q4 = Thresholds(0.08, 1.5, 0.88, None, 0.07, None, 0.5, 0.75, 0.025)  # [lcpp] 0.03127, 91.90 %
_GPTQ = replace(_Q4, tensor_nmse=0.1)  # [own] fits outputs, not weights: 0.04 on the demo, with a KL of 0.0012
_Q3 = Thresholds(0.25, None, 0.82, None, 0.25, None, 0.75, 0.5, 0.08)  # [lcpp] 0.1019
_Q2 = Thresholds(1.1, None, 0.6, None, 0.6, None, 1.0, None, 0.3)  # [lcpp] 0.4451, 71.14 %
_IQ3 = Thresholds(0.3, None, 0.8, None, 0.3, None, 1.0, 0.5, 0.08)  # [lcpp] 0.1113
_IQ3_XXS = Thresholds(0.46, None, 0.75, None, 0.45, None, 1.0, 0.5, 0.2)  # [lcpp] 0.1836; [own] 0.077 of a tensor
_IQ2 = Thresholds(1.4, None, 0.55, None, 1.4, None, None, None, 0.4)  # [lcpp] 0.5463
_IQ2_XXS = Thresholds(2.0, None, 0.45, None, 2.0, None, None, None, 0.4)  # [lcpp] 0.8120; [own] 0.15
_IQ1 = Thresholds(3.5, None, 0.3, None, 3.5, None, None, None, 0.7)  # [lcpp] 1.3931; [own] 0.29
_LORA = Thresholds(2e-3, 0.02, 0.99, None, 0.002, 1e-4, 0.1, 1.0, 1e-8)  # [vllm]
_W8 = Thresholds(
    0.01, 0.3, 0.95, None, 0.028, None, 0.2, 0.75, 2e-3
)  # [own] 8-bit weights and activations: recovery of 99 %

TABLE: Mapping[str, Thresholds] = {
    "float32": _FP32,
    "bfloat16": _BF16,
    "float16": _BF16,
    "lora": _LORA,
    "F32": _F16,
    "F16": _F16,
    "BF16": _BF16_GGUF,
    "Q8_0": _Q8,
    "Q6_K": _Q6,
    "Q5_K_M": _Q5,
    "Q5_K_S": _Q5,
    "Q5_1": _Q5,
    "Q5_0": _Q5,
    "Q4_K_M": _Q4,
    "Q4_K_S": _Q4,
    "Q4_1": _Q4,
    "Q4_0": _Q4,
    "IQ4_NL": _Q4,
    "IQ4_XS": _Q4,
    "MXFP4": _Q4,
    "Q3_K_L": _Q3,
    "Q3_K_M": _Q3,
    "Q3_K_S": _Q3,
    "Q2_K": _Q2,
    "IQ3_M": _IQ3,
    "IQ3_S": _IQ3,
    "IQ3_XS": _IQ3_XXS,
    "IQ3_XXS": _IQ3_XXS,
    "IQ2_M": _Q2,
    "IQ2_S": _IQ2,
    "IQ2_XS": _IQ2,
    "IQ2_XXS": _IQ2_XXS,
    "IQ1_M": _IQ1,
    "IQ1_S": _IQ1,
    "fp8": _W8,
    "fp8-block": _W8,
    "fp8-static": _W8,
    "int8": _W8,
    "w8a16": _Q8,
    "w4a16": _Q4,
    "awq": _Q4,
    "gptq": _GPTQ,
    "nvfp4": _Q4,
    "nvfp4-w4a4": _Q3,  # [own] activations in 4 bits, too
    "mxfp4": _Q4,
    "url": _W8,  # a deployment, whatever it computes in
}


def kind_of(manifest: Manifest) -> str:
    """The row of the table for an export."""
    return "lora" if manifest.is_adapter else manifest.quant or manifest.dtype or "bfloat16"


# KL of a model against itself, in nats: what its engine's arithmetic makes (docs/parity.md, "Noise floors").
NOISE = {"float32": 1e-9, "bfloat16": 1e-7, "float16": 1e-7, "BF16": 5e-5}
NOISE_OF_OTHERS = 2e-6


def noise(kind: str) -> float:
    """That of the engines that open a format."""
    return NOISE.get(kind, NOISE_OF_OTHERS)


def lookup(kind: str, overrides: Mapping[str, Mapping[str, float]] = {}) -> Thresholds:
    """The bounds for a format, with the user's over the built-in ones; UsageError for names that do not exist."""
    known = {name.lower(): name for name in TABLE}
    builtin = TABLE[known[kind.lower()]] if kind.lower() in known else _Q4
    changes: dict[str, float] = {}
    for name, bounds in overrides.items():
        if name.lower() not in {**known, "all": "all"}:
            raise UsageError(
                f"parity.thresholds.{name}: unknown format{did_you_mean(name, TABLE)}",
                f"known: {', '.join(TABLE)}, all",
            )
        unknown = [key for key in bounds if key not in NAMES]
        if unknown:
            near = did_you_mean(unknown[0], NAMES)
            raise UsageError(
                f"parity.thresholds.{name}.{unknown[0]}: unknown figure{near}", f"known: {', '.join(NAMES)}"
            )
        if name.lower() in (kind.lower(), "all"):
            changes |= {key: float(value) for key, value in bounds.items()}
    return replace(builtin, **changes)
