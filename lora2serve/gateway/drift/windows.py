"""The requests that are compared: those that a version was promoted on, which are stored, and the last ones.

The reference of a version are its answers in the window before it became champion (as challenger or shadow, on which it
was promoted); where those are too few, its answers in the first window after that. It is stored, since the records of
requests go when their file is full. Both windows are apart from each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from lora2serve.errors import InputError, UsageError
from lora2serve.gateway.drift.drift_test import WindowRow, evenly
from lora2serve.gateway.drift.text_features import PAIR
from lora2serve.gateway.request_record import RequestRecord, from_text, to_text
from lora2serve.gateway.traffic_store import TrafficStore
from lora2serve.registry.version_facts import utc
from lora2serve.system.small_files import write_text

FOLDER = "drift"  # beside the records of requests
FEWEST = 100  # requests of a window
MOST_STORED = 5000  # requests of a reference


@dataclass(frozen=True)
class RequestWindow:
    """Requests of one version, from ``since`` to ``until``, in seconds since 1970."""

    since: float
    until: float
    records: Sequence[RequestRecord]

    def rows(self) -> list[WindowRow]:
        """Their features."""
        return [row_of(record) for record in self.records]

    @property
    def shown(self) -> str:
        """In words."""
        first, last = (utc(datetime.fromtimestamp(at, UTC)) for at in (self.since, self.until))
        return f"{len(self.records)} requests, {first} to {last}"


def row_of(record: RequestRecord) -> WindowRow:
    """The features of a request, those that were taken of its texts and those that every record has."""
    numbers = {"prompt.length": float(record.prompt_length), "answer.length": float(record.answer_length)}
    shares, categories, pairs = dict[str, float](), dict[str, str](), []
    if record.finish:
        categories["answer.finish"] = record.finish
    for key, value in record.features.items():
        name, colon, category = key.partition(":")
        if key.startswith(PAIR):
            pairs.append(int(category))
        elif colon:
            categories[name] = category
        elif name in ("answer.refusal", "answer.empty"):
            shares[name] = value
        else:
            numbers[name] = value
    return WindowRow(record.unit or record.request_id, numbers, shares, categories, tuple(pairs))


def reference_file(store: TrafficStore, name: str, number: int) -> Path:
    """Where the reference of a version is stored."""
    return store.path.parent / FOLDER / f"{name}@{number}.jsonl"


def find_reference(
    store: TrafficStore, name: str, number: int, promoted: float, seconds: float, now: float, *, renew: bool = False
) -> tuple[RequestWindow, bool]:
    """The stored reference of a version, or a new one, which is stored; whether it is new.

    ``promoted`` is when it became champion, ``seconds`` the length of a window. UsageError where there are too few
    requests yet, InputError for a damaged file.
    """
    path = reference_file(store, name, number)
    if path.is_file() and not renew:
        return _read(path), False
    if renew:
        window = _window(store, name, number, now - seconds, now)
    else:
        window = _at_promotion(store, name, number, promoted, seconds, now)
    _refuse_few(name, number, window, "reference")
    _write(path, window)
    return window, True


def _at_promotion(
    store: TrafficStore, name: str, number: int, promoted: float, seconds: float, now: float
) -> RequestWindow:
    """The window before it became champion; where that has too few requests, the one after it, once it is over."""
    before = _window(store, name, number, promoted - seconds, promoted)
    if len(before.records) >= FEWEST:
        return before
    if promoted + seconds >= now:
        end = utc(datetime.fromtimestamp(promoted + seconds, UTC))
        raise UsageError(
            f"{name}@{number}: champion for less than one window, and {len(before.records)} requests before that: its "
            f"reference is complete at {end}", "a shorter --window, or wait",
        )  # fmt: skip
    return _window(store, name, number, promoted, promoted + seconds)


def current_window(
    store: TrafficStore, name: str, number: int, reference: RequestWindow, seconds: float, now: float
) -> RequestWindow:
    """The last requests to a version, none of which is in its reference; UsageError where they are too few."""
    window = _window(store, name, number, max(now - seconds, reference.until), now)
    _refuse_few(name, number, window, "current window")
    return window


def _window(store: TrafficStore, name: str, number: int, since: float, until: float) -> RequestWindow:
    """Of whatever arm: what a request that named its version itself asked is traffic, too."""
    records = [record for record in store.requests(name, since, until) if record.version == number and record.ok]
    return RequestWindow(since, until, records)


def _refuse_few(name: str, number: int, window: RequestWindow, what: str) -> None:
    if len(window.records) < FEWEST:
        raise UsageError(
            f"{name}@{number}: {what}: {window.shown}, expected {FEWEST} or more",
            "a longer --window; the gateway's folder has the records",
        )


def _read(path: Path) -> RequestWindow:
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        since, until = map(float, head.split())
        return RequestWindow(since, until, list(_parsed(lines)))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a stored window ({error})", "`lora2serve drift NAME --renew` stores another"
        ) from None


def _parsed(lines: Iterable[str]) -> Iterator[RequestRecord]:
    return (from_text(RequestRecord, line, 0) for line in lines)


def _write(path: Path, window: RequestWindow) -> None:
    """Without texts, whole or not at all; of many requests some, evenly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    some = evenly(window.records, MOST_STORED)
    lines = [f"{window.since} {window.until}", *(to_text(replace(each, prompt=None, answer=None)) for each in some)]
    write_text(path, "\n".join(lines) + "\n")
