"""``lora2serve.drift``: whether the traffic of a name is still like that which its champion was promoted on."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from lora2serve.api.export_request import Named
from lora2serve.api.version_registry import CHAMPION, Registry
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
from lora2serve.errors import UsageError
from lora2serve.gateway.drift import windows
from lora2serve.gateway.drift.drift_report import DriftReport, write_report
from lora2serve.gateway.drift.drift_test import compare_windows
from lora2serve.gateway.traffic_store import FILE, TrafficStore
from lora2serve.progress import Progress
from lora2serve.registry.version_facts import utc

DEFAULT_FOLDER = "gateway"  # of a gateway's records
DEFAULT_WINDOW = "7d"
WINDOW = re.compile(r"(\d{1,5})(h|d|w)")
HOURS = {"h": 1, "d": 24, "w": 7 * 24}


@checked
def drift(
    name: str, *, window: str = DEFAULT_WINDOW, folder: Named = DEFAULT_FOLDER, report: Named | None = None,
    renew: bool = False, registry: Named | None = None, progress: Progress | None = None,
) -> DriftReport:  # fmt: skip
    """Compare the last requests to a name's champion with those that it was promoted on.

    window: how long both windows are: "12h", "7d" or "2w". A whole week compares the same weekdays.
    folder: where the gateway keeps its records. The reference is stored there, by the gateway or by the first call.
    report: a folder for report.html and report.json; by default ``drift/NAME`` in ``folder``.
    renew: what comes now is right: store the last window as the reference, against which the next call compares.
    registry: where it is, as for ``lora2serve.Registry``.
    progress: where messages go. By default they are shown at a prompt or in a notebook only.

    Raises UsageError for a name without a champion, and where a window has too few requests.
    """
    progress, seconds, now = progress or default_progress(), window_seconds(window), time.time()
    with Registry(registry) as opened:
        number = opened.get(f"{name}@{CHAMPION}").number
        promoted = _promoted(opened, name, number)
    store = TrafficStore(Path(folder))
    if not store.path.is_file():
        raise UsageError(f"{folder}: no {FILE} of a gateway", "--folder names the folder of its records")
    try:
        reference, new = windows.find_reference(store, name, number, promoted, seconds, now, renew=renew)
        if new:
            progress.note(f"reference of {name}@{number} stored: {reference.shown}")
        current = reference if renew else windows.current_window(store, name, number, reference, seconds, now)
    finally:
        store.close()
    features = () if renew else tuple(compare_windows(reference.rows(), current.rows()))
    made = DriftReport(1, name, number, utc(datetime.now(UTC)), reference.shown, current.shown, features)
    page = write_report(made, Path(report) if report is not None else Path(folder) / windows.FOLDER / name)
    progress.note(f"report: {page}")
    return made


def keep_references(registry: Registry, store: TrafficStore, champions: Mapping[str, int]) -> None:
    """Store the references of champions that have none, before the records of that time go; name -> number.

    Where there are too few requests yet, a later call does.
    """
    for name, number in champions.items():
        if not windows.reference_file(store, name, number).is_file():
            promoted = _promoted(registry, name, number)
            with suppress(UsageError):
                windows.find_reference(store, name, number, promoted, window_seconds(DEFAULT_WINDOW), time.time())


def _promoted(registry: Registry, name: str, number: int) -> float:
    """When the champion's alias came to that version, in seconds since 1970."""
    moves = [each for each in registry.history(name) if each.alias == CHAMPION and each.new == number]
    return datetime.fromisoformat(moves[-1].at).timestamp()


def window_seconds(text: str) -> float:
    """The length of ``7d``; UsageError for what is none."""
    match = WINDOW.fullmatch(text)
    if not match or int(match[1]) == 0:
        raise UsageError(f"--window {text}: expected hours, days or weeks", "such as 12h, 7d or 2w")
    return float(int(match[1]) * HOURS[match[2]] * 3600)
