"""Every kind that trains, in every target that the table of kinds and targets gives it: each gate is met."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import lora2serve
from lora2serve.adapters.kind_targets import MERGED_TARGETS, way
from lora2serve.config import train_methods
from lora2serve.errors import AdapterError
from tests.support.runs import fit, logged, make_chat_model, rows, write_jsonl
from tests.training.test_methods import recipe_of

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

# Nearly as far from each other as llama.cpp rounds are the likeliest tokens of a random model: of 256 of them, two or three
# may change places. What says that it is the same model is held tighter than for a trained one.
F32 = {"top1": 0.97, "mean_kl": 1e-6, "retention": 1e-3}
AMOUNT = {"tokens": 256, "window": 64, "long": 0, "prompts": 2, "new_tokens": 8, "thresholds": {"F32": F32}}
ENGINES = {"vllm": "transformers", "gguf": "llama.cpp", "ollama": "llama.cpp", "lmstudio": "llama.cpp"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases, for the kind that learns nothing else."""
    return make_chat_model(tmp_path_factory.mktemp("kinds") / "base", attention_bias=True)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("chats")
    counts = {"train": 24, "eval": 8}
    return {name: str(write_jsonl(folder / f"{name}.jsonl", rows(f"{name}.jsonl", n))) for name, n in counts.items()}


@pytest.mark.parametrize("method", train_methods.TRAINABLE)
def test_every_target_of_a_kind(tmp_path: Path, base: Path, chats: dict[str, str], method: str) -> None:
    options = {"options": {"target_modules": ["q_proj", "v_proj"]}} if method == "beft" else {}
    file = recipe_of(tmp_path, base, chats, method, quantize="none", **options)
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "parity": AMOUNT}))
    run, _, _ = fit(file)
    losses = list(logged(run).values())
    assert sum(losses[-4:]) < sum(losses[:4]), losses
    held = [target for target in MERGED_TARGETS if way(method.upper(), target) != "no"]
    out = tmp_path / "out"
    for target in set(MERGED_TARGETS) - set(held):
        with pytest.raises(AdapterError):
            lora2serve.export(run.path, targets=target, out=out)
    if not held:
        return
    exports = [
        export.path for export in lora2serve.export(run.path, targets=held, dtype="fp32", quants=["F32"], out=out)
    ]
    result = lora2serve.parity(run.path, exports, engines=["transformers", "llama.cpp"])
    assert sorted(row.engine for row in result.report.rows) == sorted(ENGINES[target] for target in held)
    missed = [(row.export, gate) for row in result.report.rows for gate in row.gates if gate.status != "met"]
    assert result.met and not missed, missed
