"""bitsandbytes says nothing when it is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine

# a CPU with AVX512-BF16, for which it looks for a kernel of the Hub
OTHER_CPU = """
import ctypes
own = ctypes.CDLL.__getattr__
ctypes.CDLL.__getattr__ = lambda self, name: (lambda: True) if name == "has_avx512bf16_cpu" else own(self, name)
"""


def test_no_line_about_kernels() -> None:
    pytest.importorskip("bitsandbytes")
    quiet = "from lora2serve.weights.bnb.library import import_quietly; import_quietly()\n"
    for loads, expected in ((quiet, ""), ("", "Failed to load CPU gemm_4bit_forward from kernels-community")):
        code = f"{OTHER_CPU}{loads}import bitsandbytes, logging\nassert logging.getLogger('bitsandbytes').level == 0"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert (expected in done.stderr) and (bool(done.stderr.strip()) == bool(expected))
