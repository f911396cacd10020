"""A running Ollama, by its REST API: what an export is handed to with ``--create``, and what parity asks."""

from __future__ import annotations

from lora2serve.serving.ollama.ollama_client import NoServer, OllamaClient, server_address
from lora2serve.serving.ollama.ollama_create import QUESTION, ask, command, create, refuse_name

__all__ = ["QUESTION", "NoServer", "OllamaClient", "ask", "command", "create", "refuse_name", "server_address"]
