"""``lora2serve.Registry``: versions of adapters, their aliases and their history."""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lora2serve.api.export_request import Named
from lora2serve.api.locate import find_source
from lora2serve.artifacts.suite_scores import SuiteScores
from lora2serve.config.arguments import checked_methods
from lora2serve.console import default_progress
from lora2serve.errors import InputError, ParityNotMet, UsageError
from lora2serve.progress import Progress
from lora2serve.registry.location import find_location
from lora2serve.registry.trial_decision import TrialDecision
from lora2serve.registry.version_reference import need_reference, need_version, refuse_version_name

if TYPE_CHECKING:
    from lora2serve.api.registry_sync import Synced
    from lora2serve.registry.difference import VersionDifference
    from lora2serve.registry.live_aliases import LiveAliases
    from lora2serve.registry.open_registry import OpenRegistry
    from lora2serve.registry.promotion_gates import GateRecipe
    from lora2serve.registry.upkeep import Collected
    from lora2serve.registry.version_record import ChangedVersion, RegistryEvent, Version

CHAMPION, CHALLENGER = "champion", "challenger"
KEEP = 5  # versions of each name that gc leaves


@checked_methods
class Registry:
    """A registry of versions: a folder with a sqlite file, or a Postgres and a store for files.

    location: a folder, or ``postgresql://HOST/DATABASE``; by default what LORA2SERVE_REGISTRY names, else ``registry``.
    author: who is written into events; by default the user of this process.

    A version is named ``medical-qa@7``, or by an alias ``medical-qa@champion``. All methods raise UsageError for
    versions and options that cannot be, RegistryError where the database or a disk refuses.

    What changes a version returns a ChangedVersion: that version, the ``events`` of its history that were written, its
    ``files`` that are new, the ``gates`` as judged. With ``dry_run`` a method refuses what it would refuse, changes
    nothing, and returns what it would do.
    """

    def __init__(self, location: Named | None = None, *, author: str | None = None) -> None:
        self.location = find_location(location)
        self.author = author or _user()
        self._opened: OpenRegistry | None = None

    @classmethod
    def create(cls, location: Named | None = None, *, content: Named = "", author: str | None = None) -> Registry:
        """Make an empty registry, or open the one that is there.

        content: where files lie: a folder, or a URL that fsspec opens, such as ``s3://bucket/registry``; by default the
            registry's own folder. A Postgres needs one. It is chosen once.
        """
        registry = cls(location, author=author)
        if not content and not registry.location.folder:
            raise UsageError(
                f"registry {registry.location.shown}: no place for files", "--content FOLDER or URL is one"
            )
        text = str(content)
        registry._open(create=True, content=text if "://" in text or not text else str(Path(text).absolute()))
        return registry

    def add(
        self, source: Named, *, name: str, domain: str = "", task: str = "", note: str = "", author: str = "",
        unproven: bool = False, dry_run: bool = False, progress: Progress | None = None,
    ) -> ChangedVersion:  # fmt: skip
        """Register a run with its exports, an adapter, or an export; the same content is the same version.

        name: what its versions are called, such as ``medical-qa``.
        domain, task, note, author: what people look for; ``author`` is who trained it, by default who adds it.
        unproven: add exports whose parity is not proven, or a run without exports.
        progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

        Raises ParityNotMet for what is not proven, InputError for an export that is not as its manifest says.
        """
        from lora2serve.registry.ledger import Labels

        refuse_version_name(name)
        found = find_source(source)
        if not unproven and (reasons := found.unproven()):
            raise ParityNotMet("\n".join(reasons), "`lora2serve parity` proves it; --unproven adds it as it is")
        labels, progress = Labels(domain, task, note, author), progress or default_progress()
        if dry_run and self._opened is None:
            from lora2serve.registry.open_registry import to_plan_with

            with to_plan_with(self.location) as opened:
                return opened.add(name, found, labels, self.author, progress, dry_run=True)
        opened = self._open(create=self.location.folder is not None)
        return opened.add(name, found, labels, self.author, progress, dry_run=dry_run)

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, or those of one name, by name and number."""
        from lora2serve.registry import version_rows
        from lora2serve.registry.queries import VersionQuery, find_versions

        with self._open().reading() as connection:
            if name is not None:
                version_rows.refuse_unknown_name(connection, name)
            return find_versions(connection, VersionQuery(name=name or ""))

    def names(self) -> list[str]:
        """Every name that has versions."""
        from lora2serve.registry import version_rows

        with self._open().reading() as connection:
            return version_rows.names(connection)

    def get(self, version: str) -> Version:
        """One version, by ``NAME@NUMBER`` or ``NAME@ALIAS``."""
        from lora2serve.registry.version_rows import find_version

        with self._open().reading() as connection:
            return find_version(connection, need_version(version))

    def path(self, version: str) -> Path:
        """A directory of its files, as every command takes it: a run, an adapter or an export.

        ``medical-qa@7/vllm`` is one export. The directory is made where it is not there; leave its files as they are.
        """
        return self._open().check_out(need_reference(version))[1]

    def aliases(self, name: str) -> Mapping[str, int]:
        """Alias -> number of the version that it points to."""
        from lora2serve.registry import version_rows

        with self._open().reading() as connection:
            version_rows.refuse_unknown_name(connection, name)
            return version_rows.aliases_of(connection, name)

    def live(self, since: int = -1) -> LiveAliases | None:
        """Where all aliases point, and where a rollback of each would go; None if ``since`` is still the last event."""
        from lora2serve.registry.live_aliases import last_event, read_live

        with self._open().reading() as connection:
            return None if last_event(connection) == since else read_live(connection)

    def diff(self, first: str, second: str) -> list[VersionDifference]:
        """Every field in which two versions differ: recipe, data, scores, exports."""
        from lora2serve.registry.difference import differences

        return differences(self.get(first), self.get(second))

    def find(
        self, *, name: str = "", domain: str = "", task: str = "", author: str = "", alias: str = "", data: Named = "",
        metric: str = "", suite: str = "", since: str = "", until: str = "", last: str = "", where: str = "",
        best: bool = False, limit: int | None = None,
    ) -> list[Version]:  # fmt: skip
        """The versions that fit, the best first where a metric is named.

        data: a file of rows that they were trained on, or the beginning of its sha256.
        metric: SUITE.METRIC, such as ``medqa.acc``: only versions that were measured on it.
        suite: the beginning of the suite's sha256, where several suites have that name.
        since, until: dates such as ``2026-07-01``; ``until`` itself is left out. When it was measured, with a metric;
            else when it was trained.
        last: "day", "week", "month", "quarter" or "year": the last whole one of UTC's calendar; or "30d".
        where: such as ``rank <= 16 and base = org/model``.
        best: the best alone.
        """
        from lora2serve.registry.periods import period
        from lora2serve.registry.queries import VersionQuery, find_versions, sum_of_rows

        first, after = period(since, until, last)
        question = VersionQuery(
            name, domain, task, author, alias, sum_of_rows(data), metric, suite, first, after, where, best, limit
        )
        with self._open().reading() as connection:
            return find_versions(connection, question)

    def unknown_words(
        self, *, name: str = "", domain: str = "", task: str = "", author: str = "", alias: str = ""
    ) -> list[str]:
        """Which of these no version has, a line each, with what is near it: why ``find`` has found nothing."""
        from lora2serve.registry.queries import VersionQuery, unknown_words

        with self._open().reading() as connection:
            return unknown_words(connection, VersionQuery(name, domain, task, author, alias))

    def sql(self, query: str) -> tuple[Sequence[str], list[list[object]]]:
        """The columns and the rows of a SELECT; UsageError for what would write, and for over 100,000 rows."""
        from lora2serve.registry.queries import run_sql

        return run_sql(self._open().database, query)

    def score(self, version: str, scores: SuiteScores | Named) -> Version:
        """Write down what a version reached on a suite: the scores, or a file of them."""
        from lora2serve.registry.version_rows import find_version

        suite = scores if isinstance(scores, SuiteScores) else SuiteScores.read(Path(scores))
        with self._open().writing(self.author) as ledger:
            found = find_version(ledger.connection, need_version(version))
            ledger.add_scores(found.name, found.number, suite)
            return find_version(ledger.connection, need_version(found.reference))

    def promote(
        self, version: str, to: str = CHAMPION, *, why: str = "", force: bool = False, gates: Named | None = None,
        dry_run: bool = False,
    ) -> ChangedVersion:  # fmt: skip
        """Let an alias point to a version, if its gates are met.

        gates: a YAML file of suites and margins; by default ``gates.yaml`` in the registry's folder, if it is there.
        force: go past the gates; ``why`` must say why, and is written down with them.

        Raises GateNotMet with each gate that forbids it.
        """
        from lora2serve.registry import alias_moves

        recipe, reference = self._gates(gates), need_version(version)
        move = partial(alias_moves.promote, reference=reference, alias=to, gates=recipe, force=force, why=why)
        return self._open().change(self.author, move, dry_run=dry_run)

    def rollback(
        self, name: str, *, alias: str = CHAMPION, to: int | None = None, why: str = "", dry_run: bool = False
    ) -> ChangedVersion:
        """Let an alias point to the version before, or to the one of that number; needs no network and no GPU."""
        from lora2serve.registry import alias_moves

        move = partial(alias_moves.rollback, name=name, alias=alias, number=to, why=why)
        return self._open().change(self.author, move, dry_run=dry_run)

    def end_trial(
        self, name: str, outcome: TrialDecision, *, champion: int, challenger: int, why: str,
        aliases: tuple[str, str] = (CHAMPION, CHALLENGER),
    ) -> bool:  # fmt: skip
        """Do what live traffic has decided between two versions; False, and nothing moves, where somebody was faster.

        outcome: "promote" lets the champion's alias point to the challenger's version, if its gates are met
            (GateNotMet); "rollback" and "stop-shadow" let the challenger's alias point to the champion's version.
        champion, challenger: the numbers of the versions that were tested; ``aliases`` are what points to them.
        """
        from lora2serve.registry.trial_end import end_trial

        gates, tested = self._gates(None), tuple(zip(aliases, (champion, challenger), strict=True))
        with self._open().writing(self.author) as ledger:
            return end_trial(ledger, name, outcome, tested[0], tested[1], gates, why)

    def unset(self, version: str, *, why: str = "", dry_run: bool = False) -> ChangedVersion:
        """Remove an alias, named as ``medical-qa@challenger``; the version that it pointed to."""
        from lora2serve.registry import alias_moves

        remove = partial(alias_moves.unset, reference=need_version(version), why=why)
        return self._open().change(self.author, remove, dry_run=dry_run)

    def retire(self, version: str, *, why: str = "", dry_run: bool = False) -> ChangedVersion:
        """Mark a version as one that no alias may point to."""
        from lora2serve.registry import alias_moves

        mark = partial(alias_moves.retire, reference=need_version(version), why=why)
        return self._open().change(self.author, mark, dry_run=dry_run)

    def history(self, name: str | None = None) -> list[RegistryEvent]:
        """What was done, the first first, to one name or to all."""
        from lora2serve.registry import version_rows

        with self._open().reading() as connection:
            if name is not None:
                version_rows.refuse_unknown_name(connection, name)
            return version_rows.read_events(connection, name)

    def gc(self, *, keep: int = KEEP, dry_run: bool = False) -> Collected:
        """Remove the files of old versions; their records stay.

        Of each name the ``keep`` newest versions stay, whatever an alias points to, and the last ``keep`` that each
        alias pointed to. Files that no version has go too, such as what a killed command left.
        """
        if keep < 1:
            raise UsageError(f"--keep {keep}: expected 1 or more")
        return self._open().collect(keep, self.author, dry_run=dry_run)

    def verify(self, *, progress: Progress | None = None) -> int:
        """Compare every file with its sha256, and the aliases with the events; how many versions were looked at.

        Raises InputError with everything that is wrong, a line each.
        """
        problems, count = self._open().verify(progress or default_progress())
        if problems:
            raise InputError("\n".join(problems), "`lora2serve registry add` of the same content mends its files")
        return count

    def sync(self, name: str, *, to: str, dry_run: bool = False, progress: Progress | None = None) -> Synced:
        """Send the versions of a name to another place, one way; the proven ones that are not there yet.

        to: ``hub:USER/REPO``: version 7 as the tag ``v7``, each alias as a branch; or ``mlflow:http://HOST:PORT``: a
            registered model with its versions, scores as metrics of their runs, aliases.

        Raises HubError or HttpError for what is refused there.
        """
        from lora2serve.api.registry_sync import sync

        return sync(self, name, to, progress or default_progress(), dry_run=dry_run)

    def files(self, version: str) -> Mapping[str, Path]:
        """Every file of a version by its path in it, as it lies here."""
        return self._open().local_files(need_reference(version))

    def record_parity(self, directory: Path) -> None:
        """Write down what was measured in the directory of a version: the verdicts of parity, its report, scores."""
        self._open().record_measured(directory, self.author)

    def close(self) -> None:
        """End its connections."""
        if self._opened:
            self._opened.close()
            self._opened = None

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, *, create: bool = False, content: str = "") -> OpenRegistry:
        if self._opened is None or content:
            from lora2serve.registry.open_registry import OpenRegistry

            self._opened = OpenRegistry(self.location, create=create, content=content)
        return self._opened

    def _gates(self, named: Named | None) -> GateRecipe:
        from lora2serve.registry.promotion_gates import FILE, GateRecipe, read_gates

        if named is not None:
            return read_gates(Path(named))
        own = self.location.folder / FILE if self.location.folder else None
        return read_gates(own) if own and own.is_file() else GateRecipe()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"user {os.getuid()}"
