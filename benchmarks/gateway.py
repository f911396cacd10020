"""The gateway beside no gateway and beside LiteLLM's proxy: ``make bench-gateway``.

Each is a process of its own, and so is the server behind them, which answers at once. The rounds follow one another.

- What is added to a stream: 20 of them, a token every 25 ms that carries the time at which it was sent (one clock
  for all processes); how much later a client has it than without a gateway, for first tokens and for all.
- Requests a second: 20 clients, each with its next request once it has the answer to the last.

``python -m benchmarks.gateway --vllm EXPORT`` measures in a real vLLM, with an adapter export, the first request to a
version that was promoted: beside a warm one, and beside one to an adapter that was only loaded.
Both write their part of benchmarks/gateway.json, and print it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine

STREAMS, TOKENS, STEP = 20, 40, 0.025  # seconds between two tokens
USAGE = {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}  # told at once with the last token, as by vLLM
SECONDS = float(os.environ.get("SECONDS_EACH", "5"))
ROUNDS = int(os.environ.get("ROUNDS", "3"))
PROMOTIONS = 5
CHAT = "/v1/chat/completions"
LITELLM = "litellm[proxy]>=1.80"
KEY = f"sk-{secrets.token_hex(32)}"  # LiteLLM does not start without one
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


async def server(scope: Mapping[str, Any], receive: Callable[[], Awaitable[Mapping[str, Any]]], send: Send) -> None:
    """What stands behind: the least that speaks OpenAI's API."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if scope["method"] == "GET":
        await _send(send, {"object": "list", "data": [{"id": "model", "object": "model"}]})
        return
    content = json.loads(body)
    shared = {"id": "c", "object": "chat.completion", "created": 1, "model": content["model"]}
    if not content.get("stream"):
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "An answer of a few words."},
            "finish_reason": "stop",
        }
        await _send(send, {**shared, "choices": [choice], "usage": USAGE})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for number in range(TOKENS):
        finish = "stop" if number == TOKENS - 1 else None
        delta = {"role": "assistant", "content": f"{time.monotonic_ns()} "}
        event = {
            **shared,
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }
        await send({"type": "http.response.body", "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True})
        if not finish:
            await asyncio.sleep(STEP)
    usage = {**shared, "object": "chat.completion.chunk", "choices": [], "usage": USAGE}
    told = f"data: {json.dumps(usage)}\n\n" if (content.get("stream_options") or {}).get("include_usage") else ""
    await send({"type": "http.response.body", "body": f"{told}data: [DONE]\n\n".encode()})


async def _send(send: Send, content: object) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def process(command: Sequence[str], url: str, log: Path, **environment: str) -> Iterator[None]:
    """A process that answers at ``url`` before the block begins, and ends with it."""
    with log.open("wb") as out:
        child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=out, stderr=out)
    try:
        for _ in range(2400):
            if child.poll() is not None:
                raise SystemExit(f"{command[0]} ended: {log.read_text()[-2000:]}")
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.1)
        yield
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()


def body(model: str, *, stream: bool) -> bytes:
    """One request."""
    messages = [{"role": "user", "content": "Who governs Wexley?"}]
    return json.dumps({"model": model, "messages": messages, "stream": stream}).encode()


async def streams(url: str, model: str) -> tuple[list[float], list[float]]:
    """Milliseconds on the way: of first tokens, and of all."""
    import aiohttp

    first: list[float] = []
    every: list[float] = []

    async def one(session: aiohttp.ClientSession, wait: float) -> None:
        await asyncio.sleep(wait)  # not all at once
        async with session.post(url + CHAT, data=body(model, stream=True), headers=KIND) as response:
            number = 0
            async for line in response.content:
                now = time.monotonic_ns()
                if line.startswith(b"data: {") and b'"content"' in line:
                    choices = json.loads(line[6:])["choices"]
                    sent = ((choices[0].get("delta") or {}).get("content") or "").strip() if choices else ""
                    if sent:
                        every.append((now - int(sent)) / 1e6)
                        if number == 0:
                            first.append(every[-1])
                        number += 1

    async with aiohttp.ClientSession() as session:
        for _ in range(3):
            await asyncio.gather(*(one(session, number * STEP / STREAMS) for number in range(STREAMS)))
    return first, every


