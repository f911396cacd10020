"""Dry runs: nothing changes, what is said is what the call then does, and what is refused is refused the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from lora2serve import Lora2ServeError, Registry
from lora2serve.artifacts.run import Run
from lora2serve.errors import GateNotMet, UsageError
from lora2serve.registry import migrations
from lora2serve.registry.tables import metadata
from lora2serve.registry.version_record import ChangedVersion, JudgedGate, RegistryEvent
from lora2serve.system.small_files import digest
from tests.support.registries import add_export, add_trial, empty_database, make_run, scores

NAME = "medical-qa"


@pytest.fixture
def tested(registry: Registry, tmp_path: Path) -> Registry:
    """Version 1 is the champion, 2 the challenger; the parity of 3 is not proven."""
    add_trial(registry, tmp_path, NAME)
    return registry


def state(registry: Registry, folder: Path) -> tuple[object, object]:
    """Every row, and every file with its time."""
    with registry._open().database.reading() as connection:
        rows = {
            table.name: [tuple(row) for row in connection.execute(select(table))] for table in metadata.sorted_tables
        }
    files = {path: (digest(path)["sha256"], path.stat()[:9]) for path in folder.rglob("*") if path.is_file()}
    return {name: sorted(map(repr, own)) for name, own in rows.items()}, {
        str(path): (sha256, *stat[:7], stat[8])
        for path, (sha256, stat) in files.items()  # all but when it was read
    }


def new_events(registry: Registry, count: int) -> list[RegistryEvent]:
    return [replace(event, id=0) for event in registry.history()[count:]]


def with_another_export(run: Run) -> Path:
    add_export(run, "gguf", quant="Q8_0")
    return run.path


def test_what_is_said_is_done(tested: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call as a dry run first. The control: the call itself changes what the dry run has left."""
    monkeypatch.setattr("lora2serve.registry.ledger.now", lambda: "2026-11-28T09:30:00Z")
    fourth = make_run(tmp_path / "run-3", 3)
    scores(fourth.path / "evals", 0.8, created="2026-07-01T00:00:00Z")
    add_export(fourth)
    calls: list[tuple[list[str], Callable[[bool], ChangedVersion]]] = [
        (["add", "export", "score", "score"], lambda dry: tested.add(fourth.path, name=NAME, note="n", dry_run=dry)),
        (["export"], lambda dry: tested.add(with_another_export(fourth) if dry else fourth.path, name=NAME, dry_run=dry)),
        ([], lambda dry: tested.add(fourth.path, name=NAME, dry_run=dry)),
        (["promote"], lambda dry: tested.promote(f"{NAME}@4", why="better", dry_run=dry)),
        ([], lambda dry: tested.promote(f"{NAME}@4", dry_run=dry)),
        (["promote"], lambda dry: tested.promote(f"{NAME}@3", force=True, why="now", dry_run=dry)),
        (["rollback"], lambda dry: tested.rollback(NAME, why="worse", dry_run=dry)),
        (["rollback"], lambda dry: tested.rollback(NAME, to=2, dry_run=dry)),
        (["unset"], lambda dry: tested.unset(f"{NAME}@challenger", why="over", dry_run=dry)),
        (["retire"], lambda dry: tested.retire(f"{NAME}@1", why="old rows", dry_run=dry)),
        ([], lambda dry: tested.retire(f"{NAME}@1", dry_run=dry)),
    ]  # fmt: skip
    for kinds, call in calls:
        before, count = state(tested, tmp_path), len(tested.history())
        planned = call(True)
        if kinds != ["export"]:  # that one makes the export first
            assert state(tested, tmp_path) == before
        assert state(tested, tmp_path)[0] == before[0]
        done = call(False)
        assert (planned.dry_run, done.dry_run) == (True, False) and planned.version == done.version
        assert (planned.files, planned.gates) == (done.files, done.gates)
        for each in (planned, done):
            assert [replace(event, id=0) for event in each.events] == new_events(tested, count)
        assert list(done.events) == tested.history()[count:] and done.version == tested.get(done.reference)
        assert [event.kind for event in planned.events] == kinds and planned.is_new == ("add" in kinds)
        assert (state(tested, tmp_path)[0] != before[0]) == bool(kinds) == bool(planned.events)
    tested.gc(keep=1)
    assert tested.get(f"{NAME}@1").state == "collected"
    before = state(tested, tmp_path)
    planned = tested.add(tmp_path / "run-0", name=NAME, dry_run=True)
    assert state(tested, tmp_path) == before and planned.number == 1 and planned.state == "retired"
    assert [event.kind for event in planned.events] == ["restore", "export"]
    assert tested.verify() == 4


