"""Speed and memory of QLoRA on an NVIDIA GPU, beside TRL by hand and the GPU's own limit: ``make bench-train``.

Makes random models of 1.1 and 8 billion parameters (the shapes of TinyLlama and Llama 3.1) in a scratch folder (19 GB),
trains each with ``lora2serve train`` and with the usual script of TRL, PEFT and bitsandbytes, on the same full
rows, with the same settings, each in a process of its own. Writes benchmarks/train.json and prints a table.

The limit: 6 operations a parameter and token (forward, the same again for gradient checkpointing, and the gradients of
the activations; the weights are frozen and have none) at the rate of the largest bfloat16 matrix product measured in
the same run. Attention and the adapter are not counted.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine

STEPS, ROWS, LENGTH, RANK = 40, 4, 1024, 16
SIZES: dict[str, dict[str, int]] = {
    "1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip


def make(size: str, root: Path) -> dict[str, Any]:
    """A random bfloat16 model with the demo's tokenizer in ``root``/base, and rows of exactly ``LENGTH`` tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES[size], max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(root / "base")
    demo = ROOT / "recipes" / "demo"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo / "base" / name, root / "base" / name)
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    text = "\n".join(json.loads(line)["text"] for line in (demo / "general.jsonl").read_text().splitlines())
    ids = tokenizer(text)["input_ids"]
    with (root / "train.jsonl").open("w") as file:
        for row in range(STEPS * ROWS):
            start = row * 97 % (len(ids) - 2 * LENGTH)
            file.write(json.dumps({"text": tokenizer.decode(ids[start : start + 2 * LENGTH])}) + "\n")
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def ours(root: Path) -> dict[str, Any]:
    """``lora2serve train`` in this process."""
    from lora2serve.cli import run

    os.chdir(root)
    recipe = {
        "model": {"path": "base"},
        "data": {"train": "train.jsonl", "max_length": LENGTH},
        "train": {"steps": STEPS, "batch_size": ROWS, "lora": {"rank": RANK}},
    }
    (root / "lora2serve.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return _measured(lambda: run(["train"]))


def peer(root: Path) -> dict[str, Any]:
    """The script that people write today: TRL's SFTTrainer makes the adapter."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    def train() -> None:
        chosen = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            root / "base", quantization_config=chosen, dtype=torch.bfloat16, device_map={"": 0}
        )
        arguments = SFTConfig(
            output_dir=str(root / "peer"), max_steps=STEPS, per_device_train_batch_size=ROWS, max_length=LENGTH,
            bf16=True, gradient_checkpointing=True, optim="paged_adamw_32bit", learning_rate=2e-4, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=load_dataset("json", data_files=str(root / "train.jsonl"), split="train"),
            processing_class=AutoTokenizer.from_pretrained(root / "base"),
            peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        ).train()

    return _measured(train)


def limit(root: Path) -> dict[str, Any]:
    """The rate of a bfloat16 product of 8192 x 8192 matrices, and what the card is called."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(20):
        started = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        rates.append(2 * 8192**3 / (time.perf_counter() - started))
    return {"gpu": torch.cuda.get_device_name(), "flops": statistics.median(rates), "torch": torch.__version__}


def _measured(train: Any) -> dict[str, Any]:
    """Median seconds of a step, peak of the GPU's memory, and seconds of the whole, from the libraries in memory on."""
    import torch
    from transformers import TrainerCallback, trainer

    steps: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """One step: from the fetched batch to the updated adapter."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            steps.append(time.perf_counter() - self.started)

    trainer.DEFAULT_CALLBACKS.append(Clock)
    started = time.perf_counter()
    train()
    assert len(steps) == STEPS
    return {
        "step": statistics.median(steps),
        "tokens_per_second": round(ROWS * LENGTH / statistics.median(steps)),
        "peak": torch.cuda.max_memory_allocated(),
        "wall": time.perf_counter() - started,
    }


def child(task: str, root: Path) -> dict[str, Any]:
    """One task in a process of its own: its memory and its patches end with it."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train", task, str(root)], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    print(f"{root.name} {task}: {found}", file=sys.stderr, flush=True)
    return found


def table(result: dict[str, Any]) -> list[str]:
    """Markdown."""
    lines = ["| | tokens/s | of the limit | peak memory | whole command |", "|---|---|---|---|---|"]
    for size, found in result["models"].items():
        for name, label in (("ours", "lora2serve train"), ("peer", "TRL by hand")):
            one = found[name]
            share = one["tokens_per_second"] / found["limit"]
            lines.append(
                f"| {size}, {label} | {one['tokens_per_second']:,} | {share:.0%} | {one['peak'] / 1e9:.1f} GB |"
                f" {one['wall']:.0f} s |"
            )
    return lines


def main(arguments: Sequence[str]) -> None:
    """Measure; the scratch folder may be named."""
    with tempfile.TemporaryDirectory(prefix="bench-train-", dir=arguments[0] if arguments else None) as folder:
        card = child("limit", Path(folder))
        result: dict[str, Any] = {
            "machine": {**machine(), **card},
            "command": "make bench-train",
            "settings": {"steps": STEPS, "rows": ROWS, "length": LENGTH, "rank": RANK, "targets": "all-linear"},
            "models": {},
        }
        for size in SIZES:
            root = Path(folder) / size
            root.mkdir()
            made = child("make", root)
            found = {**made, "limit": round(card["flops"] / (6 * made["parameters"]))}  # tokens a second
            result["models"][size] = {**found, "ours": child("ours", root), "peer": child("peer", root)}
            shutil.rmtree(root)
            (ROOT / "benchmarks" / "train.json").write_text(json.dumps(result, indent=2) + "\n")  # what is known so far
    print("\n".join(table(result)))


if __name__ == "__main__":
    tasks = {"ours": ours, "peer": peer, "limit": limit, "make": lambda root: make(root.name, root)}
    if len(sys.argv) == 3 and sys.argv[1] in tasks:
        print(json.dumps(tasks[sys.argv[1]](Path(sys.argv[2]))))
    else:
        main(sys.argv[1:])
