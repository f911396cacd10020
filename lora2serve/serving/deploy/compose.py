"""Docker Compose: one machine, with the files mounted from it."""

from __future__ import annotations

from lora2serve.serving.deploy.server_spec import IMAGE, PORT, Document, ServerSpec

HUB = {"type": "volume", "source": "huggingface", "target": "/root/.cache/huggingface"}
CHECK = f"import urllib.request; urllib.request.urlopen('http://localhost:{PORT}/health', timeout=5)"


def header(spec: ServerSpec) -> list[str]:
    return ["VLLM_API_KEY=... docker compose up; clients send it as a bearer token"]


def documents(spec: ServerSpec) -> list[Document]:
    volumes: dict[str, object] = {} if spec.local else {"volumes": {HUB["source"]: {}}}
    return [{"name": spec.name, "services": {"vllm": _service(spec)}, **volumes}]


def _service(spec: ServerSpec) -> dict[str, object]:
    command = [spec.model, *spec.arguments(), "--host", "0.0.0.0", "--port", str(PORT)]
    devices = [{"driver": "nvidia", "count": spec.gpus, "capabilities": ["gpu"]}]
    return {
        "image": IMAGE,
        "entrypoint": ["vllm", "serve"],
        "command": [word.replace("$", "$$") for word in command],  # Compose would read variables into it
        "environment": {
            "VLLM_API_KEY": "${VLLM_API_KEY:?set it in the environment or in .env}",
            "VLLM_NO_USAGE_STATS": "1",
            **({} if spec.local else {"HF_TOKEN": "${HF_TOKEN:-}"}),
        },
        "ports": [f"{spec.host}:{spec.port}:{PORT}"],
        "volumes": [*_mounts(spec), *([] if spec.local else [HUB])],
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


def _mounts(spec: ServerSpec) -> list[Document]:
    sources = {spec.adapter_path(name): folder for name, folder in spec.adapters.items()}
    sources |= {spec.model: spec.local} if spec.local else {}
    return [
        {"type": "bind", "source": source, "target": target, "read_only": True}
        for target, source in sorted(sources.items())
    ]
