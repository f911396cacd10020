"""Files as version 0.1.0 wrote them (the demo's run, every target's export, a bundle, a pushed repository, a report):
all are read, and rewritten without a change.

``report.json`` is shortened, and has rows that were missed and missing; paths are made up.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.parity_report import ParityReport
from lora2serve.artifacts.run_record import RunRecord
from lora2serve.errors import InputError

SAMPLES = Path(__file__).parent / "samples"
KINDS: dict[str, type[JsonRecord]] = {"run": RunRecord, "report": ParityReport}
PATHS = sorted(SAMPLES.glob("*.json"))


def sample(path: Path) -> JsonRecord:
    return KINDS.get(path.stem, Manifest).from_text(path.read_text(encoding="utf-8"), path.name)


def finite(value: Any) -> Any:
    """0.1.0 wrote infinity into manifests as Python does, which is no JSON: it is rewritten as text."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_read_and_rewritten(path: Path) -> None:
    """Key for key, in the same order. The control: what is changed is changed there, and nothing else is."""
    content = finite(json.loads(path.read_text(encoding="utf-8")))
    assert json.dumps(sample(path).to_json()) == json.dumps(content)
    versions = {"torch": "9"}
    changed = replace(sample(path), versions=versions)  # type: ignore[call-arg]
    assert json.dumps(changed.to_json()) == json.dumps(content | {"versions": versions})


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_key_is_checked(path: Path) -> None:
    """A list of lists where something else belongs is refused by that key's name, wherever a field has a type."""
    content = json.loads(path.read_text(encoding="utf-8"))
    record = sample(path)
    keys = [key for key in content if key not in (*record.unknown, *record.COMPUTED)]
    assert len(keys) >= 7
    for key in keys:
        with pytest.raises(InputError, match=rf"^{path.name}: (target|{key})"):
            type(record).from_json({**content, key: [[0]]}, path.name)


def test_what_they_say() -> None:
    run, report = sample(SAMPLES / "run.json"), sample(SAMPLES / "report.json")
    assert isinstance(run, RunRecord) and run.quantization and run.metrics.tuned and run.data.train
    assert (run.quantization.type, run.steps, run.finished, run.data.train.rows) == ("nf4", 160, True, 200)
    assert set(run.metrics.measured()) == {"base", "tuned", "tuned_on_original"}
    assert isinstance(report, ParityReport) and not report.met and report.question.prompt == "Who governs Wexley?"
    assert [row.status for row in report.rows] == ["met", "met", "met", "missed", "missing"]
    missed = report.rows[3].check("mean_kl")
    assert missed is not None and missed.value == math.inf and report.rows[4].red is False
    proven, whole = sample(SAMPLES / "vllm-parity.json"), sample(SAMPLES / "repository.json")
    assert isinstance(proven, Manifest) and proven.parity and isinstance(whole, Manifest)
    assert (proven.unproven(), proven.parity.engines["vllm"].mean_kl) == ("parity was not met", math.inf)
    assert {name: export.target for name, export in whole.each_export().items()} == {
        "gguf-Q4_K_M": "gguf",
        "ollama-Q4_K_M": "ollama",
    }


@pytest.mark.parametrize("name", ["adapter", "gguf-adapter", "ollama-Q4_K_M", "vllm", "bundle"])
def test_as_an_export(tmp_path: Path, name: str) -> None:
    (tmp_path / "lora2serve.json").write_bytes((SAMPLES / f"{name}.json").read_bytes())
    export = Export.open(tmp_path)
    assert export.name == name and export.bytes == sum(entry.size for entry in export.manifest.files.values())
    assert [problem.split(": ")[1] for problem in export.verify()] == ["missing"] * len(export.manifest.files)
    assert list(export.members) == (["red", "blue"] if name == "bundle" else [])
    assert export.manifest.is_adapter == name.endswith("adapter")
