"""The trials of a sweep in Optuna's storage, where several processes and machines see each other's.

A trial is claimed by adding it: of two with the same key the one with the lower number counts, which all see the same
way, as a storage numbers trials one after another. A claim whose worker has ended does not count.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.errors import Lora2ServeError, SweepError, UsageError, first_line
from lora2serve.sweeping.optuna_points import distributions_of, params_of, quiet_optuna
from lora2serve.sweeping.search_space import SearchPoint, Value
from lora2serve.sweeping.sweep_facts import SweepFacts
from lora2serve.sweeping.trial_record import TrialOutcome, TrialSpec
from lora2serve.system.extras import EXTRA_OF, install_hint
from lora2serve.system.http import without_credentials

if TYPE_CHECKING:
    import optuna

SILENT = 150.0  # seconds without a sign of life after which another machine's worker counts as ended
BEAT = 20.0  # seconds between two signs of life
BUSY = 60.0  # seconds to wait for another process that writes into sqlite
FACTS, RETRIED = "sweep", "retried"  # attributes of the study
SPEC, WORKER, ALIVE, OUTCOME = "spec", "worker", "alive", "outcome"  # and of a trial
JOURNALS = (".journal", ".log")
FIGURES = ("eval_loss", "memory_bytes", "seconds", "parameters", "unservable")


@dataclass(frozen=True)
class LedgerView:
    """What is on record, by key in the order of the trials; ``running`` are claimed by somebody who is there."""

    results: Mapping[str, TrialOutcome]
    tried: Mapping[str, TrialSpec]
    running: Mapping[str, str]  # key -> worker


@dataclass
class TrialLedger:
    """One storage, opened. All its methods are called from one thread."""

    study: optuna.Study
    facts: SweepFacts
    location: str
    _beats: dict[int, tuple[int, float]] = field(default_factory=dict)  # trial -> its last sign of life, when seen
    _claims: dict[str, int] = field(default_factory=dict)  # ours: key -> number
    _last_beat: float = 0.0

    def read(self) -> LedgerView:
        """Everything, once more."""
        results: dict[str, TrialOutcome] = {}
        tried: dict[str, TrialSpec] = {}
        running: dict[str, str] = {}
        retried = set(self._attribute(RETRIED) or ())
        for trial in self._trials():
            if SPEC not in trial.user_attrs or trial.number in retried:
                continue
            spec = spec_from_json(trial.user_attrs[SPEC])
            if spec.key in tried:  # claimed twice: the lower number counts
                continue
            if OUTCOME in trial.user_attrs and trial.state.is_finished():
                results[spec.key] = TrialOutcome.from_json(json.loads(trial.user_attrs[OUTCOME]), spec.key)
            elif trial.state.is_finished() or self._has_ended(trial):
                continue
            else:
                running[spec.key] = trial.user_attrs[WORKER]
            tried[spec.key] = spec
        return LedgerView(results, tried, running)

    def claim(self, spec: TrialSpec) -> bool:
        """Whether this trial is ours to run; False where somebody else has it, or has done it."""
        import optuna

        claim = uuid.uuid4().hex
        with _errors(self.location):
            self.study.add_trial(
                optuna.create_trial(
                    state=optuna.trial.TrialState.RUNNING, params=params_of(spec.point),
                    distributions=distributions_of(self.facts.space),
                    user_attrs={SPEC: spec_to_json(spec), WORKER: own_worker(), "claim": claim, ALIVE: 0},
                )
            )  # fmt: skip
        number = -1
        for trial in self._trials():
            if trial.user_attrs.get("claim") == claim:
                number = trial.number
                break
            if trial.user_attrs.get(SPEC) == spec_to_json(spec) and self._counts(trial):
                self._withdraw(claim)
                return False
        self._claims[spec.key] = number
        return True

    def finish(self, spec: TrialSpec, outcome: TrialOutcome) -> None:
        """Keep what came of a trial of ours. What does not fit is told to Optuna as infeasible."""
        import optuna

        states = optuna.trial.TrialState
        number = self._claims.pop(spec.key)
        with _errors(self.location):
            trial = optuna.trial.Trial(self.study, self._trial_id(number))
            trial.set_user_attr(OUTCOME, json.dumps(outcome.to_json()))
            too_large = outcome.status in ("out of memory", "does not fit")
            trial.set_constraint("memory", 1.0 if too_large else -1.0)
            base_loss = self.facts.settings.base_loss
            objectives = outcome.objectives if outcome.finished else outcome.infeasible(base_loss)
            if outcome.finished or too_large:
                self.study.tell(number, list(objectives.values), state=states.COMPLETE)
            else:
                self.study.tell(number, state=states.FAIL)

    def give_up(self, spec: TrialSpec) -> None:
        """Leave a trial of ours to whoever comes next: after Ctrl-C."""
        import optuna

        number = self._claims.pop(spec.key, None)
        if number is not None:
            with _errors(self.location):
                self.study.tell(number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def show_life(self) -> None:
        """A sign of life for other machines, every now and then."""
        import optuna

        if time.monotonic() - self._last_beat < BEAT:
            return
        self._last_beat = time.monotonic()
        with _errors(self.location):
            for number in self._claims.values():
                trial = optuna.trial.Trial(self.study, self._trial_id(number))
                trial.set_user_attr(ALIVE, int(trial.user_attrs.get(ALIVE, 0)) + 1)

    def retry_failed(self) -> int:
        """Have trials that failed for another reason than memory run once more; how many they are."""
        failed = [
            trial.number
            for trial in self._trials()
            if OUTCOME in trial.user_attrs and json.loads(trial.user_attrs[OUTCOME]).get("status") == "failed"
        ]
        before = self._attribute(RETRIED) or []
        with _errors(self.location):
            self.study.set_user_attr(RETRIED, sorted({*before, *failed}))
        return len(set(failed) - set(before))

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        with _errors(self.location):
            trials: list[optuna.trial.FrozenTrial] = self.study.get_trials(deepcopy=False)
        return sorted(trials, key=lambda trial: trial.number)

    def _trial_id(self, number: int) -> int:
        return next(int(trial._trial_id) for trial in self._trials() if trial.number == number)

    def _attribute(self, key: str) -> list[int] | None:
        with _errors(self.location):
            value: list[int] | None = self.study.user_attrs.get(key)
        return value

    def _has_ended(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether its worker has: on this machine by its process, elsewhere by its silence."""
        worker = str(trial.user_attrs.get(WORKER, ""))
        if trial.number in self._claims.values():
            return False
        if worker.partition(":")[0] == _host():
            return not _is_there(worker)
        beat, now = int(trial.user_attrs.get(ALIVE, 0)), time.monotonic()
        last, since = self._beats.get(trial.number, (-1, now))
        if beat != last:
            self._beats[trial.number] = (beat, now)
            return False
        return now - since > SILENT

    def _counts(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether it is done, or somebody is at it."""
        if trial.number in set(self._attribute(RETRIED) or ()):
            return False
        finished = trial.state.is_finished()
        return OUTCOME in trial.user_attrs if finished else not self._has_ended(trial)

    def _withdraw(self, claim: str) -> None:
        import optuna

        with _errors(self.location):
            for trial in self._trials():
                if trial.user_attrs.get("claim") == claim:
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


def create_ledger(location: str, facts: SweepFacts) -> TrialLedger:
    """A new study of that name; UsageError where there is one."""
    import optuna

    with _errors(location):
        try:
            study = optuna.create_study(
                storage=_storage(location), study_name=facts.name, directions=["minimize"] * len(FIGURES)
            )
        except optuna.exceptions.DuplicatedStudyError:
            raise UsageError(
                f"{without_credentials(location)}: has a sweep {facts.name!r} already", "--name gives this one another"
            ) from None
        study.set_user_attr("figures", list(FIGURES))
        study.set_user_attr(FACTS, json.dumps(facts.to_json()))
    return TrialLedger(study, facts, location)


def open_ledger(location: str, name: str | None = None) -> TrialLedger:
    """The sweep in a storage; UsageError where there is none, or several and no name."""
    import optuna

    with _errors(location):
        if "://" not in location and not Path(location).is_file():
            raise UsageError(f"{location}: no storage of a sweep", "such as sweeps/demo/sweep.db")
        storage = _storage(location)
        names = optuna.get_all_study_names(storage)
        chosen = name or (names[0] if len(names) == 1 else None)
        if chosen not in names:
            known = f"sweeps there: {', '.join(names) or 'none'}"
            raise UsageError(f"{without_credentials(location)}: which sweep? {known}", "--name names one of them")
        study = optuna.load_study(storage=storage, study_name=chosen)
        content = study.user_attrs.get(FACTS)
    if content is None:
        raise UsageError(f"{without_credentials(location)}: {chosen} is a study of another program", "")
    return TrialLedger(study, SweepFacts.from_json(json.loads(content), f"sweep {chosen}"), location)


def has_sweep(location: str, name: str) -> bool:
    """Whether a storage has a sweep of that name; in one that has none, nothing is made for that."""
    import optuna

    if "://" not in location and not Path(location).is_file():
        return False
    with _errors(location):
        return _has_studies(location) and name in optuna.get_all_study_names(_storage(location))


def own_worker() -> str:
    """This process, as others can tell whether it is there: host, pid, and when it began."""
    return f"{_host()}:{os.getpid()}:{_began(os.getpid())}"


def spec_to_json(spec: TrialSpec) -> str:
    """As it lies in a storage."""
    point = spec.point
    return json.dumps([point.rate, point.targets, point.rank, point.others, spec.level, spec.seed])


def spec_from_json(text: str) -> TrialSpec:
    """The same, read."""
    rate, targets, rank, others, level, seed = json.loads(text)
    pairs: list[tuple[str, Value]] = [(key, tuple(v) if isinstance(v, list) else v) for key, v in others]
    return TrialSpec(SearchPoint(float(rate), targets, int(rank), tuple(pairs)), int(level), int(seed))


def _storage(location: str) -> optuna.storages.BaseStorage:
    """A database by its URL, a journal by its ending, else a file of sqlite."""
    optuna = quiet_optuna()
    if _is_journal(location):
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(location))
    url, options = _database(location)
    return optuna.storages.RDBStorage(url, engine_kwargs=options)


def _is_journal(location: str) -> bool:
    return "://" not in location and location.endswith(JOURNALS)


def _database(location: str) -> tuple[str, dict[str, object]]:
    """Its URL, and how it is connected to."""
    if "://" not in location:
        return f"sqlite:///{location}", {"connect_args": {"timeout": BUSY}}
    scheme, _, rest = location.partition("://")
    driver = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}.get(scheme, scheme)
    return f"{driver}://{rest}", {}


def _has_studies(location: str) -> bool:
    """Whether Optuna has its tables there, which it makes as soon as it opens a database."""
    if _is_journal(location):
        return True
    import sqlalchemy

    url, options = _database(location)
    engine = sqlalchemy.create_engine(url, **options)
    try:
        return sqlalchemy.inspect(engine).has_table("studies")
    finally:
        engine.dispose()


@contextmanager
def _errors(location: str) -> Iterator[None]:
    """What a storage raises, as ours."""
    try:
        import optuna
    except ImportError:
        raise SweepError("optuna is not installed", install_hint("sweep")) from None
    import sqlalchemy

    try:
        yield
    except Lora2ServeError:
        raise
    except ImportError as error:  # the driver of a database
        package = _missing(error)
        raise SweepError(f"{package} is not installed", install_hint(EXTRA_OF.get(package, "sweep"))) from None
    except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        raise SweepError(
            f"{without_credentials(location)}: {first_line(error)}", "look whether it is there, and may be written"
        ) from error


def _missing(error: BaseException | None) -> str:
    """The package; Optuna raises an error without its name from the one that has it."""
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            return error.name.split(".")[0]
        error = error.__cause__ or error.__context__
    return "the driver of that database"


def _host() -> str:
    return socket.gethostname()


def _is_there(worker: str) -> bool:
    _, pid, began = worker.rsplit(":", 2)
    return _began(int(pid)) == began


def _began(pid: int) -> str:
    """When a process started, in ticks of the machine; empty where there is none, or one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
