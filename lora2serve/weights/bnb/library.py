"""bitsandbytes, imported without what it logs then: on CPUs with AVX512-BF16 it misses a kernel that we do not use."""

from __future__ import annotations

from lora2serve.system.library_log import errors_only


def import_quietly() -> None:
    """Import bitsandbytes; to be called before whatever else imports it."""
    with errors_only("bitsandbytes"):
        import bitsandbytes  # noqa: F401
