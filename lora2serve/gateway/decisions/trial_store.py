"""States of trials in a folder, one file each, each whole or as it was before."""

from __future__ import annotations

from pathlib import Path

from lora2serve.artifacts.json_record import read_text
from lora2serve.gateway.decisions.trial import TrialRecord
from lora2serve.system.small_files import write_text


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
        write_text(self._path(key), record.to_text(indent=None), durable=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"
