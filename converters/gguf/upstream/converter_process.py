"""The conversation with llama.cpp's own converter, which runs in a worker process: upstream_child.py.

Its ``gguf`` is newer than PyPI's and has the same name, and its classes are somebody else's code: neither is imported
here. What passes: one plan, then one tensor after another, as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from converters.gguf.upstream.converter_messages import FilePlan, Float32Values, Request
from lora2serve.errors import EngineError, ExportError
from lora2serve.system import scratch
from lora2serve.system.worker_process import WorkerProcess

if TYPE_CHECKING:
    from torch import Tensor

WORKER = f"{Path(__file__).with_name('upstream_child.py')}:ConverterWorker"


class UpstreamRefused(EngineError):
    """The converter ran and says no."""


class UpstreamProcess(WorkerProcess):
    """The worker, whose refusals can be told from its end."""

    def failed(self, message: Mapping[str, str]) -> EngineError:
        return UpstreamRefused(message["error"])

    def died(self, code: int, last_line: str) -> EngineError:
        return EngineError(f"ended with code {code}: {last_line}")


class ConverterProcess:
    """``request``: what the worker is told of the model; ``read`` gives a whole tensor, in the type named there."""

    def __init__(self, tree: Path, request: Request, read: Callable[[str], Tensor]) -> None:
        self._architecture, self._read, self._lock = request["architecture"], read, Lock()
        self._folder = scratch.temporary_folder("converter")
        log = Path(self._folder.name) / "log"
        self._worker = UpstreamProcess("llama.cpp's converter", WORKER, {"tree": str(tree), "request": request}, log)

    def plan(self) -> FilePlan:
        """See ``ConverterWorker.plan``."""
        plan: FilePlan = self._call("plan")
        plan["keys"] = [(key, _immutable(value), kind, inner) for key, value, kind, inner in plan["keys"]]
        for tensor in plan["tensors"]:
            if "stored" in tensor:
                tensor["stored"] = bytes(tensor["stored"])
        return plan

    def compute(self, target: str, sources: Mapping[str, Tensor]) -> Tensor:
        """The values of one planned tensor, float32; what it needs beside ``sources`` is read."""
        with self._lock:
            values = {name: _bytes(tensor) for name, tensor in sources.items()}
            return as_tensor(self._call("compute", target=target, sources=values))

    def close(self) -> None:
        """End the worker. Safe twice."""
        self._worker.close()
        self._folder.cleanup()

    def _call(self, job: str, **arguments: Any) -> Any:
        try:
            return self._worker.call(job, answer=lambda name: _bytes(self._read(name)), **arguments)
        except UpstreamRefused as error:
            raise self._refused(error.message) from None
        except EngineError as error:
            raise ExportError(
                f"llama.cpp's converter {error.message}",
                "is there enough memory? Its own program (convert_hf_to_gguf.py) may say more",
            ) from None

    def _refused(self, reason: str) -> ExportError:
        hint = "serve it with --target vllm"
        if "pre-tokenizer was not recognized" in reason:
            hint = "name it with --pre (such as llama-bpe, qwen2, gpt-2): it is checked before it is used"
            reason = "its table of pre-tokenizers does not have this one"
        elif "preprocessor" in reason or "image_mean" in reason:
            hint = "copy the base's preprocessor_config.json into the model directory"
        return ExportError(f"architecture {self._architecture}: llama.cpp's converter refuses it: {reason}", hint)


def _bytes(values: Tensor) -> memoryview:
    import torch

    flat = values.contiguous().reshape(-1)
    content: memoryview = flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")
    return content


def as_tensor(answer: Float32Values) -> Tensor:
    """The array as the child sent it."""
    import torch

    values = answer["values"]
    flat = torch.frombuffer(values, dtype=torch.float32) if values else torch.empty(0)
    return flat.reshape(answer["shape"])


def _immutable(value: object) -> object:
    """Bytes as gguf's writer knows them."""
    if isinstance(value, bytearray):
        return bytes(value)
    return [_immutable(part) for part in value] if isinstance(value, list) else value
