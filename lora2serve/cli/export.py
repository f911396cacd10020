"""``lora2serve export``."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora2serve.cli.options import (
    Choice,
    Command,
    F,
    GroupedOption,
    complete_quants,
    complete_runs,
    complete_targets,
    dry_run_option,
    json_option,
    plain,
    progress,
)
from lora2serve.errors import UsageError

if TYPE_CHECKING:
    from lora2serve.api.export_request import ExportRequest
    from lora2serve.artifacts.export_dir import Export
    from lora2serve.exporting.stream import ExportPlan
    from lora2serve.progress import Progress

EXAMPLES = [
    ("lora2serve export -t ollama", "runs/latest as Q4_K_M"),
    ("lora2serve export -t vllm -t gguf -q fp8 -q Q8_0", "two targets in one pass"),
    ("lora2serve export runs/demo -t vllm --dry-run", "what would be written"),
    ("lora2serve export -t gguf -q IQ2_XS --calibrate train", "with an importance matrix"),
    ("lora2serve export runs/a runs/b -t adapter -o bundle", "one server for two adapters"),
    ("lora2serve export -t ollama --create my-model", "and create it in Ollama"),
    ("lora2serve export -t vllm -o /shared --shards 2/3", "one of three workers"),
]


def of(group: str) -> Callable[..., Callable[[F], F]]:
    """A decorator for an option under that heading."""
    return partial(click.option, cls=GroupedOption, group=group)


weights, vllm, gguf = of("Base and adapter"), of("vLLM"), of("GGUF (gguf, ollama, lmstudio)")
adapter, ollama, lmstudio = of("Adapter"), of("Ollama"), of("LM Studio")


def _numbers(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(f"--weights {text}: expected numbers with commas between, such as 0.7,0.3") from None


@click.command(cls=Command, short_help="Write a run for vLLM, llama.cpp, Ollama or LM Studio.", examples=EXAMPLES)
@click.argument("sources", metavar="[RUN]...", nargs=-1, shell_complete=complete_runs)
@click.option(
    "-t", "--target", "targets", multiple=True, metavar="TARGET", shell_complete=complete_targets,
    help="vllm, gguf, ollama, lmstudio, adapter or gguf-adapter; several in one pass.",
)  # fmt: skip
@click.option(
    "-q", "--quant", "quants", multiple=True, metavar="TYPE", shell_complete=complete_quants,
    help="Q4_K_M, Q8_0, F16, ... or fp8, int8, w4a16, awq, ...; several in one pass.",
)  # fmt: skip
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="DIR",
    help="The folder for one directory per target and type (default: the run's exports/).",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace exports that exist, once the new ones are complete.")
@click.option("--name", help="Name of the model in files and servers (default: the run's).")
@click.option(
    "--shards", metavar="I/N",
    help="Be worker I of N that write one export together (vllm, gguf, ollama, lmstudio); the last one publishes it.",
)  # fmt: skip
@dry_run_option("--plan", help="Only show what would be written, and every refusal; reads no weights.")
@json_option
@weights("--base", metavar="MODEL", help="The base to fold onto: a path or a Hub id (default: the one trained on).")
@weights(
    "--merge-base", type=Choice(["auto", "trained", "original"]), default="auto", show_default=True,
    help="Fold onto the quantized weights as trained on, or the full-precision ones; auto: where the loss is lower.",
)  # fmt: skip
@weights(
    "--dtype", type=Choice(["bf16", "fp16", "fp32"]), help="Type of merged 16-bit weights (default: the base's)."
)  # fmt: skip
@weights("--adapter", "adapters", multiple=True, metavar="DIR", help="Fold these adapters onto --base, one by one.")
@weights(
    "--combine", type=Choice(["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"]),
    help="Combine the --adapter's into one first, by PEFT's method of that name.",
)  # fmt: skip
@weights("--weights", metavar="W,W", callback=_numbers, help="Weights for --combine.")
@weights("--density", type=float, default=0.5, show_default=True, help="Share that TIES and DARE keep.")
@weights(
    "--allow-base-mismatch", is_flag=True, help="Fold onto a base that is not the run's; written into the manifest."
)  # fmt: skip
@weights("--allow-pickle", is_flag=True, help="Convert an adapter_model.bin, weights only, in a child process.")
@of("Calibration")(
    "--calibrate", metavar="DATA",
    help="vllm awq, gptq, nvfp4-w4a4: measure on DATA; gguf: make the importance matrix. `train`: the run's own data.",
)  # fmt: skip
@vllm("--shard-size", metavar="SIZE", help="Largest shard, such as 5GB.")
@gguf("--tensor-type", multiple=True, metavar="PATTERN=TYPE", help="Another type for the tensors that match.")
@gguf("--pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, where it is not recognized.")
@gguf(
    "--imatrix", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="An importance matrix in llama.cpp's format; IQ1, IQ2, IQ3_XXS and IQ3_XS need one.",
)  # fmt: skip
@gguf("--split-size", metavar="SIZE", help="Largest file, such as 5GB.")
@gguf("--match-reference", is_flag=True, hidden=True, help="Round to bf16 and f16 first, as merge and convert do.")
@adapter("--served-base", metavar="NAME", help="The model's name on the server's command line (default: the base).")
@adapter(
    "--as-lora-rank", type=click.IntRange(min=1), metavar="R",
    help="Extract a plain LoRA of this rank from what vLLM does not serve; reports the error.",
)  # fmt: skip
@ollama(
    "--as", "as_kind", type=Choice(["model", "adapter"]),
    help="A complete model (default), or the adapter on a base that Ollama has.",
)  # fmt: skip
@ollama("--from", "from_model", metavar="BASE", help="With --as adapter: the base's name there, or its GGUF.")
@ollama("--create", metavar="NAME", help="Create the model on the server at OLLAMA_HOST, and ask it once.")
@lmstudio("--install", is_flag=True, help="Put it into LM Studio's own models folder as well.")
@click.pass_context
def export(ctx: click.Context, /, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Export RUN (default: runs/latest) to one or more targets, in one pass over the weights.

    RUN is a run, a PEFT adapter directory, a plain model directory, or a Hub id of one of these.
    Several RUNs with --target adapter make one bundle of adapters for one server. Prints the export directories.
    """
    from lora2serve.api.export_model import plan_export, run_export
    from lora2serve.api.export_request import ExportRequest

    request = ExportRequest(**options)
    if dry_run:
        _show_plan(plan_export(request, progress(ctx)), as_json, progress(ctx))
    else:
        _show(run_export(request, progress(ctx)), request, as_json, progress(ctx))


