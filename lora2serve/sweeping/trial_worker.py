"""The worker process of a sweep: trains one trial after another, and measures adapters on held-out rows."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.adapters.adapter import open_adapter
from lora2serve.adapters.lint import lint
from lora2serve.adapters.peft_loading import load_adapter
from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import EvalLoss
from lora2serve.config import recipe as recipes
from lora2serve.config.recipe import Recipe
from lora2serve.data import data_sets
from lora2serve.errors import TrainError
from lora2serve.parity_check.chat_models import of_trained
from lora2serve.parity_check.trained_model import of_run
from lora2serve.progress import Silent
from lora2serve.sweeping.suite_losses import base_losses, suite_losses
from lora2serve.sweeping.sweep_suite import SuiteOrder, read_part
from lora2serve.sweeping.trial_record import RowLoss, TrialOutcome
from lora2serve.system.hardware import VISIBLE
from lora2serve.weights.checkpoint import read_config

if TYPE_CHECKING:
    from lora2serve.sweeping.trial_process import TrialOrder
    from lora2serve.system.worker_protocol import Link
    from lora2serve.training.eval_loss import RowLosses


class TrialWorker:
    """Run by ``trial_process.py``. ``gpu``: the only one that it uses; ``threads`` of torch, 0 for its own choice."""

    def __init__(self, link: Link, gpu: str | None, threads: int) -> None:
        self._link = link
        use_gpu(gpu, threads)

    def train(self, order: TrialOrder) -> dict[str, object]:
        """Train as the recipe says, into an empty directory; a ``TrialOutcome``."""
        from lora2serve.training.finetune import train

        suite = read_part(order["suite"]) if order["suite"] else None  # what is wrong with it is said before a training
        gc.collect()  # the model of the trial before
        recipe, run, base = (
            recipes.load(Path(order["recipe"]), order["overrides"]),
            Run(Path(order["run"])),
            Path(order["base"]),
        )
        if order["base_loss"] is not None:
            known = EvalLoss.from_json(order["base_loss"], "base loss")
            run.save(replace(run.record, metrics=replace(run.record.metrics, base=known)))
        begin = time.monotonic()
        train(recipe, run, data_sets.load(recipe.data), base=base, quick=order["quick"], progress=Silent())
        seconds = time.monotonic() - begin
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)  # a trial that was cut off begins again
        if suite:
            losses = suite_losses(self._link, of_trained(of_run(run, base), run.name), suite)
        elif order["final_rows"]:
            losses = _row_loss(_measured(recipe, base, run.adapter, Path(order["final_rows"])))
        else:
            losses = _read_losses(run.row_losses)
        if not losses.finite:
            raise TrainError("the eval loss is not a number", "a smaller learning rate may train")
        return _outcome(run, base, losses, seconds).to_json()

    def measure(self, recipe: str, base: str, files: Sequence[str], suites: Sequence[SuiteOrder]) -> list[object]:
        """The base's losses on each file of rows, then on each suite: ``RowLoss`` records."""
        loaded, parts = recipes.load(Path(recipe)), [read_part(order) for order in suites]
        losses = [_row_loss(_measured(loaded, Path(base), None, Path(file))) for file in files]
        losses += base_losses(self._link, loaded, Path(base), parts)
        if not all(item.finite for item in losses):
            raise TrainError("its loss is not a number", "look at its weights: `lora2serve chat` shows what it says")
        return [item.to_json() for item in losses]


def use_gpu(gpu: str | None, threads: int) -> None:
    """Let this process have this one only, and so many threads of torch; 0 for its own choice."""
    if gpu is not None:
        os.environ[VISIBLE] = gpu  # before torch looks for one
    if threads:
        import torch

        torch.set_num_threads(threads)


def _outcome(run: Run, base: Path, losses: RowLoss, seconds: float) -> TrialOutcome:
    memory, adapter = run.record.memory, open_adapter(run.adapter)
    tensors = adapter.tensors.specs()
    findings = lint(adapter.config, tensors, read_config(base))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    runtime = next((line["train_runtime"] for line in reversed(lines) if "train_runtime" in line), seconds)
    return TrialOutcome(
        losses=losses, seconds=float(runtime), memory=memory.peak_bytes if memory else 0,
        memory_measured=memory is not None, parameters=sum(prod(spec.shape) for spec in tensors),
        servable=not findings, problem="; ".join(finding.message for finding in findings), run=str(run.path),
        curve=tuple((int(line["step"]), float(line["eval_loss"])) for line in lines if "eval_loss" in line),
        eval_loss=tuned.eval_loss if losses.scored and (tuned := run.record.metrics.tuned) else None,
    )  # fmt: skip


def _measured(recipe: Recipe, base: Path, adapter: Path | None, rows: Path) -> RowLosses:
    """The base, held as in training, with an adapter or without, on a file of rows."""
    from lora2serve.data.base_template import base_template
    from lora2serve.data.tokenization import tokenize_all
    from lora2serve.training import eval_loss
    from lora2serve.training.expert_lora import open_to_peft
    from lora2serve.training.model import device, load_base, prepare
    from lora2serve.training.new_rows import grow
    from lora2serve.training.requirements import translated

    with translated():
        template = base_template(base, recipe.data.chat_template, new_tokens=recipe.data.new_tokens)
        data = data_sets.read_file(rows, {}).in_form(recipe.data.form, template.tokenizer.chat_template)
        samples = [s for s in tokenize_all(data, template, recipe.data, Silent()) if s.learned]
        model = load_base(base, recipe.train, device())
        grow(model, template.new_tokens.rows)
        model = prepare(model, checkpointing=False)
        with open_to_peft(model):
            tuned = load_adapter(model, adapter) if adapter else model
        pad, batch = template.tokenizer.pad_token_id, recipe.train.batch_size
        return eval_loss.evaluate(tuned, samples, pad, batch, Silent(), "")


def _row_loss(losses: RowLosses) -> RowLoss:
    return RowLoss(tuple(losses.sums.tolist()), tuple(losses.tokens.tolist()))


def _read_losses(path: Path) -> RowLoss:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return RowLoss(tuple(line["loss"] for line in lines), tuple(line["tokens"] for line in lines))
