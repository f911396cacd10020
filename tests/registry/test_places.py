"""Where a registry lies: old and new schemas, network file systems, full disks, URLs, damage; and what it reads of many versions."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path
from unittest.mock import Mock

import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from lora2serve import Lora2ServeError, Registry
from lora2serve.cli import run as command_line
from lora2serve.errors import InputError, RegistryError, UsageError
from lora2serve.registry import ledger, tables
from lora2serve.registry.database import UNWRITABLE, Database
from lora2serve.registry.location import file_system, find_location, refuse_shared
from lora2serve.registry.periods import last_period, time_of
from tests.support.registries import add_export, forked, make_run

SCHEMA_1 = (Path(__file__).parent / "schema-1.sql").read_text(encoding="utf-8")


def proven(path: Path, seed: int = 0) -> Path:
    run = make_run(path, seed)
    add_export(run)
    return run.path


def test_a_registry_of_schema_1_is_migrated(tmp_path: Path) -> None:
    """As the first release of the registry wrote it; its files are not there, which is what the control sees."""
    folder = tmp_path / "registry"
    folder.mkdir()
    with sqlite3.connect(folder / "registry.db") as connection:
        connection.executescript(SCHEMA_1)
    with Registry(folder) as registry:
        found = registry.find(data="a" * 64)
        assert [version.reference for version in found] == ["medical-qa@1", "medical-qa@2", "medical-qa@3"]
        assert registry.find(data="aaab") == []
        assert registry.aliases("medical-qa") == {"champion": 1, "staging": 3}
        assert [event.kind for event in registry.history("medical-qa") if event.alias] == [
            "promote", "promote", "rollback", "promote",
        ]  # fmt: skip
        registry.promote("medical-qa@2")
        with pytest.raises(InputError, match="missing"):
            registry.verify()
    with sqlite3.connect(folder / "registry.db") as connection:
        assert connection.execute("SELECT value FROM setting WHERE key = 'schema'").fetchone() == (str(tables.SCHEMA),)
        fresh = {row[1] for row in connection.execute("PRAGMA table_info(version)")}
        assert fresh == {column.name for column in tables.versions.columns}


def test_a_newer_schema_is_refused(location: str, tmp_path: Path) -> None:
    with Registry(location) as registry:
        registry.add(proven(tmp_path / "run"), name="a")
        with registry._open().database.writing() as connection:
            connection.exec_driver_sql("UPDATE setting SET value = '99' WHERE key = 'schema'")
    with pytest.raises(InputError, match="newer lora2serve") as refusal, Registry(location) as again:
        again.versions()
    assert "upgrade" in refusal.value.hint


def test_a_folder_of_any_name(tmp_path: Path) -> None:
    """What means something in a URL does not in a path: the registry lies in the folder, and is found there."""
    for name in ("what?now", "c%41", "d#e", "f g&mode=ro"):
        with Registry.create(tmp_path / name) as registry:
            assert registry.versions() == []
        with Registry(tmp_path / name) as again:
            assert again.versions() == [] and (tmp_path / name / "registry.db").is_file()
    with Registry(f"/{tmp_path}/d#e") as again:  # two slashes begin a host's name in a URL
        assert again.versions() == []


def test_a_transaction_of_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be read in one that did not begin it, also where sqlite can write no file beside the registry's."""
    run = proven(tmp_path / "run")
    with Registry(tmp_path / "registry") as registry:
        registry.add(run, name="m")
    opened = Database(find_location(tmp_path / "registry"))

    def seen() -> list[str]:
        with opened.reading() as connection, ThreadPoolExecutor(1) as pool:
            return list(pool.submit(lambda: connection.scalars(select(tables.versions.c.name))).result())

    assert seen() == ["m"]
    unwritable = OperationalError("PRAGMA", None, sqlite3.OperationalError(UNWRITABLE[0]))
    monkeypatch.setattr(opened, "_connect", Mock(side_effect=unwritable))
    assert seen() == ["m"]


