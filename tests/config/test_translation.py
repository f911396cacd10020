"""Configs of Axolotl and LLaMA-Factory: each becomes a recipe that is one, and no key is lost without a word."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import lora2serve
from lora2serve.config import recipe as recipes
from lora2serve.config.recipe import Recipe, load
from lora2serve.config.translation.moved_keys import MovedKeys
from lora2serve.config.translation.translated_recipe import move_keys, translate
from lora2serve.errors import RecipeError, UsageError

CONFIGS = Path(__file__).parent / "other_trainers"
EACH = sorted(CONFIGS.glob("*/*.yaml"))
LIGHT = (
    "dpo-full",
    "qlora-sharegpt",
    "variants",
    "kto-oft",
    "lora-sft",
    "goes-on",
)  # of each trainer's; the others take as long


def keys_of(value: Any) -> Iterator[str]:
    """The first part of every key that says something, and is on."""
    return (str(key) for key, item in value.items() if item not in (None, "", [], {}, False, 0))


def translated(name: str, folder: Path) -> tuple[Recipe, dict[str, str]]:
    """The recipe of a config, and what was left out of it, by key."""
    result = translate(CONFIGS / f"{name}.yaml")
    path = folder / "lora2serve.yaml"
    path.write_text(result.text, encoding="utf-8")
    return load(path), {item.key: item.why for item in result.left_out}


@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=() if path.stem in LIGHT else pytest.mark.engine) for path in EACH],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_every_key_has_a_place_or_is_named(config: Path, tmp_path: Path) -> None:
    """Without a key the recipe is another one, or its line among those left out is gone."""
    (tmp_path / "r.yaml").write_text(translate(config).text, encoding="utf-8")
    load(tmp_path / "r.yaml")
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    _, whole = move_keys(content, config)
    silent = []
    for key in keys_of(content):
        try:
            _, less = move_keys({name: value for name, value in content.items() if name != key}, config)
        except RecipeError:
            continue  # nothing without it: its place is the model or the data
        unchanged = (less.recipe, less.left_out) == (whole.recipe, whole.left_out)
        if unchanged and content[key] not in SAME.get(key, ()):
            silent.append(key)
    assert silent == []


# Values that say what a recipe does anyway.
SAME: Mapping[str, tuple[object, ...]] = {
    "do_train": (True,), "pref_loss": ("sigmoid",), "stage": ("sft",), "finetuning_type": ("lora",), "report_to": ("none",),
    "optimizer": ("adamw_torch", "adamw_torch_fused"), "evals_per_epoch": (1,), "chat_template": ("tokenizer_default",),
    "eval_strategy": ("steps",), "evaluation_strategy": ("steps",), "quantization_method": ("bnb",),
    "load_in_4bit": (True,), "pissa_convert": (True,), "dataset_dir": ("data",), "lora_rank": (8,),
    "cutoff_len": (2048,), "num_train_epochs": (3.0,), "pissa_iter": (16,), "use_mlflow": (True,),
}  # fmt: skip


def test_what_an_axolotl_config_becomes(tmp_path: Path) -> None:
    recipe, left_out = translated("axolotl/local-files", tmp_path)
    data, train = recipe.data, recipe.train
    assert (data.train, data.eval, data.max_length) == (("one.jsonl", "two.jsonl"), "eval.jsonl", 1024)
    assert data.columns == {"instruction": "question", "output": "reply"} and not data.completion_only
    assert (train.quantize, train.double_quant, train.lora.rank, train.lora.alpha) == ("nf4", False, 8, 16)
    assert train.lora.targets == ("gate_proj", "up_proj", "down_proj")
    assert (train.steps, train.warmup, train.batch_size, train.accumulation) == (400, 0.1, 4, 4)
    assert (train.schedule, train.learning_rate, train.max_grad_norm, train.seed) == ("linear", 1e-4, 0.5, 7)
    assert (train.eval_steps, train.early_stopping, train.trackers, recipe.name) == (100, 3, ("wandb",), "runs")
    assert left_out.keys() == {
        "datasets[0].type.format", "optimizer", "save_steps", "save_total_limit", "wandb_project", "wandb_entity",
    }  # fmt: skip


def test_what_a_llamafactory_config_becomes(tmp_path: Path) -> None:
    """With what LLaMA-Factory does where nothing is said."""
    recipe, left_out = translated("llamafactory/qlora-named", tmp_path)
    data, train = recipe.data, recipe.train
    (source,) = data.sources("train")
    assert (source.path, source.split, data.eval_split, data.max_length) == ("some-user/turns", "train_sft", 0.1, 1024)
    assert (train.quantize, train.double_quant, train.lora.targets) == ("nf4", False, ("q_proj", "v_proj"))
    assert (train.lora.rank, train.lora.alpha, train.schedule, train.max_grad_norm) == (8, 16, "cosine", 1.0)
    assert (train.batch_size, train.accumulation, train.epochs, train.eval_steps) == (1, 8, 3, 500)
    assert left_out.keys() == {"template", "overwrite_cache", "fp16", "per_device_eval_batch_size"}
    recipe, left_out = translated("llamafactory/pretrain", tmp_path)
    assert recipe.data.train == str(CONFIGS / "llamafactory/data/plain.txt.jsonl") and not recipe.data.columns
    assert (recipe.train.warmup, recipe.train.schedule, recipe.train.learning_rate) == (0.1, "linear", 1e-4)
    recipe, _ = translated("llamafactory/pissa", tmp_path)
    assert (recipe.train.lora.init, recipe.train.lora.rslora, recipe.name) == ("pissa_niter_16", True, "pissa-16")
    assert recipe.train.lora.modules_to_save == ("embed_tokens", "lm_head")
    recipe, left_out = translated("llamafactory/dpo", tmp_path)
    assert (recipe.train.objective, recipe.train.preference) == ("dpo", {"beta": 0.1}) and "stage" not in left_out
    recipe, _ = translated("llamafactory/kto-oft", tmp_path)
    assert (recipe.train.method, dict(recipe.train.options)) == ("oft", {"oft_block_size": 32})
    assert (recipe.train.objective, recipe.train.preference) == ("kto", {"desirable_weight": 1.0})
    assert recipe.data.columns == {"label": "good"}


WHY = [
    ("axolotl/dpo-full", "adapter", "all weights are trained there; a LoRA is trained here"),
    (
        "axolotl/dpo-full",
        "fsdp_config",
        "`lora2serve train --gpus all` (or torchrun) trains by several; train.parallel: fsdp cuts the base into parts",
    ),
    ("axolotl/lora-8bit", "load_in_8bit", "4 bits or none are trained: 16 are written, and nf4 takes less memory"),
    ("axolotl/variants", "made_up_key", "unknown here: no key of a recipe does the same"),
    ("axolotl/variants", "val_set_size", "data.eval_split is a share of the rows, and this is a number of them"),
    ("axolotl/goes-on", "lora_r", "0, expected 1 to 16384"),
    ("axolotl/goes-on", "lora_dropout", "1.5, expected 0.0 to 0.99"),
    ("llamafactory/kto-oft", "lora_rank", "'eight', expected a whole number"),
    ("llamafactory/rewards", "stage", "answers and preferences (dpo, kto) are trained, and no rewards"),
    ("llamafactory/full-galore", "finetuning_type", "a LoRA is written; train.method names other kinds of adapters"),
    ("llamafactory/vision", "freeze_vision_tower", "rows with images are not trained"),
    ("llamafactory/gptq", "quantization_method", "bitsandbytes quantizes"),
]


@pytest.mark.parametrize(("config", "key", "why"), WHY)
def test_why_a_key_has_no_place(config: str, key: str, why: str, tmp_path: Path) -> None:
    _, left_out = translated(config, tmp_path)
    assert left_out[key] == why


def test_kto_of_axolotl(tmp_path: Path) -> None:
    recipe, left_out = translated("axolotl/kto", tmp_path)
    weights = {"beta": 0.2, "desirable_weight": 0.5, "undesirable_weight": 2.0}
    assert (recipe.train.objective, recipe.train.preference) == ("kto", weights)
    assert left_out.keys() == {"datasets[0].type"}


@pytest.mark.parametrize(
    ("changes", "path", "value", "named"),
    [
        (
            {"datasets": [{"path": "a", "type": {"field_output": "one"}}, {"path": "b", "type": {"field_output": "two"}}]},
            "data.columns.output", "one", {"datasets[1].type.field_output: output": "two"},
        ),
        ({"pretraining_dataset": "b"}, "data.train", "b", {"datasets": "a"}),
        ({"rl": "dpo", "dpo_beta": 0.2, "rl_beta": 0.3}, "train.preference.beta", 0.3, {"dpo_beta": 0.2}),
        ({"rl": "dpo", "dpo_beta": 0.3, "rl_beta": 0.3}, "train.preference.beta", 0.3, {}),
        ({"warmup_steps": 0.2, "warmup_ratio": 0.1}, "train.warmup", 0.2, {"warmup_ratio": 0.1}),
        ({"warmup_steps": 0, "warmup_ratio": 0.1}, "train.warmup", 0.1, {}),
        ({"warmup_steps": 0}, "train.warmup", 0.0, {}),
    ],
)  # fmt: skip
def test_two_keys_for_one(changes: dict[str, Any], path: str, value: object, named: dict[str, object]) -> None:
    """The value that is not taken is named; 0 steps of warm-up leave it to the share, as in transformers."""
    config = {"base_model": "x/y", "adapter": "lora", "datasets": "a", **changes}
    _, keys = move_keys(config, Path("axolotl.yaml"))
    assert keys.get(path) == value
    assert {item.key: item.value for item in keys.left_out} == named


def test_columns_that_nobody_reads_are_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    columns = {"prompt": "q", "response": "r", "history": "before", "images": "pictures"}
    index = {"turns": {"file_name": "turns.json", "columns": columns, "num_samples": 5, "folder": "x"}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(index), encoding="utf-8")
    config = {"model_name_or_path": "x/y", "dataset": "turns"}
    _, keys = move_keys(config, tmp_path / "config.yaml")
    assert [item.key.removeprefix("dataset: turns.") for item in keys.left_out] == [
        "num_samples", "folder", "columns.history", "columns.images",
    ], "in the order of the file"  # fmt: skip
    assert keys.get("data.columns") == {"instruction": "q", "output": "r"}


def test_init_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = lora2serve.init(source=CONFIGS / "axolotl/ia3.yaml")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["# lora2serve train", "# from ia3.yaml of Axolotl"]
    assert "#   relora_steps: 100: a merged LoRA is no start of another" in lines
    assert load(path).train.method == "ia3"
    with pytest.raises(UsageError, match="already exists"):
        lora2serve.init(source=CONFIGS / "axolotl/ia3.yaml")
    (tmp_path / "other.yaml").write_text("a: 1")
    with pytest.raises(RecipeError, match=r"other.yaml: neither base_model nor model_name_or_path"):
        lora2serve.init(source="other.yaml", overwrite=True)
    (tmp_path / "no-data.yaml").write_text("base_model: x/y")
    with pytest.raises(RecipeError, match=r"no recipe without it: data.train: missing"):
        lora2serve.init(source="no-data.yaml", overwrite=True)
    assert path.read_text(encoding="utf-8").splitlines() == lines, "an error leaves what is there"


def test_init_from_a_built_in_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beside it is found from elsewhere."""
    monkeypatch.chdir(tmp_path)
    assert load(lora2serve.init(source="demo")) == load(recipes.find("demo"))
    with pytest.raises(UsageError, match=r"no such file or built-in recipe \(did you mean 'demo'\?\)"):
        lora2serve.init(source="dmo", overwrite=True)


