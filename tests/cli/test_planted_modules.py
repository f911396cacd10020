"""A module that lies in a folder that a command is given, or started in, does not run: such a folder may be a download."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from lora2serve.exporting import bundle
from lora2serve.serving import server
from lora2serve.serving.server import ServeOptions
from lora2serve.system import scratch
from tests.support.manifests import write_export
from tests.support.runs import make_chat_model
from tests.support.tiny import make_adapter, make_model

ROOT = Path(__file__).parents[2]
NAMES = ("numpy", "torch", "json", "vllm", "llama_cpp", "sitecustomize", "yaml", "rich", "typing", "click", "pip")
PLANT = "import os; open(os.environ['PLANTED'], 'a').write(__file__ + '\\n')\nraise SystemExit('a planted module')\n"


def plant(*folders: Path) -> None:
    for folder in folders:
        for name in NAMES:
            (folder / f"{name}.py").write_text(PLANT)


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a planted module leaves its name; none may."""
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    yield tmp_path / "planted"


def ran(trace: Path) -> list[str]:
    lines = trace.read_text().splitlines() if trace.exists() else []
    trace.unlink(missing_ok=True)
    return [Path(line).name for line in lines]


def run(words: Sequence[str | Path], folder: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lora2serve", *map(str, words)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def test_the_control(tmp_path: Path, trace: Path) -> None:
    """Python itself takes them: from the current folder, and for a program, from the folder that it lies in."""
    plant(tmp_path)
    subprocess.run([sys.executable, "-c", "import json"], cwd=tmp_path, capture_output=True, check=False)
    assert ran(trace) == ["json.py"]
    subprocess.run([sys.executable, "-m", "click"], cwd=tmp_path, capture_output=True, check=False)
    assert ran(trace) == ["click.py"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["doctor"], 0),
        *(pytest.param([word], 0, marks=pytest.mark.engine) for word in ("--help", "init")),
        pytest.param(["inspect", "."], 1, marks=pytest.mark.engine),
    ],
)
def test_light_commands(tmp_path: Path, trace: Path, words: Sequence[str], code: int) -> None:
    plant(tmp_path)
    run(words, tmp_path, code)
    assert ran(trace) == []


@pytest.mark.engine
def test_a_model_an_adapter_and_their_exports(tmp_path: Path, trace: Path) -> None:
    """Each command started in a folder that it is given, all of them planted."""
    base = make_model(tmp_path / "base", vocab_size=1536)
    adapter = make_adapter(tmp_path / "adapter", base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes((ROOT / "recipes" / "demo" / "base" / name).read_bytes())
    out = tmp_path / "out"
    out.mkdir()
    plant(tmp_path, base, adapter, out)
    run(["export", ".", "-t", "vllm", "-t", "adapter", "-t", "gguf", "-q", "Q8_0", "-o", out], adapter)
    exports = [out / name for name in ("vllm", "adapter", "gguf-Q8_0")]
    assert not any(path.name == "numpy.py" for export in exports for path in export.iterdir()), "nor are they copied"
    plant(*exports)
    for export in exports:
        run(["inspect", "."], export, 1)  # they are not in its manifest
    line = run(["serve", ".", "--dry-run"], exports[0]).strip()
    words = [word for word in shlex.split(line) if "=" not in word or word.startswith("-")]
    assert "-P" in words and str(exports[0]) in words
    assert ran(trace) == []


@pytest.mark.engine
@pytest.mark.slow
def test_parity(tmp_path: Path, trace: Path) -> None:
    """With its engines and their workers, started in every folder that it is given."""
    base, out = make_chat_model(tmp_path / "base"), tmp_path / "out"
    run(["export", base, "-t", "vllm", "-t", "gguf", "-q", "F16", "-o", out], tmp_path)
    exports = (out / "vllm", out / "gguf-F16")
    plant(tmp_path, base, out)
    words = ["parity", base, *exports, "--engine", "transformers,llama.cpp", "--report", tmp_path / "report"]
    run(words, out)
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert [row["engine"] for row in rows] == ["transformers", "llama.cpp"], "both were asked"
    plant(*exports)
    words = ["parity", base, ".", exports[1], "--engine", "transformers,llama.cpp", "--report", tmp_path / "again"]
    done = subprocess.run(
        [sys.executable, "-m", "lora2serve", *map(str, words)], cwd=exports[0], capture_output=True, check=False
    )
    assert done.returncode in (0, 1, 3), done.stderr
    assert ran(trace) == []


@pytest.mark.parametrize("target", ["vllm", *(pytest.param(t, marks=pytest.mark.engine) for t in ("gguf", "bundle"))])
def test_an_engine(target: str, tmp_path: Path, trace: Path) -> None:
    """The engine's command as it is, with the program in place of the engine that shows what would be imported."""
    export = write_export(tmp_path / "export", target)
    plant(tmp_path, export)
    command = server.plan([export], ServeOptions())
    assert command.folder is None and command.command[:2] == (sys.executable, "-P")
    words = [sys.executable, "-P", "-c", "import sys, subprocess, json\n"
             "subprocess.run([sys.executable, '-c', 'import json, click'], check=True)"]  # fmt: skip
    for folder in (export, scratch.empty_folder()):
        subprocess.run(words, env={**os.environ, **command.environment}, cwd=folder, check=True)
    assert ran(trace) == []
    control = [word for word in words if word != "-P"]
    without = {name: value for name, value in os.environ.items() if name not in command.environment}
    subprocess.run(control, env=without, cwd=export, capture_output=True, check=False)
    assert ran(trace) == ["json.py"], "the control"


def settings(export: Path) -> Mapping[str, object]:
    import yaml

    content: Mapping[str, object] = yaml.safe_load((export / bundle.CONFIG).read_text())
    return content


def test_a_bundle_has_absolute_paths(tmp_path: Path) -> None:
    export = write_export(tmp_path / "export", "bundle")
    command = server.plan([export], ServeOptions())
    modules = [json.loads(word) for word in command.command if word.startswith("{")]
    assert {Path(module["path"]) for module in modules} == {export / "adapters" / "a", export / "adapters" / "b"}
    assert len(settings(export)["lora-modules"]) == 2  # type: ignore[arg-type]
