"""What an export does once its files are complete: into a running Ollama, into LM Studio's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora2serve.api.export_request import OLLAMA_TARGETS, ExportRequest
from lora2serve.artifacts.export_dir import Export
from lora2serve.errors import UsageError
from lora2serve.progress import Progress


def refuse(request: ExportRequest, targets: Sequence[str]) -> None:
    """UsageError for a ``create`` that cannot be done, before the work; ``targets`` has one name for each export."""
    if not request.create:
        return
    from lora2serve.serving import ollama

    count = sum(target in OLLAMA_TARGETS for target in targets)
    if not count:
        raise UsageError("--create: only for --target ollama")
    if count > 1 and ":" in request.create:
        raise UsageError(
            f"--create {request.create} with {count} Ollama exports: expected a name without a tag",
            "each gets its type as tag, such as my-model:Q8_0",
        )
    ollama.refuse_name(request.create)
    ollama.server_address()


def hand_over(exports: Sequence[Export], request: ExportRequest, progress: Progress) -> None:
    """Install and create what was requested. The exports stay, whatever happens here."""
    from lora2serve.serving import lmstudio_app

    if request.install:
        for export in (export for export in exports if export.target == "lmstudio"):
            folder = lmstudio_app.models_folder()
            for file in lmstudio_app.install(export.path, folder, progress, overwrite=request.overwrite):
                progress.note(f"LM Studio has it: {file}")
    if request.create:
        models = [export for export in exports if export.target in OLLAMA_TARGETS]
        for export in models:
            tag = f":{export.quant or 'adapter'}" if len(models) > 1 else ""
            _create(export.path, f"{request.create}{tag}", progress)


def _create(export: Path, name: str, progress: Progress) -> None:
    from lora2serve.serving import ollama

    client = ollama.OllamaClient()
    try:
        client.version()
    except ollama.NoServer as error:
        progress.warn(f"{error.message}: {name} was not created. The export is kept; with Ollama running:")
        progress.note(f"  {ollama.command(export, name)}")
        return
    ollama.create(client, export, name, progress)
    progress.note(f"created {name} at {client.address}")
    progress.note(f"  {ollama.QUESTION}\n  > {ollama.ask(client, name)}")
    progress.note(f"  ollama run {name}")
