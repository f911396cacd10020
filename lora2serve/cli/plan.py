"""``lora2serve plan``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from lora2serve.cli.options import Command, complete_runs, json_option, names, plain, progress
from lora2serve.errors import UsageError

if TYPE_CHECKING:
    from lora2serve.api.plan_training import TrainingPlan
    from lora2serve.planning.memory_plan import PlannedTraining

PARTS = {
    "weights": "weights", "quantization_state": "4-bit state", "adapter": "adapter", "gradients": "gradients",
    "optimizer": "optimizer", "activations": "activations", "logits": "logits", "context": "CUDA context",
}  # fmt: skip


def _ranks(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...]:
    """Whole numbers with commas between."""
    words = names(ctx, parameter, text)
    if wrong := [word for word in words if not word.isdecimal() or not 1 <= int(word) <= 1 << 14]:
        raise UsageError(f"--rank {wrong[0]}: expected a whole number from 1 to 16384, or several with commas between")
    return tuple(int(word) for word in words)


@click.command(
    cls=Command,
    short_help="Show the memory, disk and time of a training, before anything is downloaded.",
    examples=[
        ("lora2serve plan", "of lora2serve.yaml here"),
        ("lora2serve plan meta-llama/Llama-3.1-8B --gpu 4090", "a model of the Hub, and what fits on that GPU"),
        ("lora2serve plan runs/my-base --gpu 24 --method qlora,lora --rank 16,64", "one column for each"),
        ("lora2serve plan --exact", "by the model's own code, on tensors without values"),
        ("lora2serve plan demo --json", "a list: method, rank, targets, batch, length, bytes"),
    ],
)
@click.argument("model", metavar="[MODEL | RECIPE]", required=False, shell_complete=complete_runs)
@click.option("--gpu", metavar="NAME|GIB", help="A GPU (4090, h100, a100-40) or its GiB (24): what fits there.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, help="How many of them train it; the plan is of each.")
@click.option("--method", "methods", callback=names, help="full, lora, qlora, or several with commas between.")
@click.option("--rank", "ranks", callback=_ranks, help="Ranks of the adapter, with commas between.")
@click.option("--targets", callback=names, help="Presets (qv, attention, ...) or modules (q_proj+v_proj), with commas.")
@click.option("--batch", type=click.IntRange(min=1), help="Rows that go through the model at once.")
@click.option("--length", type=click.IntRange(min=8), help="Tokens of a row.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one field, as for `train`.")
@click.option("--exact", is_flag=True, help="Run the model's own code on fake tensors: a minute, and no closed form.")
@json_option
@click.pass_context
def plan(
    ctx: click.Context, model: str | None, gpu: str | None, gpus: int, methods: tuple[str, ...], ranks: tuple[int, ...],
    targets: tuple[str, ...], batch: int | None, length: int | None, overrides: tuple[str, ...], exact: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Show what a training takes: memory by part, GPUs that hold it, the largest micro-batch, disk.

    Of a model on the Hub only config.json and the headers of its weights are read. Without a model, it is the recipe
    in lora2serve.yaml here.
    """
    from lora2serve import console
    from lora2serve.api.plan_training import plan as plan_training

    planned = plan_training(
        model, gpu=gpu, gpus=gpus, methods=methods, ranks=ranks, targets=targets, batch=batch, length=length,
        exact=exact, overrides=overrides, progress=progress(ctx),
    )  # fmt: skip
    if as_json:
        console.result_json(plan_json(planned))
        return
    for line in plan_lines(planned):
        console.result(line)


def plan_json(plan: TrainingPlan) -> list[object]:
    """Its trainings as dataclasses, each with the total beside the parts."""
    return [_json(training) for training in plan.trainings]


def _json(training: PlannedTraining) -> object:
    content = plain(training)
    assert isinstance(content, dict)
    return {**content, "bytes": {**content["bytes"], "total": training.bytes.total}}


def plan_lines(plan: TrainingPlan) -> Iterator[str]:
    """The table by part, and what follows from it."""
    from lora2serve.console import aligned

    first = plan.trainings[0]
    yield (
        f"{plan.model}: {_count(plan.parameters)} parameters in {plan.layers} layers; "
        f"{first.batch} row{'s' if first.batch > 1 else ''} of {_answers(first)}{first.length} tokens at once"
    )
    yield ""
    yield from aligned([["", *(_heading(training) for training in plan.trainings)], *_rows(plan)])
    yield ""
    rank = next((training.rank for training in plan.trainings if training.rank), None)
    if plan.shares and rank:
        learned = ", ".join(f"{preset} {_percent(share)}" for preset, share in plan.shares.items())
        yield f"learned at rank {rank}: {learned}"
    yield from _levers(plan)
    yield f"host memory: {_size(plan.host_memory)}"
    yield "disk: " + ", ".join(f"{name} {_size(size)}" for name, size in plan.disk.items())
    yield f"time: {plan.time}"
    yield from plan.notes


def _answers(training: PlannedTraining) -> str:
    return f"{training.answers} answers with their prompts, each of " if training.answers > 1 else ""


def _heading(training: PlannedTraining) -> str:
    if training.rank is None:
        return training.kind if training.method != "full" else "full"
    targets = training.targets if isinstance(training.targets, str) else "+".join(training.targets or ())
    return f"{training.method} r{training.rank} {targets}"


def _rows(plan: TrainingPlan) -> Iterator[list[str]]:
    for part, label in PARTS.items():
        sizes = [getattr(training.bytes, part) for training in plan.trainings]
        if any(sizes):
            yield [label, *(_size(size) for size in sizes)]
    yield ["total", *(_size(training.bytes.total) for training in plan.trainings)]
    yield [
        "learned",
        *(f"{_count(training.trainable)}, {_percent(training.share)}" for training in plan.trainings),
    ]
    yield ["checkpointing", *("yes" if training.checkpointing else "no" for training in plan.trainings)]
    if any(training.fits for training in plan.trainings):
        yield ["smallest GPU", *(training.fits[0] if training.fits else "none" for training in plan.trainings)]
    if plan.gpu:
        yield [f"rows on {plan.gpu}", *(str(training.largest_batch or "none") for training in plan.trainings)]


def _levers(plan: TrainingPlan) -> Iterator[str]:
    """What would make the first training smaller, with its price."""
    from lora2serve.console import aligned

    first = plan.trainings[0]
    if first.levers:
        yield f"less memory than {_heading(first)} ({_size(first.bytes.total)}):"
        yield from aligned([["  " + lever.change, _size(lever.total), lever.price] for lever in first.levers])


def _size(count: int) -> str:
    """In decimal units, with as many digits as one compares by."""
    return f"{count / 1e9:,.2f} GB" if count >= 1_000_000_000 else f"{count / 1e6:,.1f} MB"


def _count(values: int) -> str:
    if values < 1_000_000:
        return f"{values:,}"
    return f"{values / 1e9:,.2f} B" if values >= 1_000_000_000 else f"{values / 1e6:,.1f} M"


def _percent(share: float) -> str:
    return f"{share:.2%}".replace("%", " %")