def _show(exports: Sequence[Export], request: ExportRequest, as_json: bool, progress: Progress) -> None:
    from lora2serve import console
    from lora2serve.api.export_request import OLLAMA_TARGETS

    if as_json:
        console.result_json(
            [
                {"target": export.target, "type": export.quant, "size": export.bytes, "path": str(export.path)}
                for export in exports
            ]
        )
        return
    for export in exports:
        console.result(str(export.path))
        created = request.create and export.target in OLLAMA_TARGETS  # needs no telling how to get it there
        if export.manifest.use and not created:
            progress.note(f"  {export.manifest.use}")
        if export.target == "gguf-adapter":
            base = shlex.quote(export.manifest.base.path or export.manifest.base.id)
            progress.note(f"  BASE.gguf: `lora2serve export {base} --target gguf` makes it")
    for paths in _compared(exports) if exports else ():  # none of a worker that is not the last
        progress.note(f"next: `lora2serve parity {shlex.join(map(str, paths))}`")


def _compared(exports: Sequence[Export]) -> list[list[Path]]:
    """What one run of parity takes: all exports of a model, or one adapter of a bundle."""
    members = [path for export in exports for path in export.members.values()]
    return [[path] for path in members] or [[export.path for export in exports]]


def _show_plan(plan: ExportPlan, as_json: bool, progress: Progress) -> None:
    from lora2serve import console

    if plan.disk > plan.free:
        progress.warn(
            f"{console.size(plan.disk)} to write, {console.size(plan.free)} free: the export would be refused"
        )
    if as_json:
        console.result_json(plain(plan))
        return
    rows = [[name, str(output.files), console.size(output.bytes)] for name, output in plan.outputs.items()]
    console.table("", ["output", "files", "size"], rows)
    console.result(
        f"{plan.tensors} tensors, {plan.changed} changed by the adapter; disk {console.size(plan.disk)} "
        f"({console.size(plan.free)} free); memory {console.size(plan.memory)} plus the libraries"
    )
