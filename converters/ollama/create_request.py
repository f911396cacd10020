"""From an export's Modelfile to the body of ``POST /api/create``, as ``ollama create`` makes it (parser/parser.go)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.ollama.modelfile_parser import DEPRECATED, PARAMETERS, ModelfileError, parse
from lora2serve.artifacts import manifest
from lora2serve.errors import InputError
from lora2serve.system.small_files import digest


def request(export: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """The body without the model's name, and the files that it needs: ``sha256:<hex>`` -> path."""
    modelfile = export / "Modelfile"
    try:
        commands = parse(modelfile.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{export}: no Modelfile, so no Ollama export", "`lora2serve export --target ollama`"
        ) from None
    except ModelfileError as error:
        raise InputError(f"{modelfile}: {' '.join(str(error).split())}", "export again") from None
    known: dict[str, Any] = manifest.read(export)["files"]
    body: dict[str, Any] = {}
    files: dict[str, Path] = {}

    def blob(path: Path) -> dict[str, str]:
        name = path.name
        sha256 = known[name]["sha256"] if path.parent == export and name in known else digest(path)["sha256"]
        files[f"sha256:{sha256}"] = path
        return {name: f"sha256:{sha256}"}

    for name, value in commands:
        path = export / Path(value).expanduser() if name in ("from", "adapter") else None
        if name == "from" and path is not None:
            body |= {"files": blob(path)} if path.is_file() else {"from": value}
        elif name == "adapter" and path is not None:
            if not path.is_file():
                raise InputError(f"{path}: named in {modelfile}, and not there", "export again")
            body["adapters"] = blob(path)
        else:
            _add(body, name, value)
    return body, files


def _add(body: dict[str, Any], name: str, value: str) -> None:
    if name == "license":
        body.setdefault("license", []).append(value)
    elif name == "message":
        role, _, content = value.partition(": ")
        body.setdefault("messages", []).append({"role": role, "content": content})
    elif name in PARAMETERS:
        kind = PARAMETERS[name]
        parameters = body.setdefault("parameters", {})
        if kind is None:
            parameters.setdefault(name, []).append(value)
        else:
            parameters[name] = value == "true" if kind is bool else kind(value)
    elif name not in DEPRECATED:
        body[name] = value
