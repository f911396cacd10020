"""One fine-tune from recipe to run directory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora2serve import manifest
from lora2serve.checkpoint import identity
from lora2serve.errors import DataError, TrainError
from lora2serve.progress import Progress
from lora2serve.recipe import Recipe, dump
from lora2serve.run import Run
from lora2serve.train import data, evaluate, guards
from lora2serve.train.data import Rows, Tokens
from lora2serve.train.model import Device, add_adapter, device, load_base, load_tokenizer, quantized_modules

MOST_EVAL_ROWS = 1000  # kept in eval.jsonl for parity


def train(recipe: Recipe, run: Run, *, base: Path, resume: bool, progress: Progress) -> None:
    """Fine-tune ``base`` (a local directory) as ``recipe`` says; everything of the run directory is written."""
    _quiet()
    train_rows, eval_rows = data.load(recipe.data)
    where = device()
    tokenizer = load_tokenizer(base)
    rows = _tokenize(train_rows, tokenizer, recipe)
    held_out = _tokenize(eval_rows, tokenizer, recipe) if eval_rows else []
    checkpointing = recipe.train.gradient_checkpointing
    if checkpointing is None:
        checkpointing = recipe.train.quantize != "none"
    for warning in guards.warnings(recipe, rows, bool(held_out), checkpointing):
        progress.warn(warning)
    rows = [row for row in rows if any(label != data.IGNORE for label in row.labels)]
    if not rows:
        raise DataError(f"{train_rows.path}: no row has a token to learn from", "raise data.max_length")
    (run.path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    _write_eval(run, eval_rows)

    from transformers import set_seed

    set_seed(recipe.train.seed)
    model = load_base(base, recipe.train, where)
    _record_start(run, recipe, base, where, model, train_rows, eval_rows)
    model = add_adapter(model, recipe.train, checkpointing=checkpointing)
    initial = _keep_initial(model, recipe, run)
    metrics = _measure(run, "base", model, held_out, tokenizer, recipe, progress)
    _fit(model, tokenizer, rows, held_out, recipe, run, where, checkpointing, resume, progress)
    _save(model, tokenizer, run, initial, base)
    metrics |= _measure(run, "tuned", model, held_out, tokenizer, recipe, progress)
    del model
    _measure_on_original(run, base, held_out, tokenizer, recipe, where, progress)
    _plot(run)


def _fit(model: Any, tokenizer: Any, rows: Any, held_out: Any, recipe: Recipe, run: Run, *rest: Any) -> None:
    from lora2serve.train.loop import fit

    where, checkpointing, resume, progress = rest
    options = {"checkpointing": checkpointing, "resume": resume, "progress": progress}
    try:
        steps = fit(model, tokenizer, rows, held_out, recipe, run, where, **options)
    except ImportError as error:
        raise TrainError(f"a library is missing: {error}", "pip install 'lora2serve[train]'") from error
    except RuntimeError as error:
        if "out of memory" in str(error):
            hint = "lower train.batch_size or data.max_length, and raise train.accumulation"
            raise TrainError(f"out of memory: {str(error).splitlines()[0][:160]}", hint) from error
        raise
    run.update({"steps": steps})


def _tokenize(rows: Rows, tokenizer: Any, recipe: Recipe) -> list[Tokens]:
    if any("messages" in row for row in rows.rows) and not tokenizer.chat_template:
        raise DataError(
            f"{rows.path}: rows of messages, but the tokenizer has no chat template",
            "use prompt + completion, or an instruct model",
        )
    try:
        return [data.tokenize(row, tokenizer, recipe.data) for row in rows.rows]
    except Exception as error:  # a template raises what it likes
        if isinstance(error, DataError):
            raise
        raise DataError(f"{rows.path}: the chat template refuses a row: {error}") from error


def _measure(
    run: Run, name: str, model: Any, rows: Sequence[Tokens], tokenizer: Any, recipe: Recipe, progress: Progress
) -> dict[str, Any]:
    """Evaluate the base (adapter off) or the tuned model on the base as trained; kept in run.json."""
    kept = run.record.get("metrics") or {}
    if not rows or (name == "base" and "base" in kept):
        return kept
    pad, batch = tokenizer.pad_token_id, recipe.train.batch_size
    if name == "base":
        with model.disable_adapter():
            found = evaluate.evaluate(model, rows, pad, batch, progress, "eval before")
    else:
        found = evaluate.evaluate(model, rows, pad, batch, progress, "eval after")
    kept = {**kept, name: found}
    run.update({"metrics": kept})
    progress.note(f"{name}: eval loss {found['eval_loss']:.4f}, perplexity {found['perplexity']:.2f}")
    return kept


def _measure_on_original(
    run: Run, base: Path, rows: Sequence[Tokens], tokenizer: Any, recipe: Recipe, where: Device, progress: Progress
) -> None:
    """The merge needs to know which base suits the adapter better."""
    if not rows or not run.record.get("quantization"):
        return
    from lora2serve.checkpoint import read_config

    if read_config(base).get("quantization_config"):
        return  # this base has no full-precision weights here
    pad, batch = tokenizer.pad_token_id, recipe.train.batch_size
    found = evaluate.on_original(base, run.adapter, rows, pad, batch, where, progress)
    if found:
        run.update({"metrics": {**run.record["metrics"], "tuned_on_original": found}})
        progress.note(
            f"tuned, on the original base: eval loss {found['eval_loss']:.4f}, perplexity {found['perplexity']:.2f}"
        )


def _record_start(
    run: Run, recipe: Recipe, base: Path, where: Device, model: Any, train_rows: Rows, eval_rows: Rows | None
) -> None:
    quantization = None
    modules = quantized_modules(model)
    if modules:
        config = model.config.quantization_config
        quantization = {
            "type": config.bnb_4bit_quant_type,
            "double_quant": config.bnb_4bit_use_double_quant,
            "block_size": 64,
            "compute_dtype": where.dtype,
            "modules": modules,
        }
    run.update(
        {
            "name": run.name,
            "base": identity(base, recipe.model.path, recipe.model.revision),
            "data": {"train": train_rows.record(), "eval": eval_rows.record() if eval_rows else None},
            "quantization": quantization,
            "device": where.name,
            "versions": manifest.versions(),
        }
    )


def _keep_initial(model: Any, recipe: Recipe, run: Run) -> Path | None:
    """Inits that change the base are saved once at the start: the result can then be a plain LoRA for the true base."""
    if not recipe.train.lora.init.startswith(("pissa", "olora", "corda")):
        return None
    initial = run.path / "checkpoints" / "initial"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(initial))
    return initial


def _save(model: Any, tokenizer: Any, run: Run, initial: Path | None, base: Path) -> None:
    given = {"path_initial_model_for_weight_conversion": str(initial)} if initial else {}
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(run.adapter), **given)
    tokenizer.save_pretrained(str(run.adapter))
    (run.adapter / "README.md").unlink(missing_ok=True)  # PEFT's empty card: `push` writes a true one


def _write_eval(run: Run, rows: Rows | None) -> None:
    if rows:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows.rows[:MOST_EVAL_ROWS]]
        run.eval_data.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _plot(run: Run) -> None:
    """loss.png: training and eval loss by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, style in (("loss", "-"), ("eval_loss", "o--")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key.replace("_", " "), markersize=4)
    axes.set(xlabel="step", ylabel="loss", title=run.name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(run.path / "loss.png", dpi=120)
    pyplot.close(figure)


def _quiet() -> None:
    """The libraries' own bars and words; what matters goes through Progress."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("trl", "peft", "bitsandbytes", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
