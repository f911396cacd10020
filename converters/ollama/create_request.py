"""From an export's Modelfile to the body of ``POST /api/create``, as ``ollama create`` makes it (parser/parser.go)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters.ollama.modelfile import ParameterValue
from converters.ollama.modelfile_parser import DEPRECATED, PARAMETERS, ModelfileError, parse
from lora2serve.artifacts.manifest import Manifest
from lora2serve.errors import InputError
from lora2serve.system.small_files import digest

ELSEWHERE = {"from", "adapter", "license", "message", *PARAMETERS, *DEPRECATED}  # commands with a form of their own


def request(export: Path) -> tuple[dict[str, object], dict[str, Path]]:
    """The body without the model's name, and the files that it needs: ``sha256:<hex>`` -> path."""
    modelfile = export / "Modelfile"
    try:
        commands = parse(modelfile.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{export}: not an Ollama export (no Modelfile)", "`lora2serve export --target ollama`"
        ) from None
    except ModelfileError as error:
        raise InputError(f"{modelfile}: {' '.join(str(error).split())}", "export again") from None
    known = Manifest.read(export).files
    files: dict[str, Path] = {}

    def blob(path: Path) -> dict[str, str]:
        name, inside = path.name, path.relative_to(export).as_posix() if path.is_relative_to(export) else ""
        sha256 = known[inside].sha256 if inside in known else digest(path)["sha256"]
        files[f"sha256:{sha256}"] = path
        return {name: f"sha256:{sha256}"}

    body: dict[str, object] = {name: value for name, value in commands if name not in ELSEWHERE}
    for name, value in commands:
        path = export / Path(value).expanduser() if name in ("from", "adapter") else None
        if name == "from" and path is not None:
            shards = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if path.is_file() else []
            named = {key: sha256 for shard in shards for key, sha256 in blob(shard).items()}
            body |= {"files": named} if named else {"from": value}
        elif path is not None:
            if not path.is_file():
                raise InputError(f"{path}: named in {modelfile}, but missing", "export again")
            body["adapters"] = blob(path)
    lists = {
        "license": [value for name, value in commands if name == "license"],
        "messages": [_message(value) for name, value in commands if name == "message"],
        "parameters": _parameters(commands),
    }
    return body | {name: value for name, value in lists.items() if value}, files


def _message(value: str) -> dict[str, str]:
    role, _, content = value.partition(": ")
    return {"role": role, "content": content}


def _parameters(commands: Sequence[tuple[str, str]]) -> dict[str, ParameterValue | list[str]]:
    parameters: dict[str, ParameterValue | list[str]] = {}
    for name, value in commands:
        kind = PARAMETERS.get(name)
        if kind is not None:
            parameters[name] = value == "true" if kind is bool else kind(value)
        elif name in PARAMETERS:  # a line for each
            parameters[name] = [text for other, text in commands if other == name]
    return parameters
