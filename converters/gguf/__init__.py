"""GGUF for llama.cpp, Ollama and LM Studio: from folded row blocks to a quantized file in one pass."""

from converters.gguf import import_gguf  # noqa: F401 (before whatever imports gguf)
