"""What an export's serve.yaml may tell vLLM.

The file comes with the export, from wherever that is from, and vLLM takes every flag in it: plugins that it imports,
``trust-remote-code``. Only what ``lora2serve export`` writes is passed on, each with a value of its own kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from lora2serve.config.schema import show
from lora2serve.config.yaml_text import LONGEST, load_yaml
from lora2serve.errors import InputError, did_you_mean
from lora2serve.exporting import bundle
from lora2serve.system.small_files import is_relative

DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")


def _text(pattern: str) -> Callable[[object], bool]:
    """A value that begins with a dash would be the next flag."""
    return lambda value: isinstance(value, str) and bool(re.fullmatch(rf"(?!-){pattern}", value))


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _modules(value: object) -> bool:
    return isinstance(value, list) and all(_module(text) is not None for text in value)


KNOWN: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "model": (_text(r"[^\x00-\x1f]+"), "a Hub id or a path"),
    "revision": (_text(r"[\w./-]+"), "a commit, a branch or a tag"),
    "served-model-name": (_text(r"[^\x00-\x1f]+"), "a name"),
    "dtype": (lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}"),
    "max-model-len": (_count, "a number"),
    "enable-auto-tool-choice": (lambda value: isinstance(value, bool), "true or false"),
    "tool-call-parser": (_text(r"\w+"), "a parser of vLLM's own"),
    "enable-lora": (lambda value: isinstance(value, bool), "true or false"),
    "max-lora-rank": (_count, "a number"),
    "max-loras": (_count, "a number"),
    "lora-modules": (_modules, f"a list of names, each with a path in {bundle.ADAPTERS}/"),
}


def read(file: Path) -> dict[str, object]:
    """The settings in the file; InputError with everything in it that must not reach an engine."""
    content = parsed(file)
    problems = []
    for key, value in content.items():
        fits, expected = KNOWN.get(str(key), (None, ""))
        if fits is None:
            problems.append(f"{file}: {show(key)}: unknown key{did_you_mean(str(key), KNOWN)}")
        elif not fits(value):
            problems.append(f"{file}: {key}: {_shown(value)}, expected {expected}")
    if problems:
        raise InputError(
            "\n".join(problems[:20]),
            "vLLM would take it as it is: read the file; `lora2serve serve --trust-export` passes it on unread",
        )
    return {str(key): value for key, value in content.items()}


def modules(settings: Mapping[str, object], folder: Path) -> list[str]:
    """The adapters of ``lora-modules`` with absolute paths, as the flag of that name takes them."""
    listed = settings.get("lora-modules")
    parsed = [_module(text) for text in listed] if isinstance(listed, list) else []
    return [json.dumps({**module, "path": str(folder / module["path"])}) for module in parsed if module]


def _module(text: object) -> dict[str, str] | None:
    """Name and path of an adapter in the bundle; None for anything else."""
    try:
        module = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(module, dict) or set(module) != {"name", "path"}:
        return None
    path = module["path"]
    plain = isinstance(module["name"], str) and isinstance(path, str) and is_relative(path)
    return module if plain and path.startswith(f"{bundle.ADAPTERS}/") else None


def parsed(file: Path) -> Mapping[object, object]:
    """The settings as they stand there; InputError where that are none."""
    if not file.is_file() or file.stat().st_size > LONGEST:
        raise InputError(f"{file}: expected a small file of settings")
    try:
        content = load_yaml(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not YAML ({str(error)[:100]})") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: {_shown(content)}, expected settings")
    return content


def _shown(value: object) -> str:
    """A list in YAML can be longer than any memory."""
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else show(value)
