"""What the GGUF tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small models of test_gguf_families.py: ``root``, and each family that was made below it."""
    return {"root": tmp_path_factory.mktemp("families")}