def test_files_without_an_event(registry: Registry, tmp_path: Path) -> None:
    """A report that is measured again is no event, and still something that would change."""
    run = make_run(tmp_path / "run")
    add_export(run)
    (run.path / "parity").mkdir()
    (run.path / "parity" / "report.json").write_text("first")
    registry.add(run.path, name="a")
    planned = registry.add(run.path, name="a", dry_run=True)
    assert (planned.events, planned.files) == ((), ())
    (run.path / "parity" / "report.json").write_text("second")
    planned = registry.add(run.path, name="a", dry_run=True)
    assert planned.files == ("parity/report.json",)


def test_gates_are_judged(tested: Registry, tmp_path: Path) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text("suites: {medqa.acc: 0.01}\n")
    for number, value in ((1, 0.75), (2, 0.74)):
        tested.score(f"{NAME}@{number}", scores(tmp_path / "made", value, created="2026-07-01T00:00:00Z"))
    planned = tested.promote(f"{NAME}@2", gates=gates, dry_run=True)
    assert planned.aliases == ("challenger", "champion")
    assert planned.gates == (
        JudgedGate("state", True, "active"), JudgedGate("parity", True, "vllm"),
        JudgedGate("base", True, f"org/base, {NAME}@1 is of org/base"),
        JudgedGate("medqa.acc", True, f"0.74, {NAME}@1 has 0.75 (margin 0.01)"),
    )  # fmt: skip
    gates.write_text("suites: {medqa.acc: 0.001}\n")
    forced = tested.promote(f"{NAME}@2", gates=gates, force=True, why="now", dry_run=True)
    assert [gate.met for gate in forced.gates] == [True, True, True, False]
    assert forced.events[0].overridden == f"medqa.acc: 0.74, {NAME}@1 has 0.75 (margin 0.001)"
    with pytest.raises(GateNotMet, match=r"cannot become champion: medqa\.acc: 0\.74"):
        tested.promote(f"{NAME}@2", gates=gates, dry_run=True)
    gates.write_text("suites: {medqa.ac: 0.001, other.acc: 0.1}\n")
    with pytest.raises(GateNotMet) as refused:
        tested.promote(f"{NAME}@2", gates=gates, dry_run=True)
    assert refused.value.message.splitlines() == [
        f"{NAME}@2 cannot become champion: {name}: {NAME}@2 was not measured on it{near}"
        for name, near in (("medqa.ac", " (did you mean 'medqa.acc'?)"), ("other.acc", ""))
    ]
    assert tested.aliases(NAME) == {"champion": 1, "challenger": 2}


def test_what_is_refused(tested: Registry, tmp_path: Path) -> None:
    """In the same words, with the same way out and exit code, and nothing changes."""
    run = make_run(tmp_path / "run-9", 9)
    (add_export(run) / "config.json").write_text("[]")
    calls: list[Callable[[bool], object]] = [
        lambda dry: tested.add(tmp_path / "run-2", name=NAME, dry_run=dry),
        lambda dry: tested.add(run.path, name=NAME, dry_run=dry),
        lambda dry: tested.add(tmp_path / "run-0", name=NAME, note="other", dry_run=dry),
        lambda dry: tested.add(tmp_path / "run-0", name="a b", dry_run=dry),
        lambda dry: tested.add(tmp_path / "nothing", name=NAME, dry_run=dry),
        lambda dry: tested.promote(f"{NAME}@3", dry_run=dry),
        lambda dry: tested.promote(f"{NAME}@9", dry_run=dry),
        lambda dry: tested.promote(f"{NAME}@2", force=True, dry_run=dry),
        lambda dry: tested.promote(f"{NAME}@2", "7", dry_run=dry),
        lambda dry: tested.rollback(NAME, dry_run=dry),
        lambda dry: tested.rollback("medcal-qa", dry_run=dry),
        lambda dry: tested.unset(f"{NAME}@2", dry_run=dry),
        lambda dry: tested.unset(f"{NAME}@champoin", dry_run=dry),
        lambda dry: tested.retire(f"{NAME}@1", dry_run=dry),
        lambda dry: tested.sync("nothing", to="hub:you/x", dry_run=dry),
        lambda dry: tested.sync(NAME, to="hub:you", dry_run=dry),
        lambda dry: tested.sync(NAME, to="s3://bucket", dry_run=dry),
    ]  # fmt: skip
    before = state(tested, tmp_path)[0]
    for call in calls:
        seen = []
        for dry in (True, False):
            with pytest.raises(Lora2ServeError) as refused:
                call(dry)
            seen.append((type(refused.value), refused.value.message, refused.value.hint, refused.value.exit_code))
        assert seen[0] == seen[1]
    assert state(tested, tmp_path)[0] == before


