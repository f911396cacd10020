"""The Hugging Face Hub: pull by name, push what was proven.

``fetch`` turns ``org/name[@revision]`` or a path into a local directory, ``push`` uploads exports,
``pull_check`` pulls a pushed export back and verifies it. ``huggingface_hub`` is imported where it is used.
"""

from lora2serve.hub.check import Checked, pull_check
from lora2serve.hub.choose import choose
from lora2serve.hub.pull import Fetched, fetch, pin_data
from lora2serve.hub.push import Pushed, push

__all__ = ["Checked", "Fetched", "Pushed", "choose", "fetch", "pin_data", "pull_check", "push"]
