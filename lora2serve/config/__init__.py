"""Recipes: YAML to frozen dataclasses, every problem reported at once."""
