"""What a worker process asks llama.cpp itself: loaded by its path, with nothing of ours imported."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_callbacks: list[object] = []  # a log callback that is collected crashes the library at its next word


class LlamaWorker:
    """The jobs; made while the parent plans."""

    def __init__(self, link: object) -> None:
        os.environ["GGML_NO_BACKTRACE"] = "1"  # an assertion's own line is its last word
        _import_bindings()

    def quantize(self, source: str, out: str, file_type: int, means: str | None) -> str:
        """``llama_model_quantize``; its reason where it fails, else nothing. ``means``: an .npz, tensor -> float32."""
        import llama_cpp

        with quiet_llama() as log:
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype, params.nthread, params.pure = file_type, 1, False
            if means:
                import numpy

                loaded = dict(numpy.load(means))  # alive until the call is done, as the array of pointers into it
                array = entries(loaded)
                params.imatrix = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
            failed = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
        return log.last_error() if failed else ""

    def tokens(self, path: str, texts: list[str], end: int | None) -> dict[str, object]:
        """``ids`` of each text, special tokens recognized and none added, ``adds_bos`` and whether the token ``end``
        ends an answer (``stops``); or ``refused``: why not.

        The file needs no tensor data: its tensors are checked against the graph, but not allocated.
        """
        import llama_cpp

        with quiet_llama() as log:
            params = llama_cpp.llama_model_default_params()
            params.no_alloc, params.load_mode, params.n_gpu_layers = True, 0, 0  # LLAMA_LOAD_MODE_NONE
            llama_cpp.llama_backend_init()
            loaded = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not loaded:
            return {"refused": log.last_error().removeprefix("llama_model_load: error loading model: ")}
        vocab = llama_cpp.llama_model_get_vocab(loaded)
        ids = [_tokenize(vocab, text.encode()) for text in texts]
        adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(vocab))
        stops = end is None or bool(llama_cpp.llama_vocab_is_eog(vocab, end))
        llama_cpp.llama_model_free(loaded)
        return {"ids": ids, "adds_bos": adds_bos, "stops": stops}


def _import_bindings() -> None:
    """``llama_cpp`` without its own class and chat formats, which take three times as long and bring numpy."""
    found = find_spec("llama_cpp")
    assert found is not None and found.submodule_search_locations is not None
    package = sys.modules["llama_cpp"] = ModuleType("llama_cpp")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["llama_cpp"] = import_module("llama_cpp.llama_cpp")


def _tokenize(vocab: object, text: bytes) -> list[int]:
    import llama_cpp

    room = len(text) + 8
    while True:
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(vocab, text, len(text), ids, room, False, True)
        if count >= 0:
            return list(ids[:count])
        room = -count  # as many as it needs


def entries(means: Mapping[str, NDArray[np.float32]]) -> Any:
    """llama.cpp's own array of importances (which stay alive as long as ``means``), ended by one without a name."""
    import llama_cpp

    array = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
    for entry, (name, values) in zip(array, means.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return array


class quiet_llama:  # noqa: N801
    """Keep llama.cpp's words off the terminal while it is used; the last error stays readable."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __enter__(self) -> quiet_llama:
        import llama_cpp

        def listen(level: int, text: bytes, data: object) -> None:
            if level >= 3:  # GGML_LOG_LEVEL_WARN
                self._lines.append(text.decode("utf-8", errors="replace").strip())

        _callbacks.append(llama_cpp.llama_log_callback(listen))
        llama_cpp.llama_log_set(_callbacks[-1], ctypes.c_void_p(0))
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def last_error(self) -> str:
        """The last line of warning or error that gives a reason."""
        reasons = [line for line in self._lines if line and not line.endswith("failed to load model")]
        return (reasons or self._lines or ["no reason given"])[-1]