def test_network_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel's own list of mounts; the control is the disk that this runs on."""
    mounts = (
        "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
        f"30 22 0:40 / {tmp_path}/with\\040space rw - nfs4 server:/x rw\n"
        f"31 30 0:41 / {tmp_path}/with\\040space/local rw - xfs /dev/sdb rw\n"
    )
    (tmp_path / "with space" / "local").mkdir(parents=True)
    assert file_system(tmp_path / "with space" / "new" / "registry", mounts) == "nfs4"
    assert file_system(tmp_path / "with space" / "local" / "new", mounts) == "xfs"
    assert file_system(tmp_path, mounts) == "ext4"
    refuse_shared(tmp_path)
    listed = tmp_path / "mountinfo"
    listed.write_text(mounts)
    monkeypatch.setattr("lora2serve.registry.location.MOUNTS", listed)
    with pytest.raises(UsageError, match=r"network file system \(nfs4\)"):
        Registry(tmp_path / "with space").add(proven(tmp_path / "run"), name="a")
    assert not list((tmp_path / "with space").glob("registry.db*"))


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: an adapter does not fit, and then the database does not."""
    run = proven(tmp_path / "run")
    with (run / "adapter" / "tokenizer.json").open("wb") as file:
        file.truncate(3_000_000)
    said = tmp_path / "said"

    def add(limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os.chdir(tmp_path)
        with said.open("w") as file, redirect_stderr(file):
            code = command_line(["registry", "add", str(run), "--name", "a"])
        os._exit(code)

    for limit in (2_000_000, 30_000):
        _, status = os.waitpid(forked(lambda limit=limit: add(limit)), 0)  # type: ignore[misc]
        words = said.read_text()
        assert os.waitstatus_to_exitcode(status) == 1 and words.startswith("error: "), words
        assert words.count("\n") <= 2 and "Traceback" not in words
    with Registry(tmp_path / "registry") as registry:
        assert registry.versions() == []
        registry.gc()
        assert not list((tmp_path / "registry" / "blobs").glob("*/*")), "no blob is left without a version"
        assert registry.add(run, name="a").reference == "a@1"
        assert registry.verify() == 1


def test_what_cannot_be_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for name, message in {
        str(tmp_path / "file"): "a file, expected", "mysql://host/db": "expected a folder or postgresql",
        "postgresql://user:secret@host": "expected a folder or postgresql",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=message) as refusal:
            find_location(name)
        assert "secret" not in f"{refusal.value.message} {refusal.value.hint}"
    with (
        pytest.raises(RegistryError, match=r"127\.0\.0\.1:1/db: ") as refused,
        Registry("postgresql://me:secret@127.0.0.1:1/db") as registry,
    ):
        registry.versions()
    assert "secret" not in refused.value.message
    folder = tmp_path / "registry"
    folder.mkdir()
    (folder / "registry.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(RegistryError, match="not a database") as damaged, Registry(folder) as registry:
        registry.versions()
    assert damaged.value.hint
    monkeypatch.chdir(tmp_path / "..")
    monkeypatch.delenv("LORA2SERVE_REGISTRY", raising=False)
    with pytest.raises(UsageError, match="no registry at") as missing, Registry() as registry:
        registry.versions()
    assert "registry add" in missing.value.hint
    monkeypatch.setenv("LORA2SERVE_REGISTRY", str(tmp_path / "other"))
    assert find_location().folder == tmp_path / "other"


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])  # pages
def test_a_database_that_is_damaged(tmp_path: Path, every: int) -> None:
    """Whatever page of it is lost: one line, or nothing that it held is missed; ``verify`` sees what others read past."""
    folder = tmp_path / "registry"
    with Registry(folder) as registry:
        for seed in range(3):
            registry.add(proven(tmp_path / f"run-{seed}", seed), name="m")
            registry.promote(f"m@{seed + 1}")
        registry.verify()
    whole = (folder / "registry.db").read_bytes()
    seen, pages = [], range(0, len(whole), 4096 * every)
    for start in pages:
        (folder / "registry.db").write_bytes(whole[:start] + bytes(4096) + whole[start + 4096 :])
        with Registry(folder) as registry:
            for work in (registry.verify, registry.versions, registry.history, lambda own=registry: own.rollback("m")):
                try:
                    work()
                except Lora2ServeError as error:
                    seen += [start] if work == registry.verify else []
                    assert "\n" not in error.message or work == registry.verify
    assert set(seen) == set(pages), "no page is lost unseen"
    (folder / "registry.db").write_bytes(whole)
    with Registry(folder) as registry:
        assert registry.verify() == 3, "the control"


def test_files_at_a_url(tmp_path: Path) -> None:
    """Of fsspec; what is served is fetched into the registry's folder, and checked."""
    url = f"file://{tmp_path}/bucket"
    with Registry.create(tmp_path / "registry", content=url) as registry:
        registry.add(proven(tmp_path / "run"), name="a")
        registry.add(proven(tmp_path / "run-1", 1), name="a")
        path = registry.path("a@1")
        assert path.is_relative_to(tmp_path / "registry")
        assert (path / "adapter" / "adapter_model.safetensors").read_bytes() == (
            tmp_path / "run" / "adapter" / "adapter_model.safetensors"
        ).read_bytes()
        assert registry.verify() == 2
        assert registry.gc(keep=1).versions == ("a@1",) and not path.exists()
        assert registry.verify() == 2
        blob = max((tmp_path / "bucket").glob("blobs/*/*"), key=lambda file: file.stat().st_size)
        blob.write_bytes(b"x" * blob.stat().st_size)
        with pytest.raises(InputError, match="content changed"):
            registry.verify()
        with pytest.raises(RegistryError, match="content changed"):
            registry.path("a@2")
        assert not (tmp_path / "registry" / "versions" / "a-2").exists(), "nothing half is left"
    with pytest.raises(UsageError, match="files lie in file://"):
        Registry.create(tmp_path / "registry", content=tmp_path / "other")
    with pytest.raises(UsageError, match="nonsense"):
        Registry.create(tmp_path / "third", content="nonsense://bucket")


