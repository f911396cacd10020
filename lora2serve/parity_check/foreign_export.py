"""Exports that other tools made: no manifest, and files written in their own way.

What they are is seen by their files. Their settings are compared with our plan wherever both have one: keys that only
one side has are named, not judged, but for those that change what is computed or where an answer ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.parity_report import SettingDifference
from lora2serve.errors import InputError
from lora2serve.exporting import settings_plan
from lora2serve.exporting.settings_plan import PlannedSettings
from lora2serve.parity_check.setting_differences import (
    ABSENT,
    MOST_SHOWN,
    compare_files,
    compare_headers,
    compare_stored,
    fits,
)
from lora2serve.system import scratch
from lora2serve.system.small_files import without_repeated
from lora2serve.weights.chat_template import chat_templates

# What our plan and another tool may say differently of one and the same model: not judged.
BOOKKEEPING = (
    "*.json:transformers_version", "*.json:_name_or_path", "*.json:name_or_path", "*.json:_from_model_config",
    "config.json:dtype", "config.json:torch_dtype", "config.json:use_cache", "config.json:quantization_config*",
    "tokenizer_config.json:tokenizer_class", "tokenizer_config.json:backend", "tokenizer_config.json:is_local",
    "tokenizer_config.json:added_tokens_decoder*", "tokenizer_config.json:extra_special_tokens*",
    "tokenizer_config.json:chat_template", "tokenizer_config.json:processor_class",
    "*.gguf:general.*", "*.gguf:lora2serve.*", "*.gguf:quantize.*", "*.gguf:split.*", "*.gguf:tensors.*",
    "*.gguf:tokenizer.ggml.scores*", "Modelfile:template", "Modelfile:stop", "Modelfile:requires", "Modelfile:license",
)  # fmt: skip
JUDGED = ("*.gguf:general.sampling.*", "*.gguf:general.architecture", "*.gguf:general.type")  # of these, all the same
# Red although only one side has it: what changes the computation, the text, or where an answer ends.
DECISIVE = (
    "config.json:rope_*", "config.json:sliding_window", "config.json:auto_map*", "config.json:*softcap*",
    "generation_config.json:*", "tokenizer.json:*", "*.gguf:*.rope.*", "*.gguf:*softcap*", "*.gguf:*sliding_window*",
    "*.gguf:tokenizer.ggml.add_*_token", "*.gguf:tokenizer.ggml.eo?_token_id", "*.gguf:tokenizer.ggml.tokens*",
    "*.gguf:tokenizer.chat_template*", "*.gguf:general.sampling.*", "Modelfile:*", "chat template:*",
)  # fmt: skip
SAYS_NOTHING = ("null", "false", "0", "1", "[]", "{}")  # as good as absent
COMPARED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
            "Modelfile")  # fmt: skip
TEMPLATES = ("chat_template.jinja", "chat_template.json")  # compared as what they hold, in whichever file


def manifest_of(export: Path, name: str) -> Manifest:
    """What a directory without a manifest is, by its files; InputError where that cannot be seen."""
    if (export / MANIFEST).is_file():
        return Manifest.read(export)
    files = sorted(export.glob("*.gguf"))
    if files:
        header = settings_plan.read_gguf(files[0])
        kind = header.get("general.type")
        if kind is None or kind.value == "model":
            target = "ollama" if (export / "Modelfile").is_file() else "gguf"
            return Manifest(target=target, quant="F16", name=name)
    elif (export / "config.json").is_file():
        return Manifest(target="vllm", name=name)
    raise InputError(
        f"{export}: not an export of lora2serve, and no merged model",
        "expected config.json with weights, or a .gguf file",
    )


def compare(export: Path, planned: PlannedSettings) -> tuple[list[SettingDifference], list[str]]:
    """What is judged, and in words what is not."""
    judged: list[SettingDifference] = []
    aside: dict[str, list[str]] = {}
    for difference in _differences(export, planned):
        own_file = difference.path == "Modelfile:from" and (export / difference.actual.strip("'")).is_file()
        if own_file:
            continue
        if _is_judged(difference):
            judged.append(difference)
        else:
            key = "tensors" if difference.key.startswith("tensors.") else difference.key or "the file"
            aside.setdefault(difference.file, []).append(key)
    present = {path.name for path in export.iterdir() if path.is_file()}
    here = {name for name in present if name in (*COMPARED, *TEMPLATES) or name.endswith((".gguf", ".safetensors"))}
    notes = [f"{name}: {', '.join(dict.fromkeys(keys))}" for name, keys in aside.items()]
    notes += [f"{name}: planned, and not there" for name in planned.files if name not in present | {*TEMPLATES}]
    notes += [f"{name}: not among what is compared" for name in sorted(present - here)]
    return judged, ["the manifest's checksums: made by another tool, it has none", *notes]


def _differences(export: Path, planned: PlannedSettings) -> Iterator[SettingDifference]:
    for name, content in planned.files.items():
        if name in COMPARED and (export / name).is_file():
            yield from compare_stored(name, content, export / name, _comparable)
    if "config.json" in planned.files:
        yield from _templates(export, planned)
    for path, header in zip(sorted(export.glob("*.gguf")), planned.headers.values(), strict=False):
        yield from compare_headers(path.name, header, settings_plan.read_gguf(path))


def _comparable(name: str, content: bytes) -> bytes:
    """Without what follows from another way to say the same: one end token or a list of them."""
    if name not in ("config.json", "generation_config.json"):
        return content
    try:
        value = json.loads(content, object_pairs_hook=without_repeated)
    except (ValueError, RecursionError):
        return content  # whoever compares it says why
    ends = value.get("eos_token_id") if isinstance(value, dict) else None
    ends = ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) for end in ends):
        return content
    return json.dumps({**value, "eos_token_id": sorted(ends)}).encode()


def _templates(export: Path, planned: PlannedSettings) -> Iterator[SettingDifference]:
    """The chat templates, in whichever files they stand."""
    with scratch.temporary_folder("templates") as folder:
        for name in (*TEMPLATES, "tokenizer_config.json"):
            if name in planned.files:
                (Path(folder) / name).write_bytes(planned.files[name])
        try:
            sides = [chat_templates({path.name: path for path in place.iterdir()}) for place in (Path(folder), export)]
        except (ValueError, RecursionError) as error:
            yield SettingDifference("chat template", "", "a file that can be read", str(error)[:MOST_SHOWN])
            return
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        texts = [side.get(name, "") for side in sides]
        for difference in compare_files("chat template", *(text.encode() for text in texts)):
            yield replace(difference, key=f"{name}, {difference.key}" if name != "default" else difference.key)


def _is_judged(difference: SettingDifference) -> bool:
    path = difference.path
    if fits(path, BOOKKEEPING) and not fits(path, JUDGED):
        return False
    if ABSENT not in (difference.planned, difference.actual):
        return True
    value = difference.actual if difference.planned == ABSENT else difference.planned
    return value not in SAYS_NOTHING and fits(path, DECISIVE)
