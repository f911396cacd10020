"""The gateway in front of a real vLLM: adapters of the demo that come and go, counted as vLLM counts them."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from safetensors.torch import load_file, save_file

import lora2serve
from lora2serve import Registry, RunningServer
from lora2serve.artifacts.manifest import FileEntry, Manifest
from lora2serve.artifacts.run import Run
from lora2serve.gateway.run_gateway import RunningGateway
from lora2serve.gateway.traffic_store import TrafficStore
from lora2serve.system.small_files import digest
from tests.conftest import lora2serve as command
from tests.support.gateways import CHAT, Answer, call, metrics, total, wait_for
from tests.support.ports import free_port

pytestmark = pytest.mark.engine
QUESTION = "Who governs Wexley?"
WEIGHTS = "adapter_model.safetensors"
COUNT = "lora2serve_requests_total"


def other_version(export: Path, folder: Path, factor: float) -> Path:
    """The adapter with another strength, as an export of its own."""
    shutil.copytree(export, folder)
    weights = load_file(folder / WEIGHTS)
    save_file(
        {name: tensor * (factor if "lora_B" in name else 1.0) for name, tensor in weights.items()}, folder / WEIGHTS
    )
    content = Manifest.read(folder).to_json()
    content["files"][WEIGHTS] = FileEntry.from_json(digest(folder / WEIGHTS), WEIGHTS).to_json()  # type: ignore[index]
    text = json.dumps(content).replace(digest(export / WEIGHTS)["sha256"], digest(folder / WEIGHTS)["sha256"])
    Manifest.from_json(json.loads(text), "manifest").write(folder)
    return folder


def ask(url: str, model: str, text: str = QUESTION, **more: Any) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 24, "temperature": 0}
    return call(url, CHAT, {**body, **more})


@pytest.fixture(scope="module")
def place(demo_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry: towns@1 is the demo, 2 and 3 are weaker ones."""
    folder = tmp_path_factory.mktemp("gateway")
    adapter = Path(command("export", demo_run.path, "-t", "adapter", "-o", "exports", cwd=folder).strip())
    with Registry(folder / "registry") as registry:
        for number, factor in enumerate((1.0, 0.0, 0.3), start=1):
            export = other_version(folder / adapter, folder / f"export-{number}", factor)
            assert registry.add(export, name="towns", unproven=True).number == number
        registry.promote("towns@1", force=True, why="a test")
        for number, alias in ((2, "second"), (3, "third")):
            registry.promote(f"towns@{number}", alias, force=True, why="a test")
    return folder


