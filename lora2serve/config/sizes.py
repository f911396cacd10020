"""Sizes as people write them."""

from __future__ import annotations

import re

from lora2serve.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str) -> int:
    """Bytes in ``5GB``, ``500M`` or ``2GiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(k|m|g|ki|mi|gi|)b?", text.strip().lower())
    if not match:
        raise UsageError(f"size {text!r}: expected a number and a unit, such as 5GB or 500M")
    return int(float(match[1]) * _UNITS[match[2]])
