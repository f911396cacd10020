"""Docker Compose: one machine, the files mounted where they lie."""

from __future__ import annotations

from typing import Any

from lora2serve.serving.deploy.server_spec import IMAGE, PORT, ServerSpec

HUB = {"type": "volume", "source": "huggingface", "target": "/root/.cache/huggingface"}
CHECK = f"import urllib.request; urllib.request.urlopen('http://localhost:{PORT}/health', timeout=5)"


def header(facts: ServerSpec) -> list[str]:
    return ["VLLM_API_KEY=... docker compose up; clients send it as a bearer token"]


def documents(facts: ServerSpec) -> list[dict[str, Any]]:
    volumes: dict[str, Any] = {} if facts.local else {"volumes": {HUB["source"]: {}}}
    return [{"name": facts.name, "services": {"vllm": _service(facts)}, **volumes}]


def _service(facts: ServerSpec) -> dict[str, Any]:
    command = [facts.model, *facts.arguments(), "--host", "0.0.0.0", "--port", str(PORT)]
    devices = [{"driver": "nvidia", "count": facts.gpus, "capabilities": ["gpu"]}]
    return {
        "image": IMAGE,
        "entrypoint": ["vllm", "serve"],
        "command": [word.replace("$", "$$") for word in command],  # Compose would read variables into it
        "environment": {
            "VLLM_API_KEY": "${VLLM_API_KEY:?set it in the environment or in .env}",
            "VLLM_NO_USAGE_STATS": "1",
            **({} if facts.local else {"HF_TOKEN": "${HF_TOKEN:-}"}),
        },
        "ports": [f"{facts.host}:{facts.port}:{PORT}"],
        "volumes": [*_mounts(facts), *([] if facts.local else [HUB])],
        "ipc": "host",  # tensor parallel workers share memory
        "deploy": {"resources": {"reservations": {"devices": devices}}},
        "healthcheck": {
            "test": ["CMD", "python3", "-c", CHECK],
            "interval": "10s",
            "timeout": "10s",
            "retries": 3,
            "start_period": "15m",
        },
        "restart": "unless-stopped",
    }


def _mounts(facts: ServerSpec) -> list[dict[str, Any]]:
    sources = {facts.adapter_path(name): folder for name, folder in facts.adapters.items()}
    sources |= {facts.model: facts.local} if facts.local else {}
    return [
        {"type": "bind", "source": source, "target": target, "read_only": True}
        for target, source in sorted(sources.items())
    ]
