"""Imports the gguf package without what it does not need here.

Its vocab module imports mistral_common where that is installed (vLLM brings it), and with it OpenCV: 50 MB and a third
of a second in every process. It takes an ImportError there as "not installed", so it gets one.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

_HIDDEN = "mistral_common"

if _HIDDEN not in sys.modules:
    modules: dict[str, Any] = sys.modules
    modules[_HIDDEN] = None  # "a None in sys.modules raises ModuleNotFoundError": the import system's own rule
    try:
        with suppress(ModuleNotFoundError):  # without gguf itself the export says so, with the way out
            import gguf  # noqa: F401
    finally:
        del modules[_HIDDEN]
