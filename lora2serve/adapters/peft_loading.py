"""Adapters through PEFT's own layers, those of kinds that PEFT does not have, too."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.config.train_methods import OWN

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Module


def load_adapter(model: Module, adapter: str | Path, name: str = "default") -> PeftModel:
    """``model`` with the adapter of that directory, which cannot be trained further."""
    from peft import PeftModel

    for module in OWN.values():
        import_module(module)
    loaded: PeftModel = PeftModel.from_pretrained(model, str(adapter), name)
    return loaded
