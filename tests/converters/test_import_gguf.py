"""What importing the GGUF converters does to a process: nothing, unless it is the command line's own."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

LOOK = """
import sys
import converters.gguf.gguf_sink
print(None in sys.modules.values(), "gguf" in sys.modules)
import gguf.vocab
print("mistral_common" in sys.modules, gguf.vocab.SentencePieceProcessor is not None)
"""
CLAIM = """
from lora2serve.cli import main
try:
    main(["--quiet", "doctor", "--nothing"])
except SystemExit:
    pass
"""


def output(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-2:]


@pytest.mark.engine
@pytest.mark.skipif(find_spec("mistral_common") is None, reason="vLLM brings mistral_common")
def test_modules_are_left_alone_in_a_library() -> None:
    """No None in sys.modules, and gguf whole; in the command line's process, the control, gguf is imported without."""
    assert output(LOOK) == ["False False", "True True"]
    assert output(CLAIM + LOOK) == ["False True", "False False"]
