"""What ``export`` does once the exports are whole: into a running Ollama, into LM Studio's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora2serve.errors import UsageError

if TYPE_CHECKING:
    from lora2serve.progress import Progress

OLLAMA = ("ollama", "ollama-adapter")


def targets(options: Mapping[str, Any]) -> list[str]:
    """The targets asked for: with ``--as adapter``, Ollama's is the adapter's."""
    asked = list(dict.fromkeys(options["targets"]))
    if options["as_kind"] and "ollama" not in asked:
        raise UsageError(f"--as {options['as_kind']}: only for --target ollama")
    if options["as_kind"] == "adapter":
        asked = ["ollama-adapter" if name == "ollama" else name for name in asked]
    if options["from_model"] and "ollama-adapter" not in asked:
        raise UsageError("--from: only for --target ollama --as adapter", "--base names the model to fold onto")
    return asked


def refuse(options: Mapping[str, Any], planned: Sequence[tuple[str, Any]]) -> None:
    """UsageError for a ``--create`` that cannot be, before the work."""
    if not options["create"]:
        return
    from lora2serve.serving import ollama

    count = sum(target in OLLAMA for target, _ in planned)
    if not count:
        raise UsageError("--create: only for --target ollama")
    if count > 1 and ":" in options["create"]:
        raise UsageError(
            f"--create {options['create']} with {count} Ollama exports: expected a name without a tag",
            "each gets its type as tag, such as my-model:Q8_0",
        )
    ollama.refuse_name(options["create"])
    ollama.server_address()


def creates(about: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether that export goes to the server, so that nobody need be told how to get it there."""
    return bool(options["create"]) and about["target"] in OLLAMA


def install_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``--install``, for the LM Studio target."""
    if not options["install"]:
        return {}
    from lora2serve.serving import lmstudio_app

    return {"install": lmstudio_app.models_folder(), "replace": bool(options["overwrite"])}


def hand_over(written: Sequence[Path], options: Mapping[str, Any], told: Progress) -> None:
    """Create and install what was asked for. The exports stay, whatever happens here."""
    from lora2serve.artifacts import manifest
    from lora2serve.serving import lmstudio_app

    about = {path: manifest.read(path) for path in written}
    if options["install"]:
        for path in (path for path, said in about.items() if said["target"] == "lmstudio"):
            for made in lmstudio_app.install(path, lmstudio_app.models_folder(), told, overwrite=options["overwrite"]):
                told.note(f"LM Studio has it: {made}")
    if options["create"]:
        exports = {path: said for path, said in about.items() if said["target"] in OLLAMA}
        several = len(exports) > 1
        for path, said in exports.items():
            tag = f":{said.get('quant') or 'adapter'}" if several else ""
            _create(path, f"{options['create']}{tag}", told)


def _create(export: Path, name: str, told: Progress) -> None:
    from lora2serve.serving import ollama

    client = ollama.Client()
    try:
        client.version()
    except ollama.NoServer as error:
        told.warn(f"{error.message}: {name} was not created. The export is kept; with Ollama running:")
        told.note(f"  {ollama.command(export, name)}")
        return
    ollama.create(client, export, name, told)
    told.note(f"created {name} at {client.address}")
    told.note(f"  {ollama.QUESTION}\n  > {ollama.ask(client, name)}")
    told.note(f"  ollama run {name}")
