"""What a registry does: versions that never change, aliases that move, questions; the same on sqlite and Postgres."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import click
import pytest

from lora2serve import Lora2ServeError, Registry
from lora2serve.cli import run as command_line
from lora2serve.cli.registry import registry as registry_group
from lora2serve.errors import GateNotMet, InputError, ParityNotMet, UsageError
from lora2serve.registry.queries import MOST_ROWS
from lora2serve.system.small_files import digest
from tests.support.manifests import change_manifest
from tests.support.registries import PROVEN, add_export, make_run, scores, write_adapter
from tests.support.shared import once


def proven(path: Path, seed: int = 0, **record: object) -> Path:
    """A run with one export, whose parity is met."""
    run = make_run(path, seed, **record)  # type: ignore[arg-type]
    add_export(run)
    return run.path


MOST = 6


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, and registries of the first one, the first two, ...: to copy one takes a fifth of the time."""

    def make(folder: Path) -> None:
        with Registry(folder / "all", author="tester") as registry:
            for seed in range(MOST):
                registry.add(proven(folder / f"run-{seed}", seed), name="medical-qa")
                shutil.copytree(folder / "all", folder / f"first-{seed + 1}")

    MADE.append(once(tmp_path_factory, "registries", make))
    return MADE[-1]


MADE: list[Path] = []


def versions(registry: Registry, folder: Path, count: int) -> None:
    for seed in range(count):
        shutil.copytree(MADE[-1] / f"run-{seed}", folder / f"run-{seed}")
    if registry.location.folder and not registry.location.folder.exists():
        shutil.copytree(MADE[-1] / f"first-{count}", registry.location.folder)
    else:  # Postgres
        for seed in range(count):
            registry.add(folder / f"run-{seed}", name="medical-qa")


def test_a_run_becomes_a_version(registry: Registry, tmp_path: Path) -> None:
    run = proven(tmp_path / "run")
    version = registry.add(run, name="medical-qa", domain="medical", task="qa", note="first", author="Ada")
    assert (version.reference, version.state, version.author, version.domain) == (
        "medical-qa@1",
        "active",
        "Ada",
        "medical",
    )
    assert (version.run, version.base, version.rank, version.alpha, version.method) == (
        "run",
        "org/base",
        4,
        8.0,
        "LORA",
    )
    assert (version.learning_rate, version.rows, version.steps, version.targets) == (2e-4, 100, 10, ("q_proj",))
    assert [export.name for export in version.exports] == ["vllm"] and version.proven
    assert {score.name: score.value for score in version.scores} == {"heldout.loss": 1.0, "heldout.perplexity": 2.0}
    assert registry.get("medical-qa@1") == version.version
    path = registry.path("medical-qa@1")
    for file in (
        "run.json",
        "recipe.yaml",
        "eval.jsonl",
        "adapter/adapter_model.safetensors",
        "exports/vllm/config.json",
    ):
        assert (path / file).read_bytes() == (run / file).read_bytes()
    assert registry.verify() == 1


def test_a_date_in_a_recipe_is_text(registry: Registry, tmp_path: Path) -> None:
    """YAML has dates, among the arguments of a chat template too; JSON has none. What is no key there is refused."""
    run = make_run(tmp_path / "run")
    (run.path / "recipe.yaml").write_text(
        "train: {learning_rate: 0.0001}\ndata: {arguments: {day: 2026-11-28, n: 1}}\n"
    )
    version = registry.add(run.path, name="a", unproven=True)
    assert version.recipe == {"train": {"learning_rate": 1e-4}, "data": {"arguments": {"day": "2026-11-28", "n": 1}}}
    assert version.learning_rate == 1e-4
    other = make_run(tmp_path / "other", 1)
    (other.path / "recipe.yaml").write_text("2026-11-28: 1\n")
    with pytest.raises(InputError, match=r"recipe.yaml: keys must be"):
        registry.add(other.path, name="a", unproven=True)


