"""``lora2serve export``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from lora2serve.cli import after_export
from lora2serve.cli.common import base_of, fetch, progress
from lora2serve.errors import UsageError

if TYPE_CHECKING:
    from lora2serve.exporting.sinks import ExportModel
    from lora2serve.progress import Progress


@click.command(short_help="Write a run for vLLM, llama.cpp, Ollama or LM Studio.")
@click.argument("subjects", metavar="[RUN]...", nargs=-1)
@click.option(
    "-t",
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET",
    help="vllm, gguf, ollama, lmstudio, adapter or gguf-adapter; several in one pass.",
)
@click.option(
    "-q",
    "--quant",
    "quants",
    multiple=True,
    metavar="TYPE",
    help="Q4_K_M, Q8_0, F16, ... or fp8, int8, w4a16, awq, ...; several in one pass.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="One folder per target and type goes in here (default: the run's exports/).",
)
@click.option("--overwrite", is_flag=True, help="Replace exports that are there, once the new ones are whole.")
@click.option(
    "--plan", "plan_only", is_flag=True, help="Only say what would be written, and every refusal; reads no weights."
)
@click.option("--json", "as_json", is_flag=True, help="Results as JSON.")
@click.option(
    "--base", metavar="MODEL", help="The base to fold onto: a path or a Hub id (default: the one trained on)."
)
@click.option(
    "--merge-base",
    type=click.Choice(["auto", "trained", "original"]),
    default="auto",
    show_default=True,
    help="Fold onto the quantised weights as trained on, or the full-precision ones; auto takes the lower eval loss.",
)
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Type of merged 16-bit weights (default: the base's)."
)
@click.option(
    "--adapter", "adapters", multiple=True, metavar="DIR", help="Fold these adapters onto --base, one after another."
)
@click.option(
    "--combine",
    type=click.Choice(["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"]),
    help="Combine the --adapter's into one first, by PEFT's method of that name.",
)
@click.option("--weights", metavar="W,W", callback=lambda _, __, text: _floats(text), help="Weights for --combine.")
@click.option("--density", type=float, default=0.5, show_default=True, help="Share that TIES and DARE keep.")
@click.option(
    "--allow-base-mismatch", is_flag=True, help="Fold onto a base that is not the run's; written into the manifest."
)
@click.option("--allow-pickle", is_flag=True, help="Convert an adapter_model.bin, weights only, in a child process.")
@click.option("--name", help="Name of the model in files and servers (default: the run's).")
@click.option(
    "--tensor-type", multiple=True, metavar="PATTERN=TYPE", help="gguf: another type for the tensors that match."
)
@click.option("--pre", metavar="NAME", help="gguf: llama.cpp's name of the pre-tokenizer, where it is not recognised.")
@click.option(
    "--match-reference", is_flag=True, help="gguf: round to bf16 and f16 first, as merge, convert, quantise do."
)
@click.option(
    "--imatrix", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="gguf: an importance matrix in llama.cpp's format; IQ1, IQ2, IQ3_XXS and IQ3_XS need one.",
)  # fmt: skip
@click.option(
    "--calibrate", metavar="DATA",
    help="vllm awq, gptq: measure on DATA; gguf: make the importance matrix from it. `train` is the run's own data.",
)  # fmt: skip
@click.option("--split-size", metavar="SIZE", help="gguf: largest file, such as 5GB.")
@click.option("--shard-size", metavar="SIZE", help="vllm: largest shard, such as 5GB.")
@click.option("--served-base", metavar="NAME", help="adapter: the model as the server is told it (default: the base).")
@click.option(
    "--as-lora-rank",
    type=click.IntRange(min=1),
    metavar="R",
    help="adapter: extract a plain LoRA of this rank from what vLLM does not serve; reports the error.",
)
@click.option(
    "--as",
    "as_kind",
    type=click.Choice(["model", "adapter"]),
    help="ollama: a model of its own (default), or the adapter on a base that Ollama has.",
)
@click.option("--from", "from_model", metavar="BASE", help="ollama --as adapter: the base's name there, or its GGUF.")
@click.option("--create", metavar="NAME", help="ollama: create the model on the server at OLLAMA_HOST; ask it once.")
@click.option("--install", is_flag=True, help="lmstudio: put it into LM Studio's own folder of models too.")
@click.pass_context
def export(ctx: click.Context, /, subjects: tuple[str, ...], **options: Any) -> None:
    """Export RUN (default: runs/latest) to one or more targets, in one pass over the weights.

    RUN is a run, a PEFT adapter directory, a plain model directory, or a Hub id of one of these.
    Several RUNs with --target adapter make one bundle of adapters for one server. Prints the export directories.
    """
    from lora2serve.cli import calibration
    from lora2serve.exporting import sinks, stream

    told = progress(ctx)
    if not options["targets"]:
        raise UsageError("no --target given", f"one or more of {', '.join(sinks.known())}")
    targets = {name: sinks.find(name) for name in after_export.targets(options)}
    planned = sinks.plan_options(targets, options["quants"], _given(options))
    after_export.refuse(options, planned)
    if len(subjects) > 1 and not options["adapters"]:
        _export_bundle(subjects, planned, options, told)
        return
    model, home = open_subject(subjects, options, told)
    calibrated = calibration.prepare(targets, model, home, options, told)
    planned = sinks.plan_options(targets, options["quants"], {**_given(options), **calibrated})
    folder = options["out"] or home
    plans = [stream.Plan(name, targets[name], chosen, folder / _folder(name, chosen)) for name, chosen in planned]
    if options["plan_only"]:
        _show_plan(stream.dry_run(model, plans), options["as_json"], told)
        return
    written = stream.export(model, plans, told, overwrite=options["overwrite"])
    _show(written, options, told)
    after_export.hand_over(written, options, told)


def _export_bundle(
    subjects: tuple[str, ...], planned: list[tuple[str, Any]], options: Mapping[str, Any], told: Progress
) -> None:
    """Several runs: their adapters together, for one server."""
    from lora2serve.exporting import bundle

    if [target for target, _ in planned] != ["adapter"]:
        raise UsageError(
            f"{len(subjects)} runs given, expected one: only --target adapter, alone, takes several",
            "to merge several adapters into one model: --adapter A --adapter B --base BASE",
        )
    if options["name"]:
        raise UsageError(f"--name {options['name']} with {len(subjects)} runs: each adapter keeps its run's name")
    models = [open_subject((subject,), options, told)[0] for subject in subjects]
    out = options["out"] or Path("exports") / "+".join(model.name for model in models)
    chosen = planned[0][1]
    if options["plan_only"]:
        _show_plan(bundle.dry_run(models, chosen, out), options["as_json"], told)
        return
    _show([bundle.export(models, chosen, out, told, overwrite=options["overwrite"])], options, told)


def _show(written: list[Path], options: Mapping[str, Any], told: Progress) -> None:
    from lora2serve import console
    from lora2serve.artifacts import manifest

    if options["as_json"]:
        console.result_json([str(path) for path in written])
        return
    for path in written:
        console.result(str(path))
        about = manifest.read(path)
        use = about.get("use")
        if use and not after_export.creates(about, options):
            told.note(f"  {use}")


def open_subject(subjects: tuple[str, ...], options: Mapping[str, Any], told: Progress) -> tuple[ExportModel, Path]:
    """The model to export, and where its exports go by default."""
    from lora2serve.adapters.adapter import CONFIG
    from lora2serve.artifacts import run as runs
    from lora2serve.exporting import open_model as models
    from lora2serve.system.hub_snapshot import short_name

    choice = models.OpenOptions(
        options["merge_base"], options["dtype"], options["allow_base_mismatch"], options["name"]
    )
    if options["adapters"]:
        return _open_adapters(subjects, options, choice, told)
    subject = subjects[0] if subjects else str(runs.latest().path)
    for path in (Path(subject), runs.ROOT / subject):
        if runs.is_run(path):
            run = runs.Run(path)
            base, _ = base_of(run.record.base, options["base"], told)
            return models.open_run(run, base, choice, told), run.exports
    path = fetch(subject, told)
    if (path / CONFIG).is_file():
        return _open_adapters((), {**options, "adapters": (str(path),)}, choice, told)
    return models.open_plain(path, subject, choice), Path("exports") / short_name(path)


def _open_adapters(
    subjects: tuple[str, ...], options: Mapping[str, Any], choice: Any, told: Progress
) -> tuple[ExportModel, Path]:
    from lora2serve.exporting import open_model as models
    from lora2serve.system.hub_snapshot import short_name

    if subjects:
        raise UsageError(
            "--adapter with a RUN: expected one of the two", "name the run's adapter directory with --adapter"
        )
    paths = [fetch(name, told, pickle=options["allow_pickle"]) for name in options["adapters"]]
    if options["allow_pickle"]:
        from lora2serve.adapters.pickles import convert

        paths = [convert(path, _scratch()) for path in paths]
    base = options["base"] or _base_in_config(paths[0])
    local, name = fetch(base, told), short_name(paths[0])
    _warn_of_quantized(local, base, told)
    if options["combine"]:
        from lora2serve.adapters.combine import combine
        from lora2serve.weights.checkpoint import Checkpoint

        weights = options["weights"] or (1.0,) * len(paths)
        paths = [combine(paths, Checkpoint(local), options["combine"], weights, options["density"], _scratch())]
    return models.open_adapters(paths, local, base, choice), Path("exports") / name


def _base_in_config(adapter: Path) -> str:
    """The base that an adapter says it was trained on, at the revision it says, if any."""
    from lora2serve.adapters.adapter import read_config

    config = read_config(adapter)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise UsageError(f"{adapter}: its config does not name a base", "name it with --base")
    if Path(base).is_absolute() and not Path(base).exists():
        raise UsageError(f"{adapter}: trained on {base}, which is not on this machine", "name the base with --base")
    return f"{base}@{revision}" if revision and not Path(base).exists() else str(base)


def _scratch() -> Path:
    """A folder that goes when the command ends."""
    return Path(click.get_current_context().with_resource(TemporaryDirectory(prefix="lora2serve-")))


def _warn_of_quantized(local: Path, name: str, told: Progress) -> None:
    from lora2serve.weights.checkpoint import read_config

    if read_config(local).get("quantization_config"):
        told.warn(f"{name} is quantised: folding onto what it dequantises to; --base names the 16-bit model")


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that belong to single targets, where the user set them."""
    from lora2serve.config.sizes import parse_size

    sizes = ("shard_size", "split_size")
    plain = ("tensor_type", "pre", "match_reference", "imatrix", "served_base", "as_lora_rank", "from_model")
    given = {key: options[key] for key in (*sizes, *plain) if options[key] not in (None, False, ())}
    given |= after_export.install_options(options)
    return {key: parse_size(value) if key in sizes else value for key, value in given.items()}


def _floats(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(f"--weights {text}: expected numbers with commas between, such as 0.7,0.3") from None


def _folder(target: str, options: Any) -> str:
    quant = getattr(options, "quant", None)
    return f"{target}-{quant}" if quant else target


def _show_plan(plan: Any, as_json: bool, told: Progress) -> None:
    from lora2serve import console

    if plan["disk"] > plan["free"]:
        told.warn(
            f"{console.size(plan['disk'])} to write, {console.size(plan['free'])} free: the export would be refused"
        )
    if as_json:
        console.result_json(plan)
        return
    rows = [[name, str(out["files"]), console.size(out["bytes"])] for name, out in plan["outputs"].items()]
    console.table("", ["output", "files", "size"], rows)
    console.result(
        f"{plan['tensors']} tensors, {plan['changed']} changed by the adapter; disk {console.size(plan['disk'])} "
        f"({console.size(plan['free'])} free); memory {console.size(plan['memory'])} beside the libraries"
    )
