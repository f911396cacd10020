"""The end of the process: everything that must happen happens, and nothing else.

Torch and its like take seconds to take themselves apart when the interpreter ends. Nobody needs that: files are
closed, children have ended, and memory goes back by itself.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
from typing import NoReturn

from lora2serve.system import interruption, scratch


def leave(code: int) -> NoReturn:
    """End with this exit code: threads that work to their end are waited for, exit handlers run, output is flushed."""
    heavy = "torch" in sys.modules
    try:
        if heavy:
            _finish()
    except KeyboardInterrupt:
        code = 130
    interruption.ignore()
    scratch.remove()
    if not heavy:
        sys.exit(code)  # nothing here takes long
    os._exit(_flush(code))


def _finish() -> None:
    """What the interpreter does before it takes modules apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()  # children of multiprocessing end, temporary folders go


def _flush(code: int) -> int:
    """Python's buffers and those of C; 1 where a result could not be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed, or given up as nobody reads it
                stream.flush()
        except (OSError, ValueError):
            code = code or 1
    ctypes.CDLL(None).fflush(None)
    return code
