"""Imports the gguf package without what it does not need here.

Its vocab module imports mistral_common where that is installed (vLLM brings it), and with it OpenCV: 50 MB and a third
of a second in every process; and sentencepiece, 3 MB more, which vocab.py imports where a model has such a tokenizer.
It takes an ImportError there as "not installed", so it gets one. Whoever imports ``gguf.vocab`` afterwards gets it
without them too, so this is done in a process of our own and nowhere else.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from types import ModuleType

HIDDEN = {"mistral_common", "sentencepiece"}


def without_extras() -> None:
    """Import it now; nothing is done where somebody has imported it already."""
    if "gguf" in sys.modules:
        return
    hidden = HIDDEN - sys.modules.keys()
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  # None: "raises ModuleNotFoundError"
    modules.update(dict.fromkeys(hidden))
    try:
        with suppress(ModuleNotFoundError):  # without gguf itself the export says so, with the way out
            import gguf  # noqa: F401
    finally:
        for name in hidden:
            del modules[name]
