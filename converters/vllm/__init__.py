"""Merged directories for vLLM: 16 bits, compressed-tensors, AWQ and GPTQ."""