def test_no_registry_is_made(tmp_path: Path) -> None:
    """Of none it says what the first version would be. The control: the call makes it."""
    run = make_run(tmp_path / "run")
    add_export(run)
    folder = tmp_path / "registry"
    with Registry(folder) as registry:
        planned = registry.add(run.path, name="a", dry_run=True)
        assert planned.reference == "a@1" and planned.is_new
        for call in (registry.promote, registry.retire, registry.unset):
            with pytest.raises(UsageError, match="no registry at"):
                call("a@champion", dry_run=True)
        assert not folder.exists()
        folder.mkdir()
        (folder / "gates.yaml").write_text("suites: {}\n")
        assert registry.add(run.path, name="a", dry_run=True).number == 1
        assert [path.name for path in folder.iterdir()] == ["gates.yaml"]
        with Registry.create(tmp_path / "empty") as empty:
            before = state(empty, tmp_path / "empty")
            empty.add(run.path, name="a", dry_run=True)
            assert state(empty, tmp_path / "empty") == before
        assert registry.add(run.path, name="a").number == 1 and (folder / "registry.db").is_file()


@pytest.mark.parametrize("server", ["patched", pytest.param("postgres", marks=pytest.mark.engine)])
def test_of_an_empty_database_nothing_is_planned(
    server: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``add`` makes no registry there. The control is a folder, in which it makes one."""
    url = "postgresql://lora@127.0.0.1:9/empty"
    if server == "postgres":
        url = empty_database(request.getfixturevalue("postgres"), "empty")
    else:
        monkeypatch.setattr(migrations, "schema_of", lambda database: None)
    run = make_run(tmp_path / "run")
    add_export(run)
    refused = []
    with Registry(url) as registry:
        for dry in (True, False):
            with pytest.raises(UsageError, match="no registry at postgresql://") as caught:
                registry.add(run.path, name="a", dry_run=dry)
            refused.append((caught.value.message, caught.value.hint))
    assert refused[0] == refused[1] == (refused[0][0], "`lora2serve registry init` makes one")
    with Registry(tmp_path / "registry") as registry:
        assert registry.add(run.path, name="a", dry_run=True).is_new


def test_beside_a_writer(tested: Registry, tmp_path: Path) -> None:
    """It waits for who writes, and says what holds afterwards; who writes beside it loses nothing."""
    location = tested.location.url if tested.location.folder is None else tested.location.folder
    planned: list[ChangedVersion] = []
    begun = threading.Event()

    def plan() -> None:
        with Registry(location) as own:
            begun.set()
            planned.append(own.promote(f"{NAME}@1", dry_run=True))

    thread = threading.Thread(target=plan)
    with tested._open().writing("writer") as ledger:
        thread.start()
        begun.wait(60)
        ledger.move("promote", NAME, "champion", 2, why="first")
    thread.join()
    assert [(event.old, event.new) for event in planned[0].events] == [(2, 1)], "not what was before the writer"

    over = threading.Event()

    def plan_on() -> None:
        with Registry(location) as own:
            while not over.is_set():
                planned.append(own.promote(f"{NAME}@1", "staging", dry_run=True))

    threads = [threading.Thread(target=plan_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    count = len(tested.history())
    try:
        for turn in range(20):
            tested.promote(f"{NAME}@{1 + turn % 2}", why=str(turn))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert [event.why for event in tested.history()[count:]] == [str(turn) for turn in range(20)]
    assert len(planned) > 2 and "staging" not in tested.aliases(NAME) and tested.verify() == 3
