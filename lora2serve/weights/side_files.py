"""What ships beside the weights: tokenizer, chat template, generation config and licenses."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from lora2serve.errors import CheckpointError, InputError, raise_all
from lora2serve.system import scratch
from lora2serve.system.small_files import JsonObject, leads_away, read_json, refuse_large
from lora2serve.weights.chat_template import (
    EXTRA,
    GENERATION,
    JINJA,
    PROCESSOR,
    SPECIAL,
    TOKENIZER,
    chat_templates,
    read_settings,
    special_tokens,
)

SIDE_FILES = re.compile(
    r"tokenizer.*|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json|tekken\.json"
    r"|.*\.model|chat_template.*|additional_chat_templates/.*|generation_config\.json|(pre)?processor_config\.json"
    r"|video_preprocessor_config\.json|LICENSE.*|NOTICE.*|USE_POLICY.*"
)
OF_THE_BASE = re.compile(r"generation_config|LICENSE|NOTICE|USE_POLICY")
SETTINGS = (TOKENIZER, SPECIAL, PROCESSOR, GENERATION)  # that are read, and not only shipped
OF_OTHER_SENSES = re.compile(r"(video_)?(pre)?processor_config")  # no part of the tokenizer that came with the adapter


class SideFiles(dict[str, Path]):
    """File name -> path. What is made anew lies in a folder that goes when nobody holds this any more."""

    def write(self, name: str, content: str) -> None:
        """Put a file of our own in the place of ``name``."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        self[name] = path

    def set(self, name: str, settings: JsonObject) -> None:
        """The same with JSON, as transformers writes it."""
        self.write(name, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    @cached_property
    def _folder(self) -> Path:
        folder = tempfile.mkdtemp(prefix="tokenizer-", dir=scratch.root())
        weakref.finalize(self, shutil.rmtree, folder, True)
        return Path(folder)


def side_files(base: Path, adapter: Path | None = None) -> SideFiles:
    """Tokenizer, template, generation config and license files to ship.

    They come from the base, byte for byte: a tokenizer saved again by another version of transformers
    may load as another class. The adapter's own are taken where training changed them: another
    vocabulary (added tokens), another chat template, another end token.
    """
    files = _side_files(base)
    if adapter is None:
        return files
    trained = _side_files(adapter)
    if "tokenizer.json" in trained and _vocabulary(trained.get("tokenizer.json")) != _vocabulary(
        files.get("tokenizer.json")
    ):
        own = {name: path for name, path in trained.items() if not OF_THE_BASE.match(name)}
        kept = [name for name in files if OF_THE_BASE.match(name) or OF_OTHER_SENSES.match(name)]
        return SideFiles({name: files[name] for name in kept} | own)
    _take_templates(files, trained)
    _take_end(files, trained)
    return files


def _take_templates(files: SideFiles, trained: SideFiles) -> None:
    """The templates of training, in the one way that everybody reads, in the place of all others."""
    templates, before = chat_templates(trained), chat_templates(files)
    if all(before.get(name) == template for name, template in templates.items()):
        return
    for name in [name for name in files if name in (JINJA, PROCESSOR) or name.startswith(EXTRA)]:
        del files[name]
    settings = read_settings(files, TOKENIZER)
    if settings.get("chat_template") is not None:  # gguf's reader would prefer it
        files.set(TOKENIZER, {key: value for key, value in settings.items() if key != "chat_template"})
    for name, template in templates.items():
        file = JINJA if name == "default" else f"{EXTRA}{name}.jinja"
        if file in trained:
            files[file] = trained[file]
        else:
            files.write(file, template)


def _take_end(files: SideFiles, trained: SideFiles) -> None:
    end = special_tokens(trained).get("eos_token")
    if end is None or end == special_tokens(files).get("eos_token"):
        return
    for name in (TOKENIZER, SPECIAL):
        settings = read_settings(files, name)
        if name in files and (name == TOKENIZER or "eos_token" in settings):
            files.set(name, {**settings, "eos_token": end})


def _side_files(path: Path) -> SideFiles:
    files = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    files = {name: p for name, p in files.items() if SIDE_FILES.fullmatch(name)}
    problems = [problem for name, file in files.items() for problem in _problems(path, name, file)]
    hint = "copy what is linked into the directory; what cannot be read is damaged: fetch it again"
    raise_all(problems, lambda message: CheckpointError(message, hint))
    return SideFiles(files)


def _problems(folder: Path, name: str, file: Path) -> Iterator[str]:
    """Why the file is not shipped: it shows another file of this machine, or cannot be what its name says."""
    if leads_away(folder, file):
        yield f"{file}: points to {file.resolve()}, outside the directory"
        return
    try:
        refuse_large(file, CheckpointError)
        if name in SETTINGS:
            read_json(file, f"no {name}")
        elif name == JINJA or name.startswith(EXTRA):
            file.read_text(encoding="utf-8")
    except InputError as error:
        yield error.message
    except UnicodeDecodeError as error:
        yield f"{file}: not UTF-8 ({error.reason} at byte {error.start})"


def _vocabulary(path: Path | None) -> Any:
    if path is None:
        return None
    content = read_json(path, "no tokenizer.json")
    return (content.get("model", {}).get("vocab"), [t.get("content") for t in content.get("added_tokens", [])])
