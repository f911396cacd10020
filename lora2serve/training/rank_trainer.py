"""The trainer of one of several processes: its share of a step's rows, and sums over all processes.

The libraries take it for a training by itself whose batches are those of all processes. What it gets of a batch is its
share (``RowCollator``), so that the order of rows, the count of steps and what a resume passes over are those of one
process. Once a step, before gradients are clipped, they are summed. Whatever a process does to fit a step into its
memory stays its own affair.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora2serve.data.rendering import IGNORE
from lora2serve.system import scratch
from lora2serve.training import ranks
from lora2serve.training.metric_logging import MetricLog
from lora2serve.training.run_trainer import RunTrainer

if TYPE_CHECKING:
    from torch.nn import Module

WEIGHT = "learned"  # tokens behind a figure: what TRL's are means over


class RankTrainer(RunTrainer):
    """Its losses, figures and counts are those of all processes; the first one saves the checkpoints."""

    stop: MetricLog  # asked to by a signal: one of them is enough
    _losses = 0.0  # of the step in hand, in this process

    def begin_together(self) -> None:
        """Once all is ready: every process has the adapter of the first one."""
        self.stop = next(each for each in self.callback_handler.callbacks if isinstance(each, MetricLog))
        self.stop.all_stop = False
        self.router_aux_loss_coef /= ranks.processes()  # a mean over rows, and gradients are summed
        ranks.same_parameters(self._trained())

    def training_step(
        self, model: Module, inputs: Mapping[str, object], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of the step comes with its last batch, from all processes; that of the others is 0."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses += float(loss)
        if not self.accelerator.sync_gradients:
            return torch.zeros_like(loss)
        ranks.sum_gradients(self._trained())
        return loss.new_tensor(self._summed_figures())

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def compute_loss(self, model: Module, inputs: dict[str, object], *values: object, **options: object) -> object:
        """As it is, with the count of tokens that its figures are means over."""
        labels = inputs["labels"]
        assert isinstance(labels, Tensor)
        if self.model.training:
            self._metrics["train"][WEIGHT].append(int((labels[..., 1:] != IGNORE).sum()))
        return super().compute_loss(model, inputs, *values, **options)

    def _summed_figures(self) -> float:
        """Of the step, over all processes: its loss; figures as one mean for the step, tokens and signals noted."""
        tokens, lengths = self._before
        metrics = self._metrics["train"]
        weights = metrics.pop(WEIGHT)[lengths.get(WEIGHT, 0) :]
        names = sorted(set(metrics) - {"num_tokens"})
        own = {name: metrics[name][lengths.get(name, 0) :] for name in names}
        sums = [sum(value * weight for value, weight in zip(own[name], weights, strict=True)) for name in names]
        figures = [float(self.stop.stopped), self._losses, self._total_train_tokens - tokens, sum(weights), *sums]
        stopped, loss, trained, weight, *totals = ranks.summed(torch.tensor(figures, dtype=torch.float64)).tolist()
        for name, total in zip(names, totals, strict=True):
            metrics[name][lengths.get(name, 0) :] = [total / max(1.0, weight)]
        self._total_train_tokens = tokens + int(trained)
        metrics["num_tokens"] = [self._total_train_tokens]
        self.stop.all_stop = bool(stopped)
        self._losses = 0.0
        return float(loss)

    def _get_num_items_in_batch(self, batch_samples: list[object], device: torch.device) -> Tensor:
        """The learned tokens of a step, of which each process knows its share."""
        items = super()._get_num_items_in_batch(batch_samples, device)
        assert items is not None, "the loss would be a mean over the tokens of one process"
        return ranks.summed(torch.as_tensor(items).clone()).to(device)

    def _save_checkpoint(self, model: Module, trial: object) -> None:
        """Whole once all have their random numbers in it; nobody goes on before."""
        if ranks.rank() == 0:
            super()._save_checkpoint(model, trial)
        else:
            self._save_beside()
        ranks.barrier()

    def _save_beside(self) -> None:
        folder = Path(self.args.output_dir)
        self._save_rng_state(str(folder / f"checkpoint-{self.state.global_step}"))
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step:  # the first process has saved it, or is about to
            self.state.best_model_checkpoint = str(best)

    def _save_rng_state(self, output_dir: str) -> None:
        """Each process has a file for its own; the first one's record of the checkpoint comes after all of them."""
        if ranks.rank() == 0:
            super()._save_rng_state(output_dir)
        else:
            with scratch.temporary_folder("random") as folder:
                super()._save_rng_state(folder)
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder) / "rng_state.pth", _own_numbers(output_dir))
        ranks.barrier()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Of a checkpoint that fewer processes saved, those of the others stay as they are seeded."""
        if checkpoint is None or ranks.rank() == 0:
            super()._load_rng_state(checkpoint)
        elif _own_numbers(checkpoint).is_file():
            with scratch.temporary_folder("random") as folder:
                shutil.copyfile(_own_numbers(checkpoint), Path(folder) / "rng_state.pth")
                super()._load_rng_state(folder)


def _own_numbers(checkpoint: str) -> Path:
    return Path(checkpoint) / f"rng_state_{ranks.rank()}.pth"
