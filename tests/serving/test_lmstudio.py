"""``--target lmstudio --install``: into LM Studio's own folder, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.run import Run
from lora2serve.cli import run
from lora2serve.errors import ExportError, InputError
from lora2serve.progress import Silent
from lora2serve.serving import lmstudio_app
from lora2serve.system.small_files import digest

FILE = "lora2serve/demo/demo-F16.gguf"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return folder


def export(demo_run: Run, out: Path, *more: str) -> int:
    return run(["export", str(demo_run.path), "-t", "lmstudio", "-q", "F16", "-o", str(out), *more])


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_folder(home: Path) -> None:
    """Newest first: settings.json in its home, then that of the desktop's settings, then ``models``."""
    assert lmstudio_app.models_folder() == home / ".lmstudio" / "models"
    put(home / ".config" / "LM Studio" / "settings.json", json.dumps({"downloadsFolder": "/data/older"}))
    assert lmstudio_app.models_folder() == Path("/data/older")
    settings = put(home / ".lmstudio" / "settings.json", json.dumps({"downloadsFolder": "/data/models"}))
    assert lmstudio_app.models_folder() == Path("/data/models")
    put(settings, json.dumps({"downloadsFolder": None}))
    assert lmstudio_app.models_folder() == Path("/data/older")
    put(settings, "{")
    with pytest.raises(InputError, match=r"settings\.json"):
        lmstudio_app.models_folder()
    put(home / ".lmstudio-home-pointer", f"{home}/elsewhere\n")
    put(home / "elsewhere" / "settings.json", json.dumps({"downloadsFolder": "~/there"}))
    assert lmstudio_app.models_folder() == home / "there"


def test_install(home: Path, demo_run: Run, tmp_path: Path, capfd: Any) -> None:
    """The same bytes, no second copy on the same disk, nothing else; again only with --overwrite."""
    assert export(demo_run, tmp_path / "out", "--install") == 0
    export_dir, installed = tmp_path / "out" / "lmstudio-F16", home / ".lmstudio" / "models" / FILE
    err = capfd.readouterr().err
    assert f"lms import --copy --user-repo lora2serve/demo {export_dir / FILE}" in err
    assert f"LM Studio has it: {installed}" in err
    assert installed.samefile(export_dir / FILE)
    assert [path.name for path in installed.parent.iterdir()] == [installed.name]
    assert export(demo_run, tmp_path / "other", "--install") == 1
    assert "LM Studio has that file" in capfd.readouterr().err
    assert not (tmp_path / "other" / "lmstudio-F16").exists()  # refused before the first byte
    installed.unlink()
    installed.write_text("older")
    assert export(demo_run, tmp_path / "other", "--install", "--overwrite") == 0
    assert installed.read_bytes() == (export_dir / FILE).read_bytes()
    assert [path.name for path in installed.parent.iterdir()] == [installed.name]


def test_plan_says_it_too(home: Path, demo_run: Run, tmp_path: Path, capfd: Any) -> None:
    put(home / ".lmstudio" / "models" / FILE, "there")
    assert export(demo_run, tmp_path, "--install", "--plan") == 1
    assert "LM Studio has that file" in capfd.readouterr().err


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """An export of two files."""
    export_dir = tmp_path / "lmstudio-Q8_0"
    files = {f"me/demo/demo-{n}.gguf": put(export_dir / f"me/demo/demo-{n}.gguf", f"part {n}") for n in (1, 2)}
    Manifest.from_json(
        {"format": 1, "target": "lmstudio", "files": {n: digest(path) for n, path in files.items()}}
    ).write(export_dir)
    return export_dir


def test_on_another_disk_it_is_copied(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def across(source: Any, target: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across)
    installed = lmstudio_app.install(split, tmp_path / "models", Silent())
    assert [path.read_text() for path in installed] == ["part 1", "part 2"]
    assert not installed[0].samefile(split / "me/demo/demo-1.gguf")
    assert len(list(installed[0].parent.iterdir())) == 2


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("step", ["link", "publish"])
def test_a_full_disk_leaves_what_was_there(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, step: str
) -> None:
    """At the second file, while copying and while renaming: neither file is new, neither is gone."""
    models = tmp_path / "models"
    if overwrite:
        for n in (1, 2):
            put(models / f"me/demo/demo-{n}.gguf", f"older {n}")
    before = {path: path.read_text() for path in models.rglob("*") if path.is_file()}
    name, calls = {"link": "_link_or_copy", "publish": "_rename_new"}[step], []
    real = getattr(lmstudio_app, name)

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(models))
        real(*arguments)

    monkeypatch.setattr(lmstudio_app, name, full)
    with pytest.raises(ExportError, match="No space left on device"):
        lmstudio_app.install(split, models, Silent(), overwrite=overwrite)
    assert len(calls) == 2
    assert {path: path.read_text() for path in models.rglob("*") if path.is_file()} == before


def test_a_file_that_appears_meanwhile_is_kept(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, real = tmp_path / "models", lmstudio_app._rename_new

    def late(partial: Path, target: Path) -> None:
        put(target, "somebody else's")
        real(partial, target)

    monkeypatch.setattr(lmstudio_app, "_rename_new", late)
    with pytest.raises(ExportError, match="File exists"):
        lmstudio_app.install(split, models, Silent())
    assert (models / "me/demo/demo-1.gguf").read_text() == "somebody else's"


@pytest.mark.parametrize("name", ["demo.", "de:mo", "x" * 101])
def test_names_that_lm_studio_does_not_take(demo_run: Run, tmp_path: Path, capfd: Any, name: str) -> None:
    assert export(demo_run, tmp_path, "--name", name) == 1
    assert "not a folder name that LM Studio takes" in capfd.readouterr().err
