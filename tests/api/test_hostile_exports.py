"""Exports from elsewhere: whatever a file is, each command answers with one line, at once; none hangs, none is surprised."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import pytest

from lora2serve.artifacts.lineage import BaseRecord
from lora2serve.cli import run as command
from lora2serve.errors import UsageError
from lora2serve.parity_check import comparator
from tests.support.manifests import write_export

SECONDS = 60
WRONG = {
    "architectures": 5, "quantization_config": [1], "r": "x", "rank_pattern": [1], "target_modules": 7,
    "base_model_name_or_path": ["a"], "model_type": 3, "hidden_size": -5, "peft_type": 9, "torch_dtype": {},
}  # fmt: skip
TEXTS = {
    "empty": "",
    "a list": "[]",
    "null": "null",
    "deep": '{"a":' + "[" * 20_000,
    "no numbers": '{"architectures": NaN, "quantization_config": NaN, "r": NaN, "lora_alpha": Infinity, "files": NaN}',
    "other types": json.dumps(WRONG),
    "negative": '{"architectures": [-1], "quantization_config": {"quant_method": [1]}, "r": -4, "peft_type": "LORA"}',
    "a long number": '{"r": ' + "9" * 5000 + ', "format": ' + "9" * 5000 + "}",
    "half a character": '{"architectures": ["\\ud800"], "peft_type": "\\ud800", "base_model_name_or_path": "\\ud800"}',
}


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


CHANGES: dict[str, Callable[[Path], object]] = {
    **{kind: lambda path, text=text: path.write_text(text) for kind, text in TEXTS.items()},  # type: ignore[misc]
    "no text": lambda path: path.write_bytes(b"\xff\xfe\0\1"),
    "3 GB": lambda path: os.truncate(path, 3 << 30),
    "a header beyond its end": lambda path: path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
    "a directory": replaced(Path.mkdir),
    "a pipe": replaced(os.mkfifo),
    "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
    "a device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "nothing": Path.unlink,
}
COMMANDS = (
    ("inspect",), ("verify",), ("serve", "--dry-run"), ("deploy", "compose"), ("parity",),
    ("push", "--repo-id", "a/b", "--dry-run"),
)  # fmt: skip
FILES = {
    "vllm": ("lora2serve.json", "serve.yaml", "config.json"),
    "adapter": ("lora2serve.json", "adapter_config.json", "adapter_model.safetensors"),
    "gguf": ("lora2serve.json", "model.gguf"),
    "bundle": ("lora2serve.json", "serve.yaml"),
}


FEW = {  # what the light suite has of them: the rest is read as config.json, and as the manifest
    "adapter_config.json": ("deep", "no numbers", "other types", "negative", "half a character", "no text", "a pipe", "nothing"),
    "serve.yaml": ("empty", "a list", "deep", "other types", "a long number", "no text", "a pipe", "a directory", "nothing"),
}  # fmt: skip


def weekly(target: str, file: str, kind: str) -> bool:
    """Manifests are all read by the same code, a bundle's settings as a model's, and no JSON is a header of weights."""
    other = file == "lora2serve.json" and target != "vllm"
    same = target == "bundle" and kind not in ("deep", "other types", "a pipe")
    alike = kind in ("null", "a link to itself") and file != "lora2serve.json"  # as a list, and as a device
    few = file in FEW and kind not in FEW[file]
    return (
        other
        or same
        or alike
        or few
        or (file.startswith(("model.", "adapter_model.")) and kind in TEXTS.keys() - {"empty", "deep"})
    )


CASES = [
    pytest.param(
        target, file, kind, id=f"{target}-{file}-{kind}", marks=[pytest.mark.slow] * weekly(target, file, kind)
    )
    for target, files in FILES.items()
    for file in files
    for kind in CHANGES
]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that waits for a pipe fails; parity stops where the engines would begin."""

    def late(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"no answer within {SECONDS} s")

    def stop(*_: object, **__: object) -> None:
        raise UsageError("here the engines would begin")

    monkeypatch.setattr(comparator, "check", stop)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def answer(words: Sequence[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    signal.alarm(SECONDS)
    code = command(list(words))
    signal.alarm(0)
    return code, capfd.readouterr().err


@pytest.mark.parametrize(("target", "file", "kind"), CASES)
def test_a_file_of_it(target: str, file: str, kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    base = BaseRecord(path=str(tmp_path / "base"), id="org/base")
    export = write_export(tmp_path / "export", target, base=base)
    if not (export / file).exists():
        (export / file).write_bytes(struct.pack("<Q", 2) + b"{}")
    CHANGES[kind](export / file)
    for name, *options in COMMANDS:
        code, err = answer([name, *options, str(export)], capfd)
        assert code in (0, 1, 2, 3) and "unexpected" not in err and "Traceback" not in err, f"{name}: {err}"
        assert code == 0 or "error: " in err


def test_the_control(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody has foreseen is seen above, and an untouched export is served."""
    export = write_export(tmp_path / "export", "vllm")
    assert answer(["serve", "--dry-run", str(export)], capfd)[0] == 0
    monkeypatch.setattr("lora2serve.serving.serve_settings.read", lambda _: 1 / 0)
    assert "unexpected" in answer(["serve", "--dry-run", str(export)], capfd)[1]


def test_an_export_without_a_base(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must be named: the current folder is none."""
    monkeypatch.chdir(tmp_path)
    write_export(tmp_path / "export", "vllm")
    code, err = answer(["parity", "export"], capfd)
    assert code == 2 and "its manifest does not name its base" in err and "--base" in err


@pytest.mark.parametrize("option", ["--report", "--baseline", ""])
def test_what_is_wrong_with_the_report_is_found_before_the_engines(
    option: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A report that cannot be written, a baseline that is none; the control gets to where the engines would begin."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    export = write_export(tmp_path / "export", "gguf", base=BaseRecord(path=str(tmp_path / "base"), id="org/base"))
    (tmp_path / "file").write_text("{}")
    value = {"--report": tmp_path / "file" / "report", "--baseline": tmp_path / "file", "": None}[option]
    code, err = answer(["parity", *([option, str(value)] if option else []), str(export)], capfd)
    expected = {"--report": "choose another directory with --report", "--baseline": "not a report.json of format 1"}
    assert expected.get(option, "here the engines would begin") in err
    assert code == (1 if option else 2) and ("would begin" in err) == (not option)
