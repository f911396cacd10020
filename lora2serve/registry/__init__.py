"""Versions of adapters and of what was exported from them: their records, aliases, events and files."""
