"""vLLM's own server, started as ``lora2serve serve`` starts it: a merged export, or a LoRA by name."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from lora2serve.errors import EngineError
from lora2serve.parity_check.engines.openai_engine import BUSY, REFUSED, OpenAI
from lora2serve.parity_check.engines.vllm_engine import CPU_ATTENTION, cpu_dtype, longest, no_kernel
from lora2serve.serving import server, server_process
from lora2serve.serving.server import ServeOptions
from lora2serve.system import scratch
from lora2serve.system.http import HttpStatus
from lora2serve.system.json_values import Json

# The engine computes in its own process, as on one GPU, and starts none for that: 19 s of CPU instead of 28. That one
# binds itself to the machine's first cores, on which the one of every other server is as well.
ONE_PROCESS_LESS = "0"


class VllmServer(OpenAI):
    """The server of ``export`` with its own serve.yaml, template and names, on a free port; ``base`` for adapters.

    On a CPU in float32 where its kernels can; on a GPU in the type that the export is served in. It ends with this
    process's group. ``gpu_memory`` is the share of the GPU's memory that it may take; None for vLLM's default.
    """

    def __init__(self, export: str, base: str, tokenizer: str, window: int, gpu_memory: float | None = None) -> None:
        from vllm.platforms import current_platform

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.dtype: str | None = None
        merged = (Path(export) / "config.json").is_file()
        room = longest(export if merged else base, window)
        arguments = ["--max-model-len", str(room), "--max-logprobs", "-1", "--enforce-eager", "--seed", "0"]
        if current_platform.is_cpu():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = ONE_PROCESS_LESS
            self.dtype = cpu_dtype(export if merged else base)
            arguments += ["--dtype", self.dtype, "--attention-backend", CPU_ATTENTION]
        elif gpu_memory is not None:
            arguments += ["--gpu-memory-utilization", str(gpu_memory)]
        options = ServeOptions("vllm", base, port=port, engine_arguments=tuple(arguments))
        command = server.plan([Path(export)], options)
        log = scratch.log_file("vllm-server")
        try:
            self.process = server_process.start(command, log)
        except EngineError as error:
            raise no_kernel(error.message) or error from None
        self._log = log.open(encoding="utf-8", errors="replace")
        log.unlink()
        super().__init__(command.address, tokenizer, command.models[-1])
        self.version = f"vllm server, {self.model}"

    def _ask_once(self, method: str, path: str, body: Mapping[str, object] | None) -> Json:
        """The answer; of a server that broke, what its log says."""
        try:
            return super()._ask_once(method, path, body)
        except EngineError as error:
            if isinstance(error, HttpStatus) and error.status in (*REFUSED, *BUSY):
                raise
            self._log.seek(0)
            reason = server_process.first_error(self._log.read())
            raise EngineError(f"{error.message.split(' answers ')[0]}: {reason}") from None
