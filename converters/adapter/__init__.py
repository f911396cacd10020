"""Raw LoRA adapters for multi-LoRA vLLM."""

from converters.adapter.adapter_sink import AdapterOptions, AdapterSink

__all__ = ["AdapterOptions", "AdapterSink"]
