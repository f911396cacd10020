"""transformers: a merged directory, plain or quantized, and what the reference shares with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora2serve.data.end_tokens import find_answer_end
from lora2serve.parity_check.engines import Ids, Messages, Scores, Tools


class Transformers:
    """A Hugging Face model directory, computed in float32: what is measured is the export, not the arithmetic."""

    dtype = "float32"

    def __init__(self, model: str, threads: int | None = None) -> None:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        quiet(threads)
        device_name = device()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        options: dict[str, Any] = {"dtype": torch.float32, "device_map": device_name, **_decompressed(model)}
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, **options).float().eval()
        self.version = f"transformers {transformers.__version__} float32 {device_name}"

    def render(self, messages: Messages, tools: Tools = ()) -> str | None:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=True
            )
        )

    def prompt_ids(self, messages: Messages, text: str, tools: Tools = ()) -> list[int] | None:
        if not messages:
            return list(self.tokenizer(text)["input_ids"])
        return list(
            self.tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, add_generation_prompt=True, return_dict=False
            )
        )

    def stop_ids(self) -> list[int] | None:
        return stop_ids(self.model, self.tokenizer)

    def positions(self) -> int | None:
        """Tokens of one text that the model was made for; None where its config names no limit."""
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        return int(limit) if limit else None

    def vocab(self) -> int:
        """Logits for each position."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def score(self, sequences: Sequence[Ids]) -> Iterator[Scores]:
        for ids in sequences:
            yield Scores(logits(self.model, ids))

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        stop = self.stop_ids() or []
        return [greedy(self.model, self.tokenizer, ids, new_tokens, stop)[0] for ids in prompts]


def _decompressed(model: str) -> dict[str, Any]:
    """Weights of compressed-tensors dequantized as they are loaded; activations are quantized as the scheme says."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" not in config:
        return {}
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(run_compressed=False)}


def quiet(threads: int | None) -> None:
    """No bars; as many threads as asked."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)


def device() -> str:
    """``cuda`` or ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The end tokens of the generation config and of the tokenizer, and the one that closes an answer."""
    named = model.generation_config.eos_token_id
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id, _closing_id(tokenizer)}
    return sorted(token for token in ids if token is not None)


def _closing_id(tokenizer: Any) -> int | None:
    added = tokenizer.get_added_vocab()
    if not tokenizer.chat_template or not added:
        return None
    end = find_answer_end(lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False)), added)
    return int(added[end]) if end else None


def logits(model: Any, ids: Ids) -> Any:
    """(n-1, V) float32 logits, as numpy, for the predicted positions of one sequence."""
    import torch

    with torch.no_grad():
        values = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0, :-1]
    return values.float().cpu().numpy()


Likeliest = list[list[tuple[int, float]]]


def greedy(
    model: Any, tokenizer: Any, ids: Ids, new_tokens: int, stop: Ids, top: int = 0
) -> tuple[list[int], Likeliest]:
    """The likeliest continuation up to a stop token, as the model's own generation config has it but for chance.

    Penalties, forced and suppressed tokens, stop strings and a smaller length are its own. With it, for each step (the
    stop's too), the ``top`` likeliest tokens and by how many nats each is less likely than the first.
    """
    import torch

    own = model.generation_config
    inputs = torch.tensor([list(ids)], device=model.device)
    out = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, num_beams=1,
        max_new_tokens=min(own.max_new_tokens or new_tokens, new_tokens), eos_token_id=list(stop) or None,
        pad_token_id=stop[0] if stop else 0, tokenizer=tokenizer if own.stop_strings else None,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = out.sequences[0, len(ids) :].tolist()
    steps: Likeliest = []
    for scores in out.scores if top else ():
        values, names = scores[0].float().topk(min(top, scores.shape[-1]))
        steps.append([(int(name), float(gap)) for name, gap in zip(names, values[0] - values, strict=True)])
    return tokens[:-1] if tokens and tokens[-1] in stop else tokens, steps
