"""What cannot be trained, as a user meets it: one line and a way out, no traceback, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora2serve.artifacts.run import Run
from lora2serve.cli import run as command
from lora2serve.errors import CheckpointError, DataError, TrainError
from lora2serve.training.checkpoints import last_checkpoint
from lora2serve.training.requirements import translated
from tests.support.runs import DEMO, fit, recipe_file, write_jsonl

pytestmark = pytest.mark.engine


@pytest.fixture
def tokenizer_only(tmp_path: Path) -> Path:
    """A directory with the demo's tokenizer and nothing else."""
    path = tmp_path / "base"
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / "base" / name, path / name)
    return path


def refused(tmp_path: Path, model: Path, chats: dict[str, str], **train: Any) -> str:
    with pytest.raises((TrainError, CheckpointError)) as caught:
        fit(recipe_file(tmp_path, model, chats, **train))
    assert "\n" not in caught.value.message
    assert caught.value.hint or caught.type is CheckpointError
    return caught.value.message


def test_a_model_that_is_no_causal_lm(tmp_path: Path, tokenizer_only: Path, chats: dict[str, str]) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 1536, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tokenizer_only)
    said = refused(tmp_path, tokenizer_only, chats)
    assert f"{tokenizer_only}: no causal language model that transformers can load" in said


@pytest.mark.parametrize("fault", ["no weights", "cut weights", "no config", "no tokenizer"])
def test_a_model_directory_that_is_not_whole(tmp_path: Path, chats: dict[str, str], fault: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(DEMO / "base", base)
    if fault == "no weights":
        (base / "model.safetensors").unlink()
    elif fault == "cut weights":
        os.truncate(base / "model.safetensors", 3_000_000)
    elif fault == "no config":
        (base / "config.json").unlink()
    else:
        (base / "tokenizer.json").unlink()
    said = refused(tmp_path, base, chats)
    assert str(base) in said
    assert (fault if fault in ("no tokenizer", "no config") else "no causal language model") in said


def test_no_row_with_a_token_to_learn_from(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    with pytest.raises(DataError, match="no row has a token to learn from"):
        fit(recipe_file(tmp_path, small, {**chats, "max_length": 8}))


def test_missing_libraries_are_named_with_their_extra(
    tmp_path: Path, chats: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of them at once, before anything is read or made."""
    import importlib.util as machinery

    find = machinery.find_spec
    gone = ("bitsandbytes", "trl")
    monkeypatch.setattr(machinery, "find_spec", lambda name, *rest: None if name in gone else find(name, *rest))
    monkeypatch.chdir(recipe_file(tmp_path, DEMO / "base", chats).parent)
    assert command(["train"]) == 1
    said = "error: not installed: trl, bitsandbytes\nhint: pip install 'lora2serve[train]'\n"
    assert capfd.readouterr().err.endswith(f"loading the libraries\n{said}"), "nothing else in between"
    assert not (tmp_path / "runs").exists()


def test_a_library_that_breaks_on_import(tmp_path: Path, chats: dict[str, str]) -> None:
    """The real command in an interpreter where bitsandbytes is found, but cannot be imported."""
    recipe_file(tmp_path, DEMO / "base", chats)
    script = (
        "import sys, importlib.abc\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'bitsandbytes' and 'transformers' in sys.modules: raise ImportError('libfoo.so: no such file')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from lora2serve.cli import main; main(['train'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "libfoo.so" in line or "bitsandbytes" in line
    assert "pip install 'lora2serve[train]'" in done.stderr
    assert not list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else True


def test_a_library_is_needed_for_quantization_only(tmp_path: Path, chats: dict[str, str]) -> None:
    """The control: LoRA without quantization runs where bitsandbytes is not."""
    recipe_file(tmp_path, DEMO / "base", chats, quantize="none", steps=1)
    script = "import sys; sys.modules['bitsandbytes'] = None\nfrom lora2serve.cli import main; main(['train'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes"), "a library is missing"),
    ],
)
def test_words_for_what_libraries_raise(problem: BaseException, said: str) -> None:
    with pytest.raises(TrainError, match=said) as caught, translated():
        raise problem
    assert caught.value.hint
    with pytest.raises(KeyError), translated():
        raise KeyError("the control: everything else as it is")


def test_bitsandbytes_without_a_library_for_this_gpu() -> None:
    """Its own page of advice, as it raises it where the CUDA library cannot be loaded."""
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary

    for loader in ("libcudart.so.14: cannot open shared object file", "No compatible CUDA binary found at /x.so"):
        with pytest.raises(TrainError) as caught, translated():
            ErrorHandlerMockBNBNativeLibrary(loader).cquantize_blockwise_fp16_nf4()
        assert caught.value.message == f"bitsandbytes has no library that fits this GPU ({loader})"
        assert "python -m bitsandbytes" in caught.value.hint


def test_no_held_out_row_with_a_token_to_score(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "word " * 300, "completion": "x"}])
    with pytest.raises(DataError, match=r"long\.jsonl: no held-out row has a token to score"):
        fit(recipe_file(tmp_path, small, {**chats, "eval": str(long)}, early_stopping=1))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written to, not even by root where that can be had."""
    place = tmp_path / "read-only"
    place.mkdir(mode=0o555)
    if os.geteuid():
        yield place
        return
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("root may write anywhere, and mounting is not allowed")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("words", [["init"], ["train", "demo"]], ids=" ".join)
def test_a_folder_that_cannot_be_written_to(
    read_only: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.chdir(read_only)
    assert command(words) == 1
    first, second = capfd.readouterr().err.splitlines()[-2:]
    assert first.startswith(f"error: {'lora2serve.yaml' if words == ['init'] else 'runs'}: ")
    assert second == "hint: run it in a folder that you may write to"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB: two checkpoints fit, a third one does not."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(
    small_disk: Path, chats: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line; what was saved before stays, and the run goes on once there is room."""
    recipe_file(small_disk, DEMO / "base", chats, steps=12)
    monkeypatch.chdir(small_disk)
    assert command(["train"]) == 1
    stderr = capfd.readouterr().err
    assert "Traceback" not in stderr
    assert "error: the disk is full" in stderr
    assert "lora2serve train --resume" in stderr
    run = Run(small_disk / "runs" / "run")
    kept = last_checkpoint(run)
    assert kept is not None
    assert json.loads((run.path / "run.json").read_text())["name"] == "run"

    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    assert command(["train", "--resume"]) == 0
    assert run.record.steps == 12