def test_new_tokens_take_the_place_of_whole_tables() -> None:
    """Both train embedding and head in full for them; a module beside these stays."""
    axolotl = {"base_model": "m", "datasets": [{"path": "d"}], "adapter": "lora", "tokens": ["<a>", "<b>"]}
    saved = {"lora_modules_to_save": ["embed_tokens", "lm_head", "model.norm"]}
    _, keys = move_keys({**axolotl, **saved}, Path("a.yaml"))
    assert keys.get("data.new_tokens") == ["<a>", "<b>"]
    assert keys.get("train.lora.modules_to_save") == ["model.norm"]
    assert [item.line() for item in keys.left_out if item.key == "lora_modules_to_save"] == [
        "lora_modules_to_save: ['embed_tokens', 'lm_head']: of these tables the rows of data.new_tokens are trained, and "
        "no others"
    ]
    _, plain = move_keys({name: value for name, value in {**axolotl, **saved}.items() if name != "tokens"}, Path("a"))
    assert plain.get("train.lora.modules_to_save") == saved["lora_modules_to_save"], "the control"
    factory = {"model_name_or_path": "m", "dataset": "d", "add_tokens": "<a>, <b>", "add_special_tokens": "<c>"}
    assert move_keys(factory, Path("f"))[1].get("data.new_tokens") == ["<a>", "<b>", "<c>"]


