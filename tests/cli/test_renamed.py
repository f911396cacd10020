"""What was renamed works for one release more, with a note on stderr; nothing goes to stdout but the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora2serve.cli import run
from tests.support.tiny import make_adapter, make_model

NOTE = "note: {} is now {}; the old name works until the next release"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("renamed")
    adapter = make_adapter(root / "mayor", make_model(root / "base"))
    words = ["export", str(adapter), "-t", "vllm", "-t", "adapter", "-o", str(root / "out"), "--quiet"]
    assert run(words) == 0
    return root / "out"


def test_print(exports: Path, capfd: pytest.CaptureFixture[str]) -> None:
    merged = str(exports / "vllm")
    for old, new in (
        (["serve", "--print", merged, "--port", "9000"], ["serve", merged, "--port", "9000", "--dry-run"]),
        (["serve", merged, "--print", "command"], ["serve", merged, "--dry-run"]),
        (["serve", "--print", "compose", merged, "--", "--dtype", "float32"],
         ["deploy", "compose", merged, "--", "--dtype", "float32"]),
    ):  # fmt: skip
        assert run(old) == 0
        before = capfd.readouterr()
        assert run(new) == 0
        after = capfd.readouterr()
        assert before.out == after.out and after.out
        assert "is now" in before.err and "is now" not in after.err


def test_add_and_remove(exports: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lora2serve.serving import runtime_lora

    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(runtime_lora, "add", lambda *words: calls.append(words) or exports)
    monkeypatch.setattr(runtime_lora, "remove", lambda *words: calls.append(words))
    url = "http://127.0.0.1:9"
    assert run(["serve", "--add", f"mayor={exports / 'adapter'}", "--url", url]) == 0
    assert NOTE.format("serve --add", "adapters add") in capfd.readouterr().err
    assert run(["serve", "--remove", "mayor", "--url", url]) == 0
    assert NOTE.format("serve --remove", "adapters remove") in capfd.readouterr().err
    assert run(["adapters", "add", f"mayor={exports / 'adapter'}", "--url", url]) == 0
    assert run(["adapters", "remove", "mayor", "--url", url]) == 0
    assert calls == [(url, "mayor", exports / "adapter"), (url, "mayor")] * 2
    assert "is now" not in capfd.readouterr().err


def test_pull_check(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lora2serve import hub
    from lora2serve.hub import VerifiedRepo

    checked = VerifiedRepo("you/demo", "0" * 40, Path("here"), 1, 2, ["vllm"], {}, [])
    monkeypatch.setattr(hub, "pull_check", lambda name, progress: checked)
    for command in ("pull-check", "verify"):
        assert run([command, "you/demo", "--json"]) == 0
        out, err = capfd.readouterr()
        assert json.loads(out)["repo_id"] == "you/demo"
        assert (NOTE.format("pull-check", "verify") in err) == (command == "pull-check")


def test_plan_stays_without_a_note(exports: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = []
    for word in ("--plan", "--dry-run"):
        assert run(["export", str(exports.parent / "mayor"), "-t", "vllm", "-o", "o", word, "--json"]) == 0
        out, err = capfd.readouterr()
        plan = json.loads(out)
        shown.append({key: value for key, value in plan.items() if key != "free"})
        assert "is now" not in err
    assert shown[0] == shown[1]


def test_former_names_are_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    for command in ((), ("serve",), ("export",)):
        assert run([*command, "--help"]) == 0
    out = capfd.readouterr().out
    assert not [name for name in ("pull-check", "--print", "--add", "--remove", "--store", "--match") if name in out]


def test_verify_here(exports: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a path: its files, and its proof."""
    merged = str(exports / "vllm")
    assert run(["verify", merged]) == 3
    assert "vllm: parity was not run" in capfd.readouterr().err
    assert run(["verify", merged, "--allow-unproven"]) == 0
    assert capfd.readouterr().out.strip() == merged
    file = exports / "adapter" / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert run(["verify", str(exports / "adapter"), "--allow-unproven"]) == 1
    assert "content changed since the export" in capfd.readouterr().err
    file.write_bytes(data)
    assert run(["verify", str(exports)]) == 2


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.shell_completion import ShellComplete

    from lora2serve.cli import cli

    monkeypatch.chdir(tmp_path)
    record = tmp_path / "runs" / "demo" / "exports" / "vllm" / "lora2serve.json"
    record.parent.mkdir(parents=True)
    record.touch()
    (tmp_path / "runs" / "demo" / "run.json").touch()
    shell = ShellComplete(cli, {}, "lora2serve", "_LORA2SERVE_COMPLETE")

    def complete(*words: str) -> list[str]:
        return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]

    assert complete("export", "-t", "g") == ["gguf", "gguf-adapter"]
    assert complete("export", "-t", "o") == ["ollama"]
    assert complete("export", "-t", "vllm", "-q", "w") == ["w8a16", "w4a16"]
    assert complete("export", "-t", "gguf", "-q", "q8") == ["Q8_0"]
    assert complete("parity", "--engine", "vllm,ll") == ["vllm,llama.cpp"]
    assert complete("deploy", "k") == ["k8s", "kserve"]
    assert complete("export", "runs/") == ["runs/demo", "runs/"]
    assert complete("serve", "runs/d") == ["runs/demo/exports/vllm", "runs/d"]
