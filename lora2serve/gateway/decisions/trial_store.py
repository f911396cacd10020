"""States of trials in a folder, one file each, each whole or as it was before."""

from __future__ import annotations

import os
from pathlib import Path

from lora2serve.artifacts.json_record import read_text
from lora2serve.gateway.decisions.trial import TrialRecord
from lora2serve.system.small_files import sync_to_disk


class TrialStore:
    """The folder is made with the first state. Of several gateways that share it, each writes the whole evidence."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> TrialRecord | None:
        """The state of the last trial of that key; None where there was none, InputError for a damaged file."""
        path = self._path(key)
        return TrialRecord.from_text(read_text(path), str(path)) if path.is_file() else None

    def write(self, key: str, record: TrialRecord) -> None:
        """Write it, so that a crash leaves this state or the one before. OSError where the disk refuses."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
        temporary.write_text(record.to_text(indent=0), encoding="utf-8")
        sync_to_disk(temporary)
        os.replace(temporary, path)
        sync_to_disk(self.folder)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"
