"""Exports of small models, damaged beside their weights and signed again, as a faulty exporter would."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lora2serve
from lora2serve.artifacts.manifest import NAME, FileEntry, Manifest
from lora2serve.parity_check.settings_gate import SettingsComparator, SettingsResult
from lora2serve.parity_check.trained_model import of_parts
from lora2serve.system.small_files import digest

Damage = Callable[[Path], None]


def exported(source: Path, out: Path, target: str, base: Path | None = None, **options: Any) -> Path:
    """One export by the public API."""
    (export,) = lora2serve.export(source, targets=target, out=out, base=base, **options)
    return export.path


def checked(export: Path, base: Path, *adapters: Path, allow: tuple[str, ...] = ()) -> SettingsResult:
    """The gate's verdict, planned again from base and adapters."""
    return SettingsComparator(of_parts("tiny", base, adapters, export.parent / "parity").json(), allow).check(export)


def signed_again(export: Path) -> Path:
    """The manifest names the files as they are now."""
    paths = [path for path in sorted(export.rglob("*")) if path.is_file() and path.name != NAME]
    files = {p.relative_to(export).as_posix(): FileEntry.from_json(digest(p), p.name) for p in paths}
    replace(Manifest.read(export), files=files).write(export)
    return export


def damaged(export: Path, out: Path, damage: Damage) -> Path:
    """A copy with the damage, signed again; weights are links to the same file until they are changed."""
    shutil.copytree(export, out, copy_function=os.link)
    damage(out)
    return signed_again(out)


def both(*damages: Callable[[Path], object]) -> Damage:
    """One after another."""

    def damage(export: Path) -> None:
        for each in damages:
            each(export)

    return damage


def rewritten(path: Path, content: str | bytes) -> None:
    """New content for a file that may be a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def text(name: str, old: str, new: str) -> Damage:
    """Other words in a text file."""

    def damage(export: Path) -> None:
        content = (export / name).read_text(encoding="utf-8")
        assert old in content, content
        rewritten(export / name, content.replace(old, new, 1))

    return damage


def in_json(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """A change of a JSON file's object."""

    def damage(export: Path) -> None:
        content = json.loads((export / name).read_text(encoding="utf-8"))
        change(content)
        rewritten(export / name, json.dumps(content, ensure_ascii=False, indent=1))

    return damage


def keys(name: str, **values: Any) -> Damage:
    """Other values of a JSON file's keys."""
    return in_json(name, lambda content: content.update(values))


def in_manifest(**values: Any) -> Damage:
    """Other words in the manifest."""

    def damage(export: Path) -> None:
        content = {**Manifest.read(export).to_json(), **values}
        rewritten(export / NAME, json.dumps(content))

    return damage


def gguf(values: dict[str, Any], lost: tuple[str, ...] = ()) -> Damage:
    """Other keys in the GGUF, by gguf's own reader and writer; a function changes the value that is there."""

    def damage(export: Path) -> None:
        from gguf import GGUFValueType, GGUFWriter

        path = next(export.rglob("*.gguf"))
        fields, tensors = _read_gguf(path)
        new = path.with_suffix(".new")
        writer = GGUFWriter(new, "")
        writer.kv_data[0].clear()
        names = [key for key in fields if key not in lost]
        for key in [*names, *(key for key in values if key not in names)]:
            value, kind, inner = fields.get(key, (None, None, None))
            if key in values:
                value = values[key](value) if callable(values[key]) else values[key]
            writer.add_key_value(key, value, GGUFValueType.get_type(value) if kind is None else kind, inner)
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(new, path)

    return damage


_read: dict[tuple[int, int], tuple[dict[str, Any], list[Any]]] = {}  # by the file, which stays mapped


def _read_gguf(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Value, type and type of entries by key, and the tensors; once for all links to a file."""
    from gguf import GGUFReader, GGUFValueType

    state = path.stat()
    key = (state.st_ino, state.st_mtime_ns)
    if key not in _read:
        reader = GGUFReader(path)
        fields = {
            name: (field.contents(), field.types[0], field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None)
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        _read[key] = fields, reader.tensors
    return _read[key]
