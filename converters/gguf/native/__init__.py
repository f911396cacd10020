"""GGUF from our own tables, for the architectures that most people train."""
