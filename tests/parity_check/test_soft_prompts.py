"""A soft prompt in engines that know none: every gate is met, and red where an export forgets to put it in front."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora2serve
from converters.ollama.conversations import turns
from converters.ollama.go_template import ollama_data
from converters.ollama.modelfile_parser import parse
from lora2serve.artifacts.parity_report import ComparisonResult
from lora2serve.parity_check.comparator import check
from lora2serve.parity_check.comparisons import of_exports
from lora2serve.parity_check.trained_model import of_parts
from lora2serve.progress import Silent
from tests.support.golang import Renderer
from tests.support.runs import DEMO, make_chat_model
from tests.support.tiny import load_model, make_adapter

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

BASE, COUNT, FIRST = DEMO / "base", 8, 1536


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors as large as the demo's own embeddings, which its layers are used to."""
    folder = tmp_path_factory.mktemp("prompt") / "adapter"
    config = {"num_virtual_tokens": COUNT, "prompt_tuning_init": "SAMPLE_VOCAB"}
    return make_adapter(folder, BASE, method="PROMPT_TUNING", std=0.02, **config)


@pytest.fixture(scope="module")
def exports(prompt: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("exports")
    options = {"base": str(BASE), "dtype": "fp32", "quants": ["F32"], "out": out}
    return [export.path for export in lora2serve.export(prompt, targets=["vllm", "ollama"], **options)]


def rows(prompt: Path, exports: Sequence[Path], home: Path, engines: Sequence[str]) -> list[ComparisonResult]:
    origin = of_parts("soft", BASE, (prompt,), home)
    settings = replace(origin.settings, tokens=512, window=96, prompts=4, engines=tuple(engines))
    origin = replace(origin, settings=settings)
    return list(check(origin, of_exports(origin, exports), progress=Silent()).rows)


def test_every_gate_is_met(prompt: Path, exports: list[Path], tmp_path: Path) -> None:
    for row in rows(prompt, exports, tmp_path / "parity", ["transformers", "llama.cpp"]):
        missed = [gate for gate in row.gates if gate.status != "met"]
        assert not missed and len(row.gates) == 4, (row.export, row.engine, missed)


def test_ollama_renders_it_in_front(exports: list[Path]) -> None:
    """By a Go template that was proven against the chat template, without a BOS before it."""
    modelfile = (exports[1] / "Modelfile").read_text(encoding="utf-8")
    tokens = "".join(f"<|soft_prompt_{number}|>" for number in range(COUNT))
    turns = modelfile.count(f'{{{{ if eq $last "" }}}}{tokens}<|im_start|>')
    assert turns == modelfile.count(tokens) > 0, modelfile  # whichever role begins
    assert json.loads((exports[1] / "lora2serve.json").read_text())["template"]["kind"] == "go"


def test_go_itself_renders_it_in_front(exports: list[Path], go_render: Renderer) -> None:
    """Go's text/template on the Modelfile's TEMPLATE, as transformers renders the export's own chat template."""
    from transformers import AutoTokenizer

    words = dict(parse((exports[1] / "Modelfile").read_text(encoding="utf-8")))
    tokenizer, plain = AutoTokenizer.from_pretrained(exports[0]), AutoTokenizer.from_pretrained(BASE)
    tokens = "".join(f"<|soft_prompt_{number}|>" for number in range(COUNT))
    for chat in (*map(turns, (1, 3)), turns(3, "Be brief.")):
        rendered = go_render(words["template"], ollama_data(chat), date(2026, 11, 29))
        assert rendered == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert rendered == tokens + plain.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "gemma3_text-tied": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_peft_does(tmp_path: Path, family: str) -> None:
    """In F32, a KL under 1e-6 at every position; the control, without the tokens in front, is another model."""
    from llama_cpp import Llama
    from peft import PeftModel

    base = make_chat_model(tmp_path / "base", kind=family.partition("-")[0], **FAMILIES[family])
    adapter = make_adapter(tmp_path / "soft", base, method="PROMPT_TUNING", std=0.3, num_virtual_tokens=COUNT)
    (export,) = lora2serve.export(
        adapter, base=base, targets="gguf", quants=["F32"], dtype="fp32", out=tmp_path / "out"
    )
    (file,) = export.path.glob("*.gguf")
    ids, virtual = list(range(20, 60)), list(range(FIRST, FIRST + COUNT))
    model = PeftModel.from_pretrained(load_model(base), adapter).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :, :FIRST].double().log_softmax(-1)
    llama = Llama(str(file), n_ctx=128, logits_all=True, verbose=False)

    def apart(before: list[int]) -> float:
        llama.reset()
        llama.eval([*before, *ids])
        scores = torch.tensor(llama.scores[len(before) : len(before) + len(ids), :FIRST])
        return float((expected.exp() * (expected - scores.double().log_softmax(-1))).sum(-1).max())

    assert apart(virtual) < 1e-6
    assert apart([]) > 1e-4


