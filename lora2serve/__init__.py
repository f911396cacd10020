"""From a QLoRA fine-tune to a served model, with proof that what is served is what was trained."""

__version__ = "0.1.0"
