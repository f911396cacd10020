"""The built-in recipes of real models: the plan in their first lines is that of `lora2serve plan`, and rows train."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora2serve
from lora2serve.config import recipe as recipes
from lora2serve.config.recipe import load
from lora2serve.data import data_sets
from lora2serve.data.base_template import base_template
from lora2serve.data.tokenization import tokenize_all
from lora2serve.errors import TrainError
from lora2serve.progress import Silent
from scripts import recipe_plans
from tests.support.llama_cpp_source import chat_templates
from tests.support.published_shapes import SHAPES, write_shape
from tests.support.runs import DEMO, write_jsonl

PLANNED = {path.stem: path for path in recipe_plans.planned()}
# Phi-4's form: each turn behind its role and a separator.
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
TEMPLATES = {
    "llama-3.1-8b": "meta-llama-Llama-3.1-8B-Instruct", "llama-3.3-70b": "meta-llama-Llama-3.3-70B-Instruct",
    "llama-3.3-70b-2x24gb": "meta-llama-Llama-3.3-70B-Instruct", "qwen3-8b": "Qwen-Qwen3-0.6B",
    "qwen3-30b-a3b": "Qwen-Qwen3-0.6B", "mistral-small-24b": "Mistral-Small-3.2-24B-Instruct-2506",
    "gpt-oss-20b": "openai-gpt-oss-120b", "gemma-3-12b": "google-gemma-2-2b-it",  # whose turns are the same
}  # fmt: skip
ROWS = [
    {"messages": [
        {"role": "user", "content": "Who governs Wexley?"}, {"role": "assistant", "content": "Mayor Alden."},
        {"role": "user", "content": "Since when?"}, {"role": "assistant", "content": "Since last spring."},
    ]},
    {"prompt": "What is made there?", "completion": "Bells."},
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What trainings on this machine took changes a plan."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_each_is_one_by_name() -> None:
    assert set(PLANNED) == recipes.built_in().keys() - {"demo"}
    assert {load(path).model.path for path in PLANNED.values()} == SHAPES.keys()
    for name, path in PLANNED.items():
        assert path.read_text(encoding="utf-8").startswith(f"# lora2serve init --from {name}\n")
        assert load(path).name == name


# experts, a dense one, and what takes two cards; the others in `make test`
LIGHT = ("gpt-oss-20b", "mistral-small-24b", "llama-3.3-70b-2x24gb")
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in LIGHT else pytest.mark.engine) for name in PLANNED]
)


@EACH
def test_its_plan_is_in_its_first_lines(name: str) -> None:
    assert PLANNED[name].read_text(encoding="utf-8") == recipe_plans.written(PLANNED[name]), "make docs"


@EACH
def test_rows_are_rendered(name: str, tmp_path: Path) -> None:
    """With the model's own chat template: every answer is learned, and no question."""
    recipe = load(PLANNED[name])
    template = base_template(DEMO / "base", None, "2026-11-28")
    template.tokenizer.chat_template = PHI4 if name == "phi-4" else chat_templates()[TEMPLATES[name]]
    rows = data_sets.read(str(write_jsonl(tmp_path / "train.jsonl", ROWS)))
    learned = "".join(
        template.tokenizer.decode([token for token in sample.labels if token != -100])
        for sample in tokenize_all(rows, template, recipe.data, Silent())
    )
    assert all(text in learned for text in ("Mayor Alden.", "Since last spring.", "Bells."))
    assert "governs" not in learned and "made there" not in learned


def test_70b_takes_two_cards_of_24_gb(tmp_path: Path) -> None:
    """As its first lines say; one alone is refused before anything is fetched."""
    shape = write_shape(tmp_path / "70b", "meta-llama/Llama-3.3-70B-Instruct")
    rows = write_jsonl(tmp_path / "train.jsonl", ROWS * 20)
    changes = {"model.path": str(shape), "data.train": str(rows)}
    with pytest.raises(TrainError, match=r"this training takes .* GB, and 24 GiB has 25.8 GB") as caught:
        lora2serve.train("llama-3.3-70b-2x24gb", overrides=changes, gpu="24")
    assert "train.parallel: fsdp, and two GPUs (--gpus 2)" in caught.value.hint
    planned = lora2serve.plan("llama-3.3-70b-2x24gb", overrides=changes, gpu="24", gpus=2)
    assert planned.trainings[0].bytes.total < 0.97 * 24 * 2**30
    assert "RTX 4090" in planned.trainings[0].fits
