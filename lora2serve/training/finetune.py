"""One fine-tune from recipe to run directory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora2serve.artifacts import manifest
from lora2serve.artifacts.lineage import BaseRecord
from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import DataRecord, QuantizationRecord
from lora2serve.config import lora_inits
from lora2serve.config.recipe import Recipe, dump
from lora2serve.data.rows import DataSets
from lora2serve.data.tokenization import Tokens, tokenize_all
from lora2serve.errors import DataError
from lora2serve.progress import Progress
from lora2serve.system.hub_snapshot import hub_snapshot
from lora2serve.training import advice, eval_loss
from lora2serve.training.model import (
    Device,
    add_adapter,
    device,
    load_base,
    load_tokenizer,
    lora_config,
    prepare,
    quantized_modules,
)
from lora2serve.training.plot import plot
from lora2serve.training.requirements import translated
from lora2serve.weights.checkpoint import identity, read_config

MOST_EVAL_ROWS = 1000  # kept in eval.jsonl for parity


def train(
    recipe: Recipe, run: Run, sets: tuple[DataSets, DataSets | None], *, base: Path, resume: bool, progress: Progress
) -> None:
    """Fine-tune ``base`` (a local directory) on ``sets`` (``data.load``); everything of the run directory is written.

    DataError and TrainError for what cannot be trained; KeyboardInterrupt once Ctrl-C has saved a checkpoint.
    """
    with translated():
        from transformers import set_seed

        from lora2serve.training.trainer import check_trackers, fit

        _quiet()
        check_trackers(recipe)
        where = device()
        _announce(run, recipe, sets, where, progress)
        tokenizer = load_tokenizer(base)
        checkpointing = _checkpointing(recipe)
        rows, held_out = _tokens(sets, tokenizer, recipe, checkpointing, progress)
        (run.path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
        _write_eval(run, sets[1])
        set_seed(recipe.train.seed)
        model = prepare(load_base(base, recipe.train, where), checkpointing=checkpointing)
        lora = _adapter(model, recipe, base, progress)  # a module that is not there is met before the work
        _record_start(run, recipe, base, where, model, sets)
        # The base is measured before the adapter is there: some inits take a part of the base out.
        _measure(run, "base", model, held_out, tokenizer, recipe, progress)
        model = add_adapter(model, lora)
        initial = _keep_initial(model, recipe, run)
        steps = fit(
            model, tokenizer, rows, held_out, recipe, run, where,
            checkpointing=checkpointing, resume=resume, progress=progress,
        )  # fmt: skip
        run.save(replace(run.record, steps=steps))
        _save(model, tokenizer, run, initial, base)
        _measure(run, "tuned", model, held_out, tokenizer, recipe, progress)
        del model
        _measure_on_original(run, base, held_out, tokenizer, recipe, where, progress)
        plot(run)
        run.save(replace(run.record, finished=True))


def _announce(
    run: Run, recipe: Recipe, sets: tuple[DataSets, DataSets | None], where: Device, progress: Progress
) -> None:
    """What is about to be done, before the long silence of loading; and a warning where a GPU would stand idle."""
    train_rows, eval_rows = sets
    held_out = f", {len(eval_rows.rows)} held out" if eval_rows else ""
    kind = "LoRA" if recipe.train.quantize == "none" else f"QLoRA ({recipe.train.quantize})"
    progress.note(f"{run.path}: {kind} of {recipe.model.path} on {len(train_rows.rows)} rows{held_out}")
    warning = "" if where.on_gpu else advice.idle_gpu()
    if warning:
        progress.warn(warning)


def _adapter(model: Any, recipe: Recipe, base: Path, progress: Progress) -> Any:
    """PEFT's configuration, after a warning where vLLM will not serve what it gives beside others."""
    config = lora_config(model, recipe.train)
    init = True if lora_inits.changes_base(recipe.train.lora.init) else config.init_lora_weights  # as it will be saved
    warning = advice.multi_lora({**config.to_dict(), "init_lora_weights": init}, read_config(base))
    if warning:
        progress.warn(warning)
    return config


def _checkpointing(recipe: Recipe) -> bool:
    chosen = recipe.train.gradient_checkpointing
    return recipe.train.quantize != "none" if chosen is None else chosen


