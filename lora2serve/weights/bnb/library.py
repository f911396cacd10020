"""bitsandbytes, imported without what it logs then: on CPUs with AVX512-BF16 it misses a kernel that we do not use."""

from __future__ import annotations

import logging


def import_quietly() -> None:
    """Import bitsandbytes; to be called before whatever else imports it."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logger.setLevel(level)
