"""Real disks of a few megabytes, full, read-only and as the kernel lists them: in a namespace of mounts of our own."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.registries import add_export, forked, make_run

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
# Commands on a disk of that size, in one process; writes down what each said.
SCRIPT = """
import contextlib, io, json, subprocess, sys
from pathlib import Path
from lora2serve import Registry
from lora2serve.cli import run
from lora2serve.registry.location import MOUNTS, file_system
disk = Path("disk").resolve()
mount = lambda *words: subprocess.run(["mount", *words, str(disk)], check=True)
said = []
def lora2serve(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["registry", *words])
    said.append([" ".join(words), code, out.getvalue(), err.getvalue()])
mount("-t", "tmpfs", "-o", "size=3m", "tmpfs")
said.append(file_system(disk / "new", MOUNTS.read_text()))
lora2serve("add", "run-0", "--name", "a")
lora2serve("add", "run-1", "--name", "a")
lora2serve("list")
lora2serve("verify")
(disk / "rest").write_bytes(b"x" * 100)
with contextlib.suppress(OSError), (disk / "rest").open("ab", 0) as file:
    while True:
        file.write(bytes(4096))
lora2serve("promote", "a@1", "--why", "w" * 20000)
lora2serve("list")
(disk / "rest").unlink()
mount("-o", "remount,size=64m")
lora2serve("add", "run-1", "--name", "a")
lora2serve("promote", "a@1")
lora2serve("promote", "a@2")
lora2serve("verify")
Registry().path("a@2")
mount("-o", "remount,ro")
for words in (("list",), ("history", "a"), ("verify",)):
    lora2serve(*words)
said.append(str(Registry().path("a@2")))
for words in (("promote", "a@1"), ("rollback", "a"), ("add", "run-0", "--name", "b"), ("gc",)):
    lora2serve(*words)
mount("-o", "remount,rw")
lora2serve("verify")
Path("said.json").write_text(json.dumps(said))
"""


@pytest.fixture
def said(tmp_path: Path) -> list[Any]:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces of mounts here")
    for seed, size in enumerate((100_000, 4_000_000)):
        run = make_run(tmp_path / f"run-{seed}", seed)
        add_export(run)
        (run.adapter / "more.bin").write_bytes(bytes(size))
    (tmp_path / "disk").mkdir()
    child = forked(lambda: in_namespace(tmp_path))
    assert os.waitpid(child, 0)[1] == 0
    return list(json.loads((tmp_path / "said.json").read_text()))


def in_namespace(folder: Path) -> None:
    """Run the script as root of a namespace of our own; in a child, which alone has one thread."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    os.chdir(folder)
    os.environ["LORA2SERVE_REGISTRY"] = "disk/registry"
    exec(compile(SCRIPT, "script", "exec"), {})


def test_full_and_read_only_disks(said: list[Any]) -> None:
    """What does not fit or may not be written is refused in a line, and nothing of it is left; reading goes on."""
    kind, path = (one for one in said if isinstance(one, str))
    commands = [one for one in said if not isinstance(one, str)]
    assert kind == "tmpfs", "the kernel's own list of mounts is read; the disk of the test is none of a network"
    codes = [code for _, code, _, _ in commands]
    assert codes == [0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0], commands
    for words, code, out, err in commands:
        assert (out == "" and err.startswith("error: ") and "hint: " in err) if code else "error" not in err, words
        assert err.count("\n") <= 2
    full, read_only = commands[5], commands[10:13]
    assert full[2].count("\n") == 1 and "champion" not in full[2], "a promotion that does not fit is none"
    assert read_only[0][2].count("\n") == 2 and read_only[1][2].count(" promote ") == 2
    assert path.endswith("/versions/a-2")
