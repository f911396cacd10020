"""What is missing of scores on a suite or tasks: a trial's adapter, or the base, answers in transformers and PEFT."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.artifacts.run_record import QuantizationRecord
from lora2serve.config.recipe import Recipe
from lora2serve.data.base_template import base_template
from lora2serve.errors import EngineError
from lora2serve.evaluation.harness_worker import HarnessWorker
from lora2serve.evaluation.suite import Suite
from lora2serve.evaluation.suite_run import ask_all
from lora2serve.parity_check.chat_models import BASE, ChatModel, of_trained
from lora2serve.parity_check.trained_model import TrainedModel
from lora2serve.progress import Silent
from lora2serve.sweeping.trial_record import RowLoss
from lora2serve.system import scratch
from lora2serve.weights.checkpoint import read_config

if TYPE_CHECKING:
    from lora2serve.sweeping.sweep_tasks import TaskPart
    from lora2serve.system.worker_protocol import Link


def suite_losses(link: Link, model: ChatModel, suite: Suite | TaskPart) -> RowLoss:
    """Of each item 1 - score, as ``lora2serve evaluate`` scores that model."""
    return _losses(link, model, [suite])[0]


def base_losses(link: Link, recipe: Recipe, base: Path, suites: Sequence[Suite | TaskPart]) -> list[RowLoss]:
    """The same of the base, quantized as trainings will have it, with the recipe's chat template."""
    if not suites:
        return []
    with scratch.temporary_folder("tokenizer") as folder:
        base_template(base, recipe.data.chat_template).tokenizer.save_pretrained(folder)
        trained = TrainedModel(BASE, base, (), Path(folder), _quantization(base, recipe))
        chat = of_trained(trained, BASE)
        return _losses(link, replace(chat, options={**chat.options, "tokenizer": folder}), suites)


def _losses(link: Link, model: ChatModel, suites: Sequence[Suite | TaskPart]) -> list[RowLoss]:
    _free()  # the model that was trained
    worker = HarnessWorker(link, model.engine, model.options)
    try:
        version = worker.about()["version"]
        return [_of_suite(worker, version, model, suite) for suite in suites]
    finally:
        worker.close()
        del worker
        _free()


def _of_suite(worker: HarnessWorker, version: str, model: ChatModel, suite: Suite | TaskPart) -> RowLoss:
    if not isinstance(suite, Suite):
        return suite.losses(worker, version, model)
    measured = ask_all(worker, version, model, suite, Silent())
    if unscored := next((item for item in measured.items if item.error and item.answer), None):
        raise EngineError(f"{suite.name}: item {unscored.id}: {unscored.error}")  # of a judge, which others answered
    losses = tuple(1 - item.score for item in measured.items)
    return RowLoss(losses, (1,) * len(losses), scored=True, groups=tuple(measured.groups() or ()))


def _quantization(base: Path, recipe: Recipe) -> QuantizationRecord | None:
    """Known once the base is loaded."""
    from lora2serve.training.model import device, load_base, quantization_of

    if recipe.train.quantize == "none" and not read_config(base).get("quantization_config"):
        return None
    return quantization_of(load_base(base, recipe.train, device()), device())


def _free() -> None:
    """What no model uses any more: the next one is to fit, too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
