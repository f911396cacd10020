"""llama.cpp's own answers, from a process of its own: an assertion that fails there ends that one, and not ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict

from lora2serve.errors import EngineError, ExportError
from lora2serve.system import scratch
from lora2serve.system.worker_process import WorkerProcess

if TYPE_CHECKING:
    from converters.gguf.imatrix import Matrix

WORKER = f"{Path(__file__).with_name('llama_child.py')}:LlamaWorker"


class TokenAnswer(TypedDict, total=False):
    """``ids`` of each text, ``adds_bos`` and ``stops``; or ``refused``: why the file is not loaded."""

    ids: list[list[int]]
    adds_bos: bool
    stops: bool
    refused: str


class Llama:
    """A context manager: entering it starts the process, which imports while we plan; leaving it ends it.

    ``at_once`` false: the first question starts it, where there may be none.
    """

    def __init__(self, at_once: bool = True) -> None:
        self._at_once = at_once
        self.installed = find_spec("llama_cpp") is not None
        self._folder = scratch.temporary_folder("llama")
        self._child: WorkerProcess | None = None

    def __enter__(self) -> Llama:
        if self.installed and self._at_once:
            self._started()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            self._child.__exit__(kind, error, trace)
        self._folder.cleanup()

    def quantize(self, source: Path, out: Path, file_type: int, means: Mapping[str, Matrix] | None) -> str:
        """Quantize a file to a LLAMA_FTYPE; what llama.cpp says where it refuses, else nothing."""
        import numpy

        matrices = None
        if means is not None:
            matrices = Path(self._folder.name) / "means.npz"
            arrays: dict[str, Any] = dict(means)  # numpy takes one of its own options for an array's name
            numpy.savez(matrices, **arrays)
        return str(self._call("quantize", source=source, out=out, file_type=file_type, means=matrices))

    def tokens(self, path: Path, texts: Sequence[str], end: int | None) -> TokenAnswer:
        """The texts' ids by the vocabulary of a file, and whether it knows that ``end`` ends an answer."""
        answer: TokenAnswer = self._call("tokens", path=path, texts=list(texts), end=end)
        return answer

    def _call(self, job: str, **arguments: Any) -> Any:
        assert self.installed
        try:
            return self._started().call(job, **arguments)
        except EngineError as error:
            hint = f"please report this, with the model's name; --target vllm serves it; {error.hint}"
            raise ExportError(error.message, hint) from None

    def _started(self) -> WorkerProcess:
        if self._child is None:
            log = Path(self._folder.name) / "log"
            self._child = WorkerProcess("llama.cpp", WORKER, {}, log, fork="never")  # it needs no torch
        return self._child
