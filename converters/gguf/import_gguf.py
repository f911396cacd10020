"""Imports the gguf package without what it does not need here.

Its vocab module imports mistral_common where that is installed (vLLM brings it), and with it OpenCV: 50 MB and a third
of a second in every process; and sentencepiece, 3 MB more, which vocab.py imports where a model has such a tokenizer.
It takes an ImportError there as "not installed", so it gets one.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

_hidden = {"mistral_common", "sentencepiece"} - sys.modules.keys()
_modules: dict[str, Any] = sys.modules
_modules.update(dict.fromkeys(_hidden))  # "a None in sys.modules raises ModuleNotFoundError": the import system's rule
try:
    with suppress(ModuleNotFoundError):  # without gguf itself the export says so, with the way out
        import gguf  # noqa: F401
finally:
    for _name in _hidden:
        del _modules[_name]
