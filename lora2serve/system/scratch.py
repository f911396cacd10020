"""What a process has only while it runs: files, folders and child processes. Nothing of it outlives the process.

Each process has one folder in TMPDIR, on which it holds a lock. Temporary files are made in it; what must lie
elsewhere (a partial export beside its target) is claimed in it; child processes carry its path in their environment.
At its end a process removes all of this. Of one that was killed nobody holds the lock: ``sweep``, with which every
command begins, does it then.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from lora2serve.system import file_lock

VARIABLE = "LORA2SERVE_SCRATCH"  # in the environment of children: the folder of the process that they belong to
PREFIX = "lora2serve-scratch-"
CLAIMS = "claims"
PATIENCE = 5.0  # seconds that a process has to end by itself
_own: list[tuple[int, Path]] = []  # the process, and its folder
_kept: list[Path] = []  # logs that messages name
_starting = threading.Lock()


def root() -> Path:
    """The folder of this process; of a fork, that of the process it comes from; of a child, one in its parent's."""
    with _starting:
        if not (_own and _own[0][1].is_dir()):
            parent = os.environ.get(VARIABLE, "")
            _own[:] = [(os.getpid(), _inside(Path(parent)) if Path(parent).is_dir() and parent else _locked_folder())]
            atexit.register(remove)
        return _own[0][1]


def temporary_folder(purpose: str) -> tempfile.TemporaryDirectory[str]:
    """A folder for a ``with`` statement, or to be cleaned up by hand."""
    return tempfile.TemporaryDirectory(prefix=f"{purpose}-", dir=root())


def empty_folder() -> Path:
    """Where a child runs that needs no files: none lies there that it could take for a module or a setting."""
    folder = root() / "empty"
    folder.mkdir(exist_ok=True)
    return folder


def log_file(purpose: str) -> Path:
    """An empty file for what a child prints; ``keep`` lets it outlive us."""
    plain = re.sub(r"[^\w.-]+", "_", purpose)[:80]
    descriptor, name = tempfile.mkstemp(prefix=f"{plain}-", suffix=".log", dir=root())
    os.close(descriptor)
    return Path(name)


def keep(log: Path) -> Path:
    """Where a log is once this process has ended: a message may name it. One that is no scratch stays where it is."""
    if not (_own and log.is_relative_to(_own[0][1]) and log.is_file()):
        return log
    descriptor, name = tempfile.mkstemp(prefix=f"lora2serve-{log.stem}-", suffix=".log")
    os.close(descriptor)
    _kept.append(Path(name))
    shutil.copyfile(log, name)
    return Path(name)


def forget_kept() -> None:
    """Remove those logs again: the user has ended the command, and reads no message."""
    while _kept:
        _kept.pop().unlink(missing_ok=True)


def environment() -> dict[str, str]:
    """What a child process must have in its environment; nothing where TMPDIR takes no folder."""
    try:
        return {VARIABLE: str(root())}
    except OSError:
        return {}


@contextmanager
def claimed(path: Path, lock: Path | None = None, unless: Sequence[str] = ()) -> Iterator[Callable[[], None]]:
    """Make ``path`` in here: it is removed on the way out, or later, if we are killed. Call what this gives to keep it.

    A name that other processes may use as well needs the ``lock`` under which it is used. A folder in which one of the
    patterns ``unless`` finds something is never removed.
    """
    absolute = {"path": str(path.absolute()), "lock": str(lock.absolute()) if lock else None, "unless": list(unless)}
    claim = _claim("json", absolute)
    try:
        yield claim.unlink
    finally:
        if claim.exists():
            _delete(path, unless)
            claim.unlink(missing_ok=True)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Make the folder and those above it; what is new of these and stays empty goes again, as if it were claimed."""
    new = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    claim = _claim("folders", [str(path) for path in new])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        _settle_folders(claim)


def try_folder(folder: Path) -> None:
    """OSError, as ``filled`` raises it, where the folder could not be made and written to; nothing of it is made.

    By trying beside it, as modes do not tell of /proc: another process may rely on a folder that it finds.
    """
    absolute = folder.absolute()
    if os.path.lexists(absolute) and not absolute.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    nearest = next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))
    trial = nearest / f".lora2serve-{uuid.uuid4().hex}"
    try:
        with claimed(trial):
            (trial / absolute.relative_to(nearest)).mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def _claim(kind: str, content: object) -> Path:
    """A file in this process's folder that says what is to be removed with it."""
    folder = root() / CLAIMS
    folder.mkdir(exist_ok=True)
    claim = folder / f"{uuid.uuid4().hex}.{kind}"
    claim.write_text(json.dumps(content), encoding="utf-8")
    return claim


def remove() -> None:
    """End what this process started, and remove what it made. Safe twice, and in a fork."""
    if _own and _own[0][0] == os.getpid():
        _remove(_own.pop()[1])


def sweep() -> tuple[int, int]:
    """The same for processes that were killed; how many child processes ended, and how many paths were removed."""
    ended = removed = 0
    folders: list[Path] = []
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:  # of thousands; a pattern takes longer
        folders = [Path(entry.path) for entry in entries if entry.name.startswith(PREFIX)]
    for folder in folders:
        with suppress(OSError):
            descriptor = file_lock.take_folder(folder)
            if descriptor is not None:
                processes, paths = _remove(folder)
                os.close(descriptor)
                ended, removed = ended + processes, removed + paths
    return ended, removed


def _inside(parent: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix="child-", dir=parent))


def _locked_folder() -> Path:
    """A new folder with our lock on it, which lasts as long as this process."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        with suppress(FileNotFoundError):  # swept in between
            try:
                if file_lock.take_folder(path) is not None:
                    return path
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                return path  # a file system without locks: nobody sweeps there


def _remove(folder: Path) -> tuple[int, int]:
    ended = _end_processes(str(folder))
    removed = sum(_settle(claim) for claim in folder.glob(f"{CLAIMS}/*.json"))
    for claim in folder.glob(f"{CLAIMS}/*.folders"):
        _settle_folders(claim)
    _delete(folder)
    return ended, removed


def _settle(claim: Path) -> bool:
    """Remove what was claimed, unless another process has it by now; whether there was anything."""
    with suppress(OSError, ValueError, KeyError):
        content = json.loads(claim.read_text(encoding="utf-8"))
        path, lock = Path(content["path"]), content["lock"]
        if not path.parent.is_dir():
            return False
        with file_lock.locked(Path(lock)) if lock else nullcontext():
            there = os.path.lexists(path)
            _delete(path, content["unless"])
            return there and not os.path.lexists(path)
    return False


def _settle_folders(claim: Path) -> None:
    folders: list[str] = []
    with suppress(OSError, ValueError):
        folders = json.loads(claim.read_text(encoding="utf-8"))
        claim.unlink()
    for folder in folders:
        with suppress(OSError):  # it holds something
            Path(folder).rmdir()


def _delete(path: Path, unless: Sequence[str] = ()) -> None:
    if any(next(path.glob(pattern), None) for pattern in unless):
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _end_processes(folder: str) -> int:
    """End every process that carries this folder's path, first as Ctrl-C does; how many there were."""
    marked = left = _marked(folder)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + PATIENCE
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            left = _marked(folder)
    return len(marked)


def _marked(folder: str) -> list[int]:
    """The processes other than this one whose environment, as they were started, names the folder."""
    sign = f"\0{VARIABLE}=".encode() + os.fsencode(folder)
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            content = b"\0" + (entry / "environ").read_bytes() + b"\0"
            if any(sign + end in content for end in (b"\0", b"/")) and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found
