"""Ollama: a GGUF, and a Modelfile whose template is proven equal to the chat template."""
