"""Parity without a run: an adapter's directory, a plain model, an export whose manifest knows both; and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora2serve.artifacts.run import Run
from lora2serve.cli import run as command
from tests.conftest import lora2serve


@pytest.fixture(scope="module")
def place(demo_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's adapter as somebody got it from somewhere, its export as a GGUF adapter, and one of its base."""
    root = tmp_path_factory.mktemp("origins")
    shutil.copytree(demo_run.adapter, root / "towns")
    base = demo_run.record.base.path
    lora2serve("export", "towns", "--base", base, "-t", "gguf-adapter", "-t", "adapter", cwd=root)
    lora2serve("export", base, "-t", "vllm", "--name", "plain", cwd=root)
    return root


def report(root: Path, *words: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(lora2serve("parity", *words, "--json", cwd=root))
    return found


def test_an_export_alone(place: Path) -> None:
    """Its manifest names adapter and base; the adapter as GGUF goes with the base as GGUF."""
    told = report(place, "exports/towns/gguf-adapter", "exports/towns/adapter", "--engine", "llama.cpp,peft")
    assert told["run"] == "towns"
    assert told["data"]["positions"] >= 2000  # type: ignore[index]
    rows = {(row["export"], row["engine"]): row for row in told["rows"]}  # type: ignore[attr-defined]
    assert set(rows) == {("gguf-adapter", "llama.cpp"), ("adapter", "peft")}
    for row in rows.values():
        assert [gate["status"] for gate in row["gates"]] == ["met", "met", "met", "met"]
        figures = {check["name"]: check["value"] for check in row["gates"][-1]["checks"]}
        assert figures["mean_kl"] < 2e-4, "llama.cpp's own noise, on text that the demo was not made for"
        assert figures["retention"] < 1e-3, "the control: without the adapter it is 1"
    assert (place / "exports" / "towns" / "parity" / "report.html").is_file()


def test_a_plain_model(place: Path) -> None:
    """The model itself is the reference; there is no signal to keep."""
    base = next((place / "exports").glob("*/vllm")).parent
    told = report(place, f"exports/{base.name}/vllm", "--engine", "transformers")
    (row,) = told["rows"]  # type: ignore[misc]
    assert row["status"] == "met"
    figures = {check["name"]: check["value"] for check in row["gates"][-1]["checks"]}
    assert figures["mean_kl"] < 1e-9
    assert "retention" not in figures


def test_refusals(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    others = tmp_path / "others"
    shutil.copytree(place / "towns", others)
    config = json.loads((others / "adapter_config.json").read_text())
    (others / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 35.2}))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "lora2serve.json").write_text(
        json.dumps({"format": 1, "target": "bundle", "bundle": ["a", "b"], "files": {}})
    )
    gone = tmp_path / "gone"
    shutil.copytree("exports/towns/gguf-adapter", gone)
    manifest = json.loads((gone / "lora2serve.json").read_text())
    manifest["adapters"][0]["path"] = str(tmp_path / "moved")
    manifest["adapter"] = manifest["adapters"][0]
    (gone / "lora2serve.json").write_text(json.dumps(manifest))
    for words, code, said in (
        ([str(others), "exports/towns/gguf-adapter"], 1, "made from another adapter than"),
        ([str(bundle)], 2, f"lora2serve parity {bundle}/adapters/a"),
        ([str(gone)], 1, "the adapter it was made from is missing"),
        ([str(tmp_path)], 2, "not a run, export, adapter or model"),
        (["exports/towns/adapter", *map(str, Path("exports").glob("*/vllm"))], 2, "were made from different models"),
    ):
        base = ["--base", json.loads((others / "adapter_config.json").read_text())["base_model_name_or_path"]]
        assert command(["parity", *words, *base]) == code, words
        assert said in capfd.readouterr().err
