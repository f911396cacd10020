"""One fine-tune from recipe to run directory."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora2serve.artifacts import manifest
from lora2serve.artifacts.lineage import AdapterRecord, BaseRecord
from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import DataRecord, DataSource, EvalLoss, LoopRecord
from lora2serve.config import lora_inits
from lora2serve.config.objectives import SFT
from lora2serve.config.recipe import Recipe, dump
from lora2serve.config.train_methods import LORA
from lora2serve.data.base_template import base_template
from lora2serve.data.data_sets import DataSet, DataSets
from lora2serve.data.new_tokens import NO_TOKENS, NewTokens
from lora2serve.data.preference_pairs import refuse_other_prompts
from lora2serve.data.preview import first_lines
from lora2serve.data.samples import Sample
from lora2serve.data.served_template import ChatTemplate
from lora2serve.data.tokenization import tokenize_all
from lora2serve.data.tokenizer import Tokenizer
from lora2serve.errors import DataError
from lora2serve.exporting.open_model import adapter_record
from lora2serve.progress import Progress, Silent
from lora2serve.system.hub_snapshot import hub_snapshot
from lora2serve.system.small_files import let_umask_decide
from lora2serve.training import advice, eval_loss, ranks
from lora2serve.training.checkpoints import last_checkpoint
from lora2serve.training.eval_loss import RowLosses
from lora2serve.training.loop_choice import choose_loop
from lora2serve.training.memory_record import begin_measuring, keep_measured
from lora2serve.training.method_config import adapter_config
from lora2serve.training.method_outlook import foretell, kind_of_training
from lora2serve.training.model import (
    Device,
    add_adapter,
    device,
    load_base,
    prepare,
    quantization_of,
)
from lora2serve.training.new_rows import grow, refuse_common_base
from lora2serve.training.plot import plot
from lora2serve.training.requirements import translated
from lora2serve.training.sample_prompts import sample_prompts
from lora2serve.training.shared_base import SharedTraining
from lora2serve.training.starting_adapter import load_weights, other_base
from lora2serve.training.weightless import check_adapter
from lora2serve.weights.checkpoint import identity, read_config

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

MOST_EVAL_ROWS = 1000  # kept in eval.jsonl for parity


def train(
    recipe: Recipe, run: Run, data_sets: DataSets, *, base: Path, resume: bool = False, quick: bool = False,
    progress: Progress, shared: SharedTraining | None = None,
) -> Run:  # fmt: skip
    """Fine-tune ``base`` (a local directory) on ``data_sets`` (``data_sets.load``); the run, with all that it keeps.

    quick: leave out what only an export and people need: the adapter on the original base, the picture.
    shared: of several trainings at the same time, the base that they share.
    DataError and TrainError for what cannot be trained; KeyboardInterrupt once Ctrl-C has saved a checkpoint.
    """
    with translated():
        from lora2serve.training.trainer import check_trackers

        _quiet()
        check_trackers(recipe)
        data, day = recipe.data, run.record.day or date.today().isoformat()
        template = base_template(base, data.chat_template, day, data.new_tokens)
        fine_tune = FineTune(recipe, run, data_sets, base, device(), progress, quick, shared, template.new_tokens)
        fine_tune.announce()
        fine_tune.in_form(template.tokenizer).run_all(template, resume=resume)
    return run


@dataclass(frozen=True)
class FineTune:
    """The steps of one fine-tune, in order."""

    recipe: Recipe
    run: Run
    data_sets: DataSets
    base: Path
    device: Device
    progress: Progress
    quick: bool = False
    shared: SharedTraining | None = None
    new_tokens: NewTokens = NO_TOKENS

    @property
    def starting_adapter(self) -> Path | None:
        """The directory of the adapter whose training goes on."""
        return Path(self.recipe.train.from_adapter) if self.recipe.train.from_adapter else None

    def run_all(self, template: ChatTemplate, *, resume: bool) -> None:
        """From the tokens to the picture."""
        from transformers import set_seed

        from lora2serve.training.trainer import fit

        tokenizer = template.tokenizer
        with ranks.first_on_machine():
            rows, held_out = self.tokenize(template)
        prompts = sample_prompts(self.recipe.train.samples, self.data_sets.train.rows, template)
        self.write_inputs()
        set_seed(self.recipe.train.seed)
        loop = choose_loop(self.recipe, self.run, self.base, self.device, self.progress, resume=resume)
        model = self.load(loop)
        config = self.adapter_config(model)
        self.record_start(model, template)
        # The base is measured before the adapter is there: some inits take a part of the base out.
        if held_out and not self.run.record.metrics.base:  # known since before --resume
            self.measure("base", model, held_out, tokenizer)
        tuned = add_adapter(model, config, self.new_tokens)
        del model
        if self.shared:
            self.shared.base.refuse_trained(tuned)
        if (adapter := self.starting_adapter) and not (resume and last_checkpoint(self.run)):
            load_weights(tuned, adapter)
        initial = self.keep_initial(tuned)
        begin_measuring(self.device)
        steps = fit(
            tuned, tokenizer, rows, held_out, self.recipe, self.run, self.device, loop,
            resume=resume, progress=self.progress,
            measure=lambda: self.losses(tuned, held_out, tokenizer, "", Silent()).mean(),
            prompts=prompts, turn=self.shared.turn if self.shared else None,
        )  # fmt: skip
        self.run.save(replace(self.run.record, steps=steps))
        self.keep_measured()
        self.save(tuned, tokenizer, initial)
        if held_out:
            losses = self.measure("tuned", tuned, held_out, tokenizer)
            losses.write(self.run.row_losses)
            del tuned
            if not self.quick:
                self.measure_on_original(losses, held_out, tokenizer)
        if not self.quick and ranks.rank() == 0:
            plot(self.run)
        self.run.save(replace(self.run.record, finished=True))

    def keep_measured(self) -> None:
        """The peak of memory; of several trainings at a time it is that of all of them."""
        if not self.shared:
            keep_measured(self.run, self.recipe, self.base, self.device, self.progress)

    def load(self, loop: LoopRecord) -> PreTrainedModel:
        """The base, or this process's part of it, ready for an adapter; others may train on it, too."""
        load = partial(load_base, self.base, self.recipe.train, self.device, sharded=loop.sharded)
        refuse_common_base(self.new_tokens, shared=self.shared is not None, sharded=bool(loop.sharded))
        base = self.shared.load(self.base, load) if self.shared else load()
        grow(base, self.new_tokens.rows)
        model = prepare(base, checkpointing=loop.checkpointing)
        if loop.sharded:
            from lora2serve.training.sharded_base import shard

            shard(model, self.device.name)
        return model

    def announce(self) -> None:
        """What will be done and what will not, before the long silence of loading; TrainError for what cannot be."""
        rows, eval_rows = self.data_sets.train, self.data_sets.held_out
        held_out = f", {len(eval_rows.rows)} held out" if eval_rows else ""
        kind = kind_of_training(self.recipe.train)
        self.progress.note(f"{self.run.path}: {kind} of {self.recipe.model.path} on {len(rows.rows)} rows{held_out}")
        warning = "" if self.device.on_gpu else advice.idle_gpu()
        if warning:
            self.progress.warn(warning)
        warnings = self.data_sets.warnings()
        warnings += check_adapter(self.base, self.recipe.train, self.device, self.new_tokens)
        if self.starting_adapter and not self.run.record.from_adapter:
            warnings += other_base(self.starting_adapter, self.base, self.recipe.model.path)
        for text in warnings:
            self.progress.warn(text)
        foretell(self.recipe, self.base, self.device, self.progress)

    def in_form(self, tokenizer: Tokenizer) -> FineTune:
        """With prompts and completions as the recipe has them for this model, which is told."""
        note = self.data_sets.train.note_of_form(self.recipe.data.form, tokenizer.chat_template)
        for text in [*([note] if note else []), *self.new_tokens.notes()]:
            self.progress.note(text)
        return replace(self, data_sets=self.data_sets.in_form(self.recipe.data.form, tokenizer.chat_template))

    def tokenize(self, template: ChatTemplate) -> tuple[list[Sample], list[Sample]]:
        """Training and held-out rows, those without a token to learn from left out, after every warning."""
        train_rows, eval_rows = self.data_sets.train, self.data_sets.held_out
        samples = tokenize_all(train_rows, template, self.recipe.data, self.progress)
        held_out = tokenize_all(eval_rows, template, self.recipe.data, self.progress) if eval_rows else []
        for warning in [*advice.warnings(self.recipe, samples, bool(held_out)), *self.new_tokens.warnings(samples)]:
            self.progress.warn(warning)
        samples = [sample for sample in samples if sample.learned]
        if not samples:
            raise DataError(f"{train_rows.path}: no row has a token to learn from", "raise data.max_length")
        for line in first_lines(train_rows, samples, template):
            self.progress.note(line)
        if template.prints_date:
            self.progress.note(f"the chat template prints the date: {template.day}, on --resume and in parity, too")
        scored = [sample for sample in held_out if sample.learned]
        if eval_rows and not scored:
            raise DataError(f"{eval_rows.path}: no held-out row has a token to score", "raise data.max_length")
        if self.recipe.train.objective == "dpo":
            refuse_other_prompts(samples, train_rows)
            refuse_other_prompts(scored, eval_rows or train_rows)
        if eval_rows and not self.right(scored):
            raise DataError(f"{eval_rows.path}: no held-out answer is labeled true", "hold more rows out")
        return samples, scored

    def write_inputs(self) -> None:
        """The recipe, and the held-out rows for parity."""
        self.run.recipe.write_text(dump(self.recipe), encoding="utf-8")
        if self.data_sets.held_out:
            rows = self.data_sets.held_out.rows[:MOST_EVAL_ROWS]
            lines = [json.dumps(row.json(), ensure_ascii=False) for row in rows]
            self.run.eval_data.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def adapter_config(self, model: PreTrainedModel) -> PeftConfig:
        """PEFT's configuration, after a warning where vLLM will not serve a LoRA beside others."""
        config = adapter_config(model, self.recipe.train, self.base, self.new_tokens.ids)
        if self.recipe.train.method != LORA:
            return config
        init = True if lora_inits.changes_base(self.recipe.train.lora.init) else config.init_lora_weights  # as saved
        saved = {**config.to_dict(), "peft_type": config.peft_type.value, "init_lora_weights": init}
        warning = advice.multi_lora(saved, read_config(self.base), self.new_tokens.added)
        if warning:
            self.progress.warn(warning)
        return config

    def record_start(self, model: PreTrainedModel, template: ChatTemplate) -> None:
        """Base, data and versions into run.json."""
        quantization, before = quantization_of(model, self.device), self.run.record.quantization
        if before and quantization and before.experts != quantization.experts:
            self.progress.warn(f"{self.run.path}: begun with experts in 16 bits, which are in 4 bits from now on")
        base = identity(self.base, self.recipe.model.path, self.recipe.model.revision)
        rows, eval_rows = self.data_sets.train, self.data_sets.held_out
        self.run.save(
            replace(
                self.run.record,
                name=self.run.name,
                base=BaseRecord.from_json(base, "base"),
                from_adapter=self.record_of_starting_adapter(),
                data=DataRecord(train=_source(rows), eval=_source(eval_rows) if eval_rows else None),
                quantization=quantization,
                device=self.device.name,
                day=str(template.day) if template.prints_date else None,
                versions=manifest.versions(),
            )
        )

    def record_of_starting_adapter(self) -> AdapterRecord | None:
        """That of before --resume, when the adapter may be gone."""
        if self.run.record.from_adapter or not self.starting_adapter:
            return self.run.record.from_adapter
        return adapter_record(self.starting_adapter)

    def keep_initial(self, model: PeftModel) -> Path | None:
        """An init that changes the base is saved at the start: the result can then be a plain LoRA."""
        if not lora_inits.changes_base(self.recipe.train.lora.init):
            return None
        initial = self.run.path / "checkpoints" / "initial"
        model.peft_config["default"].init_lora_weights = True
        if ranks.rank() == 0:
            model.save_pretrained(str(initial))
        return initial

    def save(self, model: PeftModel, tokenizer: Tokenizer, initial: Path | None) -> None:
        """The adapter with its tokenizer; it names its base by the Hub's id where it has one."""
        options = {"path_initial_model_for_weight_conversion": str(initial)} if initial else {}
        snapshot = hub_snapshot(self.base)
        model.peft_config["default"].base_model_name_or_path = snapshot.id if snapshot else str(self.base)
        model.peft_config["default"].revision = snapshot.commit if snapshot else None
        model.save_pretrained(str(self.run.adapter), **options)
        tokenizer.save_pretrained(str(self.run.adapter))
        let_umask_decide(self.run.adapter)
        (self.run.adapter / "README.md").unlink(missing_ok=True)  # PEFT's empty card: `push` writes a true one

    def measure(
        self, name: Literal["base", "tuned"], model: PreTrainedModel | PeftModel, held_out: list[Sample],
        tokenizer: Tokenizer,
    ) -> RowLosses:  # fmt: skip
        """Evaluate the base or the tuned model on the base as trained; kept in run.json."""
        label = "eval before" if name == "base" else "eval after"
        losses = self.losses(model, held_out, tokenizer, label, self.progress)
        self.keep_loss(name, name, losses.mean())
        return losses

    def losses(
        self, model: PreTrainedModel | PeftModel, held_out: list[Sample], tokenizer: Tokenizer, label: str,
        progress: Progress,
    ) -> RowLosses:  # fmt: skip
        """The one way in which held-out rows are scored: before, in between and after."""
        rows, batch = self.right(held_out), self.recipe.train.batch_size
        return eval_loss.evaluate(model, rows, tokenizer.pad_token_id, batch, progress, label)

    def right(self, held_out: list[Sample]) -> list[Sample]:
        """Without the answers that are rejected or labeled false."""
        return [sample for sample in held_out if sample.right]

    def measure_on_original(self, tuned: RowLosses, held_out: list[Sample], tokenizer: Tokenizer) -> None:
        """The merge needs to know which base suits the adapter better."""
        if not self.run.record.quantization:
            return
        if read_config(self.base).get("quantization_config"):
            return  # this base has no full-precision weights here
        rows, pad, batch = self.right(held_out), tokenizer.pad_token_id, self.recipe.train.batch_size
        losses = eval_loss.on_original(
            self.base, self.run.adapter, rows, pad, batch, self.device, self.progress, self.new_tokens.rows
        )
        if losses:
            self.keep_loss("tuned_on_original", "tuned, on the original base", losses.mean())
            metrics = replace(self.run.record.metrics, tuned_less_tuned_on_original=tuned.less(losses))
            self.run.save(replace(self.run.record, metrics=metrics))

    def keep_loss(self, name: str, label: str, loss: EvalLoss) -> None:
        """Into run.json, and in words."""
        record = self.run.record
        self.run.save(replace(record, metrics=record.metrics.with_loss(name, loss)))
        of_what = "eval loss" if self.recipe.train.objective == SFT else "loss of the right answers"
        self.progress.note(f"{label}: {of_what} {loss.eval_loss:.4f}, perplexity {loss.perplexity:.2f}")


def _source(data: DataSet) -> DataSource:
    parts = tuple(_source(part) for part in data.parts)
    return DataSource(path=data.path, sha256=data.sha256, rows=len(data.rows), revision=data.revision, parts=parts)


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
