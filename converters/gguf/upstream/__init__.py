"""GGUF of every other architecture, laid out by llama.cpp\'s own converter."""