KIND = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}


async def throughput(url: str, model: str) -> float:
    """Whole answers a second."""
    import aiohttp

    async def client(session: aiohttp.ClientSession, end: float) -> int:
        count = 0
        while time.perf_counter() < end:
            async with session.post(url + CHAT, data=body(model, stream=False), headers=KIND) as response:
                content = await response.read()
                assert response.status == 200, content
                count += 1
        return count

    async with aiohttp.ClientSession() as session:
        await client(session, time.perf_counter() + 0.5)
        start = time.perf_counter()
        counts = await asyncio.gather(*(client(session, start + SECONDS) for _ in range(STREAMS)))
    return sum(counts) / (time.perf_counter() - start)


def registry_of_two(folder: Path) -> None:
    """Two versions without weights to speak of; both are served under names of their own."""
    from lora2serve import Registry
    from tests.support.gateways import add_versions

    with Registry(folder / "registry") as registry:
        add_versions(registry, folder, 2)
        registry.promote("towns@1")


def start_all(stack: ExitStack, folder: Path, litellm: bool) -> dict[str, tuple[str, str]]:
    """What is compared: name -> address and model."""
    ports = {name: _free_port() for name in ("server", "gateway", "shadow", "litellm")}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    script = f"import uvicorn; uvicorn.run('benchmarks.gateway:server', port={ports['server']}, log_level='critical')"
    stack.enter_context(process([sys.executable, "-c", script], urls["server"], folder / "server.log"))
    for name in ("gateway", "shadow"):
        place = folder / name
        place.mkdir()
        shutil.copytree(folder / "registry", place / "registry")
        serves = {f"towns@{number}": f"model-{number}" for number in (1, 2)}
        upstreams = {"prod": {"url": urls["server"], "serves": serves, "adapters": False}}
        (place / "gateway.yaml").write_text(
            json.dumps({"upstreams": upstreams, "capture": {"folder": str(place / "records")}})
        )
        if name == "shadow":
            from lora2serve import Registry

            with Registry(place / "registry") as registry:
                registry.promote("towns@2", "shadow")
        words = [
            "gateway",
            str(place / "gateway.yaml"),
            "--registry",
            str(place / "registry"),
            "--port",
            str(ports[name]),
        ]
        command = [sys.executable, "-m", "lora2serve", *words]
        stack.enter_context(process(command, f"{urls[name]}/gateway/health", folder / f"{name}.log"))
    found = {
        "no gateway": (urls["server"], "towns"),
        "gateway": (urls["gateway"], "towns"),
        "with a shadow": (urls["shadow"], "towns"),
    }
    if litellm:
        params = {"model": "openai/towns", "api_base": f"{urls['server']}/v1", "api_key": "x"}
        (folder / "litellm.yaml").write_text(
            json.dumps(
                {
                    "model_list": [{"model_name": "towns", "litellm_params": params}],
                    "general_settings": {"master_key": KEY},
                }
            )
        )
        words = ["--config", str(folder / "litellm.yaml"), "--port", str(ports["litellm"]), "--host", "127.0.0.1"]
        program = folder / "venv" / "bin" / "litellm"
        stack.enter_context(
            process([str(program), *words], f"{urls['litellm']}/health/liveliness", folder / "litellm.log")
        )
        found["LiteLLM"] = (urls["litellm"], "towns")
    return found


