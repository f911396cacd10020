"""docs/train.md says what the recipe's dataclasses say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora2serve.training import advice
from tests.config.test_recipe import key_paths

TEXT = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
TABLE = dict(re.findall(r"^\| `([\w.]+)` \| (\S+) \| .+ \|$", TEXT, re.MULTILINE))


def test_every_field_is_there_and_no_other() -> None:
    assert list(TABLE) == list(dict.fromkeys(TABLE))
    assert set(TABLE) == set(key_paths())


@pytest.mark.parametrize(("path", "field"), key_paths().items())
def test_its_default_is_the_default(path: str, field: Any) -> None:
    said = TABLE[path].strip("`")
    if field.default is None:
        assert said == "none"
    elif field.default is dataclasses.MISSING:
        assert said == ("{}" if field.default_factory is not dataclasses.MISSING else "required")
    else:
        assert yaml.safe_load(said) == (list(field.default) if field.default == () else field.default)


def test_numbers_of_the_warnings() -> None:
    assert f"fewer than {advice.FEW_ROWS} rows" in TEXT
