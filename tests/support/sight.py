"""What llama.cpp's multimodal library makes of an image: the rows that its projector hands to the text model.

``python -m tests.support.sight TEXT.gguf MMPROJ.gguf PIXELS.npy OUT.npy``: pixels (height, width, 3) uint8, rows (n, embd)
float32. In a process of its own, since a failed assertion there ends it.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np


def seen(text: Path, projector: Path, pixels: np.ndarray, scratch: Path) -> np.ndarray:
    """The rows for one image, in float64."""
    source, out = scratch / "pixels.npy", scratch / "rows.npy"
    np.save(source, pixels)
    words = [sys.executable, "-m", "tests.support.sight", str(text), str(projector), str(source), str(out)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(out).astype(np.float64)


def main(text: str, projector: str, source: str, out: str) -> None:
    from llama_cpp import llama_cpp, mtmd_cpp

    pixels = np.ascontiguousarray(np.load(source))
    model = llama_cpp.llama_model_load_from_file(text.encode(), llama_cpp.llama_model_default_params())
    params = mtmd_cpp.mtmd_context_params_default()
    params.use_gpu, params.n_threads, params.warmup = False, 2, False
    context = mtmd_cpp.mtmd_init_from_file(projector.encode(), model, params)
    assert context, f"{projector}: not loaded"
    height, width, _ = pixels.shape
    image = mtmd_cpp.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    marker = mtmd_cpp.mtmd_default_marker()
    prompt = mtmd_cpp.mtmd_input_text(marker, len(marker), False, True)
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    images = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(image)
    assert mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(prompt), images, 1) == 0
    parts = [mtmd_cpp.mtmd_input_chunks_get(chunks, n) for n in range(mtmd_cpp.mtmd_input_chunks_size(chunks))]
    (chunk,) = (c for c in parts if mtmd_cpp.mtmd_input_chunk_get_type(c) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE)
    assert mtmd_cpp.mtmd_encode_chunk(context, chunk) == 0
    shape = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk), llama_cpp.llama_model_n_embd_inp(model)
    np.save(out, np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(context), shape))


if __name__ == "__main__":
    main(*sys.argv[1:])
