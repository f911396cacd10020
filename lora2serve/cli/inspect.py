"""``lora2serve inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import click

from lora2serve.cli.options import Command, complete_exports, json_option, plain, progress
from lora2serve.errors import InputError

if TYPE_CHECKING:
    from lora2serve.api.inspect_path import (
        Inspected,
        InspectedAdapter,
        InspectedExport,
        InspectedModel,
        InspectedRun,
        InspectedUnfinishedRun,
        MultiLora,
    )  # fmt: skip
    from lora2serve.artifacts.manifest import EngineVerdict

VERDICTS = {"met": "met", "not_met": "not met", "not_run": "not run"}


@click.command(
    cls=Command,
    short_help="Show what a directory is, check it, and which targets can serve it.",
    examples=[
        ("lora2serve inspect runs/latest", "a run"),
        ("lora2serve inspect runs/demo/exports/vllm", "an export: its files are checked"),
        ("lora2serve inspect you/adapter --json", "an adapter of the Hub, as JSON"),
    ],
)
@click.argument("path", shell_complete=complete_exports)
@json_option
@click.pass_context
def inspect(ctx: click.Context, path: str, as_json: bool) -> None:
    """Show what PATH is (run, export, adapter or model), check its files, and which targets can serve it.

    A Hub id is downloaded first; `lora2serve verify` checks what was pushed there.
    """
    from lora2serve import console
    from lora2serve.api.inspect_path import inspect as examine

    facts = examine(path, progress=progress(ctx))
    if as_json:
        console.result_json(plain(facts))
    else:
        for line in _lines(facts):
            console.result(console.printable(line, line_ends=False))
    if facts.problems:
        count = len(facts.problems)
        raise InputError(f"{path}: {count} problems\n" + "\n".join(facts.problems), "export again, or fetch it again")


def _lines(facts: Inspected) -> Iterator[str]:
    """``key: value``; what is empty is left out."""
    if facts.kind == "exports":
        for export in facts.exports:
            yield f"{export.target}{f'-{export.quant}' if export.quant else ''}:"
            yield from (f"  {line}" for line in _export(export))
        yield from _pulled(facts.pulled_from)
        return
    yield f"kind: {facts.kind.replace('_', ' ')}"
    if facts.kind == "export":
        yield from _export(facts)
    elif facts.kind == "run":
        yield from _run(facts)
    elif facts.kind == "unfinished_run":
        yield from _unfinished_run(facts)
    elif facts.kind == "adapter":
        yield from _adapter(facts)
    else:
        yield from _model(facts)


def _export(facts: InspectedExport) -> Iterator[str]:
    from lora2serve import console

    yield from _pairs(
        {
            "target": facts.target,
            "quant": facts.quant,
            "base": facts.base,
            "merge base": facts.merge_base,
            "files": f"{facts.files:,}",
            "size": console.size(facts.bytes),
            "parity": VERDICTS[facts.parity],
        }
    )
    for engine, verdict in facts.parity_by_engine.items():
        yield f"parity in {engine}: {_verdict(verdict)}"
    if facts.survival:
        yield "delta that survives the cast: {:.4f} to {:.4f}".format(*facts.survival)
    if facts.multi_lora:
        yield from _multi_lora(facts.multi_lora)
    yield from _pulled(facts.pulled_from)


def _verdict(verdict: EngineVerdict) -> str:
    figures = [f"mean KL {verdict.mean_kl:.2g}"] if verdict.mean_kl is not None else []
    figures += [f"same top token {verdict.top1:.2%}"] if verdict.top1 is not None else []
    return "; ".join([verdict.status, *figures, f"against {verdict.reference}, {verdict.version}"])


def _run(facts: InspectedRun) -> Iterator[str]:
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in facts.eval_loss.items() if loss is not None)
    quantization = facts.quantization or "none"
    yield from _pairs(
        {"base": facts.base, "quantization": quantization, "training": facts.resumable, "eval loss": losses}
    )
    for export in facts.exports:
        yield f"export {export}: parity {VERDICTS[facts.parity[export]]}"
    yield "adapter:"
    yield from (f"  {line}" for line in _adapter(facts.adapter))


def _unfinished_run(facts: InspectedUnfinishedRun) -> Iterator[str]:
    done = f"step {facts.checkpoint_step} of {facts.steps or 'an unknown number'}"
    last = "none: train again" if facts.checkpoint_step is None else done
    yield from _pairs({"base": facts.base, "last checkpoint": last, "to continue it": facts.resume})


def _adapter(facts: InspectedAdapter) -> Iterator[str]:
    yield from _pairs(
        {
            "method": facts.method,
            "base": facts.base,
            "modules": _counted(facts.modules),
            "trained in full": ", ".join(facts.trained_in_full),
            "ranks": _counted(facts.ranks),
        }
    )
    yield from _multi_lora(facts.multi_lora)


def _model(facts: InspectedModel) -> Iterator[str]:
    yield from _pairs(
        {
            "architecture": facts.architecture,
            "tensors": f"{facts.tensors:,}",
            "parameters": f"{facts.parameters:,}",
            "types": _counted(facts.dtypes),
            "quantization": facts.quantization,
        }
    )


def _multi_lora(facts: MultiLora) -> Iterator[str]:
    if facts.servable:
        yield "multi-LoRA: vLLM serves it as it is"
    else:
        yield "multi-LoRA: vLLM does not serve it as it is:"
        yield from (f"  {problem.rule}: {problem.message} ({problem.way_out})" for problem in facts.problems)
    if facts.missing_base:
        yield f"  {facts.missing_base} is not on this machine: the rules of its class were not checked"


def _pulled(pulled_from: str | None) -> Iterator[str]:
    if pulled_from:
        yield f"pulled from: {pulled_from}"
        yield f"verify it: lora2serve verify {pulled_from}"


def _pairs(facts: Mapping[str, str | None]) -> Iterator[str]:
    yield from (f"{key}: {value}" for key, value in facts.items() if value)


def _counted(counts: Mapping[str, int] | Mapping[int, int]) -> str:
    return ", ".join(f"{name} ×{count}" for name, count in counts.items())
