"""All sqlite registries of a process share one engine, and no wait."""

from __future__ import annotations

import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from lora2serve.registry import database
from lora2serve.registry.database import Database
from lora2serve.registry.location import find_location


def test_one_that_is_locked_holds_up_no_other(tmp_path: Path) -> None:
    """Also where it is the first that the process connects to."""
    for name in "ab":
        Database(find_location(tmp_path / name), create=True)
    database._sqlite_engine.cache_clear()
    lock = sqlite3.connect(tmp_path / "a" / "registry.db", isolation_level=None, check_same_thread=False)
    with ThreadPoolExecutor(2) as pool, closing(lock):
        lock.execute("PRAGMA locking_mode=EXCLUSIVE")
        lock.execute("BEGIN EXCLUSIVE")
        first = pool.submit(Database, find_location(tmp_path / "a"))
        time.sleep(0.3)
        assert pool.submit(Database, find_location(tmp_path / "b")).result(20).content == ""
        assert not first.done(), "the control: it waits"
    assert first.result().content == ""
