"""Answers to the recipe's own prompts while it is trained: as they would be served, the likeliest token each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from lora2serve.data.tokenizer import Tokenizer
from lora2serve.errors import TrainError
from lora2serve.progress import Progress
from lora2serve.training.base_parts import head_gathered
from lora2serve.training.generation import greedy, stop_ids
from lora2serve.training.metric_logging import add_line, drop_later
from lora2serve.training.sample_prompts import SamplePrompt

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerControl, TrainerState, TrainingArguments

LONGEST = 128  # tokens of an answer
SHOWN = 200  # characters of it in a note


class SampleLog(TrainerCallback):  # type: ignore[misc]
    """Asks before the first step, ``every`` so many steps and after the last; one line an answer into ``path``."""

    def __init__(
        self, path: Path, prompts: Sequence[SamplePrompt], tokenizer: Tokenizer, every: int, progress: Progress
    ) -> None:
        self._path, self._prompts, self._tokenizer = path, prompts, tokenizer
        self._every, self._progress = every, progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: PeftModel, **_: object
    ) -> None:
        """The answers before training; after --resume, those of steps beyond the checkpoint go."""
        if state.global_step:
            drop_later(self._path, state.global_step)
        else:
            self._path.write_text("", encoding="utf-8")
            self._ask(model, args, 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: PeftModel, **_: object
    ) -> None:
        """The answers where the model is evaluated, too."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._ask(model, args, state.global_step)

    def _ask(self, model: PeftModel, args: TrainingArguments, step: int) -> None:
        import torch

        was_training, dtype = model.training, torch.float16 if args.fp16 else torch.bfloat16
        model.eval()
        try:
            stop = stop_ids(model, self._tokenizer)
            for prompt in self._prompts:
                autocast = torch.autocast(model.device.type, dtype=dtype, enabled=args.fp16 or args.bf16)
                with autocast, head_gathered(model):
                    answer = self._answer(model, prompt, stop)
                add_line(self._path, {"step": step, "prompt": prompt.text, "answer": answer})
                self._progress.note(f"step {step}: {_shown(prompt.text)} -> {_shown(answer)}")
        finally:
            model.train(was_training)

    def _answer(self, model: PeftModel, prompt: SamplePrompt, stop: Sequence[int]) -> str:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        room = min(LONGEST, positions - len(prompt.ids)) if positions else LONGEST
        if room < 1:
            raise TrainError(
                f"train.samples: a prompt of {len(prompt.ids)} tokens, the model takes {positions}", "shorten it"
            )
        tokens, _ = greedy(model, self._tokenizer, prompt.ids, room, stop)
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."
