"""Several workers write one export: byte for byte that of one, also where one of them is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lora2serve
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.shared_dir import SUFFIX, SharedDir
from lora2serve.cli import run as command
from lora2serve.errors import ExportError, UsageError
from lora2serve.exporting import shared_export
from lora2serve.exporting.shared_export import WorkerPlace
from lora2serve.system import file_lock
from tests.support.commands import run_command
from tests.support.runs import Told, make_chat_model
from tests.support.tiny import make_adapter

# a worker that is killed in the middle of a part: with its lock, and with some of the bytes written
KILLED = """
import os, sys
from lora2serve.exporting import stream
own, written = stream.feed, []

def feed(model, sinks, progress, threads, part=None, label="export"):
    written.append(label)
    own(model, sinks, progress, threads, part[: len(part) - (len(written) == 2)], label)
    if len(written) == 2:
        os.kill(os.getpid(), 9)

stream.feed = feed
from lora2serve.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a random adapter."""
    folder = tmp_path_factory.mktemp("shared-export")
    base = make_chat_model(folder / "base", num_hidden_layers=4)
    return base, make_adapter(folder / "adapter", base)


def words(model: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    base, adapter = model
    return ["export", str(adapter), "--base", str(base), "-o", str(out), "--name", "small", *more]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest's word for where it lies."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes().replace(str(folder).encode(), b"OUT") for name, path in files.items()}


CASES = [
    pytest.param(("-t", "vllm", "--shard-size", "200KB"), "vllm", id="vllm"),
    pytest.param(("-t", "vllm", "-q", "w4a16"), "vllm-w4a16", id="w4a16", marks=pytest.mark.slow),
    pytest.param(("-t", "gguf", "-q", "Q8_0", "--split-size", "200KB"), "gguf-Q8_0", id="gguf", marks=pytest.mark.slow),
    pytest.param(("-t", "ollama", "-q", "Q4_0"), "ollama-Q4_0", id="ollama", marks=pytest.mark.slow),
    pytest.param(("-t", "lmstudio", "-q", "F16"), "lmstudio-F16", id="lmstudio", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize(("options", "name"), CASES)
def test_three_workers_one_of_them_killed(
    tmp_path: Path, model: tuple[Path, Path], options: tuple[str, ...], name: str
) -> None:
    whole = run_command(words(model, tmp_path / "one", *options), tmp_path)
    assert whole.returncode == 0, whole.stderr
    together = words(model, tmp_path / "three", *options)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *together, "--shards", "2/3"], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    target = tmp_path / "three" / name
    folder = target.with_name(name + SUFFIX)
    assert not target.exists()
    assert len(list(folder.glob("part-*.json"))) == 1, "the control: one part is done, one is not"
    assert len(list(folder.glob("part-*.lock"))) == 1
    with ThreadPoolExecutor(2) as pool:
        others = list(pool.map(lambda number: run_command([*together, "--shards", f"{number}/3"], tmp_path), (1, 3)))
    assert [each.returncode for each in others] == [0, 0], others[0].stderr + others[1].stderr
    assert sorted(each.stdout for each in others)[-1] == f"{target}\n"
    assert sum("next: `lora2serve parity" in each.stderr for each in others) >= 1
    assert all(f"parity {target}" in each.stderr for each in others if "parity" in each.stderr)
    assert not folder.exists()
    assert [path.name for path in target.parent.iterdir()] == [name]
    mine, theirs = contents(target), contents(tmp_path / "one" / name)
    assert mine.keys() == theirs.keys()
    assert [file for file in mine if mine[file] != theirs[file]] == []
    assert Export.open(target).verify() == []
    again = run_command([*together, "--shards", "2/3"], tmp_path)
    assert (again.returncode, again.stdout) == (0, f"{target}\n") and "published already" in again.stderr


def export(model: tuple[Path, Path], out: Path, shards: str, **options: object) -> tuple[list[Export], Told]:
    told = Told()
    made = lora2serve.export(
        model[1], targets="vllm", base=model[0], out=out, name="small", shards=shards, progress=told,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return made, told


def test_the_last_one_publishes(tmp_path: Path, model: tuple[Path, Path]) -> None:
    """Where another worker holds a part, what is left of the rest is done, and nothing published."""
    folder = tmp_path / f"vllm{SUFFIX}"
    folder.mkdir()
    with file_lock.locked(folder / "part-3.lock"):
        made, told = export(model, tmp_path, "1/2")
        assert made == [] and not (tmp_path / "vllm").exists()
        assert any("1 of " in note and "the last publishes" in note for note in told.notes)
    made, _ = export(model, tmp_path, "2/2")
    assert [each.path for each in made] == [tmp_path / "vllm"]
    before = (tmp_path / "vllm" / "lora2serve.json").read_bytes()
    made, told = export(model, tmp_path, "1/2", overwrite=True)
    assert made and (tmp_path / "vllm" / "lora2serve.json").read_bytes() == before
    assert any("published already" in note for note in told.notes)
    with pytest.raises(ExportError, match="already exists"):
        export(model, tmp_path, "1/2", dtype="fp16")


@pytest.mark.parametrize(
    ("where", "name"), [(shared_export._SharedWork, "begin"), (shared_export, "_put_first"), (SharedDir, "begin")]
)
def test_published_while_a_worker_begins(
    tmp_path: Path, model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, where: object, name: str
) -> None:
    """At each step of its beginning: before its folder is there, before its plan, and before its files."""
    step = getattr(where, name)

    def late(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(where, name, step)
        (first,), _ = export(model, tmp_path, "1/2")
        assert first.path.is_dir()
        return step(*arguments, **options)

    monkeypatch.setattr(where, name, late)
    (second,), told = export(model, tmp_path, "2/2")
    assert second.path == tmp_path / "vllm" and "published already" in "\n".join(told.notes)
    assert [path.name for path in tmp_path.iterdir()] == ["vllm"]


def test_parts_of_another_export(tmp_path: Path, model: tuple[Path, Path]) -> None:
    """All differences at once; what lies there is not touched."""
    folder = tmp_path / f"vllm{SUFFIX}"
    folder.mkdir()
    with file_lock.locked(folder / "part-0.lock"):
        export(model, tmp_path, "1/2")
    before = contents(folder)
    with pytest.raises(ExportError) as raised:
        export(model, tmp_path, "1/3", dtype="fp32")
    assert "options: {'dtype': 'fp32'" in raised.value.message and "count: 3 here, 2 in " in raised.value.message
    assert "model.safetensors: " in raised.value.message
    assert contents(folder) == before
    assert export(model, tmp_path, "2/2")[0], "the control"


def test_a_part_that_lacks_bytes_is_not_published(tmp_path: Path, model: tuple[Path, Path]) -> None:
    folder = tmp_path / f"vllm{SUFFIX}"
    folder.mkdir()
    with file_lock.locked(folder / "part-0.lock"):
        export(model, tmp_path, "1/2")
    (folder / "part-0.json").write_text('{"written": {}, "survival": {}}')
    with pytest.raises(ExportError, match=r"model\.safetensors: \d+ bytes of \d+ were written"):
        export(model, tmp_path, "2/2")
    assert not (tmp_path / "vllm").exists()


def test_what_several_cannot_write(tmp_path: Path, model: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    for options, problem in (
        (("-t", "adapter"), "--target adapter is written by one process"),
        (("-t", "vllm", "-q", "nvfp4"), "--quant nvfp4 needs all weights in one process"),
        (("-t", "vllm", "-q", "fp8", "-q", "int8"), "one target and one type at a time, not 2"),
    ):
        code = command(words(model, tmp_path / "out", *options, "--shards", "1/2"))
        said = capfd.readouterr().err
        assert code == 2 and problem in said, said
        assert "targets of several workers: vllm, gguf, ollama, lmstudio" in said
    assert WorkerPlace.parse("2/3") == WorkerPlace(2, 3)
    for text in ("", "2", "0/3", "4/3", "1/0", "a/b", "1/3/5", "-1/2"):
        with pytest.raises(UsageError, match="expected WORKER/WORKERS"):
            WorkerPlace.parse(text)
    assert not (tmp_path / "out").exists()
