"""The Hugging Face Hub: pull by name, push what was proven.

``fetch`` turns ``org/name[@revision]`` or a path into a local directory, ``push`` uploads exports,
``pull_check`` pulls a pushed export back and verifies it. ``huggingface_hub`` is imported where it is used.
"""

from lora2serve.hub.pull import FetchedDir, fetch, pin_data, refuse_missing_path
from lora2serve.hub.push import PushResult, push
from lora2serve.hub.select import choose
from lora2serve.hub.verify import VerifiedRepo, pull_check

__all__ = [
    "FetchedDir", "PushResult", "VerifiedRepo", "choose", "fetch", "pin_data", "pull_check", "push",
    "refuse_missing_path",
]  # fmt: skip
