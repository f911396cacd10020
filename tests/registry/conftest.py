"""Every test of what a registry does runs on sqlite and on Postgres."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora2serve import Registry
from tests.support.registries import empty_database, running_postgres

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a server."""
    with running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.engine)])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an empty registry is; that of Postgres has its files in a folder."""
    if request.param == "sqlite":
        return str(tmp_path / "registry")
    url = empty_database(request.getfixturevalue("postgres"), f"registry{next(_numbers)}")
    Registry.create(url, content=tmp_path / "content").close()
    return url


@pytest.fixture
def registry(location: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Registry]:
    """The registry there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with Registry(location, author="tester") as opened:
        yield opened