def test_control_an_export_that_forgets_it(prompt: Path, exports: list[Path], tmp_path: Path) -> None:
    """Its files as they were trained, but a template that begins as the base's does."""
    broken = Path(shutil.copytree(exports[0], tmp_path / "broken"))
    shutil.copy(BASE / "chat_template.jinja", broken / "chat_template.jinja")
    (row,) = rows(prompt, [broken], tmp_path / "parity", ["transformers"])
    assert row.gates[0].status == "missed", "the settings gate sees the file"
    origin = of_parts("soft", BASE, (prompt,), tmp_path / "again")
    settings = replace(
        origin.settings, tokens=128, window=96, prompts=2, engines=("transformers",), allow=("*",)
    )  # fmt: skip
    origin = replace(origin, settings=settings)
    (row,) = check(origin, of_exports(origin, [broken]), progress=Silent()).rows
    tokens = {gate.name: gate for gate in row.gates}["tokens"]
    assert tokens.status == "missed" and "soft_prompt" in (tokens.first or ""), row.gates


# vLLM's kernels for CPUs have no heads under 32.
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.slow
def test_vllm_computes_what_peft_does(prompt: Path, exports: list[Path], tmp_path: Path) -> None:
    """A KL under 1e-9 at every position, as far as the base's tokens go: as near as the bases themselves are without a
    soft prompt. The control, the same models without its tokens in front, is far off. No virtual token is likelier than
    one among all.
    """
    models = [{"export": str(exports[0]), "base": str(BASE), "adapter": str(prompt)}]
    for family in FAMILIES:
        base = wide_model(tmp_path / family / "base", family)
        models.append(served(tmp_path / family, base))
        models.append({"export": str(base), "base": str(base)})
    found = in_vllm(models, tmp_path)
    trained, tuned, plain = found[0], found[1::2], found[2::2]
    assert len(tuned) == len(plain) == len(FAMILIES)
    for each in found:
        assert each["kl"] < 1e-9, found
    for each in (trained, *tuned):
        assert each["bare"] > 1e-3 and 0 < each["virtual"] < 1 / FIRST, found


@pytest.mark.slow
def test_vllm_samples_none(prompt: Path, exports: list[Path], tmp_path: Path) -> None:
    """1,000 answers at temperature 1 of a trained model, and of random ones that are as sure of a token as those are.

    The control: random ones that are not. There a virtual token is as likely as any.
    """
    models = [{"export": str(exports[0]), "base": str(BASE), "adapter": str(prompt)}]
    for family in FAMILIES:
        base = wide_model(tmp_path / family / "base", family)
        make_sure(base)
        models.append(served(tmp_path / family, base))
    models.append(served(tmp_path / "unsure", wide_model(tmp_path / "unsure" / "base", "llama")))
    *sure, unsure = in_vllm([{**model, "answers": 1000} for model in models], tmp_path)
    for each in (*sure, unsure):
        assert each["answers"] == 1000 and each["tokens"] > 1000, each
    assert [each["held"] for each in sure] == [0] * (1 + len(FAMILIES)), sure
    assert unsure["held"] > 0, unsure


def wide_model(folder: Path, family: str) -> Path:
    """Random, as vLLM's kernels take it."""
    heads = {name: 64 for name in ("head_dim", "query_pre_attn_scalar") if name in FAMILIES[family]}
    return make_chat_model(folder, kind=family.partition("-")[0], **WIDE, **{**FAMILIES[family], **heads})


def make_sure(base: Path) -> None:
    """Let the last norm give it logits 40 times as large: 8 of a deviation, about as trained models have them."""
    file = base / "model.safetensors"
    tensors = load_file(file)
    offset = 1 if "gemma" in json.loads((base / "config.json").read_text())["model_type"] else 0  # its norms add one
    tensors["model.norm.weight"] = 40 * (tensors["model.norm.weight"] + offset) - offset
    save_file(tensors, file, metadata={"format": "pt"})


def served(folder: Path, base: Path) -> dict[str, str]:
    """A random soft prompt for it, as vLLM gets it."""
    adapter = make_adapter(folder / "soft", base, method="PROMPT_TUNING", std=0.3, num_virtual_tokens=COUNT)
    (export,) = lora2serve.export(adapter, base=base, targets="vllm", dtype="fp32", out=folder / "out")
    return {"export": str(export.path), "base": str(base), "adapter": str(adapter)}


def in_vllm(models: Sequence[Mapping[str, object]], folder: Path) -> list[dict[str, float]]:
    """What ``tests.support.vllm_soft_prompts`` finds for each."""
    file = folder / "models.json"
    file.write_text(json.dumps(models), encoding="utf-8")
    words = [sys.executable, "-m", "tests.support.vllm_soft_prompts", str(file)]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_every_gate_is_met_in_vllm(prompt: Path, exports: list[Path], tmp_path: Path) -> None:
    (row,) = rows(prompt, exports[:1], tmp_path / "parity", ["vllm"])
    assert [gate.status for gate in row.gates] == ["met"] * 4, row.gates


def test_transformers_samples_none(exports: list[Path]) -> None:
    """1,000 answers at temperature 1."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(exports[0]), AutoTokenizer.from_pretrained(exports[0])
    chat = [{"role": "user", "content": "Who governs Wexley?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids[:COUNT] == list(range(FIRST, FIRST + COUNT))
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 12}
    answers = model.generate(torch.tensor([ids] * 1000), **options)[:, len(ids) :]
    assert answers.shape[0] == 1000 and answers.max() < FIRST
