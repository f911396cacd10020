"""A Hub on this machine for the client in this process, and small real exports to push to it."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lora2serve.artifacts import staging
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import Manifest
from tests.support.hub_server import HubServer
from tests.support.manifests import change_manifest

TOKEN = "hf_" + "CanaryCanaryCanaryCanaryCanaryCana"
LINEAGE = {
    "base": {
        "id": "acme/base-1b",
        "revision": "0" * 40,
        "path": "/home/someone/base-1b",
        "fingerprint": {"tensors": "ab"},
    },
    "merge_base": "original",
    "adapter": {"path": "/home/someone/adapter", "sha256": {"adapter_model.safetensors": "cd"}},
}
CERTIFICATES = lru_cache(ssl.create_default_context)  # read once: no address here asks for them
MET = {"met": True, "engines": {"vllm": {"status": "met", "mean_kl": 0.0001, "top1": 0.999}}}


def export(
    folder: Path,
    target: str,
    quant: str | None = None,
    parity: Any = MET,
    seed: int = 0,
    content: bytes | None = None,
    split: Mapping[str, bytes] | None = None,
    **extra: bytes,
) -> Path:
    """A published export with real files of the target's kind, made through ``Output`` as the exporters do."""
    from safetensors.numpy import save

    draw = np.random.default_rng(seed)
    weights = save({"w": draw.standard_normal((64, 48)).astype(np.float32)})
    gguf = content or b"GGUF" + draw.bytes(5000)
    files: dict[str, Mapping[str, bytes]] = {
        "vllm": {"config.json": b'{"model_type": "llama"}', "model.safetensors": weights, "serve.yaml": b"dtype: float32\n"},
        "adapter": {"adapter_config.json": b'{"peft_type": "LORA", "r": 4}', "adapter_model.safetensors": weights},
        "gguf": split or {f"demo-{quant}.gguf": gguf},
        "gguf-adapter": {"demo-lora.gguf": gguf},
        "lmstudio": {f"lora2serve/demo/demo-{quant}.gguf": gguf},
        "ollama": {f"demo-{quant}.gguf": gguf, "Modelfile": f"FROM ./demo-{quant}.gguf\n".encode(),
                   "template": b"{{ .Prompt }}", "params": b'{"stop": ["x"]}'},
    }[target]  # fmt: skip
    path = folder / (f"{target}-{quant}" if quant else target)
    with staging.opened(path, overwrite=True) as out:
        for name, content in {**files, **extra}.items():
            out.bytes(name, content)
        facts = {"target": target, "quant": quant, "name": "demo", **LINEAGE, "versions": {"peft": "0.21"}}
        out.publish(Manifest.from_json({"format": 1, **facts, "files": {}}))
    if parity is not None:
        change_manifest(path, parity=parity)
    return path


def same(hub: HubServer, repo_id: str, path: Path, ref: str = "main") -> None:
    """The repository's files are the export's, byte for byte, and nothing else is there."""
    there = hub.repos[repo_id].files(ref)
    listed = Export.open(path).manifest.files
    assert set(there) == {*listed, "lora2serve.json", "README.md", ".gitattributes"}
    for name in listed:
        assert hub.read(there[name]) == (path / name).read_bytes(), name


def client_env(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    """The environment of a client in another process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"} | more


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        server.tokens[TOKEN] = ("user", "write")
        connect(server, tmp_path / "home", monkeypatch)
        yield server
        # The rule that holds over all tests: the token goes to the Hub's own address in a header, and nowhere else.
        assert not [
            request
            for request in server.requests
            if request.endpoint in ("put", "part", "storage") and request.authorized
        ]
        assert not [data for data in server.received if TOKEN.encode() in data]


def connect(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub in this process talk to ``server``; its waits are cut short, nothing else is changed."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants._HF_DEFAULT_ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(ssl, "create_default_context", CERTIFICATES)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.02))))
    monkeypatch.setattr(
        "lora2serve.hub.retry.time", SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.02)))
    )
    _http.close_session()