def test_twice_is_one_version(registry: Registry, tmp_path: Path) -> None:
    """Whatever its base is called, and wherever it lies. The control: other weights are another version."""
    run = proven(tmp_path / "run")
    first = registry.add(run, name="a")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    write_adapter(moved, 0, base="/another/place")
    assert registry.add(run, name="a").version == first.version
    assert registry.add(moved, name="a", unproven=True).reference == first.reference
    write_adapter(moved, 1)
    assert registry.add(moved, name="a", unproven=True).reference == "a@2"
    assert registry.add(run, name="b").reference == "b@1"
    assert [event.kind for event in registry.history("a")].count("add") == 2


def test_exports_come_later_and_stay(registry: Registry, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    registry.add(run.path, name="a", unproven=True)
    add_export(run, "gguf", quant="Q8_0")
    assert [export.name for export in registry.add(run.exports / "gguf-Q8_0", name="a").exports] == ["gguf-Q8_0"]
    assert (registry.path("a@1/gguf-Q8_0") / "model.gguf").read_text() == "GGUF"
    (run.exports / "gguf-Q8_0").rename(tmp_path / "old")
    export = add_export(run, "gguf", quant="Q8_0")
    (export / "model.gguf").write_text("other")
    change_manifest(export, files={"model.gguf": digest(export / "model.gguf")})
    with pytest.raises(UsageError, match="a version does not change"):
        registry.add(run.path, name="a")
    assert (registry.path("a@1/gguf-Q8_0") / "model.gguf").read_text() == "GGUF"


def test_what_parity_has_not_met_is_refused(registry: Registry, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ParityNotMet, match="parity was not run"):
        registry.add(run.path, name="a")
    export = add_export(run, proven=False)
    with pytest.raises(ParityNotMet, match="vllm: parity was not run"):
        registry.add(run.path, name="a")
    version = registry.add(run.path, name="a", unproven=True)
    assert not version.proven and version.exports[0].unproven == "parity was not run"
    change_manifest(export, parity=PROVEN)
    assert registry.add(run.path, name="a").proven, "its verdict is not part of what it is"


def test_damaged_exports_are_refused(registry: Registry, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    export = add_export(run)
    (export / "config.json").write_text("[]")
    (export / "stray.txt").write_text("")
    with pytest.raises(InputError, match=r"config.json: content changed(.|\n)*stray.txt: not part of the export"):
        registry.add(run.path, name="a")
    other = make_run(tmp_path / "other", 1)
    add_export(other)
    shutil.rmtree(other.adapter)
    other.adapter.mkdir()
    write_adapter(other.adapter, 2)
    with pytest.raises(InputError, match="made from another adapter"):
        registry.add(other.path, name="a")
    with pytest.raises(Lora2ServeError, match="no versions of that name"):
        registry.versions("a")


def test_aliases_and_history(registry: Registry, tmp_path: Path) -> None:
    versions(registry, tmp_path, 4)
    for number in (1, 2, 4):
        registry.promote(f"medical-qa@{number}", why=f"try {number}")
    registry.promote("medical-qa@3", "staging")
    assert registry.aliases("medical-qa") == {"champion": 4, "staging": 3}
    assert registry.get("medical-qa@champion").number == 4
    assert registry.rollback("medical-qa", why="worse").number == 2
    assert registry.rollback("medical-qa").number == 1, "a second one goes further back"
    with pytest.raises(UsageError, match="no version before it"):
        registry.rollback("medical-qa")
    assert registry.rollback("medical-qa", to=3).aliases == ("champion", "staging")
    moves = [event for event in registry.history("medical-qa") if event.alias == "champion"]
    assert [(event.kind, event.old, event.new) for event in moves] == [
        ("promote", None, 1), ("promote", 1, 2), ("promote", 2, 4), ("rollback", 4, 2), ("rollback", 2, 1),
        ("rollback", 1, 3),
    ]  # fmt: skip
    assert moves[3].why == "worse" and moves[3].who == "tester"
    before = registry.history("medical-qa")
    registry.promote("medical-qa@3")
    assert registry.history("medical-qa") == before, "already there: no event"
    assert registry.verify() == 4


def test_an_alias_is_removed(registry: Registry, tmp_path: Path) -> None:
    versions(registry, tmp_path, 2)
    registry.promote("medical-qa@1")
    registry.promote("medical-qa@2", "challenger")
    before = registry.live()
    assert before is not None and before.numbers == {"medical-qa": {"champion": 1, "challenger": 2}}
    assert registry.live(before.event) is None
    assert registry.unset("medical-qa@challenger", why="worse").aliases == ()
    after = registry.live(before.event)
    assert after is not None and after.numbers == {"medical-qa": {"champion": 1}}
    last = registry.history("medical-qa")[-1]
    assert (last.kind, last.alias, last.old, last.new, last.why) == ("unset", "challenger", 2, None, "worse")
    for name in ("medical-qa@challenger", "medical-qa@2", "medical-qa"):
        with pytest.raises(UsageError):
            registry.unset(name)
    registry.retire("medical-qa@2")
    assert registry.verify() == 2


def test_a_clock_that_goes_back(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came first is what was written first: the order of events is not that of their times."""
    versions(registry, tmp_path, 3)
    for number, day in ((1, "2026-11-28"), (2, "2026-11-27"), (3, "2020-01-01")):
        monkeypatch.setattr("lora2serve.registry.ledger.now", lambda day=day: f"{day}T00:00:00Z")
        registry.promote(f"medical-qa@{number}")
    assert [event.new for event in registry.history("medical-qa") if event.alias] == [1, 2, 3]
    assert [registry.rollback("medical-qa").number for _ in range(2)] == [2, 1]
    assert registry.gc(keep=1).versions == () or registry.get("medical-qa@champion").number == 1
    assert registry.verify() == 3


def test_gates(registry: Registry, tmp_path: Path) -> None:
    """Each gate is named; forced, they are written down. The control: without its fault, each version passes."""
    good = proven(tmp_path / "good", 1)
    scores(good / "evals", 0.75, created="2026-07-01T00:00:00Z")
    registry.add(good, name="m")
    registry.promote("m@1")
    gates = tmp_path / "gates.yaml"
    gates.write_text("suites: {medqa.acc: 0.01, heldout.loss: 0.5}\n")
    other_base = proven(tmp_path / "other", 2, base="org/other")
    worse, even = proven(tmp_path / "worse", 3), proven(tmp_path / "even", 4)
    scores(other_base / "evals", 0.8, created="2026-07-02T00:00:00Z")
    scores(worse / "evals", 0.70, created="2026-07-02T00:00:00Z")
    scores(even / "evals", 0.74, created="2026-07-02T00:00:00Z")
    unproven = make_run(tmp_path / "unproven", 5)
    another = proven(tmp_path / "another", 6)
    scores(another / "evals", 0.9, created="2026-07-02T00:00:00Z", suite_sha256="6" * 64)
    for run in (other_base, worse, even, unproven.path, another):
        registry.add(run, name="m", unproven=True)
    for number, gate in (
        (2, "base: org/other"),
        (3, "medqa.acc: 0.7, m@1 has 0.75"),
        (5, "parity: "),
        (6, "another suite"),
    ):
        with pytest.raises(GateNotMet, match=gate) as refusal:
            registry.promote(f"m@{number}", gates=gates)
        assert refusal.value.exit_code == 3
    assert registry.aliases("m") == {"champion": 1}
    registry.retire("m@4", why="old data")
    with pytest.raises(GateNotMet, match="state: m@4 is retired"):
        registry.promote("m@4", gates=gates)
    assert registry.promote("m@4", force=True, why="it must be", gates=gates).aliases == ("champion",)
    last = registry.history("m")[-1]
    assert (last.why, last.overridden) == ("it must be", "state: m@4 is retired")
    with pytest.raises(UsageError, match="without --why"):
        registry.promote("m@3", force=True)
    assert registry.rollback("m").number == 1
    with pytest.raises(UsageError, match="champion points to it"):
        registry.retire("m@1")


def test_questions(registry: Registry, tmp_path: Path) -> None:
    days = ("2026-06-30T23:59:59Z", "2026-07-01T00:00:00Z", "2026-08-15T00:00:00Z", "2026-10-01T00:00:00Z")
    for seed, (value, day) in enumerate(zip((0.9, 0.6, 0.7, 0.95), days, strict=True)):
        run = make_run(tmp_path / f"run-{seed}", seed, rank=4 << seed)
        scores(run.path / "evals", value, created=day)
        registry.add(run.path, name="medical-qa", domain="medical", unproven=True)
    law = make_run(tmp_path / "law", 9, base="org/law")
    scores(law.path / "evals", 0.99, created=days[1])
    registry.add(law.path, name="law", domain="law", unproven=True)

    def found(**question: object) -> list[str]:
        return [version.reference for version in registry.find(**question)]  # type: ignore[arg-type]

    third = {"since": "2026-07-01", "until": "2026-10-01"}
    assert found(domain="medical", metric="medqa.acc", best=True, **third) == ["medical-qa@3"]
    assert found(metric="medqa.acc", best=True, **third) == ["law@1"], "the control: of all domains"
    assert found(domain="medical", metric="medqa.acc", best=True) == ["medical-qa@4"]
    assert found(domain="medical", metric="heldout.loss", best=True) == ["medical-qa@1"], "the less the better"
    assert found(where="rank <= 8") == ["law@1", "medical-qa@1", "medical-qa@2"]
    assert found(where="rank <= 8 and base = org/base and not number = 1") == ["medical-qa@2"]
    assert found(where="medqa.acc > 0.65 and (domain = 'medical' or rank > 100)") == [
        f"medical-qa@{n}" for n in (1, 3, 4)
    ]
    registry.promote("medical-qa@2", force=True, why="test")
    assert found(alias="champion") == ["medical-qa@2"]
    registry.score("medical-qa@3", scores(tmp_path, 0.5, created="2026-08-16T00:00:00Z"))
    assert found(domain="medical", metric="medqa.acc", best=True, **third) == ["medical-qa@2"], "the newest counts"
    registry.score("medical-qa@3", scores(tmp_path, 0.5, created="2026-08-17T00:00:00Z", suite_sha256="7" * 64))
    with pytest.raises(UsageError, match="2 different suites") as refusal:
        found(domain="medical", metric="medqa.acc")
    assert "777777777777" in refusal.value.hint
    assert found(domain="medical", metric="medqa.acc", suite="777") == ["medical-qa@3"]
    with pytest.raises(UsageError, match=r"did you mean 'medqa.acc'"):
        found(metric="medqa.ac")


def test_the_printed_score_is_the_one_that_was_asked_for(
    registry: Registry,
    location: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the period, of the suite, and of two at one time what was written down last, by which they are ranked too."""
    monkeypatch.setenv("LORA2SERVE_REGISTRY", location)
    versions(registry, tmp_path, 1)
    for value, day, suite in ((0.7, "08-15", "5"), (0.9, "10-15", "5"), (0.8, "10-15", "5"), (0.6, "10-16", "7")):
        made = scores(tmp_path, value, created=f"2026-{day}T00:00:00Z", suite_sha256=suite * 64)
        made.write_text(made.read_text().replace("vllm 0.32.0", f"engine of {value}"))
        registry.score("medical-qa@1", made)
    for options, value in {
        ("--since", "2026-07-01", "--until", "2026-10-01"): "0.7", ("--suite", "555"): "0.8",
        ("--since", "2026-10-15", "--suite", "777"): "0.6", ("--until", "2026-10-16", "--suite", "5"): "0.8",
    }.items():  # fmt: skip
        assert command_line(["registry", "find", "--metric", "medqa.acc", *options]) == 0
        assert f"medical-qa@1 medqa.acc={value} " in capsys.readouterr().out
    where = "medqa.acc = 0.6"
    assert command_line(["registry", "find", "--where", where]) == 0 and "acc=" not in capsys.readouterr().out
    assert registry.get("medical-qa@1").score("medqa.acc", "5" * 64) == registry.find(where=where)[0].scores[-2]


def test_sql_only_reads(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(registry, tmp_path, 2)
    assert registry.sql("SELECT name, count(*) AS n FROM version GROUP BY name") == (["name", "n"], [["medical-qa", 2]])
    for statement in (
        "DELETE FROM version", "UPDATE alias SET number = 1", "DROP TABLE version", "PRAGMA query_only=OFF",
        "SELECT 1; DELETE FROM score", "INSERT INTO setting VALUES ('a', 'b')", "ATTACH 'x' AS y", "COMMIT", "",
        "WITH gone AS (DELETE FROM score RETURNING *) SELECT * FROM gone", "SELECT * FROM nothing",
        "SELECT setval('event_id_seq', 1)", "SET TRANSACTION READ WRITE",
    ):  # fmt: skip
        with pytest.raises(UsageError, match="sql: "):
            registry.sql(statement)
    assert registry.verify() == 2 and len(registry.versions()) == 2
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {}) SELECT i FROM n"
    assert MOST_ROWS == 100_000, "as the docs say"
    monkeypatch.setattr("lora2serve.registry.queries.MOST_ROWS", 1000)
    assert len(registry.sql(numbers.format(1000))[1]) == 1000
    with pytest.raises(UsageError, match="sql: more than 1000 rows"):
        registry.sql(numbers.format(1001))


def test_a_query_without_end_is_interrupted(registry: Registry, tmp_path: Path) -> None:
    """Ctrl-C reaches it in the midst of one row; what is asked next is answered."""
    versions(registry, tmp_path, 1)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        registry.sql(endless)
    timer.join()
    assert registry.sql("SELECT count(*) AS n FROM version") == (["n"], [[1]])


def test_columns_of_one_name(
    location: str,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """JSON has a key once: the second column would be all that is left."""
    versions(registry, tmp_path, 1)
    monkeypatch.setenv("LORA2SERVE_REGISTRY", location)
    assert command_line(["registry", "sql", "SELECT 1 AS a, 2 AS a", "--json"]) == 2
    assert "several columns are called a" in capsys.readouterr().err
    assert command_line(["registry", "sql", "SELECT 1 AS a, 2 AS b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"a": 1, "b": 2}]


def test_events_are_never_changed(registry: Registry, tmp_path: Path) -> None:
    versions(registry, tmp_path, 1)
    database = registry._open().database
    for statement in ("UPDATE event SET why = 'x'", "DELETE FROM event"):
        with pytest.raises(Lora2ServeError, match="events are never changed"), database.writing() as connection:
            connection.exec_driver_sql(statement)


def test_gc_keeps_what_may_be_needed(registry: Registry, tmp_path: Path) -> None:
    versions(registry, tmp_path, 6)
    for number in (1, 2, 3):
        registry.promote(f"medical-qa@{number}")
    registry.promote("medical-qa@1", "staging")
    planned = registry.gc(keep=2, dry_run=True)
    assert planned.versions == ("medical-qa@4",) and registry.get("medical-qa@4").state == "active"
    path = registry.path("medical-qa@4")
    done = registry.gc(keep=2)
    assert done.versions == planned.versions and done.files > 0 and not path.exists()
    assert registry.get("medical-qa@4").state == "collected" and registry.verify() == 6
    with pytest.raises(UsageError, match="its files were removed"):
        registry.path("medical-qa@4")
    with pytest.raises(UsageError, match="its files were removed"):
        registry.promote("medical-qa@4", force=True, why="no")
    assert registry.add(tmp_path / "run-3", name="medical-qa").reference == "medical-qa@4"
    assert (registry.path("medical-qa@4") / "adapter" / "adapter_model.safetensors").is_file()
    assert registry.gc(keep=9) == registry.gc(keep=9, dry_run=True).__class__((), 0, 0, False)


def test_a_flipped_byte_is_found(registry: Registry, tmp_path: Path) -> None:
    versions(registry, tmp_path, 2)
    root = Path(registry._open().database.content or registry.location.folder or "")
    path = next((registry.path("medical-qa@2") / "adapter").glob("*.safetensors"))
    blob = next(file for file in root.rglob("blobs/*/*") if file.stat().st_ino == path.stat().st_ino)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)
    with pytest.raises(InputError, match=r"medical-qa@2: adapter/adapter_model.safetensors: content changed"):
        registry.verify()
    registry.add(tmp_path / "run-1", name="medical-qa")
    assert registry.verify() == 2, "the same content mends it"
    path = next((registry.path("medical-qa@2") / "adapter").glob("*.safetensors"))
    assert path.read_bytes() == (tmp_path / "run-1" / "adapter" / path.name).read_bytes(), "also where it is used"
    blob.unlink()
    with pytest.raises(InputError, match=r"medical-qa@2: adapter/adapter_model.safetensors: missing"):
        registry.verify()
    registry.add(tmp_path / "run-1", name="medical-qa")
    assert registry.verify() == 2, "the same content mends it"


def test_a_directory_is_made_again(registry: Registry, tmp_path: Path) -> None:
    versions(registry, tmp_path, 1)
    path = registry.path("medical-qa@1")
    (path / "recipe.yaml").unlink()
    shutil.rmtree(path / "exports")
    again = registry.path("medical-qa@1")
    assert (
        again == path and (path / "recipe.yaml").is_file() and (path / "exports" / "vllm" / "lora2serve.json").is_file()
    )
    shutil.rmtree(path)
    assert (registry.path("medical-qa@1/vllm")).is_dir()
    shutil.rmtree(path)
    path.mkdir()
    (path / "mine").write_text("")
    with pytest.raises(Lora2ServeError, match="not the directory of a version"):
        registry.path("medical-qa@1")
    assert (path / "mine").is_file(), "nobody's files are removed"


def test_what_is_no_version(registry: Registry, tmp_path: Path) -> None:
    versions(registry, tmp_path, 1)
    registry.promote("medical-qa@1")
    for reference, message in {
        "medical-qa@2": "no such version", "medical-qa@champoin": "did you mean 'champion'",
        "medcal-qa@1": "did you mean 'medical-qa'", "medical-qa": "expected NAME@NUMBER", "a@b@c": "expected NAME@",
        "medical-qa@0": "no such version", "medical-qa@99999999999999999999": "no such version",
        "../x@1": "expected NAME@", "medical-qa@1/gguf": "no such export",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=message):
            registry.path(reference)
    for name in ("a@b", "a/b", "", "-x", "latest", "ä", "a b", "a\nb", "x" * 300):
        with pytest.raises(UsageError, match="--name"):
            registry.add(tmp_path / "run-0", name=name)
    for alias in ("7", "a b", "a@b", "", "x" * 200, "a/b", "-x"):
        with pytest.raises(UsageError, match="alias"):
            registry.promote("medical-qa@1", alias)
    for source in ("nothing", tmp_path, __file__):
        with pytest.raises(UsageError, match=r"no such directory|not a run"):
            registry.add(source, name="a")


def test_hostile_directories(registry: Registry, tmp_path: Path) -> None:
    """Links that lead out, pipes and odd names are refused at once, and nothing is stored."""
    secret = tmp_path / "secret"
    secret.write_text("token")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, 0)
    (adapter / "stolen").symlink_to(secret)
    os.mkfifo(adapter / "pipe")
    (adapter / "a\nb").write_text("")
    with pytest.raises(InputError, match="outside the directory") as refusal:
        registry.add(adapter, name="a", unproven=True)
    assert "not a file" in str(refusal.value) and "unprintable" in str(refusal.value)
    (adapter / os.fsdecode(b"\xff")).mkdir()
    (adapter / os.fsdecode(b"\xff") / "x").write_text("")
    with pytest.raises(InputError, match="not UTF-8"):
        registry.add(adapter, name="a", unproven=True)
    with pytest.raises(Lora2ServeError):
        registry.get("a@1")


def test_scores_that_cannot_be(registry: Registry, tmp_path: Path) -> None:
    versions(registry, tmp_path, 1)
    path = scores(tmp_path, 0.5, created="2026-08-16T00:00:00Z")
    content = json.loads(path.read_text())
    for key, value, message in (
        ("suite", "a.b", "suite: 'a.b'"), ("suite_sha256", "x", "64 hexadecimal"), ("created", "today", "a time like"),
        ("format", 2, "format 2"), ("metrics", {}, "metrics: none"), ("metrics", {"acc": {"value": "nan"}}, "finite"),
    ):  # fmt: skip
        path.write_text(json.dumps({**content, key: value}))
        with pytest.raises(InputError, match=message):
            registry.score("medical-qa@1", path)
    path.write_text(json.dumps(content))
    assert registry.score("medical-qa@1", path) == registry.score("medical-qa@1", path)


def test_a_report_is_written_over_without_harm(registry: Registry, tmp_path: Path) -> None:
    """Parity writes its report where that of before lies; the registry gets the new one, and is whole."""
    run = proven(tmp_path / "run")
    (run / "parity").mkdir()
    (run / "parity" / "report.json").write_text("first")
    registry.add(run, name="a")
    path = registry.path("a@1")
    (path / "parity" / "report.json").write_text("second")
    change_manifest(path / "exports" / "vllm", parity=None)
    assert registry.verify() == 1
    registry.record_parity(path)
    assert registry.get("a@1").exports[0].unproven == "parity was not run"
    shutil.rmtree(path)
    assert (registry.path("a@1") / "parity" / "report.json").read_text() == "second" and registry.verify() == 1


def test_names_are_completed(
    registry: Registry, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA2SERVE_REGISTRY", location)
    versions(registry, tmp_path, 2)
    registry.promote("medical-qa@2")
    registry.add(proven(tmp_path / "law"), name="law")
    show = registry_group.commands["show"]
    context = click.Context(show)
    for word, known in {"": ["law@1", "medical-qa@1", "medical-qa@2", "medical-qa@champion"], "l": ["law@1"]}.items():
        assert [item.value for item in show.params[0].shell_complete(context, word)] == known
    monkeypatch.setenv("LORA2SERVE_REGISTRY", str(tmp_path / "none"))
    assert show.params[0].shell_complete(context, "") == []


def test_links_of_a_run(registry: Registry, tmp_path: Path) -> None:
    """No file from outside gets into a version, whichever part of the run is the link; one inside it is a file."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "x.jsonl").write_text("token")
    for part in ("metrics.jsonl", "evals", "adapter"):
        run = make_run(tmp_path / f"run-{part}").path
        if part == "adapter":
            (run / part).rename(secret / part)
        (run / part).symlink_to(secret / {"metrics.jsonl": "x.jsonl", "evals": ".", "adapter": "adapter"}[part])
        with pytest.raises(InputError, match=f"{part}: a link to .*outside the directory"):
            registry.add(run, name="a", unproven=True)
    run = make_run(tmp_path / "inside").path
    (run / "adapter").rename(run / "best")
    (run / "adapter").symlink_to("best")
    version = registry.add(run, name="a", unproven=True)
    assert (registry.path(version.reference) / "adapter" / "adapter_model.safetensors").is_file()
    (tmp_path / "named").symlink_to(run / "best")
    assert registry.add(tmp_path / "named", name="a", unproven=True).version == version.version


def test_numbers_and_text_that_no_database_takes(registry: Registry, tmp_path: Path) -> None:
    """Each of an adapter's config, a recipe or an argument is refused in a line that names it."""
    half = "\ud800"
    for key, value in (
        ("r", 10**30), ("lora_alpha", 10**400), ("peft_type", half), ("target_modules", ["a", 1]),
        ("target_modules", [half]), ("base_model_name_or_path", {}),
    ):  # fmt: skip
        adapter = tmp_path / "adapter"
        adapter.mkdir(exist_ok=True)
        write_adapter(adapter, 0)
        config = adapter / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
        with pytest.raises(InputError, match=key):
            registry.add(adapter, name="a", unproven=True)
    run = make_run(tmp_path / "run")
    run.recipe.write_text('note: "\\ud800"\n')
    with pytest.raises(InputError, match=r"note: .*Unicode"):
        registry.add(run.path, name="a", unproven=True)
    run.recipe.write_text(f"train: {{learning_rate: 1{'0' * 400}}}\n")
    assert registry.add(run.path, name="a", unproven=True, note="ü").learning_rate is None
    for refused in (
        lambda: registry.promote("a@1", "b", force=True, why=half),
        lambda: registry.find(domain=half),
        lambda: registry.find(since="0001-01-01T00:00+23:59"),
        lambda: registry.find(data=tmp_path / "nothing.jsonl"),
        lambda: registry.rollback("a", alias=""),
        lambda: registry.promote("a@1", force=True, why=" "),
    ):
        with pytest.raises(UsageError, match=r"Unicode|date|no such file|alias ''|--why"):
            refused()
    assert len(registry.find(limit=10**30)) == 1


def test_an_export_is_no_version(registry: Registry, tmp_path: Path) -> None:
    versions(registry, tmp_path, 1)
    label = registry.get("medical-qa@1").exports[0].name
    for command in (registry.get, registry.promote, registry.retire):
        with pytest.raises(UsageError, match=f"names the export {label}"):
            command(f"medical-qa@1/{label}")
    assert registry.path(f"medical-qa@1/{label}").is_dir() and registry.get("medical-qa@1").state == "active"


def test_lines_for_people(
    location: str,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A reason of two lines is one event, and what finds nothing says why."""
    versions(registry, tmp_path, 1)
    monkeypatch.setenv("LORA2SERVE_REGISTRY", location)
    registry.promote("medical-qa@1", why="good\n2026-01-01T00:00:00Z root promote medical-qa@champion 1 -> 9")
    capsys.readouterr()
    assert command_line(["registry", "history", "medical-qa"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(registry.history()) and "good\\n2026" in lines[-1]
    assert command_line(["registry", "find", "--name", "medical-aq"]) == 0
    assert "did you mean 'medical-qa'?" in capsys.readouterr().err
    assert command_line(["registry", "find", "--name", "medical-qa", "--where", "rank > 1000"]) == 0
    assert "no version fits" in capsys.readouterr().err


def test_urls_that_cannot_be() -> None:
    for url in ("postgresql://[bad/db", "postgresql://host:abc/db", "postgresql://host:99999/db", "postgresql://host"):
        with pytest.raises(UsageError, match="expected a folder or postgresql"):
            Registry(url)
    assert Registry("postgresql://host:5432/db").location.folder is None


def test_records_that_cannot_be_read(registry: Registry, tmp_path: Path) -> None:
    """``verify`` names each, and counts no version as whole that no command can show."""
    versions(registry, tmp_path, 4)
    assert registry.verify() == 4
    with registry._open().database.writing() as connection:
        connection.exec_driver_sql("UPDATE version SET facts = '[' WHERE number = 2")
        connection.exec_driver_sql("UPDATE version SET state = 'lost' WHERE number = 4")
    with pytest.raises(InputError, match="medical-qa@2: facts: not JSON") as refusal:
        registry.verify()
    assert "medical-qa@4: state: 'lost'" in str(refusal.value) and "medical-qa@1" not in str(refusal.value)
    with registry._open().database.writing() as connection:
        connection.exec_driver_sql("UPDATE setting SET value = 'x' WHERE key = 'schema'")
    with pytest.raises(InputError, match="schema 'x', expected a number"):
        Registry(registry.location.folder or registry.location.url).versions()