def test_exports_share_their_bytes(tmp_path: Path) -> None:
    run = proven(tmp_path / "run")
    with Registry(tmp_path / "registry") as registry:
        registry.add(run, name="a")
        served = registry.path("a@1/vllm") / "config.json"
        assert served.stat().st_ino == (run / "exports" / "vllm" / "config.json").stat().st_ino
        weights = "adapter/adapter_model.safetensors"
        kept = registry.path("a@1") / weights
        assert kept.stat().st_ino != (run / weights).stat().st_ino, "training may write there again"
        shutil.rmtree(run)
        assert registry.verify() == 1 and served.is_file() and kept.is_file()


def filled(registry: Registry, count: int) -> None:
    """So many versions with two scores each, as plain rows."""
    quarters = ("2026-02-10T00:00:00Z", "2026-05-10T00:00:00Z", "2026-08-10T00:00:00Z", "2026-11-10T00:00:00Z")
    version_rows, score_rows = [], []
    for number in range(count):
        key = {"name": f"adapter-{number % 100}", "number": number // 100 + 1}
        version_rows.append({
            **key, "sha256": f"{number:064d}", "state": "collected", "domain": ("medical", "law", "towns")[number % 3],
            "task": "qa", "note": "", "author": f"person-{number % 7}", "created": quarters[number % 4],
            "added": ledger.now(), "run": f"run-{number}", "base": "org/base", "base_sha256": "", "method": "LORA",
            "rank": 4 << number % 5, "alpha": 16.0, "learning_rate": 2e-4, "steps": 100, "rows": 100,
            "quantization": "nf4", "bytes": 1000, "facts": "{}", "data": "",
        })  # fmt: skip
        for suite, value in (("medqa", number % 997 / 1000), ("heldout", 1.0)):
            score_rows.append({
                **key, "suite": suite, "suite_sha256": "5" * 64, "metric": "acc", "value": value, "low": None,
                "high": None, "n": 100, "higher_is_better": True, "engine": "vllm", "created": quarters[number % 4],
            })  # fmt: skip
    with registry._open(create=True).database.writing() as connection:
        connection.execute(tables.versions.insert(), version_rows)
        connection.execute(tables.scores.insert(), score_rows)


def plans(registry: Registry, work: Callable[[], object]) -> list[str]:
    """How the database answers each query of that work, in its own words; Postgres reads no index of a few rows."""
    database, queries = registry._open().database, []

    def keep(_: object, cursor: object, statement: str, parameters: object, *more: object) -> None:
        queries.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", keep)
    work()
    event.remove(database.engine, "before_cursor_execute", keep)
    explain = "EXPLAIN QUERY PLAN" if registry.location.folder else "EXPLAIN"
    with database.reading() as connection:
        if not registry.location.folder:
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            connection.exec_driver_sql("ANALYZE")
        return [
            "\n".join(str(line[-1]) for line in connection.exec_driver_sql(f"{explain} {statement}", parameters))  # type: ignore[arg-type]
            for statement, parameters in queries
            if statement.startswith("SELECT") and " FROM " in statement.replace("\n", " ")
        ]


def read_whole(plan: str) -> list[str]:
    """The tables of which that plan reads every row."""
    return re.findall(r"(?:^SCAN |Seq Scan on )(version|file|export|score|alias|event)\b", plan, re.M)


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_versions_are_not_all_read(registry: Registry, tmp_path: Path, count: int) -> None:
    """As few queries as of a few versions, each by an index. The controls: a question without one, and one removed."""
    filled(registry, count)
    question = {"domain": "medical", "metric": "medqa.acc", "since": "2026-07-01", "until": "2026-10-01"}
    (best,) = registry.find(**question, best=True)  # type: ignore[arg-type]
    _, rows = registry.sql(
        "SELECT v.name, v.number, s.value FROM version v JOIN score s ON s.name = v.name AND s.number = v.number "
        "WHERE v.domain = 'medical' AND s.suite = 'medqa' AND s.created LIKE '2026-08%' ORDER BY s.value DESC LIMIT 1"
    )
    assert [best.name, best.number, best.scores[-1].value] == rows[0]
    ranked, *parts = plans(registry, lambda: registry.find(**question, best=True))  # type: ignore[arg-type]
    assert "score_by_metric" in ranked and len(parts) == 4, "one version, its aliases, exports and scores"
    where = "rank <= 8 and medqa.acc > 0.99 and base = org/base"
    chosen, *rest = plans(registry, lambda: registry.find(where=where, limit=10))
    assert "score_by_metric" in chosen and len(rest) == 3, "their aliases, exports and scores, of all ten at once"
    assert [read_whole(plan) for plan in (ranked, *parts, chosen, *rest)] == [[]] * 9
    for seed in (0, 1):
        registry.add(proven(tmp_path / f"run-{seed}", seed), name="live")
        registry.promote(f"live@{seed + 1}")

    back = plans(registry, lambda: registry.rollback("live"))
    assert registry.aliases("live") == {"champion": 1}
    assert [read_whole(plan) for plan in back] == [[]] * 14, (
        "a version before and after, the alias, the events, the aliases as printed, the last event and the new one"
    )
    (control,) = plans(registry, lambda: registry.sql("SELECT count(*) FROM version WHERE note = 'none'"))
    assert read_whole(control) == ["version"]
    with registry._open().database.writing() as connection:
        connection.exec_driver_sql("DROP INDEX score_by_metric")
    assert "score_by_metric" not in plans(registry, lambda: registry.find(**question, best=True))[0]  # type: ignore[arg-type]


def test_periods() -> None:
    from datetime import date

    day = date(2026, 11, 28)
    assert last_period("quarter", day) == ("2026-07-01T00:00:00Z", "2026-10-01T00:00:00Z")
    assert last_period("quarter", date(2026, 1, 1)) == ("2025-10-01T00:00:00Z", "2026-01-01T00:00:00Z")
    assert last_period("month", date(2026, 1, 31)) == ("2025-12-01T00:00:00Z", "2026-01-01T00:00:00Z")
    assert last_period("week", day) == ("2026-11-16T00:00:00Z", "2026-11-23T00:00:00Z")
    assert last_period("year", day) == ("2025-01-01T00:00:00Z", "2026-01-01T00:00:00Z")
    assert last_period("day", day) == ("2026-11-27T00:00:00Z", "2026-11-28T00:00:00Z")
    assert last_period("30d", day) == ("2026-10-29T00:00:00Z", "2026-11-29T00:00:00Z")
    assert time_of("2026-07-01T02:00+02:00", "--since") == "2026-07-01T00:00:00Z"
    for text in ("fortnight", "0x", "99999d"):
        with pytest.raises(UsageError, match="--last"):
            last_period(text, date(200, 1, 1))
    with pytest.raises(Lora2ServeError, match="--since yesterday"):
        time_of("yesterday", "--since")
