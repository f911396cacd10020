"""Quantized safetensors in the compressed-tensors format, as vLLM loads them."""
