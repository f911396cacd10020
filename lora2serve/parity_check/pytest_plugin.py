"""``pytest --lora2serve-exports runs/latest/exports``: one test for each export, engine and gate.

Loaded by pytest through an entry point, so it imports nothing heavy before the option is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lora2serve.artifacts.parity_report import ComparisonResult, Gate, ParityReport
    from lora2serve.parity_check.comparisons import Comparison
    from lora2serve.parity_check.trained_model import TrainedModel


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one option."""
    group = parser.getgroup("lora2serve")
    group.addoption(
        "--lora2serve-exports",
        metavar="DIR",
        type=Path,
        help="compare every export in DIR (a run's exports/) with the trained model: one test per export and gate",
    )


def pytest_collection(session: pytest.Session) -> None:
    """Let the directory be collected beside what else was named."""
    exports = session.config.getoption("lora2serve_exports")
    if exports is not None:
        session.config.args.append(str(exports))


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The exports' folder becomes a collector of ours."""
    exports = parent.config.getoption("lora2serve_exports")
    if exports is None or path != Path(exports).resolve():
        return None
    return ExportsCollector.from_parent(parent, path=path)


class ExportsCollector(pytest.Directory):
    """All exports of one run; they are compared once, when the first test runs."""

    _report: ParityReport | None = None

    def collect(self) -> Iterator[pytest.Item]:
        from lora2serve.artifacts.parity_report import GATES

        for comparison in _compared(self.path)[1]:
            export, engine = comparison.name, comparison.engine
            for gate in GATES:
                name = f"{export}-{engine}-{gate}"
                yield ParityCheck.from_parent(self, name=name, export=export, engine=engine, gate=gate)

    def report(self) -> ParityReport:
        """Of all exports."""
        if self._report is None:
            from lora2serve.parity_check.comparator import check
            from lora2serve.progress import Silent

            origin, comparisons = _compared(self.path)
            self._report = check(origin, comparisons, progress=Silent())
        return self._report


class ParityCheck(pytest.Item):
    """One gate of one export in one engine."""

    def __init__(self, *, export: str, engine: str, gate: str, **options: Any) -> None:
        super().__init__(**options)
        self.export, self.engine, self.gate = export, engine, gate

    def runtest(self) -> None:
        row, gate = self._result()
        if gate is None or gate.status == "skipped":
            pytest.skip(f"a gate before {self.gate} was not met" if row.red else f"{self.engine} has no such gate")
        if gate.status == "missing" and not row.required:
            pytest.skip(gate.first)
        if gate.status != "met":
            raise AssertionError(f"{gate.cause or gate.status}; first: {gate.first}")

    def _result(self) -> tuple[ComparisonResult, Gate | None]:
        parent = self.parent
        assert isinstance(parent, ExportsCollector)
        rows = parent.report().rows
        row = next(row for row in rows if (row.export, row.engine) == (self.export, self.engine))
        return row, next((gate for gate in row.gates if gate.name == self.gate), None)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.name


def _compared(exports: Path) -> tuple[TrainedModel, list[Comparison]]:
    """What the folder's exports were trained as, and what is in it."""
    from lora2serve.artifacts.run import Run, is_run
    from lora2serve.errors import Lora2ServeError
    from lora2serve.parity_check.comparisons import of_exports
    from lora2serve.parity_check.trained_model import of_run, refuse_others

    run = Run(exports.parent)
    if not is_run(run.path):
        raise pytest.UsageError(f"--lora2serve-exports {exports}: expected the exports/ folder of a run")
    try:
        origin = of_run(run, Path(run.record.base.path))
        refuse_others(origin, run.list_exports())
        return origin, of_exports(origin, run.list_exports())
    except Lora2ServeError as error:
        raise pytest.UsageError(f"--lora2serve-exports {exports}: {error.message}") from None
