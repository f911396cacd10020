"""Raw LoRA adapters for multi-LoRA vLLM."""

from converters.adapter.sink import AdapterOptions, AdapterSink

__all__ = ["AdapterOptions", "AdapterSink"]
