"""vLLM's own server, started as ``lora2serve serve`` starts it: a merged export, or a LoRA by name."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from lora2serve import serve
from lora2serve.parity.engines.openai import OpenAI


class VllmServer(OpenAI):
    """The server of ``export`` with its own serve.yaml, template and names, on a free port; ``base`` for adapters.

    Float32 on a CPU; on a GPU the type that the export is served in. It ends with this process's group.
    """

    def __init__(self, export: str, base: str, tokenizer: str, window: int) -> None:
        from vllm.platforms import current_platform

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        extra = ["--max-model-len", str(window), "--max-logprobs", "-1", "--enforce-eager", "--seed", "0"]
        if current_platform.is_cpu():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            extra += ["--dtype", "float32"]
        serving = serve.plan([Path(export)], base=base, engine="vllm", host="127.0.0.1", port=port, extra=extra)
        log = Path(tempfile.gettempdir()) / f"lora2serve-parity-{os.getpid()}.log"
        try:
            self.process = serve.start(serving, log)
        finally:
            log.unlink(missing_ok=True)
        super().__init__(serving.address, tokenizer, serving.models[-1])
        self.version = f"vllm server, {self.model}"
