"""Warnings before the first step: what experience says will go wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lora2serve.adapters.lint import Finding, lint
from lora2serve.config.objectives import SFT
from lora2serve.config.recipe import Recipe, TrainRecipe
from lora2serve.data.samples import Sample, row_faults
from lora2serve.system.hardware import nvidia_gpus
from lora2serve.training.schedule import eval_interval, total_steps

FEW_ROWS = 200
PATIENCE = 3  # evaluations without a better eval loss, as is usual
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")


def warnings(recipe: Recipe, rows: Sequence[Sample], held_out: bool) -> list[str]:
    """One line each, with what to do."""
    train, lora = recipe.train, recipe.train.lora
    problems = []
    problems += _of_learning_rate(train)
    problems += _of_labels(train, rows)
    if train.quantize != "none" and train.gradient_checkpointing is False:
        problems.append("no gradient checkpointing with a 4-bit base: activations will take most of the memory")
    if not held_out:
        problems.append(
            "no eval data: nothing will show overfitting, and parity has no held-out rows (data.eval_split: 0.05)"
        )
    problems += _of_memorizing(recipe, rows, held_out)
    if lora.rank > 64:
        problems.append(f"rank {lora.rank} is large: memory and overfitting grow, quality seldom does above 64")
    trained = [name for name in lora.modules_to_save if name.rpartition(".")[2] in EMBEDDINGS]
    if trained:
        problems.append(
            f"{', '.join(trained)} trained in full: vLLM, llama.cpp and Ollama refuse such an adapter, "
            "only merged exports work"
        )
    return [*problems, *_of_length(rows, recipe.data.max_length)]


def _of_learning_rate(train: TrainRecipe) -> list[str]:
    rate, objective = train.learning_rate, train.objective
    if objective == SFT and rate < 1e-4:
        return [f"learning rate {rate:g} is low for LoRA: 1e-4 to 4e-4 is usual (train.learning_rate)"]
    if objective != SFT and rate > 1e-4:
        return [f"learning rate {rate:g} is high for {objective}: 5e-6 to 5e-5 is usual (train.learning_rate)"]
    return []


def _of_labels(train: TrainRecipe, samples: Sequence[Sample]) -> list[str]:
    """Of KTO, whose paper (arXiv 2402.01306, eq. 8) wants right and wrong answers to count about alike."""
    if train.objective != "kto":
        return []
    right = sum(sample.right for sample in samples)
    wrong = len(samples) - right
    weights = [float(str(train.preference.get(name, 1.0))) for name in ("desirable_weight", "undesirable_weight")]
    if not right or not wrong:
        return [f"all {len(samples)} answers are labeled {str(bool(right)).lower()}: kto learns from both kinds"]
    if 1 <= weights[0] * right / (weights[1] * wrong) <= 4 / 3:
        return []
    balanced = weights[1] * wrong / right
    digits = max(2, 1 - math.floor(math.log10(balanced)))  # of which the range is some steps wide
    least, most = math.ceil(balanced * 10**digits) / 10**digits, math.floor(balanced * 4 / 3 * 10**digits) / 10**digits
    return [
        f"{right} answers are labeled true and {wrong} false: set train.preference.desirable_weight: "
        f"{least:.{digits}f} to {most:.{digits}f}, so that both count about alike"
    ]


def _of_length(samples: Sequence[Sample], limit: int) -> list[str]:
    """By row, of which a conversation may give several samples."""
    rows, faults, problems = len({sample.row for sample in samples}), row_faults(samples), []
    if faults.cut:
        problems.append(
            f"{len(faults.cut)} of {rows} rows are longer than {limit} tokens and were cut (data.max_length)"
        )
    if faults.silent:
        problems.append(f"{len(faults.silent)} of {rows} rows have no token to learn from, once cut: they are left out")
    if faults.partly:
        problems.append(
            f"{len(faults.partly)} of {rows} rows have answers that are not learned: what stands before them is longer "
            f"than {limit} tokens (data.max_length)"
        )
    return problems


def _of_memorizing(recipe: Recipe, samples: Sequence[Sample], held_out: bool) -> list[str]:
    """Few rows, and an early stopping that comes too seldom to stop anything."""
    train, problems = recipe.train, []
    total = total_steps(recipe, _sequences(recipe, samples))
    evaluations = total // eval_interval(recipe, total)
    patience = train.early_stopping or PATIENCE
    often = max(
        1, total // (3 * patience)
    )  # steps between evaluations, of which a third may go by without a better one
    can_stop = held_out and total // often > patience + 1
    seldom = evaluations <= patience + 1
    rows = len({sample.row for sample in samples})
    drops = train.lora.dropout or train.objective != SFT  # which goes without
    if rows < FEW_ROWS and not (drops and train.early_stopping):
        wanted = [] if drops else ["train.lora.dropout: 0.05"]
        if can_stop and not train.early_stopping:
            wanted += [f"train.early_stopping: {PATIENCE}", *([f"train.eval_steps: {often}"] if seldom else [])]
        if wanted:
            problems.append(f"{rows} rows will be memorized: set {', '.join(wanted)}")
    if train.early_stopping and seldom:
        way_out = f"set train.eval_steps: {often}" if can_stop else "leave it out"
        problems.append(
            f"train.early_stopping: {patience} cannot stop a run of {total} steps that is evaluated "
            f"{evaluations} time{'s' if evaluations > 1 else ''}: {way_out}"
        )
    return problems


def _sequences(recipe: Recipe, samples: Sequence[Sample]) -> int:
    """How many the trainer gets, about where they are packed."""
    learned = [len(sample.input_ids) for sample in samples if sample.learned]
    if recipe.train.objective == "dpo":
        return len(learned) // 2
    return math.ceil(sum(learned) / recipe.data.max_length) if recipe.data.packing else len(learned)


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


def multi_lora(adapter: Mapping[str, object], base: Mapping[str, object], added: Sequence[str] = ()) -> str:
    """Why vLLM will not serve the adapter beside others, from PEFT's config and the base's; empty where it will.

    What the export rewrites without loss is no reason. ``added``: tokens that the base does not have.
    """
    reasons = [finding for finding in lint(adapter, [], base) if finding.fix != "export"]
    if added:
        message = f"the base's tokenizer does not have {', '.join(added)}"
        reasons = [item for item in reasons if item.rule != "trained-tokens"]
        reasons.insert(0, Finding("new-tokens", message, "merge"))
    if not reasons:
        return ""
    because = "; ".join(finding.message for finding in reasons)
    return f"this adapter will not be servable as multi-LoRA, because {because} ({reasons[0].way_out})"
