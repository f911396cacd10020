"""vLLM in this process: a merged directory, or a base with a LoRA by name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from lora2serve.adapters.lint import max_lora_rank
from lora2serve.parity_check.engine_process import EngineMissing
from lora2serve.parity_check.engines import Ids, Messages, Scores, Tools

ENTRIES = 1 << 22  # log-probabilities of one request at most: vLLM hands each over as Python objects, 4M are 0.4 GB
AT_ONCE = 64  # requests handed over together
# Latent attention (DeepSeek) in float32: by itself vLLM takes AMX where the CPU has it, in bfloat16 alone. Models with
# another attention are left as they are.
CPU_ATTENTION = "CPU_MLA"
FP8 = "float-quantized"


class Vllm:
    """``model`` is a directory; with ``adapter`` (a PEFT directory of that ``rank``) requests run with the LoRA.

    Float32 on a CPU; on a GPU the type that the model is served in.
    """

    def __init__(
        self, model: str, window: int, adapter: str | None = None, rank: int = 16, dtype: str | None = None
    ) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this is a child process already
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        from vllm import LLM
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        options: dict[str, Any] = {
            "enforce_eager": True,
            "max_logprobs": -1,
            "max_model_len": longest(model, window),
            "seed": 0,
        }
        if adapter:
            options |= {"enable_lora": True, "max_lora_rank": max_lora_rank(rank)}
        if on_cpu:
            options["attention_backend"] = CPU_ATTENTION
            if packing(model) == FP8:
                multiply_fp8_by_torch()
        else:
            options["gpu_memory_utilization"] = 0.5
        self._dtype = dtype or (cpu_dtype(model) if on_cpu else "auto")
        with kernels():
            self.llm: Any = LLM(model, dtype=self._dtype, **options)
        self.lora = LoRARequest("parity", 1, adapter) if adapter else None
        self.dtype = str(self.llm.model_config.dtype).removeprefix("torch.")
        self.version = f"vllm {_version()} {self.dtype} {current_platform.device_type}"

    def render(self, messages: Messages, tools: Tools = ()) -> str | None:
        return str(
            self.llm.get_tokenizer().apply_chat_template(
                messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=True
            )
        )

    def prompt_ids(self, messages: Messages, text: str, tools: Tools = ()) -> list[int] | None:
        from vllm import SamplingParams

        once = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
        options: dict[str, Any] = {"use_tqdm": False, "lora_request": self.lora}
        with kernels():
            if messages:
                outputs = self.llm.chat([list(messages)], once, tools=list(tools) or None, **options)
            else:
                outputs = self.llm.generate([text], once, **options)
        return list(outputs[0].prompt_token_ids)

    def stop_ids(self) -> list[int] | None:
        ids = {self.llm.get_tokenizer().eos_token_id, *(self.llm.get_default_sampling_params().stop_token_ids or ())}
        named = self.llm.model_config.try_get_generation_config().get("eos_token_id")
        ids |= set(named if isinstance(named, list) else [named])
        return sorted(token for token in ids if token is not None)

    def score(self, sequences: Sequence[Ids], tail: int = 0) -> Iterator[Scores]:
        for ids in sequences:
            first = len(ids) - tail if tail else 1
            yield self._score_by_prefixes(ids, first) if self.lora else self._score(ids, first)

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        from vllm import SamplingParams

        stop = self.stop_ids() or []
        own = self.llm.model_config.get_diff_sampling_param()
        own |= {"max_tokens": min(own.get("max_tokens") or new_tokens, new_tokens), "temperature": 0}
        params = SamplingParams(**own, stop_token_ids=stop, detokenize=False)
        answers = [list(out.outputs[0].token_ids) for out in self._ask(prompts, params)]
        return [answer[:-1] if answer and answer[-1] in stop else answer for answer in answers]

    def _score(self, ids: Ids, first: int) -> Scores:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=self._top(len(ids)), flat_logprobs=True, detokenize=False
        )
        flat = self._ask([ids], params)[0].prompt_logprobs
        return self._scores([(flat, position) for position in range(first, len(ids))], ids)

    def _score_by_prefixes(self, ids: Ids, first: int) -> Scores:
        """One request per prefix: vLLM's CPU worker dies on prompt_logprobs while LoRA is on."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0, logprobs=self._top(AT_ONCE), flat_logprobs=True, detokenize=False
        )
        flat = []
        for start in range(first, len(ids), AT_ONCE):
            prefixes = [ids[:end] for end in range(start, min(start + AT_ONCE, len(ids)))]
            flat += [(out.outputs[0].logprobs, 0) for out in self._ask(prefixes, params)]
        return self._scores(flat, ids)

    def _ask(self, prompts: Sequence[Ids], params: Any) -> list[Any]:
        from vllm import TokensPrompt

        requests = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        with kernels():
            return list(self.llm.generate(requests, params, lora_request=self.lora, use_tqdm=False))

    def _top(self, positions: int) -> int:
        """-1, the whole vocabulary, where it fits; else as many of the likeliest as do."""
        fits = max(20, ENTRIES // positions)
        return -1 if self._vocab <= fits else fits

    @property
    def _vocab(self) -> int:
        return int(self.llm.model_config.get_vocab_size())

    def _scores(self, flat: Sequence[tuple[Any, int]], ids: Ids) -> Scores:
        """From vLLM's flat lists: the true token comes first, then the likeliest in order."""
        rows = []
        for logprobs, position in flat:
            part = slice(logprobs.start_indices[position], logprobs.end_indices[position])
            rows.append((np.array(logprobs.token_ids[part]), np.array(logprobs.logprobs[part], dtype=np.float32)))
        if all(len(names) >= self._vocab for names, _ in rows):
            values = np.full((len(rows), self._vocab), np.nan, dtype=np.float32)
            for row, (names, logprobs) in enumerate(rows):
                values[row, names] = logprobs
            return Scores(values)
        width = max(len(names) for names, _ in rows)
        top = np.full((len(rows), width), -1, dtype=np.int64)
        values = np.full((len(rows), width), np.nan, dtype=np.float32)
        target = np.full(len(rows), np.nan, dtype=np.float32)
        for row, (tokens, logprobs) in enumerate(rows):
            names, first = np.unique(tokens, return_index=True)
            top[row, : len(names)], values[row, : len(names)] = names, logprobs[first]
            true = np.flatnonzero(names == ids[len(ids) - len(rows) + row])
            target[row] = logprobs[first][true[0]] if len(true) else np.nan
        return Scores(values, top, target)


@contextmanager
def kernels() -> Iterator[None]:
    """EngineMissing for a kernel that is not there; vLLM's build for AVX2 lacks operators that its Python calls."""
    try:
        yield
    except (ValueError, AttributeError) as error:
        raise no_kernel(str(error)) or error from None


def no_kernel(message: str) -> EngineMissing | None:
    """Where vLLM's build for this machine has nothing that computes with such weights."""
    if "kernel" not in message and "_OpNamespace" not in message:
        return None
    reason = " ".join(message.split())[:200]
    return EngineMissing(f"vLLM cannot run this scheme on this machine: {reason}", "compare it on a GPU")


def multiply_fp8_by_torch() -> None:
    """Not by oneDNN, which torch asks on CPUs with AMX: on all but the newest that is its slow reference, 60 ms for
    five rows that torch's own code multiplies in one, in float32 both. vLLM brings a oneDNN of its own for the rest.
    """
    import torch

    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property of a module


def cpu_dtype(model: str) -> str:
    """Float32, but where vLLM's CPU kernel (weights packed to 4 bits) has none for it."""
    return "bfloat16" if packing(model) == "pack-quantized" else "float32"


def packing(model: str) -> str | None:
    """How its weights are stored, in compressed-tensors' words; None for unquantized ones."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    name: str | None = (config.get("quantization_config") or {}).get("format")
    return name


def longest(model: str, window: int) -> int:
    """Tokens of one request: ``window``, or what the model was made for."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    most = (config.get("text_config") or config).get("max_position_embeddings")
    return min(window, most or window)


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"