ODD: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"base_model": "m", "datasets": {"a": "b"}}, {}),
    ({"base_model": "m", "datasets": [{"path": ["a", ["b"]]}, 5]},
     {"datasets[0].path": "expected a file or a Hub id", "datasets[1]": "expected a path and a type"}),
    ({"base_model": "m", "datasets": "a", "peft": [1], "tokens": 5, "report_to": 5, "warmup_steps": "ten"},
     {"peft": "expected keys and values", "warmup_steps": "expected a number",
      **dict.fromkeys(("tokens", "report_to"), "expected names, in a list or with commas between")}),
    ({"model_name_or_path": "m", "dataset": "a/b", "lora_target": 5, "eval_dataset": True},
     dict.fromkeys(("lora_target", "eval_dataset"), "expected names, in a list or with commas between")),
]  # fmt: skip


@pytest.mark.parametrize(("config", "why"), ODD)
def test_values_of_another_type_are_named(config: dict[str, Any], why: dict[str, str], tmp_path: Path) -> None:
    """None is lost in silence, and none becomes a text."""
    try:
        _, keys = move_keys(config, tmp_path / "c.yaml")
    except RecipeError as error:
        assert not why and "data.train: missing" in error.message
        return
    assert why and {key: text for key, text in why.items() if (key, text) in left(keys)} == why
    assert keys.get("data.train") in ("a", "a/b")


def left(keys: MovedKeys) -> list[tuple[str, str]]:
    return [(item.key, item.why) for item in keys.left_out]


def test_an_odd_index_of_data_sets(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    index = {"turns": {"file_name": "turns.json", "columns": ["q"], "tags": 3}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(index), encoding="utf-8")
    _, keys = move_keys({"model_name_or_path": "x/y", "dataset": "turns"}, tmp_path / "config.yaml")
    assert left(keys) == [(f"dataset: turns.{name}", "expected keys and values") for name in ("columns", "tags")]
    assert keys.get("data.train") == str(tmp_path / "data/turns.json")
