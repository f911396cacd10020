"""What the slow tests share: one trained demo run, and its exports."""

from __future__ import annotations

import atexit
import gc
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import settings

from lora2serve.artifacts.run import Run
from tests.support import golang
from tests.support.commands import run_command
from tests.support.forked_worker import specs
from tests.support.marks import may_choose
from tests.support.ollama_server import OllamaServer
from tests.support.shared import once

# the same examples in every run: a red build is red again; `--hypothesis-profile default` draws new ones
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("light", settings.get_profile("repeatable"), max_examples=25)  # make check; see `examples`
settings.load_profile("repeatable")
# a shell that starts the tests in the background has them ignore Ctrl-C, and every child with them
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # and nohup has every child ignore it; a handler is not inherited
    signal.signal(signal.SIGHUP, lambda *_: None)
# at the very end the collector looks again at what it was told to leave alone: nanobind names whatever is left then
atexit.register(gc.unfreeze)
gc.set_threshold(20_000, 20, 50)  # rarely before: models are freed without it
# llama.cpp starts a thread for each core whatever OMP_NUM_THREADS says. They spin: beside another worker's, twenty times
# the work
if threads := os.environ.get("OMP_NUM_THREADS"):
    os.environ.setdefault("OMP_THREAD_LIMIT", threads)
# vLLM's servers on CPUs compute in a process more than on a GPU, which takes nine seconds to start and binds itself to the
# first core, where the other worker's is as well
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# where it is anyhow: a test that names another XDG_CACHE_HOME would have every process load torch by itself
CACHES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("HF_HOME", str(CACHES / "huggingface"))
MARKED = re.compile(r"^pytestmark = \[?pytest\.mark\.engine\b", re.MULTILINE)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Without the garbage collector, which would look again and again at what the libraries bring: a quarter of the time.

    Nor does it look at that later on.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before xdist makes its workers of them
def pytest_configure(config: pytest.Config) -> None:
    """All workers are forked from one process that has the libraries; `make check` draws a quarter and has no vLLM's word."""
    if not may_choose("engine", config.getoption("markexpr")):
        if not config.getoption("--hypothesis-profile", None):
            settings.load_profile("light")
        # each export of an adapter asks it where it is installed: two seconds of imports in each worker
        sys.modules.setdefault("vllm.config", None)  # type: ignore[arg-type]
    if not hasattr(config, "workerinput") and config.getoption("tx", None):
        config.option.tx = list(specs(config.option.tx))


@pytest.hookimpl(tryfirst=True)  # before xdist sends it
def pytest_warning_recorded(warning_message: warnings.WarningMessage) -> None:
    """As one of Python's own: the process that gathers the results would import peft, to have its class."""
    kind = warning_message.category
    if kind.__module__ != "builtins":
        own = next(parent for parent in kind.__mro__ if parent.__module__ == "builtins")
        warning_message.category = own
        warning_message.message = own(f"{kind.__name__}: {warning_message.message}")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the demo's run needs its training, and Go its compiler; other engines are marked where they are."""
    for item in items:
        if {"demo_run", "go_program"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.engine)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=in_order(items))


def in_order(items: Sequence[pytest.Item]) -> Callable[[pytest.Item], tuple[bool, ...]]:
    """The long ones first, so that no worker waits for another at the end; nor at the beginning, for the demo's training:
    of the modules that need it, only the first one comes before those that do not.
    """
    demo = list(dict.fromkeys(item.path for item in items if "demo_run" in getattr(item, "fixturenames", ())))
    return lambda item: (
        item.get_closest_marker("engine") is None, item.path not in demo[:1], item.path in demo[1:]
    )  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make check` does not even import the modules that are marked as a whole: they load the most."""
    chosen = config.getoption("markexpr")
    if collection_path == Path(__file__).parent / "gpu" and not may_choose("gpu", chosen):
        return True
    left_out = collection_path.suffix == ".py" and not may_choose("engine", chosen)
    return True if left_out and MARKED.search(collection_path.read_text(encoding="utf-8")) else None


def lora2serve(*words: str | Path, cwd: Path, code: int = 0) -> str:
    """Run the command line as a user does; its stdout."""
    done = run_command([str(word) for word in words], cwd)
    assert done.returncode == code, f"lora2serve {words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "nanobind: leaked" not in done.stderr, "a library's words at the end of the process reach the user"
    return done.stdout


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``lora2serve train demo``; nobody writes into it. LORA2SERVE_DEMO_RUN names one that is there already."""
    ready = os.environ.get("LORA2SERVE_DEMO_RUN")
    if ready:
        return Run(Path(ready).resolve())
    place = once(tmp_path_factory, "demo", lambda folder: lora2serve("train", "demo", cwd=folder))
    return Run((place / "runs" / "latest").resolve())


@pytest.fixture(scope="session")
def demo_exports(demo_run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of the demo run by folder name, made in three passes."""
    commands: Sequence[Sequence[str]] = (
        ("-t", "vllm", "-t", "ollama", "-t", "adapter"),
        ("-t", "vllm", "-q", "fp8", "-q", "w4a16"),
        ("-t", "gguf", "-q", "F16", "-q", "Q8_0", "-q", "Q4_K_M"),
    )

    def make(out: Path) -> None:
        for words in commands:
            lora2serve("export", demo_run.path, *words, "-o", out, cwd=out)

    out = once(tmp_path_factory, "exports", make)
    return {path.parent.name: path.parent for path in out.glob("*/lora2serve.json")}


@pytest.fixture(scope="session")
def go_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that renders Go templates, built once."""
    return once(tmp_path_factory, "go", golang.build) / "render"


@pytest.fixture(scope="session")
def go_render(go_program: Path) -> Iterator[golang.Renderer]:
    """Go's own text/template, running."""
    renderer = golang.Renderer(go_program)
    yield renderer
    renderer.close()


@pytest.fixture
def ollama(tmp_path: Path, go_render: golang.Renderer, monkeypatch: pytest.MonkeyPatch) -> Iterator[OllamaServer]:
    """Our server, at OLLAMA_HOST."""
    with OllamaServer(tmp_path / "ollama", go_render) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        yield server


@pytest.fixture(params=["ours", pytest.param("true", marks=pytest.mark.ollama)])
def any_ollama(request: pytest.FixtureRequest) -> str:
    """The address of our server, and with ``-m ollama`` that of a true one at OLLAMA_HOST."""
    from lora2serve.serving.ollama import OllamaClient, server_address

    if request.param == "ours":
        return str(request.getfixturevalue("ollama").url)
    OllamaClient().version()
    return server_address()
