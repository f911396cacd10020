"""A registry that is removed, or loses its tables, while a program has it open."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora2serve import Registry
from lora2serve.errors import RegistryError
from lora2serve.registry.tables import metadata
from tests.support.registries import add_trial


def drop_tables(registry: Registry) -> None:
    with registry._open().database.writing() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.exec_driver_sql(f"DROP TABLE {table.name}")


def empty_file(registry: Registry) -> None:
    assert registry.location.folder
    registry.location.file.write_bytes(b"")


KINDS: dict[str, Callable[[Registry], object]] = {
    "folder": lambda registry: shutil.rmtree(str(registry.location.folder)),
    "file": lambda registry: registry.location.file.unlink(),
    "empty": empty_file,
    "tables": drop_tables,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_registry_that_is_gone(registry: Registry, tmp_path: Path, kind: str) -> None:
    """One line says so, whatever is asked, and no empty registry is made in its place. The control: it was there."""
    if kind != "tables" and not registry.location.folder:
        pytest.skip("of a folder")
    add_trial(registry, tmp_path, "m")
    calls: list[Callable[[], object]] = [
        lambda: registry.versions("m"), registry.live, registry.history, lambda: registry.path("m@1"),
        lambda: registry.rollback("m"), lambda: registry.promote("m@2", dry_run=True), registry.gc, registry.verify,
        lambda: registry.add(tmp_path / "run-0", name="m"), lambda: registry.add(tmp_path / "run-1", name="n", dry_run=True),
    ]  # fmt: skip
    assert registry.path("m@1").is_dir() and registry.verify() == 3
    KINDS[kind](registry)
    there = sorted(tmp_path.rglob("*"))
    for call in calls:
        with pytest.raises(RegistryError) as refused:
            call()
        words = (
            "no longer there" if kind in ("folder", "file") else r"no such table" if registry.location.folder else ""
        )
        assert words in refused.value.message and "\n" not in refused.value.message
        assert refused.value.hint.startswith("it was removed while it was open")
    if kind in ("folder", "file"):
        assert sorted(tmp_path.rglob("*")) == there
