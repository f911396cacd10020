"""Kills and full disks: the old export or the new one, never a mix, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora2serve.artifacts import manifest
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.staging import opened
from lora2serve.errors import ExportError
from tests.conftest import lora2serve
from tests.support.commands import RunningCommand, run_command
from tests.support.folding import export_merged
from tests.support.tiny import make_adapter, make_model

pytestmark = pytest.mark.engine

# Imports once, then forks one child for each line it reads: the child exports again and again over the same place.
FORKER = """
import os, sys
from pathlib import Path
import torch
import converters.vllm.vllm_sink, lora2serve.exporting.stream
from tests.support import folding
torch.set_num_threads(1)
base, first, second, out = map(Path, sys.argv[1:])
export = folding.export
folding.export = lambda *given, **more: export(*given, **{**more, "overwrite": True})
for line in sys.stdin:
    child = os.fork()
    number = int(line)
    while not child:
        folding.export_merged(base, [(first, second)[number % 2]], out)
        number += 1
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("parts")
    base = make_model(root / "base", hidden_size=256, intermediate_size=512)
    return base, make_adapter(root / "one", base, seed=1), make_adapter(root / "two", base, seed=2)


def kill_many(parts: tuple[Path, Path, Path], tmp_path: Path, times: int) -> None:
    base, one, two = parts
    out = tmp_path / "out" / "vllm"
    whole = {
        (export_merged(base, [adapter], tmp_path / f"whole-{n}") / "model.safetensors").read_bytes()
        for n, adapter in enumerate((one, two))
    }
    assert len(whole) == 2
    seen, partial = set(), 0
    dice, one_export = random.Random(0), 0.0
    command = [sys.executable, "-c", FORKER, *map(str, (base, one, two, out))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forker:
        assert forker.stdin and forker.stdout
        for number in range(times):
            print(number, file=forker.stdin, flush=True)
            child, started = int(forker.stdout.readline()), time.perf_counter()
            while not out.exists():
                time.sleep(0.01)
                one_export = time.perf_counter() - started
            time.sleep(dice.random() * 3 * one_export)
            os.kill(child, signal.SIGKILL)
            assert int(forker.stdout.readline()) == signal.SIGKILL, "it was still at work"
            assert Export.open(out).verify() == []
            content = (out / "model.safetensors").read_bytes()
            assert content in whole
            seen.add(content)
            partial += bool(list(out.parent.glob("*.partial-*")))
        forker.stdin.close()
    assert seen == whole
    assert partial, "no kill met an export under way: this test proves nothing"
    print(f"{times} kills, {partial} of them in mid-export")
    with opened(out, overwrite=True):
        pass  # the next run clears what the killed ones left
    assert [path.name for path in out.parent.iterdir()] == ["vllm"]


def test_kills(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    kill_many(parts, tmp_path, 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_kills(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    kill_many(parts, tmp_path, 200)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 8 MB of our own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


OFTEN = [(50, "vllm"), (99, "vllm"), (50, "adapter")]
MOMENTS = [*OFTEN, *(pytest.param(share, "vllm", marks=pytest.mark.slow) for share in (10, 90))]


@pytest.mark.parametrize(("share", "target"), MOMENTS)
def test_a_full_disk(parts: tuple[Path, Path, Path], disk: Path, share: int, target: str) -> None:
    """Over an old export: one line, the old one whole, nothing else there."""
    base, adapter, _ = parts
    words = ["export", adapter, "--base", base, "-t", target, "-o", disk / "out"]
    lora2serve(*words, cwd=disk)
    kept = Export.open(disk / "out" / target).manifest.to_json()
    need = sum(file["size"] for file in kept["files"].values())
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(bytes(free - need * share // 100))
    done = run_command([*map(str, words), "--overwrite"], disk)
    assert done.returncode == 1, done.stderr
    assert "No space left" in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    assert Export.open(disk / "out" / target).verify() == []
    assert Export.open(disk / "out" / target).manifest.to_json() == kept
    assert [path.name for path in (disk / "out").iterdir()] == [target]
    (disk / "ballast").unlink()
    lora2serve(*words, "--overwrite", cwd=disk)


SLOW = [pytest.param(share, marks=pytest.mark.slow) for share in (1, 99)]  # a full disk is met there, too


@pytest.mark.parametrize("share", [50, *SLOW])
def test_a_file_that_may_not_grow(parts: tuple[Path, Path, Path], tmp_path: Path, share: int) -> None:
    """The same by a limit on the size of files, which needs no right to mount: one line, nothing left."""
    base, adapter, _ = parts
    whole = lora2serve("export", adapter, "--base", base, "-t", "vllm", "-o", tmp_path / "whole", cwd=tmp_path).strip()
    limit = (Path(whole) / "model.safetensors").stat().st_size * share // 100
    words = ["export", adapter, "--base", base, "-t", "vllm", "-o", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "lora2serve", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists(), "nor the folder that was made for it"


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in mid-export: exit code 130, one word, and the old export as it was."""
    base = make_model(tmp_path / "base", vocab_size=60_000, hidden_size=512)
    adapter = make_adapter(tmp_path / "adapter", base)
    words = ["export", adapter, "--base", base, "-t", "vllm", "-o", tmp_path / "out"]
    lora2serve(*words, cwd=tmp_path)
    kept = Export.open(tmp_path / "out" / "vllm").manifest.to_json()
    child = RunningCommand([*map(str, words), "--overwrite"], tmp_path)
    while not any((tmp_path / "out").glob("*.partial-*")):
        assert not child.ended
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    done = child.end()
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "interrupted")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["vllm"]
    assert Export.open(tmp_path / "out" / "vllm").verify() == []
    assert Export.open(tmp_path / "out" / "vllm").manifest.to_json() == kept


def test_all_outputs_or_none(parts: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last moment at which the disk can fill is before any of several outputs has appeared."""
    from lora2serve.exporting.sinks import ExportModel, find
    from lora2serve.exporting.stream import Plan, export
    from lora2serve.progress import Silent
    from tests.support.folding import fold

    merged, kind = fold(parts[0], [parts[1]]), find("vllm")
    plans = [Plan("vllm", kind, kind.Options(), tmp_path / "out" / name) for name in ("one", "two")]
    write, calls = Manifest.write, []

    def full(manifest: Manifest, directory: Path) -> None:
        calls.append(directory)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(directory))
        write(manifest, directory)

    monkeypatch.setattr(Manifest, "write", full)
    with pytest.raises(ExportError, match="No space left on device"):
        export(ExportModel(merged, {}, "tiny", "base"), plans, Silent())
    assert len(calls) == 2
    assert not (tmp_path / "out").exists(), "nor the folder that was made for it"


def test_an_error_half_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), opened(tmp_path / "a" / "out", overwrite=False) as out:
        out.text("x", "y")
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists(), "nor the folder that was made for it"


def test_two_runs_into_one_target(tmp_path: Path) -> None:
    with opened(tmp_path / "out", overwrite=False):
        with (
            pytest.raises(ExportError, match="another run is writing there"),
            opened(tmp_path / "out", overwrite=False),
        ):
            pass
        with opened(tmp_path / "other", overwrite=False):
            pass
    with opened(tmp_path / "out", overwrite=False) as out:
        out.text("x", "y")
        out.publish(Manifest(target="vllm"))


def test_a_live_export_is_replaced_never_written_into(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A server that holds the old files open goes on reading them."""
    base, one, two = parts
    out = tmp_path / "out" / "vllm"
    lora2serve("export", one, "--base", base, "-t", "vllm", "-o", tmp_path / "out", cwd=tmp_path)
    before = out.stat().st_ino
    with (out / "model.safetensors").open("rb") as held:
        lora2serve("export", two, "--base", base, "-t", "vllm", "-o", tmp_path / "out", "--overwrite", cwd=tmp_path)
        old = held.read()
    assert out.stat().st_ino != before
    assert old != (out / "model.safetensors").read_bytes()
    assert len(old) == (out / "model.safetensors").stat().st_size


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask(parts: tuple[Path, Path, Path], tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        out = export_merged(parts[0], [parts[1]], tmp_path / "out")
    finally:
        os.umask(before)
    for path in out.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask


def test_what_is_not_ours_is_never_replaced(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="not an export of lora2serve"), opened(tmp_path / "out", overwrite=True):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="is not a directory"), opened(tmp_path / "file", overwrite=True):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(ExportError, match="is not a directory"), opened(tmp_path / "link", overwrite=True):
        pass
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_flipped_bit_is_named(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """And the control: the untouched export is whole."""
    out = export_merged(parts[0], [parts[1]], tmp_path / "out")
    lora2serve("inspect", out, cwd=tmp_path)
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (out / "model.safetensors").write_bytes(bytes(content))
    assert Export.open(out).verify() == ["model.safetensors: content changed since the export (sha256 differs)"]
    lora2serve("inspect", out, cwd=tmp_path, code=1)
    (out / "model.safetensors").unlink()
    (out / "stray").write_text("x")
    assert Export.open(out).verify() == ["model.safetensors: missing", "stray: not part of the export"]
    (out / manifest.NAME).write_text(json.dumps({"format": 99}))
    lora2serve("inspect", out, cwd=tmp_path, code=1)


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace here")
def test_sync_comes_before_the_rename(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Every file and the directory are synced before the export appears."""
    log = tmp_path / "log"
    words = ["export", parts[1], "--base", parts[0], "-t", "vllm", "-o", tmp_path / "out"]
    command = [
        "strace",
        "--seccomp-bpf",  # stops at these calls only
        "-f",
        "-y",
        "-e",
        "trace=fsync,rename,renameat2",
        "-o",
        log,
        sys.executable,
        "-m",
        "lora2serve",
        *words,
    ]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    calls = [line for line in log.read_text().splitlines() if ".partial-" in line]
    swap = next(
        number
        for number, line in enumerate(calls)
        if "rename" in line and line.rstrip().endswith("= 0") and '/vllm"' in line
    )
    synced = " ".join(line for line in calls[:swap] if "fsync" in line)
    for path in (tmp_path / "out" / "vllm").iterdir():
        assert f"/{path.name}" in synced or path.name == manifest.NAME, path.name
