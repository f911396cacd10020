"""``--allow-pickle``: an ``adapter_model.bin`` to safetensors, in a child process that unpickles weights only.

``torch.load(weights_only=True)`` takes tensors and plain containers and refuses everything else; the child keeps even
a fault in that out of this process.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from lora2serve.adapters.adapter import CONFIG, PICKLE, WEIGHTS
from lora2serve.errors import AdapterError
from lora2serve.system.hub_snapshot import short_name

TIMEOUT = 600  # seconds
CHILD = """
import sys, torch
from safetensors.torch import save_file
tensors = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
bad = [repr(name) for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
if bad:
    sys.exit(f"{', '.join(bad[:3])}: no tensor")
save_file({name: value.contiguous().clone() for name, value in tensors.items()}, sys.argv[2], {"format": "pt"})
"""


def convert(adapter: Path, into: Path) -> Path:
    """A copy of a PEFT directory with its pickle as safetensors; the directory itself where it has no pickle."""
    if (adapter / WEIGHTS).is_file() or not (adapter / PICKLE).is_file():
        return adapter
    converted = into / short_name(adapter)
    converted.mkdir(parents=True)
    command = [sys.executable, "-I", "-c", CHILD, str(adapter / PICKLE), str(converted / WEIGHTS)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise AdapterError(f"{adapter / PICKLE}: not converted within {TIMEOUT} s") from None
    if process.returncode:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()] or [
            f"exit code {process.returncode}"
        ]
        reason = next((line for line in lines if "Unsupported" in line or "UnpicklingError" in line), lines[-1])
        raise AdapterError(
            f"{adapter / PICKLE}: not plain weights: {reason[:200]}",
            "it may run code: do not load it with anything else",
        )
    shutil.copy(adapter / CONFIG, converted / CONFIG)
    return converted