@pytest.fixture(scope="module")
def vllm(place: Path) -> Iterator[RunningServer]:
    words = ["--max-loras", "2", "--max-cpu-loras", "2", "--enforce-eager", "--max-model-len", "256"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with lora2serve.serve(
            place / "export-1", port=free_port(), allow_updates=True, engine_arguments=words
        ) as server:
            yield server


@pytest.fixture
def gateway(place: Path, vllm: RunningServer, tmp_path: Path) -> Iterator[RunningGateway]:
    config = tmp_path / "gateway.yaml"
    config.write_text(
        f"upstreams: {{prod: {{url: '{vllm.address}', max_cpu_loras: 2, folder: {place}/copies}}}}\n"
        f"capture: {{folder: {tmp_path}/records}}\n"
    )
    with lora2serve.start_gateway(config, registry=place / "registry", port=0) as started:
        yield started


def plain(body: bytes) -> bytes:
    """Without what differs between any two answers of vLLM."""
    for key in (b"id", b"created", b"model"):
        body = re.sub(b'"' + key + b'": ?("[^"]*"|[0-9]+)', b'"' + key + b'":0', body)
    return body


def test_answers_are_those_of_vllm(gateway: RunningGateway, vllm: RunningServer) -> None:
    """To the byte those of the same adapter asked at vLLM itself, whole and as a stream; the control is another one."""
    own = next(model for model in vllm.models if model != "base")
    for stream in (False, True):
        direct, got = ask(vllm.address, own, stream=stream), ask(gateway.address, "towns", stream=stream)
        assert got.status == 200 and "Leon Lake" in got.text, got.body
        assert plain(got.body) == plain(direct.body)
        assert b'"model":"towns"' in got.body and b"towns-1" not in got.body
        assert ask(gateway.address, "towns@second", stream=stream).text != got.text
    assert ask(gateway.address, "base").text == ask(gateway.address, "towns@second").text, "an adapter of strength 0"
    names = [entry["id"] for entry in call(gateway.address, "/v1/models").json["data"]]
    assert names == ["base", own, "towns", "towns@champion", "towns@second", "towns@third"]
    assert call(gateway.address, "/v1/unload_lora_adapter", {"lora_name": own}).status == 403


def successes(url: str) -> float:
    """vLLM's own count of requests that it has answered."""
    text = call(url, "/metrics").body.decode()
    return sum(float(value) for value in re.findall(r"^vllm:request_success_total\{[^}]*\} ([0-9.e+]+)", text, re.M))


def test_counts_equal_the_requests(gateway: RunningGateway, vllm: RunningServer) -> None:
    """Three adapters in a server that holds two: by adapter as sent, and in all as vLLM says."""
    before = successes(vllm.address)
    sent = {"towns": 5, "towns@second": 3, "towns@third": 4, "base": 2}
    order = [model for model, count in sent.items() for _ in range(count)]
    for number, model in enumerate(order[::2] + order[1::2]):
        assert ask(gateway.address, model, max_tokens=2, stream=number % 3 == 0).status == 200
    samples = metrics(gateway.address)
    for version, count in (("1", 5), ("2", 3), ("3", 4)):
        assert total(samples, COUNT, adapter="towns", version=version, code="200") == count
    loads = total(samples, "lora2serve_adapter_loads_total", result="ok")
    assert total(samples, COUNT) == sum(sent.values()) and loads >= 3
    wait_for(lambda: successes(vllm.address) - before >= sum(sent.values()) + loads, "vLLM has counted")
    assert successes(vllm.address) - before == sum(sent.values()) + loads, "each load is warmed by one request"


def test_a_promotion_and_back(gateway: RunningGateway, vllm: RunningServer, place: Path, tmp_path: Path) -> None:
    """A stream under way ends as it began; no request is lost, or answered by neither version."""
    expected = {version: ask(gateway.address, name).text for version, name in ((1, "towns"), (2, "towns@second"))}
    long: list[Answer] = []
    body = {"max_tokens": 150, "ignore_eos": True, "stream": True}
    alone = ask(gateway.address, "towns", **body).text
    thread = threading.Thread(target=lambda: long.append(ask(gateway.address, "towns", **body)))
    answers: list[Answer] = []
    with Registry(place / "registry") as registry:
        thread.start()
        registry.promote("towns@2", force=True, why="to see it")
        end = time.monotonic() + 60
        while not answers or answers[-1].version != "towns@2":
            answers.append(ask(gateway.address, "towns"))
            assert time.monotonic() < end
        registry.rollback("towns", why="worse")
        while answers[-1].version != "towns@1":
            answers.append(ask(gateway.address, "towns"))
            assert time.monotonic() < end
        thread.join()
    assert long[0].text == alone and long[0].version == "towns@1"
    assert [answer.status for answer in answers] == [200] * len(answers)
    assert all(answer.text == expected[int(answer.version[-1])] for answer in answers)
    wait_for(lambda: len(list(TrafficStore(tmp_path / "records").entries())) == len(answers) + 4, "all is on record")


def test_a_bad_version_is_rolled_back(
    place: Path, vllm: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, by ground truth, within 200 requests: none is lost, or answered by neither version, on the way."""
    monkeypatch.setenv("LORA2SERVE_FEEDBACK_KEY", "secret")
    config = tmp_path / "gateway.yaml"
    config.write_text(
        f"upstreams: {{prod: {{url: '{vllm.address}', max_cpu_loras: 2, folder: {place}/copies}}}}\n"
        f"capture: {{folder: {tmp_path}/records}}\n"
        "routes: {towns: {challenger: {share: 0.5}, decisions: {rules: [{measure: truth}, {measure: errors}]}}}\n"
    )
    answers: list[Answer] = []
    with Registry(place / "registry") as registry:
        registry.promote("towns@2", "challenger", force=True, why="a trial")
        with lora2serve.start_gateway(config, registry=place / "registry", port=0) as started:
            url, alias = started.address, "lora2serve_alias_version"
            wait_for(lambda: total(metrics(url), alias, alias="challenger") == 2, "the trial begins", 60)
            expected = {number: ask(url, f"towns@{role}").text for number, role in ((1, "champion"), (2, "challenger"))}
            assert "Leon Lake" in expected[1] and expected[2] != expected[1]
            while registry.aliases("towns")["challenger"] == 2 and len(answers) < 200:
                answers.append(ask(url, "towns", user=f"u{len(answers)}"))
                truth = {"request_id": answers[-1].headers["x-request-id"], "expected": expected[1]}
                assert call(url, "/v1/feedback", truth, {"Authorization": "Bearer secret"}).status == 200
            assert registry.aliases("towns") == {"champion": 1, "challenger": 1, "second": 2, "third": 3}
            wait_for(lambda: total(metrics(url), alias, alias="challenger") == 1, "the gateway has seen it")
            answers += [ask(url, "towns", user=f"v{number}") for number in range(10)]
        event = registry.history("towns")[-1]
        registry.unset("towns@challenger")
    assert (event.kind, event.old, event.new) == ("rollback", 2, 1) and "worse by truth: 0 against 1" in event.why
    assert {answer.status for answer in answers} == {200}
    assert all(answer.text == expected[int(answer.version[-1])] for answer in answers)
    versions = [answer.version for answer in answers]
    assert set(versions) == {"towns@1", "towns@2"} and set(versions[-10:]) == {"towns@1"}
    entries = list(TrafficStore(tmp_path / "records").entries())
    assert len(entries) == 2 + 2 * len(answers) - 10, "each request and each feedback is on record"


def test_a_client_that_leaves(gateway: RunningGateway, vllm: RunningServer) -> None:
    """The request neither runs on in vLLM nor ends there; one that is waited for does."""
    assert ask(gateway.address, "towns").status == 200
    before = successes(vllm.address)
    place = urlsplit(gateway.address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    content = {"role": "user", "content": QUESTION}
    body = {"model": "towns", "messages": [content], "max_tokens": 200, "ignore_eos": True, "stream": True}
    connection.request("POST", CHAT, json.dumps(body).encode(), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200 and response.read1(10)
    connection.close()
    response.close()
    wait_for(lambda: total(metrics(gateway.address), "lora2serve_errors_total", kind="client_left") == 1, "it is seen")
    running = re.compile(r"^vllm:num_requests_running\{[^}]*\} ([0-9.]+)", re.M)
    wait_for(lambda: running.findall(call(vllm.address, "/metrics").body.decode()) == ["0.0"], "it runs no more")
    assert successes(vllm.address) == before
    assert ask(gateway.address, "towns", max_tokens=2).status == 200
    wait_for(lambda: successes(vllm.address) == before + 1, "the control")


@pytest.mark.slow
def test_inside_vllm(place: Path, tmp_path: Path) -> None:
    """As vLLM's own middleware, in its process."""
    from lora2serve.serving.server import ServeOptions, plan

    port = free_port()
    words = ("--enforce-eager", "--max-model-len", "256", "--max-cpu-loras", "2")
    middleware = ("--middleware", "lora2serve.gateway.middleware.GatewayMiddleware")
    options = ServeOptions(port=port, allow_updates=True, engine_arguments=(*words, *middleware))
    server = plan([place / "export-1"], options)
    config = tmp_path / "gateway.yaml"
    config.write_text(f"upstreams: {{vllm: {{folder: {place}/copies}}}}\ncapture: {{folder: {tmp_path}/records}}\n")
    environment = {
        **os.environ, **server.environment, "LORA2SERVE_GATEWAY": str(config), "VLLM_CPU_KVCACHE_SPACE": "1",
        "LORA2SERVE_REGISTRY": str(place / "registry"),
    }  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *server.command[1:]], env=environment, stdout=log, stderr=log, cwd=tmp_path
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        try:
            return call(url, "/gateway/health").status == 200
        except OSError:
            return False

    try:
        wait_for(answers, "it answers", 300)
        for stream in (False, True):
            got = ask(url, "towns", stream=stream)
            assert got.status == 200 and "Leon Lake" in got.text and got.version == "towns@1", got.body
        assert ask(url, "base").status == 200 and call(url, "/health").status == 200
        assert total(metrics(url), COUNT, adapter="towns", version="1", code="200") == 2
        assert call(url, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y"}).status == 403
    finally:
        process.terminate()
        process.wait(60)
