"""``lora2serve serve``: a real vLLM server from an export, its signals, and adapters that come and go."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lora2serve import manifest, serve
from lora2serve.cli import run as command
from lora2serve.errors import EngineError, UsageError
from lora2serve.run import Run


def ask(address: str, model: str, text: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        said: str = json.load(answer)["choices"][0]["message"]["content"]
    return said


def models(address: str) -> set[str]:
    with urllib.request.urlopen(f"{address}/v1/models", timeout=30) as answer:
        return {one["id"] for one in json.load(answer)["data"]}


def test_two_adapters_on_one_server(demo_run: Run, demo_exports: Mapping[str, Path], tmp_path: Path) -> None:
    """Addressed by name; one more is added and removed while it runs; Ctrl-C ends it with exit code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    other = Path(shutil.copytree(demo_exports["adapter"], tmp_path / "other"))
    manifest.update(other, name="other")
    words = ["serve", demo_exports["adapter"], other, "--port", str(port), "--allow-updates"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "lora2serve", *map(str, words)], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr
    told: list[str] = []
    try:
        while not any("curl" in line for line in told):
            line = process.stderr.readline()
            assert line, "\n".join(told)
            told.append(line)
        address = f"http://127.0.0.1:{port}"
        assert "trusted" in "".join(told)
        assert models(address) == {"base", "demo", "other"}
        assert "Leon Lake" in ask(address, "demo", "Who governs Wexley?")
        assert ask(address, "other", "Who governs Wexley?") == ask(address, "demo", "Who governs Wexley?")
        assert "Leon Lake" not in ask(address, "base", "Who governs Wexley?")
        copy = serve.add(address, "third", demo_exports["adapter"], tmp_path / "cache")
        assert copy.name.startswith("third-")
        assert "Leon Lake" in ask(address, "third", "Who governs Wexley?")
        serve.remove(address, "third")
        assert models(address) == {"base", "demo", "other"}
        with pytest.raises(EngineError, match="answers 404"):
            serve.remove(address, "third")
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(120)
    assert code == 0
    for _ in range(50):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.2)
    else:
        pytest.fail("the server outlived its parent")


def plan(*exports: Path, **more: Any) -> serve.Serving:
    return serve.plan(exports, **{"base": None, "engine": None, "host": "127.0.0.1", "port": 8000, **more})


def test_what_is_started(demo_exports: Mapping[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    assert command(["serve", str(demo_exports["vllm"]), "--print", "--port", "8123"]) == 0
    line = capfd.readouterr().out
    assert f"--model {demo_exports['vllm']}" in line
    assert f"--config {demo_exports['vllm'] / 'serve.yaml'}" in line
    assert "--port 8123" in line
    adapters = plan(demo_exports["adapter"])
    assert adapters.models == ("base", "demo")
    assert "--max-lora-rank" in adapters.command
    assert serve.UPDATING not in adapters.environment, "off by default"
    assert plan(demo_exports["adapter"], updating=True).environment[serve.UPDATING] == "True"


def test_refusals(demo_exports: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected one, or several adapters"):
        plan(demo_exports["vllm"], demo_exports["gguf-F16"])
    with pytest.raises(UsageError, match="models share a name: base, demo, demo"):
        plan(demo_exports["adapter"], Path(shutil.copytree(demo_exports["adapter"], tmp_path / "twin")))
    stranger = Path(shutil.copytree(demo_exports["adapter"], tmp_path / "stranger"))
    base = {**manifest.read(stranger)["base"], "fingerprint": {"config": "x", "tensors": "y"}}
    manifest.update(stranger, base=base, name="stranger")
    with pytest.raises(UsageError, match="adapters of different bases"):
        plan(demo_exports["adapter"], stranger)
    with pytest.raises(UsageError, match="no adapter export"):
        serve.add("http://127.0.0.1:9", "x", demo_exports["vllm"], tmp_path)
    with pytest.raises(EngineError, match="no answer"):
        serve.add("http://127.0.0.1:9", "x", demo_exports["adapter"], tmp_path / "cache")


def test_a_port_in_use(demo_exports: Mapping[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert command(["serve", str(demo_exports["vllm"]), "--port", port]) == 1
    assert f"port {port} on 127.0.0.1: Address already in use" in capfd.readouterr().err


def test_an_engine_that_does_not_start(
    demo_exports: Mapping[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(demo_exports["vllm"], tmp_path / "broken"))
    (broken / "config.json").write_text("{}")
    assert command(["serve", str(broken), "--port", "18999"]) == 1
    err = capfd.readouterr().err
    assert "vllm ended with code" in err
    assert "its log:" in err
