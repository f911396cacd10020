"""Engines started here, Ollama and LM Studio, and what clusters need."""
