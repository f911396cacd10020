"""Warnings before the first step: what experience says will go wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora2serve.adapters.lint import lint
from lora2serve.config.recipe import Recipe
from lora2serve.data.samples import Sample
from lora2serve.system.hardware import nvidia_gpus

FEW_ROWS = 200
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")


def warnings(recipe: Recipe, rows: Sequence[Sample], held_out: bool, checkpointing: bool) -> list[str]:
    """One line each, with what to do."""
    train, lora = recipe.train, recipe.train.lora
    problems = []
    if train.learning_rate < 1e-4:
        problems.append(
            f"learning rate {train.learning_rate:g} is low for LoRA: 1e-4 to 4e-4 is usual (train.learning_rate)"
        )
    if train.quantize != "none" and not checkpointing:
        problems.append("no gradient checkpointing with a 4-bit base: activations will take most of the memory")
    if not held_out:
        problems.append(
            "no eval data: nothing will show overfitting, and parity has no held-out rows (data.eval_split: 0.05)"
        )
    if len(rows) < FEW_ROWS and not (lora.dropout and train.early_stopping):
        problems.append(f"{len(rows)} rows will be memorized: set train.lora.dropout: 0.05 and train.early_stopping: 3")
    if lora.rank > 64:
        problems.append(f"rank {lora.rank} is large: memory and overfitting grow, quality seldom does above 64")
    trained = [name for name in lora.modules_to_save if name.rpartition(".")[2] in EMBEDDINGS]
    if trained:
        problems.append(
            f"{', '.join(trained)} trained in full: vLLM, llama.cpp and Ollama refuse such an adapter, "
            "only merged exports work"
        )
    cut = sum(row.cut for row in rows)
    if cut:
        problems.append(
            f"{cut} of {len(rows)} rows are longer than {recipe.data.max_length} tokens and were cut (data.max_length)"
        )
    unlabeled = sum(not row.learned for row in rows)
    if unlabeled:
        problems.append(f"{unlabeled} of {len(rows)} rows have no token to learn from, once cut: they are left out")
    return problems


def idle_gpu() -> str:
    """Why the NVIDIA GPU of this machine is not used, for a device that is the CPU; empty where there is none."""
    import torch

    if not nvidia_gpus():
        return ""
    if torch.version.cuda is None:
        return (
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} is built for CPUs: training takes the CPU "
            "(pip install --force-reinstall 'torch==2.13.*')"
        )
    return (
        f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it: training takes the CPU "
        "(nvidia-smi shows the driver's version, CUDA_VISIBLE_DEVICES which GPUs are allowed)"
    )


def multi_lora(adapter: Mapping[str, object], base: Mapping[str, object]) -> str:
    """Why vLLM will not serve the adapter beside others, from PEFT's config and the base's; empty where it will.

    What the export rewrites without loss is no reason.
    """
    reasons = [finding for finding in lint(adapter, [], base) if finding.fix != "export"]
    if not reasons:
        return ""
    because = "; ".join(finding.message for finding in reasons)
    return f"this adapter will not be servable as multi-LoRA, because {because} ({reasons[0].way_out})"
