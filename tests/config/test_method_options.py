"""``train.method`` and ``train.options``: what PEFT's own configuration would not take is named with the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora2serve.config import train_methods
from lora2serve.config.method_options import option_names, read_options
from lora2serve.config.recipe import dump, load
from lora2serve.errors import RecipeError


def recipe(folder: Path, **train: Any) -> Path:
    path = folder / "r.yaml"
    content = {"model": {"path": "some/model"}, "data": {"train": "rows.jsonl"}, "train": {"quantize": "none", **train}}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def problems(folder: Path, **train: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(recipe(folder, **train))
    return [line.removeprefix("r.yaml: ") for line in caught.value.message.splitlines()]


@pytest.mark.parametrize("method", [method for method in train_methods.TRAINABLE if method != "lora"])
def test_every_option_of_every_method(method: str) -> None:
    """Each of PEFT's types is understood: no value has all of them, and one of no type is named."""
    names, told = option_names(method), list[str]()
    assert "task_type" not in names and ("target_modules" in names or "num_virtual_tokens" in names)
    read_options(method, dict.fromkeys(names, object), told)
    assert len(told) == len(names), told
    assert all(line.startswith("train.options.") and "expected" in line for line in told)


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"method": "iaa3"}, ["train.method: 'iaa3', expected one of"]),
    ({"method": "poly"}, ["train.method: poly cannot be trained here: each row would have to name its task"]),
    ({"options": {"r": 8}}, ["train.options: 'r', expected none with train.method: lora (see train.lora)"]),
    (
        {"method": "prompt_tuning", "options": {"num_virtual_token": 8, "prompt_tuning_init": "TXT", "nope": 1}},
        [
            "train.options.nope: unknown key",
            "train.options.num_virtual_token: unknown key (did you mean 'train.options.num_virtual_tokens'?)",
            "train.options.prompt_tuning_init: 'TXT', expected one of TEXT, SAMPLE_VOCAB, RANDOM (did you mean 'TEXT'?)",
        ],
    ),
    (
        {"method": "loha", "options": {"r": "eight", "rank_dropout": "1e-1", "target_modules": "qvmlp"}},
        [
            "train.options.target_modules: unknown preset 'qvmlp' (did you mean 'qv-mlp'?)",
            "train.options.r: 'eight', expected a whole number",
        ],
    ),
    ({"method": "ia3", "options": {"task_type": "CAUSAL_LM"}}, ["train.options.task_type: unknown key"]),
    (
        {"method": "ia3", "lora": {"rank": 32}},
        ["train.lora.rank: 32, but train.method is ia3, whose options are in train.options"],
    ),
    ({"method": "loha", "quantize": "nf4"}, ["train.quantize: nf4, but loha computes with the weights of the base"]),
    ({"method": "prefix_tuning", "gradient_checkpointing": True}, ["train.gradient_checkpointing: true, but prefix"]),
    ({"method": "cpt"}, ["train.options.cpt_token_ids: missing"]),
    ({"method": "trainable_tokens"}, ["train.options.token_indices: missing"]),
]


@pytest.mark.parametrize(("train", "said"), WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, train: dict[str, Any], said: list[str]) -> None:
    told = problems(tmp_path, **train)
    assert len(told) == len(said), told
    assert all(line.startswith(start) for line, start in zip(told, said, strict=True)), told


def test_a_misspelled_method_gets_the_nearest(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, method="prompt_tunning")
    assert line.endswith("(did you mean 'prompt_tuning'?)")


def test_packed_rows_cannot_share_a_prompt(tmp_path: Path) -> None:
    path = recipe(tmp_path, method="p_tuning")
    with pytest.raises(RecipeError, match=r"data.packing: true, but p_tuning comes in front of each row"):
        load(path, ["data.packing=true"])
    assert load(path).train.method == "p_tuning", "the control"


def test_options_come_back_as_they_were(tmp_path: Path) -> None:
    options = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "rank_dropout": 0.1}
    before = load(recipe(tmp_path, method="loha", options=options))
    (tmp_path / "again.yaml").write_text(dump(before), encoding="utf-8")
    again = load(tmp_path / "again.yaml")
    assert (again.train.method, dict(again.train.options)) == ("loha", options)
    assert read_options("loha", {"rank_dropout": "1e-1"}, []) == {"rank_dropout": 0.1}, "as YAML 1.1 reads it"