def install_litellm(folder: Path) -> str:
    """In an environment of its own; its version."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", LITELLM], check=True)
    show = "from importlib.metadata import version; print(version('litellm'))"
    return subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.strip()


def compare(found: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, float]]:
    """The figures of each, over all rounds."""
    rates: dict[str, list[float]] = {name: [] for name in found}
    delays: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in found}
    for number in range(ROUNDS):
        for name, (url, model) in found.items():
            rates[name].append(asyncio.run(throughput(url, model)))
            for kept, new in zip(delays[name], asyncio.run(streams(url, model)), strict=True):
                kept.extend(new)
            print(f"round {number + 1}, {name}: {rates[name][-1]:.0f} requests/s", file=sys.stderr, flush=True)
    return {
        name: {
            "requests_per_second": round(statistics.median(rates[name]), 1),
            **{
                f"{what}_{label}_ms": round(_quantile(values, share), 3)
                for what, values in zip(("first", "token"), delays[name], strict=True)
                for label, share in (("median", 0.5), ("p99", 0.99))
            },
        }
        for name in found
    }


def first_requests(export: Path, folder: Path) -> dict[str, float]:
    """Median seconds of first requests: to a version promoted, to a warm one, to an adapter that was only loaded."""
    import lora2serve
    from tests.gateway.test_vllm import ask, other_version
    from tests.support.gateways import call

    words = ["--max-loras", "16", "--max-cpu-loras", "16", "--enforce-eager", "--max-model-len", "256"]
    warm, first, cold = [], [], []
    with lora2serve.Registry(folder / "live") as registry, ExitStack() as stack:
        for number in range(1, PROMOTIONS + 2):
            registry.add(other_version(export, folder / f"export-{number}", 1.0 / number), name="towns", unproven=True)
        registry.promote("towns@1", force=True, why="a benchmark")
        server = stack.enter_context(
            lora2serve.serve(folder / "export-1", port=_free_port(), allow_updates=True, engine_arguments=words)
        )
        gateway = stack.enter_context(
            lora2serve.start_gateway(upstreams=[f"prod={server.address}"], registry=registry, port=0)
        )

        def timed(url: str, model: str) -> tuple[float, str]:
            start = time.perf_counter()
            got = ask(url, model, max_tokens=8)
            assert got.status == 200, got.body
            return time.perf_counter() - start, got.version

        for number in range(2, PROMOTIONS + 2):
            warm += [timed(gateway.address, "towns")[0] for _ in range(8)][3:]
            registry.promote(f"towns@{number}", force=True, why="a benchmark")
            asked = iter(lambda: timed(gateway.address, "towns"), None)
            first.append(next(seconds for seconds, version in asked if version == f"towns@{number}"))
            path = str(other_version(export, folder / f"alone-{number}", 0.5 / number).resolve())
            load = {"lora_name": f"alone-{number}", "lora_path": path}
            assert call(server.address, "/v1/load_lora_adapter", load).status == 200
            cold.append(timed(server.address, f"alone-{number}")[0])
    figures = {"warm": warm, "first_after_promotion": first, "first_after_loading_alone": cold}
    return {name: round(statistics.median(seconds), 4) for name, seconds in figures.items()}


def main() -> None:
    """Measure, and write it down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway")
    parser.add_argument("--no-litellm", action="store_true", help="leave LiteLLM out: it is downloaded")
    parser.add_argument(
        "--vllm", type=Path, metavar="EXPORT", help="measure first requests in vLLM, by an adapter export"
    )
    options = parser.parse_args()
    file = ROOT / "benchmarks" / "gateway.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory(prefix="bench-gateway-") as name:
        if options.vllm:
            result["first_request"] = {
                "machine": machine(),
                "command": "python -m benchmarks.gateway --vllm EXPORT",
                "median_seconds": first_requests(options.vllm.resolve(), Path(name)),
                "load_at_the_end": round(os.getloadavg()[1], 1),
            }
        else:
            kept = {key: result[key] for key in ("first_request",) if key in result}
            result = {**streams_and_rates(Path(name), not options.no_litellm), **kept}
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=2))


def streams_and_rates(folder: Path, with_litellm: bool) -> dict[str, Any]:
    """No gateway, ours and LiteLLM's beside each other."""
    version = install_litellm(folder) if with_litellm else ""
    registry_of_two(folder)
    with ExitStack() as stack:
        figures = compare(start_all(stack, folder, with_litellm))
    result: dict[str, Any] = {
        "machine": machine(),
        "command": "make bench-gateway",
        "rounds": ROUNDS,
        "figures": figures,
        "load_at_the_end": round(os.getloadavg()[1], 1),
    }
    if version:
        ratio = figures["gateway"]["requests_per_second"] / figures["LiteLLM"]["requests_per_second"]
        result |= {"litellm": version, "times_litellm": round(ratio, 2)}
    plain = figures["no gateway"]
    result["added_ms"] = {
        each: {key: round(value - plain[key], 3) for key, value in own.items() if key.endswith("_ms")}
        for each, own in figures.items()
        if own is not plain
    }
    return result


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
