"""``train.objective`` and ``train.preference``: what TRL's configuration has, and what makes no sense with it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora2serve.config import objectives
from lora2serve.config.recipe import load
from lora2serve.errors import RecipeError


def recipe(folder: Path, train: dict[str, Any], **data: Any) -> Path:
    path = folder / "r.yaml"
    content = {"model": {"path": "m"}, "data": {"train": "t.jsonl", **data}, "train": {"objective": "dpo", **train}}
    path.write_text(yaml.safe_dump(content))
    return path


def problems(folder: Path, train: dict[str, Any], **data: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(recipe(folder, train, **data))
    return [line.removeprefix("r.yaml: ") for line in caught.value.message.splitlines()]


def test_what_trl_has_is_taken_as_trl_takes_it(tmp_path: Path) -> None:
    options = {"beta": "0.3", "loss_type": "ipo", "loss_weights": [2], "disable_dropout": False, "ld_alpha": None}
    chosen = load(recipe(tmp_path, {"preference": options, "lora": {"dropout": 0.1}})).train
    taken = objectives.read_preference(chosen.objective, chosen.preference, [])
    assert taken == {
        "beta": 0.3, "loss_type": ["ipo"], "loss_weights": [2.0], "disable_dropout": False, "ld_alpha": None,
    }  # fmt: skip
    from trl import DPOConfig

    made = DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", **taken)
    assert (made.beta, made.loss_type) == (0.3, ["ipo"])


def test_every_field_of_trl_is_an_option_or_set_by_the_run() -> None:
    """A field that a newer TRL brings shows here first."""
    assert set(objectives.option_names("dpo")) == {
        "disable_dropout", "loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef",
        "label_smoothing", "beta", "use_weighting", "discopop_tau",
    }  # fmt: skip
    assert set(objectives.option_names("kto")) == {
        "disable_dropout", "loss_type", "beta", "desirable_weight", "undesirable_weight",
    }  # fmt: skip


def test_every_loss_of_trl_is_trained_or_refused() -> None:
    from trl.trainer import dpo_trainer, kto_trainer

    assert set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(kto_trainer))) == set(objectives.LABEL_LOSSES)
    source = inspect.getsource(dpo_trainer)
    known = set(re.findall(r'loss_type == "(\w+)"', source))
    assert known == {*objectives.LOSSES, *objectives.WHOLE_BATCH}
    assert set(re.findall(r'f_divergence_type == "(\w+)"', source)) == set(objectives.DIVERGENCES)
    (with_divergence,) = re.findall(r"f_divergence_loss_types = \{(.*)\}", source)
    assert set(re.findall(r"\w+", with_divergence)) - {"sft"} == set(objectives.WITH_DIVERGENCE)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bata": 1}, "train.preference.bata: unknown key (did you mean 'train.preference.beta'?)"),
        ({"max_length": 9}, "train.preference.max_length: unknown key"),
        ({"beta": "much"}, "train.preference.beta: 'much', expected a number"),
        ({"beta": 0}, "train.preference.beta: 0.0, expected more than 0 and at most 1000"),
        ({"label_smoothing": 0.5}, "train.preference.label_smoothing: 0.5, expected 0.0 to 0.499"),
        ({"loss_type": "sigmiod"}, "(did you mean 'sigmoid'?)"),
        ({"loss_type": ["sigmoid", "aot"]}, "aot is not trained here: it sorts the pairs of a batch"),
        ({"loss_weights": [1, 2]}, "train.preference.loss_weights: 2 numbers, expected one for each loss_type: 1"),
        ({"loss_type": "exo_pair"}, "train.preference.label_smoothing: missing: exo_pair needs more than 0"),
        ({"f_divergence_type": "forward"}, "(did you mean 'forward_kl'?)"),
        ({"f_divergence_type": "forward_kl", "loss_type": "apo_zero"}, "expected reverse_kl with loss_type: apo_zero"),
    ],
)
def test_what_trl_would_not_take(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    (line,) = problems(tmp_path, {"preference": options})
    assert problem in line


def test_what_makes_no_sense_is_refused_at_once(tmp_path: Path) -> None:
    train = {"method": "prefix_tuning", "quantize": "none"}
    (line,) = problems(tmp_path, train)
    assert line.startswith("train.method: prefix_tuning, but dpo compares with the base, the adapter switched off")
    lines = problems(
        tmp_path, {"quantize": "none", "lora": {"init": "pissa", "dropout": 0.1}}, packing=True, completion_only=False
    )
    assert [line.split(":")[0] for line in lines] == [
        "data.packing", "data.completion_only", "train.lora.init", "train.lora.dropout",
    ]  # fmt: skip
    assert problems(tmp_path, {"objective": "sft", "preference": {"beta": 1}}) == [
        "train.preference: 'beta', expected none with train.objective: sft"
    ]
    assert problems(tmp_path, {"objective": "dop"}) == [
        "train.objective: 'dop', expected one of sft, dpo, kto (did you mean 'dpo'?)"
    ]


def test_kto_has_fields_of_its_own(tmp_path: Path) -> None:
    train = {"objective": "kto", "batch_size": 1}
    (line,) = problems(tmp_path, train)
    assert line.startswith("train.batch_size: 1, but kto compares the rows of a batch")
    alone = {**train, "preference": {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.5}}
    assert load(recipe(tmp_path, alone)).train.batch_size == 1, "the control: a loss that compares none"
    lines = problems(tmp_path, {"objective": "kto", "preference": {"loss_type": "kot", "undesirable_weight": 0}})
    assert [line.split(":")[0] for line in lines] == [
        "train.preference.undesirable_weight",
        "train.preference.loss_type",
    ]
    (line,) = problems(tmp_path, {"objective": "kto", "preference": {"loss_weights": [1]}})
    assert line.startswith("train.preference.loss_weights: unknown key")


def test_orpo_is_refused_by_name(tmp_path: Path) -> None:
    """With all other problems of the recipe, and with what learns from its rows."""
    said = problems(tmp_path, {"objective": "orpo", "preference": {"beta": 0.1}, "steps": 0})
    assert said[0].startswith("train.objective: 'orpo', expected sft, dpo or kto: TRL's ORPO is experimental")
    assert len(said) == 2 and said[1].startswith("train.steps: 0")
    assert load(recipe(tmp_path, {"preference": {"beta": 0.1}})).train.objective == "dpo", "the control"
