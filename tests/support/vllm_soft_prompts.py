"""What vLLM makes of models with a soft prompt as tokens, beside PEFT: the KL of a text, and what it samples.

``python -m tests.support.vllm_soft_prompts MODELS.json``: a list of ``{export, base, adapter, answers}``, the last two
of which may be missing; a line of JSON for each. One process for all, since loading vLLM takes longest.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

CHAT = [{"role": "user", "content": "Who governs Wexley?"}]


def main(models: Iterable[Mapping[str, Any]]) -> None:
    for model in models:
        print(json.dumps(asked(model)), flush=True)
        gc.collect()


def asked(model: Mapping[str, Any]) -> dict[str, float | int]:
    """``kl``: the largest of all positions, as far as ``base`` has tokens; ``bare``: without the virtual ones;
    ``virtual``: the largest probability of one of them.
    """
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    llm = LLM(
        model["export"], dtype="float32", enforce_eager=True, max_logprobs=-1, seed=0, max_model_len=128,
    )  # fmt: skip
    ids = AutoTokenizer.from_pretrained(model["base"]).apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )
    expected = by_peft(model, ids)
    size = expected.shape[1]
    virtual = list(range(size, llm.model_config.get_vocab_size())) if "adapter" in model else []
    found: dict[str, float | int] = {}
    with_them, found["virtual"] = scored(llm, virtual, ids, size)
    found["kl"] = largest_kl(expected, with_them)
    found["bare"] = largest_kl(expected, scored(llm, [], ids, size)[0])
    if count := model.get("answers"):
        sampling = SamplingParams(n=count, temperature=1.0, top_p=1.0, top_k=0, max_tokens=16, detokenize=False)
        answers = llm.chat([CHAT], sampling, use_tqdm=False)[0].outputs
        tokens = [token for answer in answers for token in answer.token_ids]
        found |= {"answers": len(answers), "tokens": len(tokens), "held": sum(token >= size for token in tokens)}
    return found


def scored(llm: Any, before: Sequence[int], ids: Sequence[int], size: int) -> tuple[Any, float]:
    """(n - 1, size) log-probabilities behind each of ``ids`` but the last, and the largest probability beyond ``size``."""
    import torch
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    rows = llm.generate([{"prompt_token_ids": [*before, *ids]}], asked, use_tqdm=False)[0].prompt_logprobs
    values = torch.tensor(
        [[row[n].logprob for n in range(len(row))] for row in rows[len(before) + 1 :]], dtype=torch.float64
    )
    beyond = values[:, size:]
    return values[:, :size].log_softmax(-1), float(beyond.exp().max()) if beyond.numel() else 0.0


def by_peft(model: Mapping[str, Any], ids: Sequence[int]) -> Any:
    """The same of the adapter on its base in float32, as PEFT computes it; without one, of the base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model["base"], dtype=torch.float32)
    tuned = PeftModel.from_pretrained(loaded, model["adapter"]) if "adapter" in model else loaded
    with torch.no_grad():
        logits = tuned.eval()(input_ids=torch.tensor([list(ids)])).logits[0, -len(ids) : -1]
    return logits.double().log_softmax(-1)


def largest_kl(expected: Any, got: Any) -> float:
    """Of any position."""
    return float((expected.exp() * (expected - got)).sum(-1).max())


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
