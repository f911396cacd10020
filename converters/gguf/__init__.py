"""GGUF for llama.cpp, Ollama and LM Studio: from folded row blocks to a quantized file in one pass."""

from converters.gguf import import_gguf
from lora2serve.system import own_process

if own_process.is_ours():
    import_gguf.without_extras()  # before any module in here imports gguf
