"""Trainings of random models on an NVIDIA GPU, one a process: by lora2serve, by TRL as people write it, and by Unsloth.

``python -m benchmarks.gpu_slot`` runs them in order; ``python -m benchmarks.train CASE FOLDER`` runs one, a ``Case``
as JSON. The models have the shapes of TinyLlama (1.1B), Llama 3.1 (8B; or its first eight layers) and Qwen3-30B-A3B,
the tokenizer is the demo's. All train the same rows, with the same settings. A CPU rehearses them with the tiny shapes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import experts
from benchmarks.measure import ROOT

SIZES: dict[str, dict[str, int]] = {
    "1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1536,
    },
}  # fmt: skip
SIZES["8B, 8 layers"] = {**SIZES["8B"], "num_hidden_layers": 8}
SIZES["152k words"] = {**SIZES["1.1B"], "num_hidden_layers": 2, "vocab_size": 151936}
RANK = 16
SHORT_TESTS = ("test_speed.py", "test_dequantize.py")  # of tests/gpu
SHORT = 200  # tokens of a short row, on average


@dataclass(frozen=True)
class Case:
    """One training or measurement.

    recipe: keys of ``train`` in the recipe, and ``packing``.
    step: how it does a step, instead of what it would choose: keys of ``LoopRecord``, and ``casts``.
    """

    name: str
    program: str
    size: str = "1.1B"
    rows: int = 4  # of an optimizer step
    data: str = "full"  # or short
    recipe: Mapping[str, object] = field(default_factory=dict)
    step: Mapping[str, object] = field(default_factory=dict)
    length: int = 1024
    warm: int = 5  # steps before the clock starts
    timed: int = 12

    @property
    def steps(self) -> int:
        """And one more, which is profiled."""
        return self.warm + self.timed + 1

    def tiny(self) -> Case:
        """The same for a rehearsal, which has not the time to compile."""
        size = "tiny experts" if self.size in experts.EXPERTS else "tiny" if self.size else ""
        step = {**self.step, "compiled": False}
        return replace(self, size=size, rows=min(self.rows, 4), length=64, warm=1, timed=1, step=step)


def model(root: Path, size: str) -> Path:
    """A model of that size with the demo's tokenizer, below ``root``: made once."""
    path = root / size.replace(",", "").replace(" ", "-")
    if (path / "tokenizer.json").is_file():
        return path
    if size in experts.EXPERTS:
        experts.write(path, size)
    else:
        _write_llama(path, size)
    for name in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):
        shutil.copy(ROOT / "recipes" / "demo" / "base" / name, path / name)
    return path


