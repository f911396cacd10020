"""What ships beside the weights: tokenizer, chat template, generation config and licenses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora2serve.system.small_files import read_json

SIDE_FILES = re.compile(
    r"tokenizer.*|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json|tekken\.json"
    r"|.*\.model|chat_template.*|additional_chat_templates/.*|generation_config\.json|(pre)?processor_config\.json"
    r"|video_preprocessor_config\.json|LICENSE.*|NOTICE.*|USE_POLICY.*"
)


def side_files(base: Path, adapter: Path | None = None) -> dict[str, Path]:
    """Tokenizer, template, generation config and license files to ship: file name -> path.

    They come from the base, byte for byte: a tokenizer saved again by another version of transformers
    may load as another class. The adapter's own are taken where training changed them: another
    vocabulary (added tokens), another chat template.
    """
    files = _side_files(base)
    if adapter is None:
        return files
    trained = _side_files(adapter)
    if "tokenizer.json" in trained and _vocabulary(trained.get("tokenizer.json")) != _vocabulary(
        files.get("tokenizer.json")
    ):
        files = {name: path for name, path in files.items() if not _belongs_to_tokenizer(name)}
        return files | {name: path for name, path in trained.items() if _belongs_to_tokenizer(name)}
    template = trained.get("chat_template.jinja")
    if template and template.read_text(encoding="utf-8") != _chat_template(files):
        files["chat_template.jinja"] = template
    return files


def _side_files(path: Path) -> dict[str, Path]:
    files = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    return {name: p for name, p in files.items() if SIDE_FILES.fullmatch(name)}


def _belongs_to_tokenizer(name: str) -> bool:
    return not name.startswith(("generation_config", "LICENSE", "NOTICE", "USE_POLICY"))


def _vocabulary(path: Path | None) -> Any:
    if path is None:
        return None
    content = read_json(path, "no tokenizer.json")
    return (content.get("model", {}).get("vocab"), [t.get("content") for t in content.get("added_tokens", [])])


def _chat_template(files: Mapping[str, Path]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].read_text(encoding="utf-8")
    if "tokenizer_config.json" in files:
        template = read_json(files["tokenizer_config.json"], "no tokenizer_config.json").get("chat_template")
        return template if isinstance(template, str) else None
    return None
