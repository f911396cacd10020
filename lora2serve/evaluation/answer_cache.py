"""Answers of a base that were made before: by the content of its files, its engine, the questions and the libraries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from lora2serve.errors import InputError
from lora2serve.evaluation.eval_records import ItemResult, write_whole
from lora2serve.evaluation.suite_run import Measured, library_versions
from lora2serve.parity_check.chat_models import ChatModel
from lora2serve.system.hardware import cache_folder, nvidia_gpus
from lora2serve.system.small_files import digest
from lora2serve.weights.checkpoint import identity

PLACES = ("base", "adapters", "tokenizer")  # options that say where something lies
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")
SETTINGS = ("config.json", "generation_config.json")


def cache_path(model: ChatModel, questions: str) -> Path | None:
    """Where a base's answers lie, whether they are there or not; None for any other model.

    questions: the sha256 of what is asked, and how.
    """
    base = model.options.get("base")
    if model.engine != "peft" or not isinstance(base, str) or (model.options["adapters"] and not model.without_adapter):
        return None
    tokenizer = Path(str(model.options["tokenizer"]))
    content = {
        "weights": identity(Path(base))["files"],
        "settings": [_digest(Path(base) / name) for name in SETTINGS],
        "tokenizer": [_digest(tokenizer / name) for name in TOKENIZER],
        "options": {name: value for name, value in model.options.items() if name not in PLACES},
        "suite": questions,
        "versions": library_versions(),
        "device": [gpu.name for gpu in nvidia_gpus()],
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "evaluations" / f"{key}.json"


def load(path: Path | None, name: str) -> Measured | None:
    """What was answered; None where nothing was, or a file is damaged."""
    known = load_more(path, name)
    return known[0] if known else None


def load_more(path: Path | None, name: str) -> tuple[Measured, Mapping[str, object]] | None:
    """The same, with what was kept beside it."""
    if path is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        items = tuple(ItemResult.from_json(item, str(path)) for item in content["items"])
        return Measured(name, str(content["engine"]), items), dict(content.get("more", {}))
    except (ValueError, KeyError, TypeError, OSError, InputError):
        return None


def save(path: Path | None, measured: Measured, more: Mapping[str, object] | None = None) -> str:
    """For the next time, unless an item was not answered: that may have been chance. Why not, where it cannot be."""
    if path is None or any(item.error for item in measured.items):
        return ""
    content = {"engine": measured.engine, "items": [item.to_json() for item in measured.items], "more": more or {}}
    try:
        write_whole(path, json.dumps(content, ensure_ascii=False))
    except InputError as error:  # its answers are here all the same
        return f"{measured.name}: its answers are not kept for the next time: {error.message}"
    return ""


def _digest(path: Path) -> str:
    return str(digest(path)["sha256"]) if path.is_file() else ""