def _write_llama(path: Path, size: str) -> None:
    """Random weights, in bfloat16 on a GPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES[size], max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=0)
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    with torch.device("cuda" if on_gpu else "cpu"):
        made = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    made.save_pretrained(path)


def data(root: Path, base: Path, case: Case) -> Path:
    """Rows for all steps: each of at least ``case.length`` tokens, or short ones of several lengths."""
    from transformers import AutoTokenizer

    path = root / f"{case.data}-{case.length}-{case.rows}.jsonl"
    if path.is_file():
        return path
    tokenizer = AutoTokenizer.from_pretrained(base)
    general = (ROOT / "recipes" / "demo" / "general.jsonl").read_text(encoding="utf-8")
    ids = tokenizer("\n".join(json.loads(line)["text"] for line in general.splitlines()))["input_ids"]
    lines = []
    for row in range((case.steps + 1) * case.rows * (8 if case.data == "short" else 1)):
        mean = min(SHORT, case.length // 3)
        count = mean // 3 + row * 61 % (4 * mean // 3) if case.data == "short" else 2 * case.length
        start = row * 97 % (len(ids) - 2 * case.length)
        lines.append(json.dumps({"text": tokenizer.decode(ids[start : start + count])}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def parameters(size: str) -> int:
    """Values that a token meets in such a model."""
    if size in experts.EXPERTS:
        return experts.parameters(size)
    shape = SIZES[size]
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    key = hidden // heads * shape["num_key_value_heads"]
    layer = 2 * hidden * (hidden + key) + 3 * hidden * shape["intermediate_size"] + 2 * hidden
    return 2 * shape["vocab_size"] * hidden + shape["num_hidden_layers"] * layer + hidden


def make(root: Path, case: Case) -> dict[str, object]:
    """The model, before what is timed."""
    path = model(root, case.size)
    return {"bytes": sum(file.stat().st_size for file in path.iterdir())}


def limit(root: Path, case: Case) -> dict[str, object]:
    """The rate of a bfloat16 product of 8192 x 8192 matrices."""
    import torch

    size, device = (8192, "cuda") if torch.cuda.is_available() else (128, "cpu")
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(20):
        started = time.perf_counter()
        left @ right
        _wait()
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return {"flops": statistics.median(rates), "torch": torch.__version__}


def ours(root: Path, case: Case) -> dict[str, object]:
    """``lora2serve train`` in this process."""
    from lora2serve.artifacts.run import Run

    folder = _home(root, case)
    figures = _measured(lambda: _train(folder, root, case), case)
    record = Run(folder / "runs" / "run").record
    memory = record.memory.to_json() if record.memory else {}
    return figures | {key: memory.get(key) for key in ("planned_bytes", "peak_bytes") if memory}


def _train(folder: Path, root: Path, case: Case, *words: str) -> None:
    """As a command in ``folder`` does it."""
    from lora2serve.cli import run

    _choose(case.step)
    base = model(root, case.size)
    train = {"steps": case.steps, "batch_size": case.rows, "lora": {"rank": RANK}, **case.recipe}
    packing = bool(train.pop("packing", False))
    recipe = {
        "model": {"path": str(base)},
        "data": {"train": str(data(root, base, case)), "max_length": case.length, "packing": packing},
        "train": train,
    }
    (folder / "lora2serve.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    os.chdir(folder)
    run(["train", *words])


def _choose(step: Mapping[str, object]) -> None:
    """Let trainings of this process do their steps so."""
    from lora2serve.training import finetune
    from lora2serve.training.adapter_casts import AdapterCasts

    changes, own = dict(step), finetune.choose_loop
    if not changes.pop("casts", True):
        AdapterCasts.on = nullcontext  # type: ignore[method-assign,assignment]
    finetune.choose_loop = lambda *values, **options: replace(own(*values, **options), **changes)  # type: ignore[arg-type]


def peer(root: Path, case: Case) -> dict[str, object]:
    """The script that people write today: TRL's SFTTrainer makes the adapter."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = model(root, case.size)
    chosen = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    from peft import LoraConfig

    adapter = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

    def train() -> None:
        loaded = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=chosen, dtype=torch.bfloat16, device_map={"": 0 if on_gpu else "cpu"}
        )
        _trl(root, case, loaded, gradient_checkpointing=True, peft_config=adapter)

    return _measured(train, case)


def _trl(root: Path, case: Case, loaded: Any, *, gradient_checkpointing: bool, **options: Any) -> None:
    """TRL's trainer on the case's rows, with the settings of our recipe."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    base, on_gpu = model(root, case.size), torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(_home(root, case)), max_steps=case.steps, per_device_train_batch_size=case.rows,
        max_length=case.length, bf16=on_gpu, use_cpu=not on_gpu, gradient_checkpointing=gradient_checkpointing,
        optim="paged_adamw_32bit" if on_gpu else "adamw_torch", learning_rate=2e-4, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, dataset_num_proc=1,
    )  # fmt: skip
    rows = load_dataset("json", data_files=str(data(root, base, case)), split="train")
    tokenizer = AutoTokenizer.from_pretrained(base)
    SFTTrainer(model=loaded, args=arguments, train_dataset=rows, processing_class=tokenizer, **options).train()


def unsloth(root: Path, case: Case) -> dict[str, object]:
    """Unsloth by its own notebook, from its own folder of packages."""
    from unsloth import FastLanguageModel  # before the libraries that it patches

    def train() -> None:
        loaded, _ = FastLanguageModel.from_pretrained(
            str(model(root, case.size)), max_seq_length=case.length, load_in_4bit=True, dtype=None
        )
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        tuned = FastLanguageModel.get_peft_model(
            loaded, r=RANK, lora_alpha=32, lora_dropout=0, target_modules=names, use_gradient_checkpointing="unsloth"
        )
        _trl(root, case, tuned, gradient_checkpointing=True)

    return _measured(train, case)


def evaluation(root: Path, case: Case) -> dict[str, object]:
    """The peak of an evaluation of eight rows beside the model, with a large vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora2serve.data.samples import Sample
    from lora2serve.progress import Silent
    from lora2serve.training import eval_loss

    on_gpu = torch.cuda.is_available()
    loaded = AutoModelForCausalLM.from_pretrained(
        model(root, case.size), dtype=torch.bfloat16, device_map={"": 0 if on_gpu else "cpu"}
    )
    ids = [token % 1000 for token in range(case.length)]
    samples = [Sample(ids, ids, cut=False, row=row) for row in range(case.rows)]
    before = _reset_peak()
    loss = eval_loss.evaluate(loaded, samples, 0, case.rows, Silent(), "eval").mean()
    return {"model_bytes": before, "peak": _peak(), "eval_loss": loss.eval_loss}


