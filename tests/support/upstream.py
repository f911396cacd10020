"""llama.cpp's own converter and quantizer: the oracle for the GGUF tests."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.support.llama_cpp_source import llama_cpp_dir

# Its converter, kept open: importing torch and transformers takes longer than converting a small model. It knows
# pre-tokenizers by a hash of real vocabularies, which a small one of ours is not; so the name may be given.
PROGRAM = """
import contextlib, json, runpy, sys, traceback
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.base as base
by_hash = base.TextModel.get_vocab_base_pre
for line in sys.stdin:
    tree, pre, words = json.loads(line)
    base.TextModel.get_vocab_base_pre = (lambda self, tokenizer: pre) if pre else by_hash
    sys.argv = [tree + "/convert_hf_to_gguf.py", *words]
    problem = ""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        problem = traceback.format_exc()
    print(json.dumps(problem), flush=True)
"""


@lru_cache(maxsize=1)
def _converter() -> subprocess.Popen[str]:
    """Ends with this process, when its standard input does."""
    command = [sys.executable, "-c", PROGRAM, str(llama_cpp_dir())]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def convert(model: Path, out: Path, *words: str, pre: str = "", outtype: str = "f16") -> Path:
    """``convert_hf_to_gguf.py`` of the same version as the library."""
    process = _converter()
    assert process.stdin is not None
    assert process.stdout is not None
    arguments = [str(model), "--outfile", str(out), "--outtype", outtype, *words]
    process.stdin.write(json.dumps([str(llama_cpp_dir()), pre, arguments]) + "\n")
    process.stdin.flush()
    error = json.loads(process.stdout.readline())
    assert error == "", error[-1500:]
    return out


def quantize(source: Path, out: Path, kind: str, imatrix: Any = None) -> Path:
    """``llama_model_quantize`` to a preset; ``imatrix``: GGUF tensor -> means."""
    import llama_cpp

    from converters.gguf import presets
    from converters.gguf.llama import llama_child

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = presets.PRESETS[kind]
    entries = llama_child.entries(imatrix) if imatrix else None
    if entries is not None:
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    with llama_child.quiet_llama() as log:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    assert failed == 0, log.last_error()
    return out
