"""A model's tokenizer files: what we read of tokenizer.json, and a directory for the readers of other libraries."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict, cast

from lora2serve.exporting.sinks import ExportModel
from lora2serve.system import scratch
from lora2serve.system.small_files import read_json


class AddedToken(TypedDict, total=False):
    """One of ``added_tokens``; in ``added_tokens_decoder`` of tokenizer_config.json without its id."""

    id: int
    content: str
    special: bool
    normalized: bool
    rstrip: bool


class BpeModel(TypedDict, total=False):
    """``model`` of type BPE."""

    type: str
    vocab: dict[str, int]
    merges: Sequence[str | Sequence[str]]
    unk_id: int
    unk_token: str
    byte_fallback: bool
    ignore_merges: bool


class PreTokenizerStep(TypedDict, total=False):
    """``pre_tokenizer``: one step, or a sequence of them."""

    type: str
    pretokenizers: list[PreTokenizerStep]
    pattern: dict[str, str]
    individual_digits: bool
    use_regex: bool
    prepend_scheme: str


class TokenizerJson(TypedDict, total=False):
    """A tokenizer.json, of the tokenizers library."""

    model: BpeModel
    added_tokens: list[AddedToken]
    pre_tokenizer: PreTokenizerStep | None


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """The file's content."""
    return cast("TokenizerJson", read_json(path, f"no {path.name}"))


def added_tokens(model: ExportModel) -> list[AddedToken]:
    """Those of tokenizer.json; none where there is no such file."""
    path = model.files.get("tokenizer.json")
    return read_tokenizer_json(path).get("added_tokens", []) if path else []


def space_scheme(model: ExportModel) -> str | None:
    """``prepend_scheme`` of the tokenizer's Metaspace step: always, never, or first; None where there is no such step.

    "first" (Mistral 0.3) puts a space only before a text that nothing precedes, not even BOS. llama.cpp has no such
    rule. Without its space prefix it is right for whatever follows a special token: every prompt.
    """
    path = model.files.get("tokenizer.json")
    step = read_tokenizer_json(path).get("pre_tokenizer") if path else None
    steps = step.get("pretokenizers", [step]) if step else []
    return next((each.get("prepend_scheme") for each in steps if each.get("type") == "Metaspace"), None)


@contextmanager
def tokenizer_directory(model: ExportModel) -> Iterator[Path]:
    """The model's tokenizer files and config in one directory, as the readers of other libraries want them."""
    with scratch.temporary_folder("tokenizer") as name:
        fill_tokenizer_directory(Path(name), model)
        yield Path(name)


def fill_tokenizer_directory(folder: Path, model: ExportModel) -> None:
    """Links to the files; configs without ``auto_map``, so that no reader fetches or runs code of the model's."""
    for name, path in model.files.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if name == "tokenizer_config.json" and "auto_map" in (settings := json.loads(path.read_text(encoding="utf-8"))):
            link.write_text(json.dumps({key: value for key, value in settings.items() if key != "auto_map"}))
        else:
            link.symlink_to(path.resolve())
    config = {key: value for key, value in model.config.items() if key != "auto_map"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
