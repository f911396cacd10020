"""transformers: a merged directory, plain or quantized, and what the reference shares with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from lora2serve.parity_check.engines import Ids, Messages, Scores, Tools
from lora2serve.parity_check.engines.chat_engine import LONGEST_ANSWER, AnswerOptions, End, Say, TokenText, prompt
from lora2serve.training.generation import greedy, stop_ids, stream
from lora2serve.weights.language_model import load_language_model


class Transformers:
    """A Hugging Face model directory, computed in float32: what is measured is the export, not the arithmetic.

    Unless it is ``as_served``: in the type that this device computes in.
    """

    dtype = "float32"

    def __init__(self, model: str, threads: int | None = None, *, as_served: bool = False) -> None:
        import torch
        import transformers
        from transformers import AutoTokenizer

        quiet(threads)
        device_name = device()
        self.dtype = training_dtype() if as_served else "float32"
        dtype = getattr(torch, self.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        options: dict[str, Any] = {"dtype": dtype, "device_map": device_name, **_decompressed(model)}
        self.model: Any = load_language_model(model, **options).to(dtype).eval()
        self.version = f"transformers {transformers.__version__} {self.dtype} {device_name}"

    def render(self, messages: Messages, tools: Tools = ()) -> str | None:
        if not self.tokenizer.chat_template:
            return None
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

    def score(self, sequences: Sequence[Ids], tail: int = 0) -> Iterator[Scores]:
        for ids in sequences:
            yield Scores(logits(self.model, ids, tail))

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        stop = self.stop_ids() or []
        return [greedy(self.model, self.tokenizer, ids, new_tokens, stop)[0] for ids in prompts]

    def reply(self, messages: Messages, options: AnswerOptions, say: Say) -> End:
        """As ``ChatEngine``; what the options leave open is the generation config's."""
        most = self.positions() or sys.maxsize
        ids, stop = prompt(self, messages, most), self.stop_ids() or []
        longest = options.max_tokens or self.model.generation_config.max_new_tokens or LONGEST_ANSWER
        text, tokens = TokenText(self.tokenizer_text), list[int]()

        def each(token: int) -> None:
            tokens.append(token)
            if token not in stop:
                say(text.add(token))

        limit = min(longest, most - len(ids))
        stream(self.model, self.tokenizer, ids, limit, stop, options.temperature, each)
        say(text.rest())
        return "length" if len(tokens) == limit and tokens[-1] not in stop else "stop"

    def tokenizer_text(self, ids: Ids) -> str:
        """Ids in words, as servers give them."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


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


def training_dtype() -> str:
    """The type that this device computes in at training: float32 on a CPU."""
    from lora2serve.training.model import device as training_device

    return training_device().dtype


def logits(model: Any, ids: Ids, tail: int = 0) -> Any:
    """(n-1, V) float32 logits, as numpy, for the predicted positions of one sequence, or for the last ``tail``."""
    import torch

    rows = tail or len(ids) - 1
    fewer = {"logits_to_keep": rows + 1} if tail and _keeps_few(model) else {}
    with torch.no_grad():
        values = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False, **fewer).logits[0]
    return values[-rows - 1 : -1].float().cpu().numpy()


def _keeps_few(model: Any) -> bool:
    """Whether it can be asked for the logits of some positions alone; a PEFT model hands that on."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in signature(inner.forward).parameters
