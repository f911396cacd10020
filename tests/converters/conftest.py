"""What the GGUF tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.gguf.import_gguf import without_extras

without_extras()  # before a test imports gguf by itself, with all that vLLM brings for it


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small models of test_gguf_families.py: ``root``, and each family that was made below it."""
    return {"root": tmp_path_factory.mktemp("families")}