def resume(root: Path, case: Case) -> dict[str, object]:
    """Whether a run that was cut and resumed ends with the adapter of a whole one, to the last bit."""
    import torch
    from safetensors.torch import load_file

    from lora2serve.artifacts.run import Run
    from lora2serve.training.checkpoints import last_checkpoint

    folder = _home(root, case)
    _train(folder, root, case)
    whole = Run(folder / "runs" / "run")
    expected = load_file(whole.adapter / "adapter_model.safetensors")
    shutil.rmtree(whole.adapter)
    newest = last_checkpoint(whole)
    assert newest is not None
    shutil.rmtree(newest)
    whole.save(replace(whole.record, finished=False))
    _train(folder, root, case, "--resume")
    resumed = load_file(whole.adapter / "adapter_model.safetensors")
    equal = sum(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    return {"equal_tensors": equal, "tensors": len(expected), "from": newest.name}


def tests(root: Path, case: Case) -> dict[str, object]:
    """The short tests that need a GPU; an error names those that failed."""
    import pytest

    files = [str(ROOT / "tests" / "gpu" / name) for name in SHORT_TESTS]
    counts: dict[str, list[str]] = {}

    class Results:
        """What became of each test."""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts.setdefault(report.outcome, []).append(report.nodeid.rpartition("/")[2])

    pytest.main(["-q", "-p", "no:cacheprovider", "-m", "gpu", *files], plugins=[Results()])
    if "failed" in counts:
        raise RuntimeError(f"{len(counts['failed'])} failed: {', '.join(counts['failed'])}")
    return {outcome: len(names) for outcome, names in counts.items()}


PROGRAMS: dict[str, Callable[[Path, Case], dict[str, object]]] = {
    program.__name__: program for program in (make, limit, tests, ours, peer, unsloth, evaluation, resume)
}


def _measured(train: Callable[[], None], case: Case) -> dict[str, object]:
    """Median seconds of a step, useful tokens a second, losses, peak; kernels and busy seconds of the last step."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback, trainer

    seconds: list[float] = []
    tokens: list[int] = []
    losses: dict[int, float] = {}
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    profiler = profile(activities=[activity])

    class Clock(TrainerCallback):  # type: ignore[misc]
        """One step: from the fetched batch to the updated adapter."""

        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            _wait()
            if state.global_step + 1 == case.steps:
                profiler.start()
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            _wait()
            seconds.append(time.perf_counter() - self.started)
            if state.global_step == case.steps:
                profiler.stop()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses[state.global_step] = float(logs["loss"])
                tokens.append(int(float(logs.get("num_tokens", 0))))

    trainer.DEFAULT_CALLBACKS.append(Clock)
    _reset_peak()
    started = time.perf_counter()
    train()
    wall, timed = time.perf_counter() - started, seconds[case.warm : case.warm + case.timed]
    useful = (tokens[case.warm + case.timed - 1] - tokens[case.warm - 1]) / sum(timed)
    kernels = [event for event in profiler.events() if event.device_type.name == activity.name]
    return {
        "step": statistics.median(timed),
        "parameters": parameters(case.size),
        "tokens_per_second": round(useful),
        "peak": _peak(),
        "kernels": len(kernels),
        "busy": sum(event.time_range.elapsed_us() for event in kernels) / 1e6,
        "losses": {step: losses[step] for step in (1, min(10, case.steps)) if step in losses},
        "wall": wall,
    }


def _home(root: Path, case: Case) -> Path:
    """A folder of the case's own."""
    folder = root / "cases" / case.name.replace(" ", "-").replace("/", "-").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> int:
    """Let the peak begin now; bytes that are there."""
    import torch

    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    """Bytes of torch's allocator, on a CPU of the process."""
    import torch

    on_gpu = torch.cuda.is_available()
    return torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name() -> str:
    """The GPU's, or cpu."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def parsed(text: str) -> Case:
    """A case as ``json.dumps(asdict(case))`` gives it."""
    return Case(**json.loads(text))


if __name__ == "__main__":
    case = parsed(sys.argv[1])
    figures = PROGRAMS[case.program](Path(sys.argv[2]).resolve(), case)
    print(json.dumps({"device": device_name(), "case": asdict(case), **figures}))
