"""What ``export`` and ``serve`` refuse, and what they say, without training and without an engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora2serve.artifacts.manifest import FileEntry, Manifest
from lora2serve.cli import run
from lora2serve.errors import UsageError
from lora2serve.serving import server
from lora2serve.serving.server import ServeOptions
from tests.support.tiny import make_adapter, make_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("refusals") / "base")


def test_existing_export_is_refused_before_the_model_is_opened(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(base), "-t", "vllm", "-o", str(tmp_path)]
    assert run(words) == 0
    monkeypatch.setattr("lora2serve.exporting.open_model.open_plain", lambda *_: pytest.fail("opened"))
    for more in ([], ["--dry-run"]):
        assert run([*words, *more]) == 1
        assert "vllm: already exists" in capfd.readouterr().err
    with pytest.raises(pytest.fail.Exception, match="opened"):
        run([*words, "--overwrite"])


def test_dry_run_refuses_a_folder_that_cannot_be_made(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for folder in (Path("/proc/exports"), tmp_path / "file" / "exports"):
        assert run(["export", str(base), "-t", "vllm", "-o", str(folder), "--dry-run"]) == 1
        assert f"cannot be made in {folder.parent}" in capfd.readouterr().err
    assert run(["export", str(base), "-t", "vllm", "-o", str(tmp_path / "exports"), "--dry-run"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("target", "quant", "message"),
    [
        ("vllm", "Q4_K_M", "--quant Q4_K_M: unknown for --target vllm, a type of --target gguf or ollama or lmstudio"),
        ("gguf", "fp8", "--quant fp8: unknown for --target gguf, a type of --target vllm"),
    ],
)
def test_type_of_another_target(
    base: Path, target: str, quant: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(base), "-t", target, "-q", quant]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert "known types" not in err
    assert run(["export", str(base), "-t", target, "-q", "nothing"]) == 2
    assert "known types" in capfd.readouterr().err


def test_known_targets_are_those_that_users_name(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(base), "-t", "nothing"]) == 2
    err = capfd.readouterr().err
    assert "known targets: vllm, gguf, ollama, lmstudio, adapter, gguf-adapter" in err
    assert "ollama-adapter" not in err


def test_gguf_adapter_is_served_by_nothing_here(tmp_path: Path) -> None:
    Manifest(target="gguf-adapter", name="demo", files={"demo-lora.gguf": FileEntry("0" * 64, 0)}).write(tmp_path)
    (tmp_path / "demo-lora.gguf").touch()
    for engine in (None, "llama.cpp"):
        with pytest.raises(UsageError, match="nothing here serves by itself") as raised:
            server.plan([tmp_path], ServeOptions(engine))
        assert f"llama-server -m BASE --lora {tmp_path / 'demo-lora.gguf'}" in raised.value.hint


def test_serve_prints_absolute_paths(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: name)
    adapter = make_adapter(tmp_path / "exports" / "adapter", base)
    for target in ("vllm", "gguf", "adapter"):
        folder = adapter.with_name(target)
        folder.mkdir(exist_ok=True)
        Manifest(target=target, name="demo", rank=4, files={"demo.gguf": FileEntry("0" * 64, 0)}).write(folder)
        (folder / "demo.gguf").touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    for target, options in {"vllm": {}, "gguf": {}, "adapter": {"base": "base"}}.items():
        command = server.plan([Path("exports") / target], ServeOptions(**options)).command
        model = Path(command[command.index("--model") + 1])
        assert model.is_absolute(), command
        assert model.exists()
        if target == "adapter":
            assert Path(json.loads(command[-1])["path"]) == adapter