def _tokens(
    sets: tuple[DataSets, DataSets | None], tokenizer: Any, recipe: Recipe, checkpointing: bool, progress: Progress
) -> tuple[list[Tokens], list[Tokens]]:
    """Training and held-out rows in tokens, those without a token to learn from left out, after every warning."""
    train_rows, eval_rows = sets
    rows = tokenize_all(train_rows, tokenizer, recipe.data, progress)
    held_out = tokenize_all(eval_rows, tokenizer, recipe.data, progress) if eval_rows else []
    for warning in advice.warnings(recipe, rows, bool(held_out), checkpointing):
        progress.warn(warning)
    rows = [row for row in rows if row.learned]
    if not rows:
        raise DataError(f"{train_rows.path}: no row has a token to learn from", "raise data.max_length")
    scored = [row for row in held_out if row.learned]
    if eval_rows and not scored:
        raise DataError(f"{eval_rows.path}: no held-out row has a token to score", "raise data.max_length")
    return rows, scored


def _measure(
    run: Run, name: str, model: Any, rows: Sequence[Tokens], tokenizer: Any, recipe: Recipe, progress: Progress
) -> None:
    """Evaluate the base or the tuned model on the base as trained; kept in run.json."""
    record = run.record
    if not rows or (name == "base" and record.metrics.base):  # known since before --resume
        return
    label = "eval before" if name == "base" else "eval after"
    loss = eval_loss.evaluate(model, rows, tokenizer.pad_token_id, recipe.train.batch_size, progress, label)
    run.save(replace(record, metrics=record.metrics.with_loss(name, loss)))
    progress.note(f"{name}: eval loss {loss.eval_loss:.4f}, perplexity {loss.perplexity:.2f}")


def _measure_on_original(
    run: Run, base: Path, rows: Sequence[Tokens], tokenizer: Any, recipe: Recipe, where: Device, progress: Progress
) -> None:
    """The merge needs to know which base suits the adapter better."""
    if not rows or not run.record.quantization:
        return
    if read_config(base).get("quantization_config"):
        return  # this base has no full-precision weights here
    pad, batch = tokenizer.pad_token_id, recipe.train.batch_size
    loss = eval_loss.on_original(base, run.adapter, rows, pad, batch, where, progress)
    if loss:
        record = run.record
        run.save(replace(record, metrics=replace(record.metrics, tuned_on_original=loss)))
        progress.note(f"tuned, on the original base: eval loss {loss.eval_loss:.4f}, perplexity {loss.perplexity:.2f}")


def _record_start(
    run: Run, recipe: Recipe, base: Path, where: Device, model: Any, sets: tuple[DataSets, DataSets | None]
) -> None:
    train_rows, eval_rows = sets
    quantization = None
    modules = quantized_modules(model)
    if modules:
        config = model.config.quantization_config
        quantization = QuantizationRecord(
            type=config.bnb_4bit_quant_type if config.load_in_4bit else "int8",
            double_quant=config.bnb_4bit_use_double_quant,
            block_size=64,
            compute_dtype=where.dtype,
            modules=tuple(modules),
        )
    data = {"train": train_rows.record(), "eval": eval_rows.record() if eval_rows else None}
    run.save(
        replace(
            run.record,
            name=run.name,
            base=BaseRecord.from_json(identity(base, recipe.model.path, recipe.model.revision), "base"),
            data=DataRecord.from_json(data, "data"),
            quantization=quantization,
            device=where.name,
            versions=manifest.versions(),
        )
    )


def _keep_initial(model: Any, recipe: Recipe, run: Run) -> Path | None:
    """Inits that change the base are saved once at the start: the result can then be a plain LoRA for the true base."""
    if not lora_inits.changes_base(recipe.train.lora.init):
        return None
    initial = run.path / "checkpoints" / "initial"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(initial))
    return initial


def _save(model: Any, tokenizer: Any, run: Run, initial: Path | None, base: Path) -> None:
    given = {"path_initial_model_for_weight_conversion": str(initial)} if initial else {}
    pulled = hub_snapshot(base)
    model.peft_config["default"].base_model_name_or_path = pulled.id if pulled else str(base)
    model.peft_config["default"].revision = pulled.commit if pulled else None
    model.save_pretrained(str(run.adapter), **given)
    tokenizer.save_pretrained(str(run.adapter))
    (run.adapter / "README.md").unlink(missing_ok=True)  # PEFT's empty card: `push` writes a true one


def _write_eval(run: Run, rows: DataSets | None) -> None:
    if rows:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows.rows[:MOST_EVAL_ROWS]]
        run.eval_data.write_text("\n".join(lines) + "\n", encoding="utf-8")


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
