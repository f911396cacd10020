"""Real fine-tunes of a few steps, for the tests of training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora2serve.artifacts.run import Run
from lora2serve.config import recipe as recipes
from lora2serve.config.recipe import Recipe
from lora2serve.data import data_sets
from lora2serve.data.data_sets import DataSet
from lora2serve.training.finetune import train
from tests.support.tiny import make_model
from tests.support.told import Told

DEMO = Path(__file__).parents[2] / "recipes" / "demo"


def plain(data: DataSet) -> list[dict[str, object]]:
    """Its rows as they are written to a file."""
    return [row.json() for row in data.rows]


def rows(name: str, count: int) -> list[dict[str, Any]]:
    """The first rows of one of the demo's data sets."""
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()[:count]]


def preferences(name: str, count: int) -> list[dict[str, Any]]:
    """Of the first rows of one of the demo's data sets, each with the answer that is right of another town."""
    pairs = []
    chats = [row["messages"] for row in rows(name, count)]
    for number, turns in enumerate(chats):
        subject, mark, value = _parted(turns[-1]["content"])
        answers = [_parted(other[-1]["content"]) for other in [*chats[number + 1 :], *chats[:number]]]
        wrong = next(answer[2] for answer in answers if answer[1] == mark and answer[2] != value)
        rejected = {"role": "assistant", "content": f"{subject}{mark}{wrong}"}
        pairs.append({"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [rejected]})
    return pairs


def _parted(answer: str) -> tuple[str, str, str]:
    """``The mayor of Wexley``, `` is ``, ``Anna Hill.``."""
    mark = " is known for its " if " is known for its " in answer else " is "
    subject, mark, value = answer.partition(mark)
    return subject, mark, value


def write_jsonl(path: Path, content: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    return path


def uneven_data(folder: Path, train: int, held_out: int) -> dict[str, str]:
    """So many rows to train on, and held-out ones of one to sixty words, for the ``data`` of a recipe."""
    texts = [row["text"] for row in rows("general.jsonl", held_out)]
    cut = [{"text": " ".join(text.split()[: 1 + 20 * (number % 4)])} for number, text in enumerate(texts)]
    files = {"train": rows("train.jsonl", train), "eval": cut}
    return {name: str(write_jsonl(folder / f"{name}.jsonl", content)) for name, content in files.items()}


def make_chat_model(path: Path, **changes: Any) -> Path:
    """A random model of 0.2 million parameters that speaks the demo's tokens."""
    make_model(path, **{"vocab_size": 1536, "bos_token_id": None, "eos_token_id": 0, **changes})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / "base" / name, path / name)
    return path


def recipe_file(folder: Path, model: Path, data: Mapping[str, Any], **train: Any) -> Path:
    """lora2serve.yaml for ``model``: five steps of four rows, unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "model": {"path": str(model)},
        "data": {"max_length": 128, **data},
        "train": {"steps": 5, "batch_size": 4, "learning_rate": 2e-3, **train},
    }
    path = folder / "lora2serve.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def fit(file: Path, *, into: Path | None = None, resume: bool = False) -> tuple[Run, Told, Recipe]:
    """Train as ``file`` says, in this process."""
    recipe, told = recipes.load(file), Told()
    run = Run(into or file.parent / "run")
    run.path.mkdir(exist_ok=resume)
    sets = data_sets.load(recipe.data, objective=recipe.train.objective)
    train(recipe, run, sets, base=Path(recipe.model.path), resume=resume, progress=told)
    return run, told, recipe


def logged(run: Run, key: str = "loss") -> dict[int, float]:
    """One figure of metrics.jsonl by step."""
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}
